"""What a new plan would gain when one rank is slower than its kind of device should be."""

import itertools
from dataclasses import replace

from titan.config.planning import ProfileSettings, SearchSettings
from titan.errors import ConfigError
from titan.plan.cost import Costs, Prediction
from titan.plan.profile import Profile
from titan.plan.search.role import plan_role

SLOW = "-slow"


def replan_gain(costs: Costs, prediction: Prediction, rank: int, factor: float) -> float | None:
    """Step of the present layout over that of the best layout, both with the slow device; None if none can be found.

    factor: seconds of the slow rank over those its kind should take
    None too for a frozen role, which is not planned.
    """
    if costs.frozen:
        return None
    layout = prediction.layout
    place = layout.place(rank)
    kind = prediction.rank_kinds[rank]
    slow = slowed(costs, kind, place.stage.tp, factor)
    stages = []
    for stage in layout.stages:
        kinds = [kind + SLOW if of == kind and stage in place.stages else of for of in costs.kinds_of(stage)]
        starts = list(itertools.accumulate(stage.islands[:-1], initial=0))
        device = tuple(kinds[start] for start in starts) if len(set(kinds)) > 1 else kinds[0]
        stages.append(replace(stage, device=device))
    try:
        now_s = slow.predict(replace(layout, stages=tuple(stages))).step_s
        best_s = plan_role(slow, SearchSettings(recompute=layout.recompute)).step_s
    except ConfigError:
        return None
    return now_s / best_s


def slowed(costs: Costs, kind: str, devices: int, factor: float) -> Costs:
    """The same fleet with some devices of a kind as a kind of their own that takes `factor` times as long."""
    fleet, name = costs.fleet, kind + SLOW
    kinds = dict(fleet.kinds)
    kinds[kind] = replace(kinds[kind], devices=kinds[kind].devices - devices)
    kinds[name] = replace(fleet.kinds[kind], name=name, devices=devices)
    if kinds[kind].devices < 1:
        del kinds[kind]
    settings = costs.profile.settings
    blocks = {"forward_s", "backward_s"}
    shapes = tuple(
        shape.model_copy(
            update={
                "blocks": (
                    *shape.blocks,
                    *(
                        block.model_copy(update={"kind": name} | {key: getattr(block, key) * factor for key in blocks})
                        for block in shape.blocks
                        if block.kind == kind
                    ),
                )
            }
        )
        for shape in settings.shapes
    )
    peaks = [peak.model_copy(update={"kind": name, "tflops": peak.tflops / factor}) for peak in settings.peaks]
    own = [device.model_copy(update={"kind": name}) for device in settings.devices if device.kind == kind]
    changed = ProfileSettings(
        devices=(*settings.devices, *own),
        shapes=shapes,
        peaks=(*settings.peaks, *(peak for peak, of in zip(peaks, settings.peaks, strict=True) if of.kind == kind)),
        links=settings.links,
    )
    return Costs(costs.task, replace(fleet, kinds=kinds), Profile(costs.task, changed))
