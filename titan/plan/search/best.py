"""The fastest 1F1B pipeline over all combos of options, with how far from the optimum it can be at most.

Combos are taken in order of a cheap bound and left out when a bound says that they cannot win
(`titan.plan.search.bound`). For each of the others, splits with the least bottleneck and with somewhat larger ones but
fewer seconds over all stages are scored with the exact timeline, and the best of them improved until no small change
helps.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from titan.plan.search.bottleneck import (
    FIRST,
    LAST,
    PLAIN,
    Limits,
    Table,
    fill,
    limits_of,
    order,
    smallest_s,
    table,
    table_of,
)
from titan.plan.search.bound import Combos, Numbers, bound_s, combos, held_within, least_steps_s, numbers, possible
from titan.plan.search.options import Combo, Ints, Pipeline, PlacedStage, SearchProblem, steps_s

NUM_LIMITS = 6
"""Limits on stage time that are tried for a combo, the least one included."""
STEPS = (0.1, 0.3, 0.5, 0.8)
"""Steps between the bound and the best so far whose limits by distance from the end suggest more splits."""
NUM_SCORED = 6
"""Splits that are scored exactly for each."""
NUM_IMPROVED = 3
"""Splits of a combo that are improved step by step."""
HOPEFUL = 1.1
"""A combo whose first splits are all this much slower than the best so far is given up."""
PROMISING = 1.02
"""A split this much slower than the best so far is not worth improving."""
MOST_ORDERS = 24
"""Orders of kinds, each in a block where memory permits, that are scored for a choice of units."""
MOST_SCORED = 100
"""Splits of as many stages that are scored exactly at a time: those with the lowest bounds."""
NUM_OTHERS = 6
"""Pipelines of other combos that are kept beside the best."""
NEARLY = 1.002
MOST_ROUNDS = 200
SMALL = 8
"""Pipelines up to so many stages see every change, longer ones those between neighbours only."""

Split = tuple[tuple[int, ...], tuple[int, ...]]
"""Kinds and layers of the stages, from first to last."""


@dataclass(frozen=True)
class Found:
    """The best pipeline and what is known about better ones."""

    problem: SearchProblem
    combo: Combo
    """The options it is made of; some may have no stage."""
    pipeline: Pipeline
    step_s: float
    bound_s: float
    """No pipeline of any combo takes less."""
    num_combos: int
    num_searched: int
    """Combos that no bound ruled out."""
    others: tuple[tuple[SearchProblem, Pipeline], ...] = ()
    """The best of other combos, the fastest first."""

    @property
    def gap(self) -> float:
        """How much longer than the optimum the step is at most, relative."""
        return self.step_s / self.bound_s - 1.0


def search(problem: SearchProblem, goal: float = 0.0) -> Found | None:
    """The best pipeline of one problem; None if the layers fit in no way."""
    return best_over([problem], goal)


def best_over(problems: Iterable[SearchProblem], goal: float = 0.0, patience: int | None = None) -> Found | None:
    """The best pipeline of several problems, such as numbers of micro-batches; None if the layers fit in no way.

    goal:     combos that could be better by at most this share are not searched
    patience: after so many combos in turn that were no better, only those are searched that keep the bound low
    """
    of_each = [(problem, combos(problem)) for problem in problems]
    best: tuple[float, SearchProblem, Combo, Split] | None = None
    reached: list[tuple[float, SearchProblem, Combo, Split]] = []
    proven_s, searched, in_vain = math.inf, 0, 0
    for cheap_s, problem, combo in _queue(of_each):
        target_s = best[0] * (1 - goal) if best else math.inf
        if patience is not None and in_vain >= patience:
            target_s = min(target_s, proven_s)
        if cheap_s >= target_s:
            proven_s = min(proven_s, cheap_s)
            break
        costs = numbers(problem, combo, limits_of(problem, combo))
        if best and not possible(costs, target_s):
            proven_s = min(proven_s, target_s)
            continue
        got = solve(problem, combo, costs, best[0] if best else math.inf)
        if got is None:
            continue
        searched, in_vain = searched + 1, in_vain + 1
        proven_s = min(proven_s, bound_s(costs, cheap_s, min(got[0], target_s)))
        reached.append((got[0], problem, combo, got[1]))
        if best is None or got[0] < best[0]:
            best, in_vain = reached[-1], 0
    if best is None:
        return None
    step_s, problem, combo, split = best
    next_best = sorted((each for each in reached if each is not best), key=lambda each: each[0])[:NUM_OTHERS]
    others = tuple((problem, _pipeline(combo, split)) for _, problem, combo, split in next_best)
    total = sum(len(each.bound_s_N) for _, each in of_each)
    return Found(problem, combo, _pipeline(combo, split), step_s, min(proven_s, step_s), total, searched, others)


def _queue(of_each: Sequence[tuple[SearchProblem, Combos]]) -> Iterable[tuple[float, SearchProblem, Combo]]:
    """All combos that may fit, the lowest bound first."""
    bounds = np.concatenate([each.bound_s_N for _, each in of_each])
    owners = np.concatenate([np.full(len(each.bound_s_N), index) for index, (_, each) in enumerate(of_each)])
    places = np.concatenate([np.arange(len(each.bound_s_N)) for _, each in of_each])
    for number in np.argsort(bounds, kind="stable").tolist():
        if not math.isfinite(bounds[number]):
            return
        problem, each = of_each[owners[number]]
        yield float(bounds[number]), problem, each.combo(places[number])


def node_losses(found: Found, devices_per_node: Mapping[str, int]) -> dict[str, tuple[Pipeline, float] | None]:
    """Best pipeline and its step for the loss of one node of each kind, with the options of the plan kept."""
    losses: dict[str, tuple[Pipeline, float] | None] = {}
    for kind in (option.kind for option in found.combo):
        left = max(0, found.problem.devices[kind] - devices_per_node[kind])
        problem = replace(found.problem, devices={**found.problem.devices, kind: left})
        costs = numbers(problem, found.combo, limits_of(problem, found.combo))
        got = solve(problem, found.combo, costs, math.inf)
        losses[kind] = (_pipeline(found.combo, got[1]), got[0]) if got else None
    return losses


def _pipeline(combo: Combo, split: Split) -> Pipeline:
    return tuple(PlacedStage(combo[kind], layers) for kind, layers in zip(*split, strict=True))


def solve(problem: SearchProblem, combo: Combo, costs: Numbers, best_s: float) -> tuple[float, Split] | None:
    """(step, split) of the best that is found for a combo; None if the layers fit in no way.

    best_s: a step already reached, which says what is worth improving
    """
    limits = costs.limits
    least_s = smallest_s(limits)
    if least_s is None:
        return None
    splits = set[Split]()
    for most_s in _tried_limits(problem, combo, limits, least_s):
        splits |= _promising(problem, combo, table(limits, most_s))
    best = _score(problem, combo, limits, splits)[0]
    if limits.stages > SMALL and best[0] > HOPEFUL * best_s:
        return best
    low_s = bound_s(costs, 0.0, best[0], accuracy=1e-3)
    splits = set[Split]()
    for share in STEPS:
        held_VKQ = held_within(costs, low_s + share * (best[0] - low_s))
        if held_VKQ is not None:
            splits |= _promising(problem, combo, table_of(limits, held_VKQ))
    scored = sorted([best, *_score(problem, combo, limits, splits)])
    for start in scored[:NUM_IMPROVED]:
        if limits.stages <= SMALL or start[0] <= PROMISING * min(best_s, best[0]):
            best = min(best, _improved(problem, combo, limits, start, far=False))
    return _improved(problem, combo, limits, best, far=True) if best[0] < best_s * NEARLY else best


def _tried_limits(problem: SearchProblem, combo: Combo, limits: Limits, least_s: float) -> list[float]:
    """Limits on stage time from the least on, as far as fewer seconds over all stages could repay them."""
    candidates = np.unique(limits.time_VKN)
    slowest = max(option.layer.both_s for option in combo)
    fastest = min(option.layer.both_s for option in combo)
    saving_s = problem.layers * (slowest - fastest) / max(1, problem.micro_batches - 1)
    worth = candidates[(candidates >= least_s) & (candidates <= least_s + max(saving_s, slowest))]
    taken = np.unique(np.linspace(0, len(worth) - 1, min(len(worth), NUM_LIMITS)).astype(int))
    return [float(worth[index]) for index in taken]


def _promising(problem: SearchProblem, combo: Combo, of: Table) -> set[Split]:
    """Splits of a table with the fewest seconds over all stages and edges, estimated."""
    layer_s = np.array([option.layer.both_s for option in combo])
    edge_s = min(problem.edge(one.kind, other.kind) for one in combo for other in combo)
    room = np.maximum(of.held_VKQ[PLAIN].max(axis=1) - 1, 0)
    found: list[tuple[float, tuple[int, ...]]] = []
    for stages, counts_NK in of.pipelines():
        left, sum_s = np.full(len(counts_NK), problem.layers - stages), counts_NK @ layer_s
        for kind in np.argsort(layer_s).tolist():
            taken = np.minimum(left, counts_NK[:, kind] * room[kind])
            left, sum_s = left - taken, sum_s + taken * layer_s[kind]
        changes = (counts_NK > 0).sum(axis=1) - 1
        sum_s = sum_s + 2 * (stages - 1) * edge_s + 1e-6 * layer_s.max() * changes
        nearest = np.argsort(sum_s, kind="stable")[:NUM_SCORED]
        found += [(float(sum_s[row]), tuple(counts_NK[row].tolist())) for row in nearest]
    splits = set[Split]()
    for _, counts in sorted(found)[:NUM_SCORED]:
        present = [kind for kind, number in enumerate(counts) if number]
        for preferred in itertools.islice(itertools.permutations(present), MOST_ORDERS):
            kinds = order(of, np.array(counts), preferred)
            splits.add((tuple(kinds), tuple(fill(of, combo, kinds))))
    return splits


def _score(
    problem: SearchProblem, combo: Combo, limits: Limits, splits: Iterable[Split], below_s: float = math.inf
) -> list[tuple[float, Split]]:
    """Exact steps of those that fit and may take less than a given time, the best first."""
    by_stages: dict[int, list[Split]] = {}
    for split in splits:
        by_stages.setdefault(len(split[0]), []).append(split)
    scored: list[tuple[float, Split]] = []
    for group in by_stages.values():
        kinds_NP, layers_NP = np.array([each[0] for each in group]), np.array([each[1] for each in group])
        chosen = np.flatnonzero(_fit(limits, kinds_NP, layers_NP))
        least_s = least_steps_s(problem, combo, kinds_NP[chosen], layers_NP[chosen])
        ranks = np.argsort(least_s, kind="stable")[:MOST_SCORED]
        chosen = chosen[ranks[least_s[ranks] < below_s]]
        if len(chosen):
            steps = steps_s(problem, combo, kinds_NP[chosen], layers_NP[chosen])
            scored += zip(steps.tolist(), [group[number] for number in chosen.tolist()], strict=True)
    return sorted(scored)


def _fit(limits: Limits, kinds_NP: Ints, layers_NP: Ints) -> NDArray[np.bool_]:
    """Which splits are within memory and units."""
    stages = kinds_NP.shape[1]
    if stages > limits.stages:
        return np.zeros(len(kinds_NP), dtype=np.bool_)
    place_P = np.zeros(stages, dtype=np.int64)
    place_P[0] |= FIRST
    place_P[-1] |= LAST
    most_NP = limits.memory_VKQ[place_P, kinds_NP, np.arange(stages - 1, -1, -1)]
    used_NK = np.stack([(kinds_NP == kind).sum(axis=1) for kind in range(len(limits.units))], axis=1)
    in_memory_N = np.all((layers_NP >= 1) & (layers_NP <= most_NP), axis=1)
    fit: NDArray[np.bool_] = np.logical_and(in_memory_N, np.all(used_NK <= np.array(limits.units), axis=1))
    return fit


def _improved(
    problem: SearchProblem, combo: Combo, limits: Limits, start: tuple[float, Split], far: bool
) -> tuple[float, Split]:
    """The best of all small changes, again and again until none helps; far ones where no near one does."""
    best = start
    for _ in range(MOST_ROUNDS):
        below_s = best[0] * (1 - 1e-12)
        for changes in (_changes(limits, best[1], each) for each in ((False, True) if far else (False,))):
            scored = _score(problem, combo, limits, changes, below_s)
            if scored and scored[0][0] < below_s:
                best = scored[0]
                break
        else:
            break
    return best


def _changes(limits: Limits, split: Split, far: bool) -> set[Split]:
    """A layer from one stage to another, two stages swapped, one stage dropped, added, or of another kind."""
    kinds, layers = split
    number, small = len(kinds), len(kinds) <= SMALL
    found = set[Split]()
    for one in range(number):
        for other in range(number) if far else (one - 1, one + 1):
            if one == other or not 0 <= other < number:
                continue
            found.add((kinds, _moved(layers, one, other, 1)))
            if kinds[one] != kinds[other]:
                swapped, with_layers = list(kinds), list(layers)
                swapped[one], swapped[other] = kinds[other], kinds[one]
                with_layers[one], with_layers[other] = layers[other], layers[one]
                found |= {(tuple(swapped), layers), (tuple(swapped), tuple(with_layers))}
            fewer = _moved(layers, one, other, layers[one])
            found.add((kinds[:one] + kinds[one + 1 :], fewer[:one] + fewer[one + 1 :]))
        for kind, units in enumerate(limits.units):
            if kinds.count(kind) == units or not ((far and small) or one in (0, number - 1)):
                continue
            found.add(((*kinds[:one], kind, *kinds[one + 1 :]), layers))
            for given in range(1, layers[one]):
                kept = layers[one] - given
                found.add(((*kinds[:one], kind, *kinds[one:]), (*layers[:one], given, kept, *layers[one + 1 :])))
                found.add(
                    ((*kinds[: one + 1], kind, *kinds[one + 1 :]), (*layers[:one], kept, given, *layers[one + 1 :]))
                )
    return found


def _moved(layers: tuple[int, ...], source: int, target: int, number: int) -> tuple[int, ...]:
    changed = list(layers)
    changed[source] -= number
    changed[target] += number
    return tuple(changed)
