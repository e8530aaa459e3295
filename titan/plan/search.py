"""The plan of one role: the fastest 1F1B layout that is found, how far from the best it can be at most, and what
plainer layouts would take.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, isfinite
from typing import Any

from titan.config.planning import SearchSettings
from titan.config.settings import LayoutSettings
from titan.errors import ConfigError
from titan.plan.best import Found, best_over
from titan.plan.bound import combos
from titan.plan.choices import layout_settings, problems, with_held_tensors, with_own_edges
from titan.plan.cost import Costs, Prediction
from titan.plan.exact import exact_layout
from titan.plan.layout import Layout, Stage, make_layout
from titan.plan.options import SearchProblem
from titan.plan.plain import uniform_pipelines
from titan.plan.room import does_not_fit, roomiest_layout

GOAL = 0.01
"""Options that could be better by at most this share are not searched; the bound says what they could give."""
MOST_COMBOS = 40
"""Combinations of options searched in full; each takes about 0.1 s for 128 layers."""
GOAL_ALONE, MOST_COMBOS_ALONE = 0.03, 4
"""The same for a kind alone, whose step is only told for comparison."""
MOST_TIGHTENINGS = 8
HELD_TENSORS = (4, 16)
"""Tensors that every stage is taken to hold, where the true number, that of micro-batches in flight, was too much."""


@dataclass(frozen=True)
class RolePlan:
    """A role's layout, what is expected of it, and what it is measured against."""

    costs: Costs
    search: SearchSettings
    found: Found | None
    """What was found of the abstract problem; None where every pipeline was tried."""
    settings: LayoutSettings
    """As in run.toml: `stages`, `micro_batches`, `recompute`."""
    prediction: Prediction
    bound_step_s: float
    """No 1F1B pipeline whose stages of a kind are alike takes less, seconds (titan/plan/bound.py)."""
    uniform_step_s: float | None
    """Of the best layout with like stages of equally many layers on all devices; None if none fits."""
    best_single_kind_step_s: float | None
    """Of the best layout on devices of one kind; None if none fits."""

    @property
    def layout(self) -> Layout:
        """The stages."""
        return self.prediction.layout

    @property
    def step_s(self) -> float:
        """Predicted seconds of a step, by the exact timeline."""
        return self.prediction.step_s

    @property
    def gap(self) -> float:
        """How much longer than the best a step is at most, relative."""
        return self.step_s / self.bound_step_s - 1.0

    @cached_property
    def devices(self) -> dict[str, int]:
        """Devices of each kind that the layout uses."""
        used = dict.fromkeys(self.costs.fleet.kinds, 0)
        for stage in self.layout.positions:
            used[self.costs.kind_of(stage)] += len(stage.ranks)
        return used

    def to_json(self) -> dict[str, Any]:
        """Plain data for `titan plan --json`; absent alternatives are null."""
        return {
            "step_s": self.step_s,
            "gap": self.gap,
            "bound_step_s": self.bound_step_s,
            "uniform_step_s": self.uniform_step_s,
            "best_single_kind_step_s": self.best_single_kind_step_s,
            "micro_batches": self.layout.micro_batches,
            "stages": [_stage_json(self.layout, stage) for stage in self.layout.stages],
            "devices": devices_json(self.prediction),
            "used": self.devices,
            "idle_share": list(self.prediction.timeline.idle_shares),
        }


def devices_json(prediction: Prediction) -> list[dict[str, Any]]:
    """Memory of every rank against its limit."""
    return [
        {
            "rank": rank,
            "kind": prediction.kinds[position],
            "stage": position,
            "memory_bytes": round(prediction.memory[position].total),
            "limit_bytes": round(prediction.limit_bytes[position]),
        }
        for position, stage in enumerate(prediction.layout.positions)
        for rank in stage.ranks
    ]


def _stage_json(layout: Layout, stage: Stage) -> dict[str, Any]:
    names = ("index", "first_layer", "end_layer", "device", "tp", "dp", "shard", "has_embedding", "has_head")
    return {name: getattr(stage, name) for name in names} | {"ranks": [stage.ranks.start, stage.ranks.stop]}


def plan_role(costs: Costs, search: SearchSettings) -> RolePlan:
    """Search the best layout of one role alone on a fleet.

    Raises ConfigError if there are no devices, the profile has holes that leave no choice, a link is missing, or the
    model fits nowhere.
    """
    if not costs.fleet.num_devices:
        raise ConfigError("inventory has no devices; add [[inventory.nodes]] with devices and count above 0")
    choices = problems(costs, search)
    best = best_layout(costs, search, choices)
    plain = [predict(costs, layout_settings(*each, search)) for each in uniform_pipelines(choices)]
    return RolePlan(
        costs,
        search,
        best.found,
        best.settings,
        best.prediction,
        best.bound_s,
        min((each.step_s for each in plain if not each.too_large), default=None),
        _best_single_kind_s(costs, search, choices),
    )


