"""Small problems by trying every pipeline: the best of all that the search may choose from.

All are scored at once with the exact timeline, with edges that are the faster of both ways and without the exchange of
embedding and head. That is a lower bound of each. The lowest are predicted in full until the next bound is no better.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from titan.config.model import LayoutSettings
from titan.config.planning import SearchSettings
from titan.plan.cost import Costs, Prediction
from titan.plan.layout import make_layout
from titan.plan.search.bottleneck import FIRST, LAST, PLAIN, limits_of
from titan.plan.search.choices import layout_settings, with_own_edges
from titan.plan.search.options import Combo, Ints, Pipeline, PlacedStage, SearchProblem, steps_s

MOST_WORK = 3_000_000
"""Micro-batches through all pipelines together, up to which they are all tried; a second or so."""
MOST_KEPT = 300
"""Candidates that may be predicted in full."""
NUM_OTHERS = 120
"""Layouts that are kept beside the best."""


@dataclass(frozen=True)
class Candidate:
    """One pipeline."""

    least_s: float
    """Its step takes no less."""
    problem: SearchProblem
    combo: Combo
    kinds_P: Ints
    layers_P: Ints

    @property
    def pipeline(self) -> Pipeline:
        """Its stages."""
        stages = zip(self.kinds_P.tolist(), self.layers_P.tolist(), strict=True)
        return tuple(PlacedStage(self.combo[kind], layers) for kind, layers in stages)


@dataclass(frozen=True)
class Exact:
    """The best layout, and a bound that is below it only if too many were too close."""

    settings: LayoutSettings
    prediction: Prediction
    bound_s: float
    others: tuple[LayoutSettings, ...] = ()
    """For each of the best orders of kinds and options, the layout with the lowest bound."""


def exact_layout(costs: Costs, search: SearchSettings, choices: Sequence[SearchProblem]) -> Exact | None:
    """The best of all layouts; None if they are too many, or if none fits."""
    todo, work = list[tuple[SearchProblem, Combo]](), 0
    for problem in choices:
        for combo in _combos(problem):
            todo.append((problem, combo))
            work += _number(problem, combo) * problem.micro_batches
            if work > MOST_WORK:
                return None
    lowest, heads = list[Candidate](), dict[tuple[tuple[str, int, int], ...], Candidate]()
    for problem, combo in todo:
        own = with_own_edges(costs, problem, combo, min)
        for kinds_NP, layers_NP in _pipelines(problem, combo):
            seconds = steps_s(own, combo, kinds_NP, layers_NP)
            ranked = [
                Candidate(float(seconds[row]), problem, combo, kinds_NP[row], layers_NP[row])
                for row in np.argsort(seconds, kind="stable")[: MOST_KEPT + 1]
            ]
            lowest += ranked
            for each in ranked:
                made_of = tuple((stage.option.kind, stage.option.tp, stage.option.dp) for stage in each.pipeline)
                if made_of not in heads or each.least_s < heads[made_of].least_s:
                    heads[made_of] = each
        lowest = sorted(lowest, key=lambda each: each.least_s)[: MOST_KEPT + 1]
    best = _best_of(costs, search, lowest)
    if best is None:
        return None
    others = sorted(heads.values(), key=lambda each: each.least_s)[:NUM_OTHERS]
    return replace(best, others=tuple(layout_settings(each.problem, each.pipeline, search) for each in others))


def _best_of(costs: Costs, search: SearchSettings, lowest: Sequence[Candidate]) -> Exact | None:
    """Predict candidates from the lowest bound on, until no other can be better."""
    best: tuple[float, LayoutSettings, Prediction] | None = None
    for candidate in lowest[:MOST_KEPT]:
        if best is not None and candidate.least_s >= best[0]:
            return Exact(best[1], best[2], best[0])
        settings = layout_settings(candidate.problem, candidate.pipeline, search)
        prediction = costs.predict(make_layout(costs.task.model, settings))
        if not prediction.too_large and (best is None or prediction.step_s < best[0]):
            best = (prediction.step_s, settings, prediction)
    if best is None:
        return None
    next_s = lowest[MOST_KEPT].least_s if len(lowest) > MOST_KEPT else best[0]
    return Exact(best[1], best[2], min(best[0], next_s))


def _combos(problem: SearchProblem) -> Iterator[Combo]:
    """One option for each kind of every set of kinds."""
    usable = [[option for option in options if problem.units(option)] for options in problem.options.values()]
    usable = [options for options in usable if options]
    for number in range(1, len(usable) + 1):
        for kinds in itertools.combinations(usable, number):
            yield from itertools.product(*kinds)


def _counts(problem: SearchProblem, combo: Combo) -> Iterator[tuple[int, ...]]:
    """Numbers of stages of each kind, at least one of each."""
    for counts in itertools.product(*(range(1, problem.units(option) + 1) for option in combo)):
        if sum(counts) <= problem.layers:
            yield counts


def _number(problem: SearchProblem, combo: Combo) -> int:
    """How many pipelines use all kinds of a combo."""
    if math.prod(problem.units(option) for option in combo) > MOST_WORK:
        return MOST_WORK + 1
    total = 0
    for counts in _counts(problem, combo):
        orders = math.factorial(sum(counts)) // math.prod(map(math.factorial, counts))
        total += orders * math.comb(problem.layers - 1, sum(counts) - 1)
        if total > MOST_WORK:
            break
    return total


def _pipelines(problem: SearchProblem, combo: Combo) -> Iterator[tuple[Ints, Ints]]:
    """Kinds and layers of all pipelines within memory, those of as many stages together."""
    limits = limits_of(problem, combo)
    by_stages: dict[int, list[tuple[int, ...]]] = {}
    for counts in _counts(problem, combo):
        kinds = [kind for kind, count in enumerate(counts) for _ in range(count)]
        by_stages.setdefault(len(kinds), []).extend(_orders(kinds))
    for stages, orders in by_stages.items():
        cuts = list(itertools.combinations(range(1, problem.layers), stages - 1))
        ends_CP = np.array(cuts, dtype=np.int64).reshape(len(cuts), stages - 1)
        splits_CP = np.diff(ends_CP, axis=1, prepend=0, append=problem.layers)
        order_OP = np.array(orders, dtype=np.int64)
        places = [(FIRST if p == 0 else PLAIN) | (LAST if p == stages - 1 else PLAIN) for p in range(stages)]
        room_OP = limits.memory_VKQ[np.array(places), order_OP, np.arange(stages - 1, -1, -1)]
        order, split = np.nonzero((splits_CP[None] <= room_OP[:, None]).all(axis=2))
        if len(order):
            yield order_OP[order], splits_CP[split]


def _orders(kinds: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Different orders of a list with repetitions."""
    if not kinds:
        yield ()
    for kind in dict.fromkeys(kinds):
        rest = list(kinds)
        rest.remove(kind)
        for tail in _orders(rest):
            yield (kind, *tail)
