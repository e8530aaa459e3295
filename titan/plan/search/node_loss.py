"""What to do when a node is lost, known beforehand: a plan for every kind of node that there is.

Nodes of a kind are alike, so one plan a kind answers for all of them, made for the largest. `loss_plans` makes them
while all is well; at the loss `plan_without` only looks one up. With few choices each is a search of its own. With
many, the number of micro-batches and the degrees of the other kinds are kept; those of the kind that lost a node, the
order and the layers are searched anew.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from titan.config.model import LayoutSettings
from titan.config.planning import InventorySettings
from titan.errors import ConfigError
from titan.plan.cost import Costs, Prediction
from titan.plan.search.choices import problems
from titan.plan.search.mixed import with_mixed
from titan.plan.search.options import SearchProblem
from titan.plan.search.role import NUM_MIXED, RolePlan
from titan.plan.search.schedules import choose_schedule
from titan.plan.search.settle import best_layout

FEW_COMBOS = 3000
"""Combinations of options that take a tenth of a second to search."""


@dataclass(frozen=True)
class AfterLoss:
    """How a role goes on without one node."""

    settings: LayoutSettings
    prediction: Prediction

    @property
    def step_s(self) -> float:
        """Predicted seconds of a step."""
        return self.prediction.step_s


@dataclass(frozen=True)
class LossPlans:
    """The answers for all nodes of an inventory, for one role."""

    after: Mapping[str, AfterLoss | None]
    """By kind of device, as `plans_after_node_loss` gives them."""
    kinds: Mapping[str, str]
    """Kind of each group of nodes in the inventory, by its name."""


def loss_plans(plan: RolePlan, inventory: InventorySettings) -> LossPlans:
    """Plan for every loss beforehand: seconds with hundreds of devices, so do it aside while the run trains."""
    return LossPlans(plans_after_node_loss(plan), {node.name: node.kind for node in inventory.nodes})


def plan_without(node: str, plans: LossPlans) -> AfterLoss:
    """The layout with which the role goes on without one node: a look-up, microseconds.

    node:    a group of nodes in the inventory, one of its nodes (`rack-a-3`), or a kind of device
    returns: `settings` as they stand in run.toml (`[teacher.layout]`), and what is expected of them
    Raises ConfigError for a node that is not known, and for one without which the model fits nowhere.
    """
    group, _, number = node.rpartition("-")
    kind = next(
        (plans.kinds[name] for name in (node, group if number.isdecimal() else "") if name in plans.kinds), node
    )
    if kind not in plans.after:
        known = ", ".join((*plans.kinds, *(kind for kind in plans.after if kind not in plans.kinds)))
        raise ConfigError(f"node {node!r} is none of the inventory's; there are {known}")
    found = plans.after[kind]
    if found is None:
        raise ConfigError(f"without node {node!r} the model fits nowhere; put another {kind} in its place")
    return found


def plans_after_node_loss(plan: RolePlan) -> Mapping[str, AfterLoss | None]:
    """By kind of device: what to do when a node of it is lost; None where nothing fits then."""
    after: dict[str, AfterLoss | None] = {}
    for name, kind in plan.costs.fleet.kinds.items():
        if kind.devices - plan.devices[name] >= kind.largest_node:  # as many stand idle
            after[name] = AfterLoss(plan.settings, plan.prediction)
            continue
        after[name] = None
        left = replace(plan.costs, fleet=plan.costs.fleet.without({name: kind.largest_node}))
        with suppress(ConfigError):  # fits nowhere
            best = best_layout(left, plan.search, _choices(plan, left, name))
            chosen = choose_schedule(left, plan.search, best.settings, best.prediction, best.others)
            chosen, _ = with_mixed(left, plan.search, chosen, (best.settings, *best.others[:NUM_MIXED]))
            after[name] = AfterLoss(chosen.settings, chosen.prediction)
    return after


def _choices(plan: RolePlan, left: Costs, lost: str) -> list[SearchProblem]:
    """What may be chosen without a node of the lost kind. Raises ConfigError if that is nothing."""
    if plan.found is None or plan.found.num_combos <= FEW_COMBOS:
        return problems(left, plan.search)
    kept = {option.kind: (option,) for option in plan.found.combo}
    problem = plan.found.problem
    options = {kind: of_kind if kind == lost else kept.get(kind, ()) for kind, of_kind in problem.options.items()}
    devices = {**problem.devices, lost: left.fleet.kinds[lost].devices if lost in left.fleet.kinds else 0}
    return [replace(problem, devices=devices, options=options)]
