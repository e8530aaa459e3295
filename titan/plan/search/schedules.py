"""The order of passes: 1F1B as layouts were searched, or interleaved where that is faster on one of the best of them.

Interleaved layouts are not searched on their own: their step has no bottleneck that a search could go by. The stages of
the best few 1F1B layouts are cut into chunks, for every number of micro-batches that can be. What surely takes too long
is left out; the others get their exact memory and timeline, the most promising first.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from titan.config.model import LayoutSettings
from titan.config.planning import SearchSettings
from titan.errors import ConfigError
from titan.plan.cost import Costs, Prediction
from titan.plan.layout import Layout, make_layout
from titan.plan.schedule import zero_bubble
from titan.plan.search.choices import micro_batch_choices
from titan.plan.search.shares import with_shares
from titan.plan.timeline import timeline

CHUNKS = (2, 3, 4)
INPUT_SHARE = 0.5
"""Of a backward pass, the part for the gradient of the input: both gradients multiply the same matrices."""
MOST_PASSES = 300_000
"""Passes of all layouts that are given their timeline; a second or two."""

NUM_STARTS = 3
"""Layouts that are improved."""

Tried = tuple[LayoutSettings, Prediction]


@dataclass(frozen=True)
class ScheduleChoice:
    """The schedule that a plan takes, and what the others would."""

    settings: LayoutSettings
    prediction: Prediction
    schedules_s: dict[str, float | None]
    """Step of each schedule, seconds: `1f1b` and `interleaved` the best layout found, None where none fits;
    `zero-bubble` that of the stages under 1F1B. No run executes zero-bubble, and its memory is not counted."""


@dataclass(frozen=True)
class Candidate:
    """An interleaved layout, and seconds that it surely takes."""

    least_s: float
    settings: LayoutSettings
    layout: Layout

    @property
    def num_passes(self) -> int:
        """Of a step, at all positions."""
        return 2 * self.layout.micro_batches * len(self.layout.stages)


def choose_schedule(
    costs: Costs, search: SearchSettings, settings: LayoutSettings, prediction: Prediction,
    others: Sequence[LayoutSettings] = (),
) -> ScheduleChoice:  # fmt: skip
    """The fastest schedule of those that `search.schedule` permits.

    settings, prediction: the best layout under 1F1B
    others:               other good ones, whose stages are tried interleaved as well
    """
    found = best_interleaved(costs, search, (settings, *others))
    schedules_s = {
        "1f1b": prediction.step_s,
        "interleaved": None if found is None else found[1].step_s,
        "zero-bubble": zero_bubble_s(prediction),
    }
    if search.schedule == "auto" and found is not None and found[1].step_s < prediction.step_s:
        return ScheduleChoice(*found, schedules_s)
    return ScheduleChoice(settings, prediction, schedules_s)


def best_interleaved(
    costs: Costs, search: SearchSettings, layouts: Sequence[LayoutSettings], most_passes: int = MOST_PASSES
) -> Tried | None:
    """The fastest that is found with the stages of these layouts; None where none can be or fits.

    The first few that fit are improved: a layer goes from one chunk to another, as long as that helps.
    """
    stages = dict.fromkeys(settings.stages or () for settings in layouts)
    first = layouts[0]
    candidates = [each for of in stages for each in _candidates(costs, search, first.model_copy(update={"stages": of}))]
    left, starts = most_passes, list[Tried]()
    for candidate in sorted(candidates, key=lambda each: each.least_s):
        if left <= 0 or (len(starts) >= NUM_STARTS and candidate.least_s >= min(each[1].step_s for each in starts)):
            break
        found, left = fastest(costs, [candidate], None, left)
        starts += [found] if found is not None else []
    best = list[Tried]()
    for start in sorted(starts, key=lambda each: each[1].step_s)[:NUM_STARTS]:
        improved, before = start, None
        while improved is not before and left > 0:
            before = improved
            changed, left = fastest(costs, _moves(costs, before[0]), before, left)
            improved = changed or before
        best.append(improved)
    return min(best, key=lambda each: each[1].step_s, default=None)


def fastest(costs: Costs, candidates: Iterable[Candidate], best: Tried | None, left: int) -> tuple[Tried | None, int]:
    """(the fastest that fits of these and the best so far, passes that may still be tried)."""
    for candidate in sorted(candidates, key=lambda each: each.least_s):
        if left <= 0 or (best is not None and candidate.least_s >= best[1].step_s):
            break
        left -= candidate.num_passes
        if fits(costs, candidate.layout):
            found = costs.predict(candidate.layout)
            if best is None or found.step_s < best[1].step_s:
                best = (candidate.settings, found)
    return best, left


def _moves(costs: Costs, settings: LayoutSettings) -> Iterator[Candidate]:
    """A layer from one chunk to another, all ways."""
    stages = settings.stages or ()
    places = list(itertools.product(range(len(stages)), range(settings.chunks)))
    for (giver, from_chunk), (taker, to_chunk) in itertools.permutations(places, 2):
        if stages[giver].layers[from_chunk] > 1:
            layers = [list(stage.layers) for stage in stages]
            layers[giver][from_chunk] -= 1
            layers[taker][to_chunk] += 1
            changed = tuple(
                stage.model_copy(update={"layers": tuple(of)}) for stage, of in zip(stages, layers, strict=True)
            )
            yield _candidate(costs, settings.model_copy(update={"stages": changed}))


def fits(costs: Costs, layout: Layout) -> bool:
    """Whether every rank is within its memory; the first position, which holds most, is looked at first."""
    return all(
        memory.total <= costs.fleet.kinds[kind].memory_bytes
        for position in range(len(layout.positions))
        for kind, memory in costs.memory_at(layout, position).items()
    )


def interleaved_least_s(costs: Costs, layout: Layout) -> float:
    """An interleaved layout takes no less, seconds.

    A position starts when micro-batch 0 has come through the first chunk of those before it, then has all its work to
    do. Its last pass is the backward of its own first chunk; its tail follows, and meanwhile the gradients go back
    through the same stages to position 0, which has a tail as well.
    """
    positions, times, tails = len(layout.positions), costs.stage_times(layout), costs.tails(layout)
    there_s = back_s = least_s = 0.0
    for position, tail_s in enumerate(tails):
        own = times[position::positions]
        work_s = layout.micro_batches * sum(each.forward_s + each.backward_s for each in own)
        least_s = max(least_s, there_s + work_s + max(tail_s, back_s + tails[0]))
        there_s += own[0].forward_s + own[0].to_next_s
        back_s += own[0].backward_s + times[position + 1].to_previous_s
    return least_s


def _candidates(costs: Costs, search: SearchSettings, settings: LayoutSettings) -> Iterator[Candidate]:
    """Every number of chunks and micro-batches that the stages of a layout can have."""
    stages = settings.stages or ()
    if len(stages) < 2:
        return
    batch, replicas = costs.task.batch_size, max(stage.dp for stage in stages)
    numbers = [
        number
        for number in micro_batch_choices(batch, search)
        if number % len(stages) == 0 and batch // number >= replicas
    ]
    for chunks in CHUNKS:
        if costs.task.model.layers < chunks * len(stages):
            return
        layers = _at_least(chunks, [sum(stage.layers) for stage in stages])
        cut = tuple(
            stage.model_copy(update={"layers": _chunks_of(number, chunks, spare_first=index == 0)})
            for index, (stage, number) in enumerate(zip(stages, layers, strict=True))
        )
        for number in numbers:
            changed = settings.model_copy(
                update={"stages": cut, "schedule": "interleaved", "chunks": chunks, "micro_batches": number}
            )
            with suppress(ConfigError):  # the profile does not know so few samples
                yield _candidate(costs, with_shares(costs, changed))


def _candidate(costs: Costs, settings: LayoutSettings) -> Candidate:
    layout = make_layout(costs.task.model, settings)
    return Candidate(interleaved_least_s(costs, layout), settings, layout)


def _at_least(least: int, layers: Sequence[int]) -> list[int]:
    """The same number of layers in all, with so many on every stage: those with most give."""
    changed = list(layers)
    while min(changed) < least:
        changed[changed.index(max(changed))] -= 1
        changed[changed.index(min(changed))] += 1
    return changed


def _chunks_of(layers: int, chunks: int, spare_first: bool) -> tuple[int, ...]:
    """Layers in chunks, as even as can be; where not all are equal the last has fewer, or the first."""
    base, extra = divmod(layers, chunks)
    cut = (base + 1,) * extra + (base,) * (chunks - extra)
    return cut[::-1] if spare_first else cut


def zero_bubble_s(prediction: Prediction) -> float:
    """The step of a 1F1B layout's stages under ZB-H1 (arXiv 2401.10241), whatever its memory."""
    layout, number = prediction.layout, prediction.layout.micro_batches
    positions = len(layout.positions)
    schedules = [zero_bubble(position, positions, number) for position in range(positions)]
    times = [
        replace(each, backward_s=each.backward_s * INPUT_SHARE, weight_s=each.backward_s * (1 - INPUT_SHARE))
        for each in prediction.times
    ]
    return timeline(schedules, 1, times, prediction.timeline.tail_s).step_s
