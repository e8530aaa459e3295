"""Lower bounds on the step of any 1F1B pipeline of a combo, fill included.

Stage i of P has forward F_i, backward B_i, x_i = F_i + B_i; q = P - i is its distance from the end (the last is 1); S
is the sum of all x and C that of all edges one way; M micro-batches. Every pipeline takes at least

(a) M x_i: stage i does that much work. What follows is at least a tail.
(b) S + 2C + (M - 1) B_i + max(0, M - q) F_i: the first backward of stage i cannot end before micro-batch 0 has passed
    all stages and come back to i; stage i has done min(q, M) forwards until then; what is left of its work follows, and
    then a backward of each stage before it.
(c) S + 2C + R W + (M - 1 - q - R r) max x_j + D + 2C' for any r neighbours j, the first of them at distance q < M; W
    is the sum of their x and of the edges between them both ways, R = floor((M - 1 - q) / r), D and C' the sums of x
    and edges from their first stage on. Once its backward m is done, that stage starts forward m + q, and behind the
    same forward of the last of the neighbours comes their backward m + r: a message that goes around among them gains r
    micro-batches. The last micro-batch then still goes down to the last stage and back. This is how slow edges show:
    1F1B does not hide them.

A step of T therefore limits the layers that a stage can have by kind and distance from the end. If no order of the
units holds all layers under those limits (the same waves as `bottleneck`, memory included), then no pipeline takes T.
S enters as the least sum under the same limits, fastest kinds first; C as the cheapest edge between the fewest stages.
(c), applied to neighbours after neighbours from the end on, limits the sum of x of P stages, so also S: without edges
to P (T - S) / (M - 1), whatever the loads.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np

from titan.plan.search.bottleneck import PLAIN, Limits, holds_all, memory_layers
from titan.plan.search.options import Combo, Floats, Ints, Option, SearchProblem, part_s

ROUNDING = 1e-9
"""Relative; added to limits, so that a pipeline that takes exactly T is never ruled out by the last digits."""
NUM_RANGES = 6
"""Ranges of numbers of stages that are tested apart."""
SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
"""Values of r that are tried in (c)."""


@dataclass(frozen=True)
class Numbers:
    """The costs of a combo as arrays, for the test of one step time after another."""

    limits: Limits
    micro_batches: int
    layer_s_K: Floats
    extra_s: float
    """Least seconds of embedding and head."""
    tail_s: float
    """Least tail."""
    forward_share: float
    """Most of x that is forward, of any part of the model."""
    edge_s: float
    """Least edge."""
    steady_KQ: Floats
    """Seconds a layer in (b), after the round trip of the first micro-batch."""
    steady_extra_VKQ: Floats
    """The same of embedding and head."""
    work_extra_VK: Floats
    """Embedding and head in (a)."""
    budget_RP: Floats
    """Most seconds of x on P stages for each second after the round trip, from (c), for several r."""
    edges_RP: Floats
    """Seconds to subtract from it for edges."""


def numbers(problem: SearchProblem, combo: Combo, limits: Limits) -> Numbers:
    """Costs as arrays."""
    after = problem.micro_batches - 1
    left_Q = np.maximum(0, problem.micro_batches - np.arange(1, limits.stages + 1))

    def steady(name: str) -> Floats:
        costs = [getattr(option, name) for option in combo]
        return np.array([after * cost.backward_s + left_Q * cost.forward_s for cost in costs])

    def both(name: str) -> Floats:
        return np.array([getattr(option, name).both_s for option in combo])

    edge_s = min(problem.edge(one.kind, other.kind) for one in combo for other in combo)
    parts = [getattr(option, part) for option in combo for part in ("layer", "embedding", "head")]
    first, last = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
    return Numbers(
        limits,
        problem.micro_batches,
        both("layer"),
        float(both("embedding").min() + both("head").min()),
        min(option.tail_s + option.tail_layer_s for option in combo),
        max((part.forward_s / part.both_s for part in parts if part.both_s > 0), default=0.0),
        edge_s,
        steady("layer"),
        first[:, None, None] * steady("embedding") + last[:, None, None] * steady("head"),
        problem.micro_batches * (first[:, None] * both("embedding") + last[:, None] * both("head")),
        *(each[:, : limits.stages] for each in budgets(problem.micro_batches, problem.layers, edge_s)),
    )


@functools.lru_cache(maxsize=64)
def budgets(micro_batches: int, stages: int, edge_s: float) -> tuple[Floats, Floats]:
    """(c) as S <= budget[r, P] * (T - S - 2C) - edges[r, P], for several r and P = 1, 2, ..; no limit is 1e18.

    Neighbourhoods of r stages from the end on; the stages left over in front are one each. With D the sum behind a
    neighbourhood and V its own, (c) says V ((M - 1 - q) / r + 1) + D <= T - S - 2C - edges, so the most of D + V grows
    with D and is linear in T - S - 2C.
    """
    sizes = np.array([size for size in SIZES if edge_s > 0 or size == 1])
    budget, edges = np.zeros((len(sizes), stages + 1)), np.zeros((len(sizes), stages + 1))
    rows = np.arange(len(sizes))
    for distance in range(1, stages + 1):
        if distance >= micro_batches:
            budget[:, distance:] = 1e18
            break
        size = np.where(distance % sizes == 0, sizes, 1)
        before_budget, before_edges = budget[rows, distance - size], edges[rows, distance - size]
        share = 1.0 / ((micro_batches - 1 - distance) / size + 1)
        hops = (micro_batches - 1 - distance) // size * (size - 1) + distance - 1
        budget[:, distance] = before_budget + (1 - before_budget) * share
        edges[:, distance] = before_edges + (2 * hops * edge_s - before_edges) * share
    return budget[:, 1:], edges[:, 1:]


def possible(of: Numbers, step_s: float) -> bool:
    """False if surely no pipeline of the combo takes at most this."""
    limits = of.limits
    whole = _relaxed(of, step_s, 1, limits.stages)
    if whole is None or not holds_all(limits, whole[0]):
        return False
    # Numbers of stages on their own, a few at a time: the fewer, the tighter (c).
    size = -(-(limits.stages - whole[1] + 1) // NUM_RANGES)
    for fewest in range(whole[1], limits.stages + 1, size):
        most = min(fewest + size - 1, limits.stages)
        part = _relaxed(of, step_s, fewest, most)
        if part is not None and holds_all(limits, part[0], part[1], most):
            return True
    return False


def held_within(of: Numbers, step_s: float) -> Ints | None:
    """Most layers of a stage by place, kind and distance from the end, if the step takes at most this.

    None if it surely does not.
    """
    relaxed = _relaxed(of, step_s, 1, of.limits.stages)
    return None if relaxed is None else relaxed[0]


def _relaxed(of: Numbers, step_s: float, fewest: int, most: int) -> tuple[Ints, int] | None:
    """The same and the fewest stages, for pipelines of `fewest` to `most` stages."""
    limits, room_s = of.limits, step_s * (1 + ROUNDING) - of.tail_s
    if limits.stages == 0:
        return None
    least_s = limits.layers * float(of.layer_s_K.min()) + of.extra_s
    by_work = _floor(room_s - of.work_extra_VK, of.micro_batches * of.layer_s_K)
    held = limits.memory_VKQ
    for _ in range(4):
        # Each round raises the least sum and the fewest stages, which lowers the limits of the next.
        left_s = room_s - least_s - 2 * (fewest - 1) * of.edge_s
        in_steady = _floor(left_s - of.steady_extra_VKQ, of.steady_KQ)
        at_end = _floor(
            _own_s(of, left_s, least_s, most) - of.work_extra_VK[:, :, None] / of.micro_batches,
            of.layer_s_K[:, None],
        )
        found = np.minimum(by_work[:, :, None], np.minimum(in_steady, at_end))
        held = np.maximum(np.minimum(limits.memory_VKQ, found.astype(np.int64)), 0)
        ranked_KQ = -np.sort(-held[PLAIN, :, :most], axis=1)
        room_K = [int(ranked[:units].sum()) for ranked, units in zip(ranked_KQ, limits.units, strict=True)]
        sum_s = _least_sum_s(of, room_K)
        stages = _fewest_stages(of, ranked_KQ, sum_s, room_s, fewest, most)
        if sum_s is None or stages is None:
            return None
        if sum_s <= least_s * (1 + ROUNDING) and stages <= fewest:
            break
        least_s, fewest = max(least_s, sum_s), max(fewest, stages)
    return held, fewest


def _own_s(of: Numbers, left_s: float, least_s: float, most: int) -> Floats:
    """Most x of a stage by (c) for itself alone, by distance from the end, in a pipeline of at most so many stages.

    What comes from it on is at least S less the stages before it, and those are limited by (b).
    """
    distance = np.arange(1, of.limits.stages + 1)
    after = of.micro_batches - 1 - distance
    weight = of.micro_batches - 1 - np.minimum(distance - 1, of.micro_batches - 1) * of.forward_share
    with np.errstate(divide="ignore", invalid="ignore"):
        each_s = np.where((weight > 0) & (distance <= most), left_s / weight, np.where(distance <= most, np.inf, 0.0))
        before_s = np.cumsum(each_s[::-1])[::-1] - each_s if np.isfinite(each_s).all() else np.full(len(after), np.inf)
        own_s = (left_s - least_s + before_s - 2 * (distance - 1) * of.edge_s) / after
    return np.where(after > 0, own_s, np.inf)


def least_steps_s(problem: SearchProblem, combo: Combo, kinds_NP: Ints, layers_NP: Ints) -> Floats:
    """(a) and (b) for given pipelines: a quick look before the exact timeline. returns: [N]."""
    stages, micro_batches = kinds_NP.shape[1], problem.micro_batches
    forward_NP, backward_NP = (part_s(combo, kinds_NP, layers_NP, name) for name in ("forward_s", "backward_s"))
    edge_KK = np.array([[problem.edge(one.kind, other.kind) for other in combo] for one in combo])
    trip_N = (forward_NP + backward_NP).sum(axis=1) + 2 * edge_KK[kinds_NP[:, :-1], kinds_NP[:, 1:]].sum(axis=1)
    left_P = np.maximum(0, micro_batches - np.arange(stages, 0, -1))
    after_N = ((micro_batches - 1) * backward_NP + left_P * forward_NP).max(axis=1)
    least_s: Floats = np.maximum(trip_N + after_N, micro_batches * (forward_NP + backward_NP).max(axis=1))
    return least_s


def _floor(room: Floats, each: Floats) -> Floats:
    """How many fit; free ones always do."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.floor(np.where(each > 0, room / each * (1 + ROUNDING), np.where(room >= 0, 1e9, -1.0)))
    return np.clip(found, -1.0, 1e9)