def _best_single_kind_s(costs: Costs, search: SearchSettings, choices: Sequence[SearchProblem]) -> float | None:
    """Step of the best layout on one kind of devices; None where the model fits on no kind alone."""
    alone = {
        kind: [replace(each, options={kind: each.options[kind]}) for each in choices if each.options.get(kind)]
        for kind in costs.fleet.kinds
    }
    bounds_s = {
        kind: min((float(bound) for each in of_kind for bound in combos(each).bound_s_N), default=inf)
        for kind, of_kind in alone.items()
    }
    best_s = inf
    for kind in sorted(alone, key=lambda kind: bounds_s[kind]):
        if bounds_s[kind] >= best_s:
            break
        exact = exact_layout(costs, search, alone[kind])
        if exact is not None:
            best_s = min(best_s, exact.prediction.step_s)
            continue
        found = best_over(alone[kind], GOAL_ALONE, MOST_COMBOS_ALONE)
        if found is not None and found.step_s < best_s:  # with true edges it only takes longer
            with suppress(ConfigError):  # the tensors that the search does not count are too many
                best_s = min(best_s, _settled(costs, search, alone[kind], found).prediction.step_s)
    return best_s if isfinite(best_s) else None


@dataclass(frozen=True)
class Best:
    """The best layout that is found."""

    settings: LayoutSettings
    prediction: Prediction
    bound_s: float
    found: Found | None
    """What was found of the abstract problem; None where every pipeline was tried."""


def best_layout(costs: Costs, search: SearchSettings, choices: Sequence[SearchProblem]) -> Best:
    """The best layout that is found: by trying all where they are few. Raises ConfigError if the model fits nowhere."""
    exact = exact_layout(costs, search, choices)
    if exact is not None:
        return Best(exact.settings, exact.prediction, exact.bound_s, None)
    found = best_over(choices, GOAL, MOST_COMBOS)
    if found is None:
        raise ConfigError(does_not_fit(costs, search, choices))
    return _settled(costs, search, choices, found)


def _settled(costs: Costs, search: SearchSettings, choices: Sequence[SearchProblem], found: Found) -> Best:
    """A found pipeline as a layout that fits. Raises ConfigError if there is none.

    The search's edges are the fastest that any options have, so the winner's splits are searched again with the edges
    of its own options. Nor does it count what stages send on and hold until its gradient comes. Where that is too much,
    the winner's options are searched again with less memory, and if that does not help all options.
    """
    bound_s = found.bound_s  # that of the memory that there is
    for tensors in (0, *HELD_TENSORS):
        held = [with_held_tensors(costs, problem, tensors) for problem in choices]
        winner = found if tensors == 0 else best_over(held, GOAL, MOST_COMBOS)
        if winner is None:
            break
        own = with_own_edges(costs, winner.problem, winner.combo)
        for _ in range(MOST_TIGHTENINGS):
            again = best_over([own])
            if again is None:
                break
            settings = layout_settings(own, again.pipeline, search)
            prediction = predict(costs, settings)
            if not prediction.too_large:
                return Best(settings, prediction, min(bound_s, prediction.step_s), winner)
            own = _tightened(own, prediction)
    roomy = roomiest_layout(costs, search, choices)
    if roomy is None:
        raise ConfigError(does_not_fit(costs, search, choices))
    prediction = predict(costs, roomy)
    return Best(roomy, prediction, min(bound_s, prediction.step_s), found)


def _tightened(problem: SearchProblem, prediction: Prediction) -> SearchProblem:
    """Less memory for each kind, by what the fullest stage has too much."""
    excess: dict[str, float] = {}
    for position in prediction.too_large:
        kind = prediction.kinds[position]
        over = prediction.memory[position].total - prediction.limit_bytes[position]
        excess[kind] = max(excess.get(kind, 0.0), over)
    options = {
        kind: tuple(replace(option, limit_bytes=option.limit_bytes - excess.get(kind, 0.0)) for option in of_kind)
        for kind, of_kind in problem.options.items()
    }
    return replace(problem, options=options)


def predict(costs: Costs, settings: LayoutSettings) -> Prediction:
    """What is expected of a layout that settings describe."""
    return costs.predict(make_layout(costs.task.model, settings))
