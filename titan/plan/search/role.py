"""The plan of one role: the fastest layout that is found, with the order of passes that suits it, how far from the best
it can be at most, and what plainer layouts would take.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import Any

from titan.config.model import LayoutSettings
from titan.config.planning import SearchSettings
from titan.errors import ConfigError
from titan.plan.cost import Costs, Prediction
from titan.plan.layout import Layout, Stage
from titan.plan.search.best import Found
from titan.plan.search.choices import layout_settings, problems
from titan.plan.search.mixed import with_mixed
from titan.plan.search.options import SearchProblem
from titan.plan.search.plain import uniform_pipelines
from titan.plan.search.schedules import ScheduleChoice, choose_schedule
from titan.plan.search.settle import Best, best_layout, find_layout, predict
from titan.plan.search.work import every_bound_s, work_bound_s

GOAL_ALONE, MOST_COMBOS_ALONE = 0.03, 4
"""As in `titan.plan.search.settle`, for a kind alone, whose step is only told for comparison."""
NUM_MIXED = 12
"""Other good layouts from which mixed ones are looked for."""


@dataclass(frozen=True)
class RolePlan:
    """A role's layout, what is expected of it, and what it is measured against."""

    costs: Costs
    search: SearchSettings
    found: Found | None
    """What was found of the abstract problem; None where every pipeline was tried."""
    settings: LayoutSettings
    """As in run.toml: `stages`, `micro_batches`, `recompute`, `schedule` and `chunks`."""
    prediction: Prediction
    pipeline_bound_s: float
    """No 1F1B pipeline whose stages of a kind are alike takes less, seconds (titan/plan/search/bound.py)."""
    work_bound_s: float
    """No pipeline of such stages takes less, whatever the order of its passes (titan/plan/search/work.py)."""
    every_bound_s: float
    """No layout at all takes less, with replicas of several kinds and any shares among them."""
    mixed: bool
    """Whether the layout is none of those, but one of `titan.plan.search.mixed`."""
    uniform_step_s: float | None
    """Of the best layout with like stages of equally many layers on all devices; None if none fits."""
    best_single_kind_step_s: float | None
    """Of the best layout on devices of one kind; None if none fits."""
    schedules_s: Mapping[str, float | None]
    """Step of each schedule, seconds; None where nothing fits (titan/plan/search/schedules.py)."""

    @property
    def layout(self) -> Layout:
        """The stages."""
        return self.prediction.layout

    @property
    def step_s(self) -> float:
        """Predicted seconds of a step, by the exact timeline."""
        return self.prediction.step_s

    @property
    def bound_step_s(self) -> float:
        """No layout with stages made alike by kind takes less under the plan's own schedule, seconds; for interleaved,
        none under any schedule; for a mixed layout, no layout at all.
        """
        plain_s = self.pipeline_bound_s if self.layout.schedule == "1f1b" else self.work_bound_s
        return min(self.step_s, self.every_bound_s if self.mixed else plain_s)

    @property
    def gap(self) -> float:
        """How much longer a step is at most than the best of those that `bound_step_s` is of, relative."""
        return self.step_s / self.bound_step_s - 1.0

    @cached_property
    def devices(self) -> dict[str, int]:
        """Devices of each kind that the layout uses."""
        used = dict.fromkeys(self.costs.fleet.kinds, 0)
        for kind in self.prediction.rank_kinds:
            used[kind] += 1
        return used

    def to_json(self) -> dict[str, Any]:
        """Plain data for `titan plan --json`; absent alternatives are null."""
        return {
            "step_s": self.step_s,
            "gap": self.gap,
            "bound_step_s": self.bound_step_s,
            "uniform_step_s": self.uniform_step_s,
            "best_single_kind_step_s": self.best_single_kind_step_s,
            "schedule": self.layout.schedule,
            "chunks": self.layout.chunks,
            "schedules_step_s": dict(self.schedules_s),
            "mixed": self.mixed,
            "bound_1f1b_step_s": self.pipeline_bound_s,
            "bound_any_schedule_step_s": self.work_bound_s if self.mixed else min(self.step_s, self.work_bound_s),
            "bound_any_layout_step_s": min(self.step_s, self.every_bound_s),
            "micro_batches": self.layout.micro_batches,
            "samples": self.prediction.micro_batch_samples,
            "stages": [_stage_json(self.layout, stage) for stage in self.layout.stages],
            "devices": devices_json(self.costs, self.prediction),
            "used": self.devices,
            "idle_share": list(self.prediction.timeline.idle_shares),
        }