def _least_sum_s(of: Numbers, room_K: list[int]) -> float | None:
    """Least seconds of all layers with so much room on each kind; None if they have no room."""
    left, total_s = of.limits.layers, of.extra_s
    for kind in np.argsort(of.layer_s_K).tolist():
        taken = min(left, room_K[kind])
        left, total_s = left - taken, total_s + taken * float(of.layer_s_K[kind])
    return None if left else total_s


def _fewest_stages(
    of: Numbers, ranked_KQ: Ints, sum_s: float | None, room_s: float, fewest: int, most: int
) -> int | None:
    """Fewest stages within the given that hold the layers and pass (c); None if no number does."""
    if sum_s is None:
        return None
    units = of.limits.units
    best = -np.sort(-np.concatenate([ranked[:number] for ranked, number in zip(ranked_KQ, units, strict=True)]))
    holding = max(fewest, int(np.searchsorted(np.cumsum(best), of.limits.layers)) + 1)
    stages = np.arange(holding, most + 1)
    left_s = room_s - sum_s - 2 * (stages - 1) * of.edge_s
    most_s = of.budget_RP[:, holding - 1 : most] * left_s - of.edges_RP[:, holding - 1 : most]
    passing = (left_s >= 0) & (most_s >= sum_s * (1 - ROUNDING)).all(axis=0)
    return int(stages[passing][0]) if passing.any() else None


