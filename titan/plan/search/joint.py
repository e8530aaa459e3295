"""One inventory for teacher, assistant and students: who gets which devices, so that the slowest role is fast.

All roles go through the samples of the teacher's steps, so a whole run takes its steps times the seconds that the
slowest role has for the samples of one: a step, or more or less of a student with a batch size of its own. With few
devices every way to share them is tried. With many, students get the least that keeps pace with the teacher, again and
again as the teacher's pace on what is left changes.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from titan.config.planning import SearchSettings
from titan.config.settings import TEACHER
from titan.errors import ConfigError
from titan.plan.cost import Costs
from titan.plan.search.choices import problems
from titan.plan.search.joint_bound import device_seconds, lone_bound_s, own_steps, shared_bound_s
from titan.plan.search.role import RolePlan, plan_role
from titan.plan.search.settle import best_layout
from titan.plan.search.work import every_bound_s, work_bound_s

MOST_SHARES = 48
"""Different numbers of devices by kind up to which every way to share them is tried."""
MOST_DEVICES = 64
"""Up to so many, students are also tried all on one kind, for every kind."""
MOST_ROUNDS = 4
"""Paces of students that are tried; each is a search for the leading role."""

Devices = tuple[int, ...]
"""Of each kind, in the fleet's order."""


class JointPlan(Mapping[str, RolePlan]):
    """A plan for every role."""

    def __init__(self, roles: Mapping[str, RolePlan], bound_step_s: float, steps: Mapping[str, float]):
        """steps: of each role, in a step of the leading one
        bound_step_s: no 1F1B layouts of stages of one kind that share these devices have a slowest role that is
        faster; where a role is interleaved, none under any schedule; where one has mixed stages, none at all
        """
        self.roles, self.bound_step_s, self.steps = dict(roles), bound_step_s, steps

    def __getitem__(self, role: str) -> RolePlan:
        return self.roles[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self.roles)

    def __len__(self) -> int:
        return len(self.roles)

    @property
    def step_s(self) -> float:
        """Of the leading role, if it keeps the pace of the slowest: that of the whole run."""
        return max(plan.step_s * self.steps[role] for role, plan in self.roles.items())

    @property
    def gap(self) -> float:
        """How much longer than the best it is at most, relative."""
        return self.step_s / self.bound_step_s - 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain data for `titan plan --json`."""
        roles = {role: plan.to_json() for role, plan in self.roles.items()}
        return {"step_s": self.step_s, "bound_step_s": self.bound_step_s, "gap": self.gap, "roles": roles}


def plan_jointly(roles: Mapping[str, Costs], search: SearchSettings) -> JointPlan:
    """Share the devices of one fleet among roles and plan each.

    roles: costs of each, all on the same fleet
    Raises ConfigError as `plan_role` does, and if there is no room for all roles at once.
    """
    fleet = next(iter(roles.values())).fleet
    if len(roles) > fleet.num_devices:
        raise ConfigError(
            f"inventory has {fleet.num_devices} devices for {len(roles)} roles ({', '.join(roles)}); each needs one at "
            "least: add devices or leave out students"
        )
    if len(roles) == 1:
        ((role, costs),) = roles.items()
        plan = plan_role(costs, search)
        return JointPlan({role: plan}, plan.bound_step_s, {role: 1.0})
    steps = own_steps(roles)
    few = math.prod(kind.devices + 1 for kind in fleet.kinds.values()) <= MOST_SHARES
    if few:
        shares, bound_s = _every_way(roles, search)
    else:
        shares = _by_pace(roles, search)
        lone_s = (lone_bound_s(costs, search) * steps[role] for role, costs in roles.items())
        bound_s = max(shared_bound_s(roles, search), *lone_s)
    plans = {role: plan_role(_on(costs, shares[role]), search) for role, costs in roles.items()}
    if search.mixed:
        plans |= _with_idle(roles, search, shares, plans)
    if any(plan.mixed for plan in plans.values()):  # those bounds are of layouts with one kind a stage
        lone_s = (every_bound_s(costs, search) * steps[role] for role, costs in roles.items())
        bound_s = max(shared_bound_s(roles, search, mixed=True), *lone_s)
    elif any(plan.layout.schedule != "1f1b" for plan in plans.values()):  # and of 1F1B layouts only
        lone_s = (work_bound_s(problems(costs, search)) * steps[role] for role, costs in roles.items())
        bound_s = max(shared_bound_s(roles, search), *lone_s)
    found = JointPlan(plans, bound_s, steps)
    return JointPlan(plans, min(bound_s, found.step_s), steps)


def _with_idle(
    roles: Mapping[str, Costs], search: SearchSettings, shares: Mapping[str, Mapping[str, int]],
    plans: Mapping[str, RolePlan],
) -> dict[str, RolePlan]:  # fmt: skip
    """The slowest role with the devices that no role got, if that helps: they may serve on stages of several kinds."""
    steps = own_steps(roles)
    slowest = max(plans, key=lambda role: plans[role].step_s * steps[role])
    given = dict(shares[slowest])
    for name, kind in roles[slowest].fleet.kinds.items():
        given[name] = given.get(name, 0) + kind.devices - sum(share.get(name, 0) for share in shares.values())
    if given == {name: shares[slowest].get(name, 0) for name in given}:
        return {}
    plan = plan_role(_on(roles[slowest], given), search)
    return {slowest: plan} if plan.step_s < plans[slowest].step_s else {}


def _on(costs: Costs, devices: Mapping[str, int]) -> Costs:
    """The same role on a part of its fleet."""
    left_out = {name: kind.devices - devices.get(name, 0) for name, kind in costs.fleet.kinds.items()}
    return replace(costs, fleet=costs.fleet.without(left_out))


def _seconds(
    costs: Costs, search: SearchSettings, devices: Mapping[str, int], steps: float = 1.0
) -> tuple[float, float]:
    """(steps, bound) of the best layout on these devices; infinite if the model does not fit on them."""
    here = _on(costs, devices)
    try:
        best = best_layout(here, search, problems(here, search))
    except ConfigError:
        return math.inf, math.inf
    return best.prediction.step_s * steps, best.bound_s * steps


def _every_way(roles: Mapping[str, Costs], search: SearchSettings) -> tuple[dict[str, dict[str, int]], float]:
    """The devices of each role for the least step of the slowest, among equals the least sum; and a bound on it.

    The bound is the same choice made with the bounds of layouts instead of their steps.
    """
    kinds = next(iter(roles.values())).fleet.kinds
    counts = tuple(kind.devices for kind in kinds.values())
    shares = [share for share in itertools.product(*(range(count + 1) for count in counts)) if any(share)]
    steps = own_steps(roles)
    found = {
        role: {share: _seconds(costs, search, dict(zip(kinds, share, strict=True)), steps[role]) for share in shares}
        for role, costs in roles.items()
    }
    best = _least([{share: step_s for share, (step_s, _) in of.items()} for of in found.values()], counts)
    least = _least([{share: bound_s for share, (_, bound_s) in of.items()} for of in found.values()], counts)
    if best is None or least is None:
        raise ConfigError(_no_room(roles))
    given = {role: dict(zip(kinds, share, strict=True)) for role, share in zip(roles, best[2], strict=True)}
    return given, least[0]


def _least(
    seconds_of_roles: Sequence[Mapping[Devices, float]], counts: Devices
) -> tuple[float, float, tuple[Devices, ...]] | None:
    """(the most, the sum, devices of each role) of the best way to share; None if there is none.

    For each number of devices used so far only the best way matters, so roles are added one by one.
    """
    best: dict[Devices, tuple[float, float, tuple[Devices, ...]]] = {(0,) * len(counts): (0.0, 0.0, ())}
    for seconds in seconds_of_roles:
        added: dict[Devices, tuple[float, float, tuple[Devices, ...]]] = {}
        for used, (most_s, sum_s, given) in best.items():
            for share, taken_s in seconds.items():
                total = tuple(map(sum, zip(used, share, strict=True)))
                way = (max(most_s, taken_s), sum_s + taken_s, (*given, share))
                within = all(number <= count for number, count in zip(total, counts, strict=True))
                if within and math.isfinite(taken_s) and (total not in added or way < added[total]):
                    added[total] = way
        best = added
    return min(best.values(), default=None)


def _by_pace(roles: Mapping[str, Costs], search: SearchSettings) -> dict[str, dict[str, int]]:
    """Students get the cheapest devices that keep pace, the leading role what is left, until the pace settles."""
    leading = TEACHER if TEACHER in roles else next(iter(roles))
    fleet = roles[leading].fleet
    speed = _speeds(roles[leading], search)
    steps, steps_s = own_steps(roles), dict[tuple[str, str, int], float]()

    def step_s(role: str, kind: str, number: int) -> float:
        key = (role, kind, number)
        if key not in steps_s:
            steps_s[key] = _seconds(roles[role], search, {kind: number}, steps[role])[0]
        return steps_s[key]

    def share(pace_s: float, preferred: str | None) -> tuple[float, float, dict[str, dict[str, int]]]:
        """(step of the leading role, of the slowest student, shares) when students may take this long."""
        left = {name: kind.devices for name, kind in fleet.kinds.items()}
        shares, slowest_s = dict[str, dict[str, int]](), 0.0
        for role in sorted((role for role in roles if role != leading), key=lambda role: -_work(roles[role])):
            from_kinds = [kind for kind in left if preferred in (None, kind) and left[kind]] or list(left)
            ways = [(kind, number) for kind in from_kinds for number in _sizes(fleet.kinds[kind].devices, left[kind])]
            if not ways:
                return math.inf, math.inf, {}
            kind, number = _cheapest(ways, pace_s, speed, partial(step_s, role))
            slowest_s = max(slowest_s, step_s(role, kind, number))
            shares[role] = {kind: number}
            left[kind] -= number
        shares[leading] = left
        leading_s = _seconds(roles[leading], search, left)[0] if any(left.values()) else math.inf
        return leading_s, slowest_s, shares

    preferences = [None, *fleet.kinds] if fleet.num_devices <= MOST_DEVICES else [None]
    slow_s, fast_s = math.inf, lone_bound_s(roles[leading], search)
    pace_s, best_s, best = fast_s, math.inf, dict[str, dict[str, int]]()
    for _ in range(MOST_ROUNDS):
        tried = [share(pace_s, preferred) for preferred in preferences]
        leading_s, students_s, shares = min(tried, key=lambda each: max(each[0], each[1]))
        if max(leading_s, students_s) < best_s:
            best_s, best = max(leading_s, students_s), shares
        # slower students leave more to the leading role
        fast_s, slow_s = (pace_s, slow_s) if leading_s > pace_s else (fast_s, pace_s)
        pace_s = (fast_s + slow_s) / 2 if math.isfinite(slow_s) else min(leading_s, 2 * fast_s)
    if not best:
        raise ConfigError(_no_room(roles))
    return best


def _cheapest(
    ways: Sequence[tuple[str, int]], pace_s: float, speed: Mapping[str, float], step_s: Callable[[str, int], float]
) -> tuple[str, int]:
    """The way that costs the leading role least and keeps the pace; if none does, the fastest.

    Ways are looked at from the cheapest on, so that few have to be searched.
    """
    tried = list[tuple[float, str, int]]()
    for kind, number in sorted(ways, key=lambda way: way[1] * speed[way[0]]):
        tried.append((step_s(kind, number), kind, number))
        if tried[-1][0] <= pace_s:
            return kind, number
    return min(tried)[1:]


def _sizes(devices: int, free: int) -> list[int]:
    """Numbers of devices of a kind that a student may get: powers of two and one and a half times those."""
    powers = [1 << power for power in range(devices.bit_length())]
    return [number for number in sorted({*powers, *(3 * power // 2 for power in powers[1:])}) if number <= free]


def _work(costs: Costs) -> float:
    model = costs.task.model
    return float(model.layers * model.hidden * (model.hidden + model.ffn))


def _speeds(costs: Costs, search: SearchSettings) -> dict[str, float]:
    """Steps a second and device, by kind."""
    return {kind: 1.0 / seconds for kind, seconds in device_seconds(costs, search).items()}


def _no_room(roles: Mapping[str, Costs]) -> str:
    kinds = next(iter(roles.values())).fleet.kinds.values()
    devices = " and ".join(f"{kind.devices} {kind.name}" for kind in kinds)
    return f"inventory has {devices}, on which {', '.join(roles)} do not fit at once; add devices or leave out students"
