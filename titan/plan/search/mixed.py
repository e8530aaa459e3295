"""Stages whose replicas are of several kinds of devices: what the search by kinds leaves out, found by improvement.

From the best layouts with one kind a stage, and from pipelines whose stages all hold as many devices of each kind,
small changes are tried as long as one helps: two neighbouring stages become one, a stage becomes one a kind, replicas
come from idle devices or another stage, layers move, the number of micro-batches changes. Replicas of unlike devices
share the samples so that the slowest is done soonest (`titan.plan.search.shares`). What surely takes too long is left
out, the others get their exact memory and timeline. Nothing is proven of what is found: how far it is from the best at
most, says `titan.plan.search.work.every_bound_s`.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from titan.config.model import LayoutSettings, StageSettings
from titan.config.planning import SearchSettings
from titan.errors import ConfigError
from titan.plan.cost import Costs
from titan.plan.layout import Layout, even_split, make_layout
from titan.plan.search.choices import micro_batch_choices, tensor_choices
from titan.plan.search.schedules import Candidate, ScheduleChoice, Tried, best_interleaved, fastest
from titan.plan.search.shares import with_shares

WORTH = 0.01
"""A layout found here is taken where it is faster by at least this share: it needs the gradient bridge."""
MOST_STAGES = 4_000
"""Stages of all layouts that are looked at; half a second."""
MOST_PASSES = 50_000
"""Passes of all layouts that are given their timeline; half a second."""
NUM_STARTS = 6
"""Layouts that are improved."""
SMALL = 8
"""Up to so many stages, layers and replicas move between any two of them; in longer pipelines between neighbours."""
MOST_ALIKE = 24
"""Stages of the pipelines whose stages all hold as many devices of each kind."""


Replicas = tuple[tuple[str, int], ...]
"""(kind, number), in the order of the fleet, none of them 0."""


@dataclass(frozen=True)
class Unit:
    """A stage before samples are shared out."""

    layers: int
    tp: int
    replicas: Replicas

    @property
    def number(self) -> int:
        """Of all replicas."""
        return sum(number for _, number in self.replicas)


@dataclass(frozen=True)
class Design:
    """A pipeline before samples are shared out."""

    units: tuple[Unit, ...]
    micro_batches: int


class Mixer:
    """Looks for layouts with stages of several kinds of devices."""

    def __init__(self, costs: Costs, search: SearchSettings):
        self.costs, self.search = costs, search
        self.numbers = micro_batch_choices(costs.task.batch_size, search)
        self.tensor = {kind.name: tensor_choices(costs, search, kind) for kind in costs.fleet.kinds.values()}
        self.stages_left, self.passes_left = MOST_STAGES, MOST_PASSES

    def best(self, layouts: Sequence[LayoutSettings]) -> Tried | None:
        """The best that is found, from these layouts and pipelines with like stages on; None if none of them fits."""
        given = (design_of(self.costs, each) for each in layouts)
        designs = dict.fromkeys([*(design for design in given if design is not None), *self._alike()])
        starts = sorted(self._candidates(designs), key=lambda each: each[0].least_s)
        best = list[Tried]()
        for candidate, design in starts:
            found, self.passes_left = fastest(self.costs, [candidate], None, self.passes_left)
            if found is not None:
                best.append(self._improved(found, design))
            if len(best) == NUM_STARTS:
                break
        return min(best, key=lambda each: each[1].step_s, default=None)

    def _improved(self, now: Tried, design: Design) -> Tried:
        """By the best of all small changes, again and again until none helps."""
        while True:
            changes = {id(of[0].settings): of for of in self._candidates(dict.fromkeys(self._changes(design)))}
            after, self.passes_left = fastest(
                self.costs, [candidate for candidate, _ in changes.values()], now, self.passes_left
            )
            if after is None or after is now:
                return now
            now, design = after, changes[id(after[0])][1]

    def _candidates(self, designs: Mapping[Design, None]) -> Iterator[tuple[Candidate, Design]]:
        """Those that can be, with seconds that they surely take."""
        for design in designs:
            if self.stages_left <= 0:
                return
            self.stages_left -= len(design.units)
            if self._allowed(design):
                with suppress(ConfigError):  # the profile does not know so few samples, or a link is missing
                    settings = with_shares(self.costs, settings_of(design, self.search))
                    layout = make_layout(self.costs.task.model, settings)
                    yield Candidate(least_s(self.costs, layout), settings, layout), design

    def _allowed(self, design: Design) -> bool:
        samples = self.costs.task.batch_size // design.micro_batches
        return all(number >= 0 for number in self._idle(design).values()) and all(
            unit.layers > 0
            and 0 < unit.number <= samples
            and all(unit.tp in self.tensor[kind] for kind, _ in unit.replicas)
            for unit in design.units
        )

    def _idle(self, design: Design) -> dict[str, int]:
        """Devices of each kind that a design does not use."""
        idle = {kind.name: kind.devices for kind in self.costs.fleet.kinds.values()}
        for unit in design.units:
            for kind, number in unit.replicas:
                idle[kind] -= number * unit.tp
        return idle

    def _alike(self) -> Iterator[Design]:
        """Pipelines whose stages hold as many devices of each kind, with the tensor degree that seems fastest.

        Short ones with every number of micro-batches, others with the one that seems best.
        """
        layers, batch = self.costs.task.model.layers, self.costs.task.batch_size
        for stages in range(1, min(layers, MOST_ALIKE) + 1):
            found = list[tuple[float, Design]]()
            for tp in sorted({tp for of in self.tensor.values() for tp in of}):
                each = {
                    kind.name: kind.devices // (stages * tp)
                    for kind in self.costs.fleet.kinds.values()
                    if tp in self.tensor[kind.name]
                }
                unit = Unit(0, tp, self._counted(each))
                for number in self.numbers if unit.replicas else ():
                    split, speed = even_split(layers, stages), 0.0
                    if unit.number > batch // number:
                        continue
                    with suppress(ConfigError):
                        for kind, count in unit.replicas:
                            share = max(1, batch // number // unit.number)
                            layer = self.costs.profile.block(kind, "layer", tp, share)
                            speed += count * share / (layer.forward_s + layer.backward_s)
                        seconds = (number + stages - 1) * max(split) * (batch // number) / speed
                        units = tuple(replace(unit, layers=of) for of in split)
                        found.append((seconds, Design(units, number)))
            found.sort(key=lambda each: each[0])
            fastest_of: dict[int, Design] = {}
            for _, design in found:
                fastest_of.setdefault(design.micro_batches if stages <= SMALL else 0, design)
            yield from fastest_of.values()

    def _counted(self, replicas: Mapping[str, int]) -> Replicas:
        return tuple((kind, replicas[kind]) for kind in self.costs.fleet.kinds if replicas.get(kind, 0) > 0)

    def _changes(self, design: Design) -> Iterator[Design]:
        """All small changes; not all of them can be."""
        units, place = design.units, self.numbers.index(design.micro_batches)
        for other in (place - 1, place + 1):
            if 0 <= other < len(self.numbers):
                yield Design(units, self.numbers[other])
        idle = self._idle(design)
        for index, unit in enumerate(units):
            for changed in itertools.chain(self._split(unit), self._refilled(unit, idle)):
                yield self._with(design, index, index + 1, *changed)
            if index + 1 < len(units):
                for changed in self._merged(unit, units[index + 1]):
                    yield self._with(design, index, index + 2, *changed)
            for other in range(len(units)) if len(units) <= SMALL else (index - 1, index + 1):
                if other != index and 0 <= other < len(units):
                    yield from self._moved(design, index, other)

    def _with(self, design: Design, start: int, end: int, *units: Unit) -> Design:
        return Design((*design.units[:start], *units, *design.units[end:]), design.micro_batches)

    def _merged(self, one: Unit, other: Unit) -> Iterator[tuple[Unit]]:
        """Two neighbours on all their devices, for every tensor degree; what is left over stands idle."""
        devices = Counter[str]()
        for unit in (one, other):
            devices.update({kind: number * unit.tp for kind, number in unit.replicas})
        for tp in {tp for kind in devices for tp in self.tensor[kind]}:
            replicas = self._counted({kind: number // tp for kind, number in devices.items()})
            yield (Unit(one.layers + other.layers, tp, replicas),)

    def _split(self, unit: Unit) -> Iterator[tuple[Unit, Unit]]:
        """A kind of its own stage, before or behind the others; or as many replicas as can be on each."""
        ways: list[tuple[Replicas, Replicas]] = [
            ((of,), tuple(each for each in unit.replicas if each != of)) for of in unit.replicas
        ]
        halves = {kind: number // 2 for kind, number in unit.replicas}
        rest = {kind: number - halves[kind] for kind, number in unit.replicas}
        ways.append((self._counted(halves), self._counted(rest)))
        for (first, second), front in itertools.product(ways, range(1, unit.layers)):
            if first and second:
                behind = unit.layers - front
                yield replace(unit, layers=front, replicas=first), replace(unit, layers=behind, replicas=second)
                yield replace(unit, layers=front, replicas=second), replace(unit, layers=behind, replicas=first)

    def _refilled(self, unit: Unit, idle: Mapping[str, int]) -> Iterator[tuple[Unit]]:
        """A replica more or less, all that stand idle, or another tensor degree."""
        own = dict(unit.replicas)
        for kind, free in idle.items():
            for more in {-own.get(kind, 0), -1, 1, free // unit.tp}:
                yield (replace(unit, replicas=self._counted(own | {kind: own.get(kind, 0) + more})),)
        for tp in {tp for kind in own for tp in self.tensor[kind]} - {unit.tp}:
            yield (replace(unit, tp=tp, replicas=self._counted({k: n * unit.tp // tp for k, n in own.items()})),)

    def _moved(self, design: Design, giver: int, taker: int) -> Iterator[Design]:
        """A layer, or a replica, from one stage to another."""
        source, target = design.units[giver], design.units[taker]

        def with_both(given: Unit, taken: Unit) -> Design:
            units = list(design.units)
            units[giver], units[taker] = given, taken
            return Design(tuple(unit for unit in units if unit.layers), design.micro_batches)

        less, more = (replace(unit, layers=unit.layers + by) for unit, by in ((source, -1), (target, 1)))
        yield with_both(less, more)
        for kind, number in source.replicas:
            left = self._counted(dict(source.replicas) | {kind: number - 1})
            own = dict(target.replicas)
            grown = self._counted(own | {kind: own.get(kind, 0) + source.tp // target.tp})
            for given, taken in ((source, target), (less, more)):
                yield with_both(replace(given, replicas=left), replace(taken, replicas=grown))


def design_of(costs: Costs, settings: LayoutSettings) -> Design | None:
    """A layout as a design; None for an interleaved one."""
    if settings.schedule != "1f1b" or settings.stages is None or settings.micro_batches is None:
        return None
    units = []
    for stage in settings.stages:
        number = Counter(stage.kinds)
        units.append(
            Unit(sum(stage.layers), stage.tp, tuple((kind, number[kind]) for kind in costs.fleet.kinds if number[kind]))
        )
    return Design(tuple(units), settings.micro_batches)


def settings_of(design: Design, search: SearchSettings) -> LayoutSettings:
    """A design as one would write it in run.toml, shares left out."""
    stages = []
    for unit in design.units:
        kinds, numbers = tuple(kind for kind, _ in unit.replicas), tuple(number for _, number in unit.replicas)
        several = len(kinds) > 1
        stages.append(
            StageSettings(
                layers=(unit.layers,),
                tp=unit.tp,
                dp=unit.number,
                shard=unit.number if search.shard_optimizer and not several else 1,
                device=kinds if several else kinds[0],
                islands=numbers if several else None,
            )
        )
    return LayoutSettings(stages=tuple(stages), micro_batches=design.micro_batches, recompute=search.recompute)


def least_s(costs: Costs, layout: Layout) -> float:
    """A 1F1B layout takes no less, seconds.

    (a) and (b) of `titan.plan.search.bound`, with what comes before a stage's passes and after them.
    """
    times, tails, number = costs.stage_times(layout), costs.tails(layout), layout.micro_batches
    trip_s = sum(each.forward_s + each.backward_s + each.to_next_s + each.to_previous_s for each in times)
    there_s = back_s = found_s = 0.0
    for position, (each, tail_s) in enumerate(zip(times, tails, strict=True)):
        work_s = number * (each.forward_s + each.backward_s)
        back_s += each.to_previous_s
        found_s = max(found_s, there_s + work_s + max(tail_s, back_s + tails[0]))
        steady_s = (number - 1) * each.backward_s + max(0, number - len(times) + position) * each.forward_s
        found_s = max(found_s, trip_s + steady_s + tails[0])
        there_s += each.forward_s + each.to_next_s
        back_s += each.backward_s
    return found_s


def with_mixed(
    costs: Costs, search: SearchSettings, chosen: ScheduleChoice, others: Sequence[LayoutSettings]
) -> tuple[ScheduleChoice, bool]:
    """(the choice or a faster one with unlike replicas, whether it is the latter).

    others: good 1F1B layouts to begin with
    """
    if not search.mixed or len(costs.fleet.kinds) < 2:
        return chosen, False
    plain = Mixer(costs, search).best(others)
    woven = best_interleaved(costs, search, [plain[0]], MOST_PASSES) if plain is not None else None
    schedules_s = dict(chosen.schedules_s)
    for name, found in (("1f1b", plain), ("interleaved", woven)):
        steps_s = [schedules_s[name], None if found is None else found[1].step_s]
        schedules_s[name] = min((step_s for step_s in steps_s if step_s is not None), default=None)
    tried = [found for found in (plain, woven if search.schedule == "auto" else None) if found is not None]
    best = min(tried, key=lambda each: each[1].step_s, default=None)
    if best is None or best[1].step_s > (1 - WORTH) * chosen.prediction.step_s:
        return chosen, False
    return ScheduleChoice(*best, schedules_s), True
