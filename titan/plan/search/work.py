"""A lower bound on the step of any pipeline, whatever the order of its passes: 1F1B, interleaved, zero-bubble.

A position with l layers has M micro-batches of them to do and then their tail, so in a step of T it holds at most
floor((T - tail) / (M x + tail_layer)) with x the seconds of a layer both ways, fewer where it also has the embedding or
the head. If no option of each kind lets all its devices together hold all layers, no pipeline takes T. And a
micro-batch goes through all layers and back. Neither fill nor memory is in it, so it is weaker than
`titan.plan.search.bound`.
"""

import math
from collections.abc import Sequence

from titan.plan.search.bound import ROUNDING
from titan.plan.search.options import Option, SearchProblem

ACCURACY = 1e-5
"""Relative."""


def work_bound_s(choices: Sequence[SearchProblem]) -> float:
    """No pipeline of any of these problems takes less, but for the accuracy, seconds; infinite if there are none."""
    best_s = math.inf
    for problem in choices:
        if not math.isfinite(best_s) or possible(problem, best_s * (1 - ACCURACY)):
            best_s = min(best_s, _bound_s(problem))
    return best_s


def _bound_s(problem: SearchProblem) -> float:
    low_s, high_s = 0.0, 1.0
    options = [option for each in problem.options.values() for option in each if problem.units(option)]
    if not options:
        return math.inf
    while not possible(problem, high_s):
        low_s, high_s = high_s, 2 * high_s
    while high_s - low_s > ACCURACY * high_s:
        middle_s = (low_s + high_s) / 2
        low_s, high_s = (low_s, middle_s) if possible(problem, middle_s) else (middle_s, high_s)
    return low_s


def possible(problem: SearchProblem, step_s: float) -> bool:
    """False if surely no pipeline takes at most this."""
    room_s = step_s * (1 + ROUNDING)
    held, at_ends, trip_s = 0, [list[int](), list[int](), list[int]()], math.inf
    for of_kind in problem.options.values():
        most = 0
        for option in of_kind:
            units = min(problem.units(option), problem.layers)
            if not units:
                continue
            alone = _layers(problem, option, room_s, 0.0)
            most = max(most, units * alone)
            extras = (option.embedding.both_s, option.head.both_s, option.embedding.both_s + option.head.both_s)
            for lost, extra_s in zip(at_ends, extras, strict=True):
                lost.append(alone - _layers(problem, option, room_s, extra_s))
            trip_s = min(trip_s, problem.layers * option.layer.both_s + option.tail_s)
        held += most
    if not at_ends[0]:
        return False
    embedding, head, both = map(min, at_ends)
    return held - min(embedding + head, both) >= problem.layers and trip_s <= room_s


def _layers(problem: SearchProblem, option: Option, room_s: float, extra_s: float) -> int:
    """Most layers of one stage beside so many seconds of something else a micro-batch; below 0 where that is too much.

    Free layers are as many as the model has.
    """
    left_s = room_s - option.tail_s - problem.micro_batches * extra_s
    each_s = problem.micro_batches * option.layer.both_s + option.tail_layer_s
    if each_s <= 0:
        return problem.layers if left_s >= 0 else -1
    return min(problem.layers, math.floor(left_s / each_s))
