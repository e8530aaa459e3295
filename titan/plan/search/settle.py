"""The best layout that is found: by trying all where they are few, else a found pipeline made into one that fits."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from titan.config.model import LayoutSettings
from titan.config.planning import SearchSettings
from titan.errors import ConfigError
from titan.plan.cost import Costs, Prediction
from titan.plan.layout import make_layout
from titan.plan.search.best import Found, best_over
from titan.plan.search.choices import layout_settings, with_held_tensors, with_own_edges
from titan.plan.search.exact import exact_layout
from titan.plan.search.options import Pipeline, SearchProblem
from titan.plan.search.room import does_not_fit, roomiest_layout

GOAL = 0.01
"""Options that could be better by at most this share are not searched; the bound says what they could give."""
MOST_COMBOS = 40
"""Combinations of options searched in full; each takes about 0.1 s for 128 layers."""
MOST_TIGHTENINGS = 8
HELD_TENSORS = (4, 16)
"""Tensors that every stage is taken to hold, where the true number, that of micro-batches in flight, was too much."""
FEWER_STAGES = (1, 2)


@dataclass(frozen=True)
class Best:
    """The best 1F1B layout that is found."""

    settings: LayoutSettings
    prediction: Prediction
    bound_s: float
    """No 1F1B layout takes less."""
    found: Found | None
    """What was found of the abstract problem; None where every pipeline was tried."""
    others: tuple[LayoutSettings, ...] = ()
    """Other good layouts, with other options, micro-batches or numbers of stages; not all of them may fit."""


def best_layout(costs: Costs, search: SearchSettings, choices: Sequence[SearchProblem]) -> Best:
    """The best 1F1B layout that is found. Raises ConfigError if the model fits nowhere, and says by how much."""
    best = find_layout(costs, search, choices)
    if best is None:
        raise ConfigError(does_not_fit(costs, search, choices))
    return best


def find_layout(
    costs: Costs, search: SearchSettings, choices: Sequence[SearchProblem], goal: float = GOAL,
    patience: int = MOST_COMBOS,
) -> Best | None:  # fmt: skip
    """The best 1F1B layout that is found, by trying all where they are few; None if none is.

    goal, patience: as `best_over` takes them
    """
    exact = exact_layout(costs, search, choices)
    if exact is not None:
        return Best(exact.settings, exact.prediction, exact.bound_s, None, exact.others)
    found = best_over(choices, goal, patience)
    return None if found is None else _settled(costs, search, choices, found)


def _settled(costs: Costs, search: SearchSettings, choices: Sequence[SearchProblem], found: Found) -> Best | None:
    """A found pipeline as a layout that fits; None if there is none.

    The search's edges are the fastest that any options have, so the winner's splits are searched again with the edges
    of its own options. Nor does it count what stages send on and hold until its gradient comes. Where that is too much,
    the winner's options are searched again with less memory, and if that does not help all options.
    """
    bound_s = found.bound_s  # that of the memory that there is
    others = tuple(layout_settings(problem, pipeline, search) for problem, pipeline in found.others)
    for tensors in (0, *HELD_TENSORS):
        held = [with_held_tensors(costs, problem, tensors) for problem in choices]
        winner = found if tensors == 0 else best_over(held, GOAL, MOST_COMBOS)
        if winner is None:
            break
        own = with_own_edges(costs, winner.problem, winner.combo)
        for _ in range(MOST_TIGHTENINGS):
            again = best_over([own])
            if again is None:
                break
            settings = layout_settings(own, again.pipeline, search)
            prediction = predict(costs, settings)
            if not prediction.too_large:
                others = (*others, *_shorter(own, search, again.pipeline))
                return Best(settings, prediction, min(bound_s, prediction.step_s), winner, others)
            own = _tightened(own, prediction)
    roomy = roomiest_layout(costs, search, choices)
    if roomy is None:
        return None
    prediction = predict(costs, roomy)
    return Best(roomy, prediction, min(bound_s, prediction.step_s), found, others)


def _shorter(own: SearchProblem, search: SearchSettings, pipeline: Pipeline) -> Iterator[LayoutSettings]:
    """The best layouts with a stage or two of one kind fewer: the interleaved schedule is particular about numbers."""
    used = Counter(stage.option for stage in pipeline)
    for option, fewer in itertools.product(used, FEWER_STAGES):
        left = {**own.devices, option.kind: (used[option] - fewer) * option.devices}
        found = best_over([replace(own, devices=left)]) if fewer <= used[option] else None
        if found is not None:
            yield layout_settings(own, found.pipeline, search)


def _tightened(problem: SearchProblem, prediction: Prediction) -> SearchProblem:
    """Less memory for each kind, by what the fullest stage has too much."""
    excess: dict[str, float] = {}
    for position in prediction.too_large:
        kind = prediction.kinds[position]
        over = prediction.memory[position].total - prediction.limit_bytes[position]
        excess[kind] = max(excess.get(kind, 0.0), over)
    options = {
        kind: tuple(replace(option, limit_bytes=option.limit_bytes - excess.get(kind, 0.0)) for option in of_kind)
        for kind, of_kind in problem.options.items()
    }
    return replace(problem, options=options)


def predict(costs: Costs, settings: LayoutSettings) -> Prediction:
    """What is expected of a layout that settings describe."""
    return costs.predict(make_layout(costs.task.model, settings))
