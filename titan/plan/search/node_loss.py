"""What to do when a node is lost, known beforehand: a plan for every kind of node that there is.

Nodes of a kind are alike, so one plan a kind answers for all of them; at the loss it is only looked up. With few
choices each is a search of its own. With many, the number of micro-batches and the degrees of the other kinds are kept;
those of the kind that lost a node, the order and the layers are searched anew.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from titan.config.settings import LayoutSettings
from titan.errors import ConfigError
from titan.plan.cost import Costs, Prediction
from titan.plan.search.choices import problems
from titan.plan.search.options import SearchProblem
from titan.plan.search.role import RolePlan
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


def plans_after_node_loss(plan: RolePlan) -> Mapping[str, AfterLoss | None]:
    """By kind of device: what to do when a node of it is lost; None where nothing fits then."""
    after: dict[str, AfterLoss | None] = {}
    for name, kind in plan.costs.fleet.kinds.items():
        if kind.devices - plan.devices[name] >= kind.devices_per_node:  # as many stand idle
            after[name] = AfterLoss(plan.settings, plan.prediction)
            continue
        after[name] = None
        left = replace(plan.costs, fleet=plan.costs.fleet.without({name: kind.devices_per_node}))
        with suppress(ConfigError):  # fits nowhere
            best = best_layout(left, plan.search, _choices(plan, left, name))
            chosen = choose_schedule(left, plan.search, best.settings, best.prediction, best.others)
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
