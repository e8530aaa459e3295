"""The smallest possible time of the slowest stage, exact over all contiguous splits and all orders of kinds.

Stages are laid from the last to the first. With a limit on stage time, `most[c_1..c_K]` is how many layers the last
c_1 + .. + c_K stages can hold, c_g of them of kind g, in their best order: the best over g of `most[c - e_g]` plus what
a stage of kind g holds that far from the end. How far decides how many micro-batches it has in flight, so memory limits
that depend on the order are exact too. Fewer layers than the most are always possible, down to one a stage, so a table
answers at once every question with fewer units: the loss of any node.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from titan.plan.search.options import (
    Combo,
    Floats,
    Ints,
    Option,
    Pipeline,
    PlacedStage,
    SearchProblem,
    stage_bytes,
)

NEVER = -(10**6)
"""Layers that a number of stages can hold which cannot be."""
PLAIN, FIRST, LAST, ONLY = range(4)
"""Place of a stage: bit 0 for the embedding, bit 1 for the head."""


@dataclass(frozen=True)
class Limits:
    """What depends on the combo only, not on the time that is tried."""

    units: tuple[int, ...]
    """Most stages of each kind."""
    stages: int
    """Most stages of the pipeline."""
    layers: int
    time_VKN: Floats
    """Seconds of a stage with n + 1 layers, by its place and kind."""
    memory_VKQ: Ints
    """Most layers in memory of the stage q + 1 from the end, the last being 1 from it; 0 if not even one."""

    def held(self, most_s: float) -> Ints:
        """Most layers of a stage that takes at most so long, by place, kind and distance from the end."""
        in_time_VK = (self.time_VKN <= most_s).sum(axis=2)
        held: Ints = np.minimum(in_time_VK[:, :, None], self.memory_VKQ)
        return held


def limits_of(problem: SearchProblem, combo: Combo) -> Limits:
    """Times and memory of all stages that the combo can have."""
    units = tuple(min(problem.units(option), problem.layers) for option in combo)
    stages = min(sum(units), problem.layers)
    time_VKN = np.array([[_times(problem, option, place) for option in combo] for place in range(4)])
    memory_VKQ = np.array(
        [[memory_layers(problem, option, stages, place) for option in combo] for place in range(4)], dtype=np.int64
    )
    return Limits(units, stages, problem.layers, time_VKN.reshape(4, len(combo), -1), memory_VKQ)


def _times(problem: SearchProblem, option: Option, place: int) -> Floats:
    extra = option.embedding.both_s * (place & FIRST) + option.head.both_s * (place & LAST) / LAST
    times: Floats = np.arange(1, problem.layers + 1, dtype=np.float64) * option.layer.both_s + extra
    return times


def memory_layers(problem: SearchProblem, option: Option, stages: int, place: int) -> Ints:
    """Most layers in memory of the stage 1, 2, .. from the end."""
    in_flight = np.minimum(problem.micro_batches, np.arange(1, stages + 1)).astype(np.float64)

    def needed(layers: Ints) -> Floats:
        return stage_bytes(option, layers.astype(np.float64), in_flight, bool(place & FIRST), bool(place & LAST))

    none = np.zeros(stages, dtype=np.int64)
    each, free = option.layer.state_bytes + in_flight * option.layer.activation_bytes, option.limit_bytes - needed(none)
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = np.where(each > 0, np.floor(free / each), np.where(free >= 0, problem.layers, 0))
    number: Ints = np.clip(quotient, 0, problem.layers).astype(np.int64)
    # The quotient may be off by one; what counts is the sum that everybody else compares with the limit.
    number = number + ((number < problem.layers) & (needed(number + 1) <= option.limit_bytes))
    number = number - ((number > 0) & (needed(number) > option.limit_bytes))
    return number


@dataclass(frozen=True)
class Table:
    """Answers for every number of units up to that of the combo, for one limit on stage time."""

    limits: Limits
    hidden: int
    """The kind whose number of stages follows from that of the others and the wave."""
    held_VKQ: Ints
    waves: tuple[Ints, ...]
    """Wave w: `most` of w stages, by the numbers of stages of the shown kinds, each from 1 on (0 is a margin)."""
    complete: tuple[Ints, ...]
    """The same where the stage that comes first also has the embedding, or NEVER."""

    def pipelines(self, units: tuple[int, ...] | None = None) -> Iterator[tuple[int, Ints]]:
        """(stages, [number of each kind]) of all that hold every layer with at most so many units."""
        allowed = self.limits.units if units is None else units
        for stages, most in enumerate(self.complete, start=1):
            shown = np.argwhere(most >= self.limits.layers) - 1
            if not len(shown):
                continue
            counts = np.insert(shown, self.hidden, stages - shown.sum(axis=1), axis=1)
            counts = counts[(counts <= np.array(allowed)).all(axis=1)]
            if len(counts):
                yield stages, counts

    def feasible(self, units: tuple[int, ...] | None = None) -> bool:
        """Whether at most so many units of each kind hold all layers."""
        return next(self.pipelines(units), None) is not None


def table(limits: Limits, most_s: float) -> Table:
    """The whole table for one limit on stage time."""
    return table_of(limits, limits.held(most_s))


def table_of(limits: Limits, held_VKQ: Ints) -> Table:
    """The whole table for limits on layers by place, kind and distance from the end."""
    waves, complete = [_start(limits)], list[Ints]()
    for distance in range(1, limits.stages + 1):
        place = LAST if distance == 1 else PLAIN
        complete.append(_next(limits, waves[-1], held_VKQ[place | FIRST, :, distance - 1], distance))
        waves.append(_next(limits, waves[-1], held_VKQ[place, :, distance - 1], distance))
    return Table(limits, _hidden(limits), held_VKQ, tuple(waves), tuple(complete))


def holds_all(limits: Limits, held_VKQ: Ints, fewest: int = 1, most_stages: int | None = None) -> bool:
    """Whether some order of some of the units holds all layers, each stage at most what is given for its place."""
    most = _start(limits)
    for distance in range(1, (limits.stages if most_stages is None else most_stages) + 1):
        place = LAST if distance == 1 else PLAIN
        as_first = held_VKQ[place | FIRST, :, distance - 1]
        if (
            distance >= fewest
            and most.max() + as_first.max() >= limits.layers
            and _next(limits, most, as_first, distance).max() >= limits.layers
        ):
            return True
        most = _next(limits, most, held_VKQ[place, :, distance - 1], distance)
    return False


def _hidden(limits: Limits) -> int:
    """The kind with most units needs no axis."""
    return int(np.argmax(limits.units))


def _start(limits: Limits) -> Ints:
    shape = [units + 2 for kind, units in enumerate(limits.units) if kind != _hidden(limits)]
    most = np.full(shape, NEVER, dtype=np.int32)
    most[(1,) * len(shape)] = 0
    return most


def _next(limits: Limits, most: Ints, held_K: Ints, stages: int) -> Ints:
    """One more stage in front, of whichever kind is best."""
    hidden, inner = _hidden(limits), (slice(1, None),) * most.ndim
    found = np.full_like(most, NEVER)
    target, axis = found[inner] if inner else found, 0
    for kind, held in enumerate(held_K.tolist()):
        view = list(inner)
        if kind != hidden:
            view[axis] = slice(0, -1)
            axis += 1
        if held > 0:
            np.maximum(target, most[tuple(view)] + np.int32(held), out=target)
    too_many = stages - limits.units[hidden]
    if too_many > 0:
        target[_shown_sum(target.shape) < too_many] = NEVER
    np.maximum(target, NEVER, out=target)
    return found


def _shown_sum(shape: tuple[int, ...]) -> Ints:
    """Number of stages of all shown kinds."""
    total: Ints = np.zeros(shape, dtype=np.int64)
    for axis, size in enumerate(shape):
        total = total + np.arange(size).reshape([-1 if other == axis else 1 for other in range(len(shape))])
    return total


def smallest_s(limits: Limits) -> float | None:
    """The exact bottleneck, seconds; None if the layers fit in no way."""
    candidates = np.unique(limits.time_VKN)
    if limits.stages == 0 or not holds_all(limits, limits.held(candidates[-1])):
        return None
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if holds_all(limits, limits.held(candidates[middle])):
            high = middle
        else:
            low = middle + 1
    return float(candidates[low])


def order(of: Table, counts: Ints, preferred: Sequence[int]) -> list[int]:
    """Kinds from first to last of a pipeline with these numbers of stages.

    preferred: kinds, those that should come first first; memory may want it otherwise
    """
    left, kinds, needed = counts.copy(), list[int](), of.limits.layers
    for distance in range(int(counts.sum()), 0, -1):
        place = (LAST if distance == 1 else PLAIN) | (PLAIN if kinds else FIRST)
        for kind in preferred:
            held = int(of.held_VKQ[place, kind, distance - 1])
            if left[kind] == 0 or held == 0:
                continue
            left[kind] -= 1
            shown = tuple(int(number) + 1 for other, number in enumerate(left) if other != of.hidden)
            if of.waves[distance - 1][shown] + held >= needed:
                kinds.append(kind)
                needed = max(needed - held, distance - 1)
                break
            left[kind] += 1
        else:
            raise AssertionError(f"no way back from {counts} at {distance} from the end")
    return kinds


def fill(of: Table, combo: Combo, kinds: list[int]) -> list[int]:
    """Layers of each stage, within the limits of the table; layers go to the fastest kinds first."""
    last = len(kinds) - 1
    held = [
        int(of.held_VKQ[(FIRST if index == 0 else PLAIN) | (LAST if index == last else PLAIN), kind, last - index])
        for index, kind in enumerate(kinds)
    ]
    layers, left = [1] * len(kinds), of.limits.layers - len(kinds)
    for index in sorted(range(len(kinds)), key=lambda index: combo[kinds[index]].layer.both_s):
        more = min(left, held[index] - 1)
        layers[index] += more
        left -= more
    assert left == 0, f"{left} layers find no stage"
    return layers


@dataclass(frozen=True)
class Bottleneck:
    """The exact optimum of one combo."""

    stage_s: float
    pipeline: Pipeline


def bottleneck(problem: SearchProblem, combo: Combo) -> Bottleneck | None:
    """The pipeline whose slowest stage is as fast as can be; None if the layers fit in no way."""
    limits = limits_of(problem, combo)
    stage_s = smallest_s(limits)
    return None if stage_s is None else Bottleneck(stage_s, _pipeline(table(limits, stage_s), combo, limits.units))


def node_loss(
    problem: SearchProblem, combo: Combo, devices_per_node: Mapping[str, int]
) -> dict[str, Bottleneck | None]:
    """The exact optimum of the combo after each kind has lost one node: one binary search, tables shared by all."""
    limits = limits_of(problem, combo)
    units = {
        option.kind: tuple(
            max(0, problem.devices[other.kind] - (devices_per_node[other.kind] if other is option else 0))
            // other.devices
            for other in combo
        )
        for option in combo
    }
    candidates = np.unique(limits.time_VKN)
    tables: dict[int, Table] = {}

    def at(index: int) -> Table:
        if index not in tables:
            tables[index] = table(limits, float(candidates[index]))
        return tables[index]

    found: dict[str, Bottleneck | None] = {}
    for kind, left in units.items():
        low, high = 0, len(candidates) - 1
        if not limits.stages or not at(high).feasible(left):
            found[kind] = None
            continue
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if at(middle).feasible(left) else (middle + 1, high)
        found[kind] = Bottleneck(float(candidates[low]), _pipeline(at(low), combo, left))
    return found


def _pipeline(of: Table, combo: Combo, units: tuple[int, ...]) -> Pipeline:
    """The shortest pipeline of a table."""
    _, counts = next(of.pipelines(units))
    kinds = order(of, counts[0], range(len(combo)))
    return tuple(PlacedStage(combo[kind], layers) for kind, layers in zip(kinds, fill(of, combo, kinds), strict=True))
