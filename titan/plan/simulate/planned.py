"""A simulation of a plan: the devices of a plan file are the fleet, its best plan is the step, and a run
that goes on without a node takes the step that the planner finds for that loss.
"""

import math
from pathlib import Path
from typing import Any

from titan.config.planning import load_plan
from titan.config.sections import read_values
from titan.config.simulation import SimulationConfig, check_simulation
from titan.errors import ConfigError
from titan.plan.cost import Costs, Prediction
from titan.plan.fleet import make_fleet
from titan.plan.profile import Profile
from titan.plan.search.node_loss import AfterLoss, plans_after_node_loss
from titan.plan.search.role import RolePlan, plan_role
from titan.plan.simulate.step_times import Pipeline

FROM_PLAN = ("nodes", "devices_per_node", "shrunk_step_s", "shrinks")
"""Settings of a kind of nodes that a plan tells."""


def read_simulation(path: Path) -> tuple[SimulationConfig, Pipeline | None]:
    """A simulation's TOML, and the step of its plan if it names one. Raises ConfigError with one line a mistake."""
    values = read_values(path, "a simulation's TOML")
    if not isinstance(values.get("plan"), str):
        return check_simulation(values), None
    if "step" in values:
        raise ConfigError("step is given beside plan, which tells it; leave one of them out")
    settings, nodes, profile = load_plan(path.parent / values["plan"])
    costs = Costs(settings.task, make_fleet(nodes, profile.links), Profile(settings.task, profile))
    given = _given(values.get("fleet", []), list(costs.fleet.kinds))
    plan = plan_role(costs, settings.search)
    after = plans_after_node_loss(plan)
    fleet = [_group(plan, after[kind], kind, given.get(kind, {})) for kind, used in plan.devices.items() if used]
    config = check_simulation(values | {"fleet": fleet, "step": {"seconds": plan.step_s}})
    return config, pipeline_of(plan.prediction)


def pipeline_of(prediction: Prediction) -> Pipeline:
    """The step of a layout as the simulator takes it; a slow position slows all its chunks."""
    layout = prediction.layout
    return Pipeline(
        schedules=tuple(layout.actions(position) for position in range(len(layout.positions))),
        chunks=layout.chunks,
        times=prediction.times,
        tail_s=prediction.timeline.tail_s,
        devices=tuple(len(stage.ranks) for stage in layout.positions),
    )


def _given(groups: Any, kinds: list[str]) -> dict[str, dict[str, Any]]:
    """What the simulation says of nodes, by kind. Raises ConfigError for what a plan tells, and for other kinds."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) and "kind" in group for group in groups):
        raise ConfigError("fleet is no list of sections with a kind; write [[fleet]] and kind, or leave it out")
    mistakes = [
        f"fleet.{index}.kind is {group['kind']!r}; the plan file has {', '.join(kinds)}"
        for index, group in enumerate(groups)
        if group["kind"] not in kinds
    ]
    mistakes += [
        f"fleet.{index}.{name} is {group[name]!r} beside plan, which tells it; leave it out"
        for index, group in enumerate(groups)
        for name in FROM_PLAN
        if name in group
    ]
    if len({str(group["kind"]) for group in groups}) < len(groups):
        mistakes.append("fleet names a kind twice; give each kind of node one [[fleet]]")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return {group["kind"]: group for group in groups}


def _group(plan: RolePlan, after: AfterLoss | None, kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """Nodes of a kind: those that the plan uses train, the others are spare.

    Speeds are the layers that a device of the kind holds.
    """
    of, used = plan.costs.fleet.kinds[kind], plan.devices[kind]
    nodes = math.ceil(used / of.devices_per_node)
    idle = of.devices // of.devices_per_node - nodes
    # a replica with a part of the samples does that part of its layers' work
    layers = sum(
        (stage.end_layer - stage.first_layer) * number / plan.prediction.micro_batch_samples
        for stage in plan.layout.stages
        for of, number in zip(
            plan.costs.kinds_of(stage),
            plan.prediction.samples_of(stage.index % len(plan.layout.positions)),
            strict=True,
        )
        if of == kind
    )
    spare = given.get("spare_nodes", 0)
    return {
        "speed": layers / used,
        **given,
        "kind": kind,
        "nodes": nodes,
        "devices_per_node": of.devices_per_node,
        "spare_nodes": spare + max(0, idle) if isinstance(spare, int) else spare,
        "shrinks": after is not None,
        **({"shrunk_step_s": max(plan.step_s, after.step_s)} if after is not None else {}),
    }