def bound_s(of: Numbers, low_s: float, high_s: float, accuracy: float = 1e-4) -> float:
    """The largest step time, but for the accuracy, that is surely not reached.

    low_s: a bound already;  high_s: a step that is reached by something, or at which search may stop
    """
    if not possible(of, high_s):
        return high_s
    while high_s - low_s > accuracy * high_s:
        middle_s = (low_s + high_s) / 2
        low_s, high_s = (low_s, middle_s) if possible(of, middle_s) else (middle_s, high_s)
    return low_s


@dataclass(frozen=True)
class Combos:
    """All combos of a problem, with a cheap bound each."""

    options: tuple[tuple[Option, ...], ...]
    """Of each kind, those that at least one stage can have."""
    chosen_NK: Ints
    bound_s_N: Floats
    """Infinite where the layers surely fit in no way."""

    def combo(self, number: int) -> Combo:
        """One of them."""
        return tuple(options[chosen] for options, chosen in zip(self.options, self.chosen_NK[number], strict=True))


def combos(problem: SearchProblem) -> Combos:
    """All combos, bounded all at once: (a) and (b) with the weakest limit of every kind, memory by kind only."""
    usable = [
        tuple(option for option in options if problem.units(option) and memory_layers(problem, option, 1, PLAIN)[0])
        for options in problem.options.values()
    ]
    usable = [options for options in usable if options]
    if not usable:
        return Combos((), np.zeros((0, 0), np.int64), np.zeros(0))
    chosen_NK = np.array(list(itertools.product(*(range(len(options)) for options in usable))), dtype=np.int64)

    def of_each(values: list[list[float]]) -> Floats:
        return np.stack([np.array(value)[chosen] for value, chosen in zip(values, chosen_NK.T, strict=True)], axis=1)

    units_NK = of_each([[min(problem.units(option), problem.layers) for option in options] for options in usable])
    room_NK = of_each([[_memory_room(problem, option) for option in options] for options in usable])
    forward_NK = of_each([[option.layer.forward_s for option in options] for options in usable])
    backward_NK = of_each([[option.layer.backward_s for option in options] for options in usable])
    tail_N = of_each([[option.tail_s + option.tail_layer_s for option in options] for options in usable]).min(axis=1)
    extra_N = sum(
        of_each([[getattr(option, part).both_s for option in options] for options in usable]).min(axis=1)
        for part in ("embedding", "head")
    )
    after, stages_N = problem.micro_batches - 1, np.minimum(units_NK.sum(axis=1), problem.layers)
    layer_NK = forward_NK + backward_NK
    steady_NK = after * backward_NK + np.maximum(0, problem.micro_batches - stages_N)[:, None] * forward_NK
    ranks_NK = np.argsort(layer_NK, axis=1)

    def passes(step_s_N: Floats) -> NDArrayBool:
        room_s_N = step_s_N * (1 + ROUNDING) - tail_N
        sum_s_N = problem.layers * layer_NK.min(axis=1) + extra_N
        for _ in range(3):
            held = np.minimum(
                _floor(room_s_N[:, None], problem.micro_batches * layer_NK),
                _floor((room_s_N - sum_s_N)[:, None], steady_NK),
            )
            held = np.minimum(units_NK * np.maximum(held, 0), room_NK)
            left = np.full(len(step_s_N), float(problem.layers))
            sum_s_N = extra_N + 0.0
            for rank in ranks_NK.T:
                rows = np.arange(len(rank))
                taken = np.minimum(left, held[rows, rank])
                left, sum_s_N = left - taken, sum_s_N + taken * layer_NK[rows, rank]
        found: NDArrayBool = left <= 0
        return found

    low_N = tail_N.copy()
    high_N = tail_N + extra_N + (problem.micro_batches + 1) * problem.layers * layer_NK.max(axis=1)
    fit_N = room_NK.sum(axis=1) >= problem.layers
    for _ in range(24):
        middle_N = (low_N + high_N) / 2
        passed = passes(middle_N)
        low_N, high_N = np.where(passed, low_N, middle_N), np.where(passed, middle_N, high_N)
    return Combos(tuple(usable), chosen_NK, np.where(fit_N, low_N, math.inf))


NDArrayBool = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


def _memory_room(problem: SearchProblem, option: Option) -> float:
    """Most layers that all stages of an option hold in memory: at the end of the pipeline, where least is in flight."""
    units = min(problem.units(option), problem.layers)
    return float(memory_layers(problem, option, units, PLAIN).sum())