def devices_json(costs: Costs, prediction: Prediction) -> list[dict[str, Any]]:
    """Memory of every rank against its limit."""
    return [
        {
            "rank": rank,
            "kind": kind,
            "stage": position,
            "memory_bytes": round(prediction.needs[position][kind].total),
            "limit_bytes": round(costs.fleet.kinds[kind].memory_bytes),
        }
        for position, stage in enumerate(prediction.layout.positions)
        for rank in stage.ranks
        for kind in (prediction.rank_kinds[rank],)
    ]


def _stage_json(layout: Layout, stage: Stage) -> dict[str, Any]:
    names = ("index", "first_layer", "end_layer", "device", "tp", "dp", "shard", "has_embedding", "has_head")
    more = {"islands": list(stage.islands), "shares": list(stage.shares)} if stage.shares else {}
    ranks = {"ranks": [stage.ranks.start, stage.ranks.stop]}
    return {name: getattr(stage, name) for name in names} | more | ranks


def plan_role(costs: Costs, search: SearchSettings) -> RolePlan:
    """Search the best layout of one role alone on a fleet.

    Raises ConfigError if there are no devices, the profile has holes that leave no choice, a link is missing, or the
    model fits nowhere.
    """
    if not costs.fleet.num_devices:
        raise ConfigError("inventory has no devices; add [[inventory.nodes]] with devices and count above 0")
    choices = problems(costs, search)
    best = best_layout(costs, search, choices)
    alone = list(_alone(costs, search, choices))
    plain = [(settings, predict(costs, settings)) for settings in _uniform(search, choices)]
    others = (*best.others, *(each.settings for each in alone), *(settings for settings, _ in plain))
    chosen = choose_schedule(costs, search, best.settings, best.prediction, others)
    single = min(
        (choose_schedule(costs, search, each.settings, each.prediction, each.others) for each in alone),
        key=lambda each: each.prediction.step_s,
        default=None,
    )
    if single is not None and single.prediction.step_s < chosen.prediction.step_s:  # where too many were tried for it
        chosen = ScheduleChoice(single.settings, single.prediction, chosen.schedules_s | single.schedules_s)
    single_kinds = (best.settings, *(each.settings for each in alone), *best.others[:NUM_MIXED])
    every_s = every_bound_s(costs, search)
    chosen, mixed = with_mixed(costs, search, chosen, single_kinds)
    return RolePlan(
        costs,
        search,
        best.found,
        chosen.settings,
        chosen.prediction,
        best.bound_s,
        max(work_bound_s(choices), every_s),
        every_s,
        mixed,
        min((each.step_s for _, each in plain if not each.too_large), default=None),
        single.prediction.step_s if single is not None else None,
        chosen.schedules_s,
    )


def _uniform(search: SearchSettings, choices: Sequence[SearchProblem]) -> list[LayoutSettings]:
    return [layout_settings(problem, pipeline, search) for problem, pipeline in uniform_pipelines(choices)]


def _alone(costs: Costs, search: SearchSettings, choices: Sequence[SearchProblem]) -> Iterator[Best]:
    """Best layouts on devices of one kind, for each kind that could be the best of them."""
    alone = {
        kind: [replace(each, options={kind: each.options[kind]}) for each in choices if each.options.get(kind)]
        for kind in costs.fleet.kinds
    }
    bounds_s = {kind: work_bound_s(of_kind) for kind, of_kind in alone.items()}
    best_s = inf
    for kind in sorted(alone, key=lambda kind: bounds_s[kind]):
        if bounds_s[kind] >= best_s:
            break
        best = find_layout(costs, search, alone[kind], GOAL_ALONE, MOST_COMBOS_ALONE)
        if best is not None:
            best_s = min(best_s, best.prediction.step_s)
            yield best
