"""Least seconds of roles that share a fleet, whoever gets which devices."""

import math
from collections.abc import Mapping

from titan.config.planning import SearchSettings
from titan.config.settings import TEACHER
from titan.plan.cost import Costs
from titan.plan.search.bound import combos
from titan.plan.search.choices import problems
from titan.plan.search.work import kind_rates


def own_steps(roles: Mapping[str, Costs]) -> dict[str, float]:
    """Steps that each role makes of the samples of one step of the leading role."""
    leading = roles[TEACHER if TEACHER in roles else next(iter(roles))].task.batch_size
    return {role: leading / costs.task.batch_size for role, costs in roles.items()}


def device_seconds(costs: Costs, search: SearchSettings, mixed: bool = False) -> dict[str, float]:
    """By kind: least device-seconds of all layers of a step, whatever the layout; infinite where nothing is known.

    mixed: whether stages may have replicas of several kinds, with any shares
    """
    if mixed:
        work = costs.task.batch_size * costs.task.model.layers
        return dict.fromkeys(costs.fleet.kinds, math.inf) | {k: work / r for k, r in kind_rates(costs, search).items()}
    least = dict.fromkeys(costs.fleet.kinds, math.inf)
    for problem in problems(costs, search):
        for kind, options in problem.options.items():
            for option in options:
                seconds = problem.micro_batches * problem.layers * option.layer.both_s * option.devices
                least[kind] = min(least[kind], seconds)
    return least


def shared_bound_s(roles: Mapping[str, Costs], search: SearchSettings, mixed: bool = False) -> float:
    """No way to share the fleet has a slowest role faster than this, seconds.

    With w_rk the device-seconds of role r if all of it ran on kind k, and any prices p_k of a device-second: in a step
    of T the fleet has T sum p_k N_k to spend, and role r costs at least min_k p_k w_rk. The prices tried are 1 / w_rk.
    """
    steps, work = own_steps(roles), dict[str, dict[str, float]]()
    for role, costs in roles.items():
        work[role] = {kind: s * steps[role] for kind, s in device_seconds(costs, search, mixed).items()}
    kinds = next(iter(roles.values())).fleet.kinds
    best_s = 0.0
    for prices_of in work.values():
        prices = {kind: 1.0 / seconds for kind, seconds in prices_of.items()}
        worth = sum(prices[name] * kind.devices for name, kind in kinds.items())
        needed = sum(min(prices[kind] * of[kind] if prices[kind] else 0.0 for kind in kinds) for of in work.values())
        best_s = max(best_s, needed / worth)
    return best_s


def lone_bound_s(costs: Costs, search: SearchSettings) -> float:
    """No layout of a role with the whole fleet to itself is faster than this, seconds."""
    bounds_s = [float(bound_s) for problem in problems(costs, search) for bound_s in combos(problem).bound_s_N]
    return min((bound_s for bound_s in bounds_s if math.isfinite(bound_s)), default=0.0)
