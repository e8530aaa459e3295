"""A lower bound on the step of any pipeline, whatever the order of its passes: 1F1B, interleaved, zero-bubble.

A position with l layers has M micro-batches of them to do and then their tail, so in a step of T it holds at most
floor((T - tail) / (M x + tail_layer)) with x the seconds of a layer both ways, fewer where it also has the embedding or
the head. If no option of each kind lets all its devices together hold all layers, no pipeline takes T. And a
micro-batch goes through all layers and back. Neither fill nor memory is in it, so it is weaker than
`titan.plan.search.bound`.

Where a stage may have replicas of several kinds and any shares, `every_bound_s` counts layers of samples. A replica of
tp devices with s samples of a micro-batch and l layers has M l x(s) seconds of them to do, so in a step of T a device
does at most max over s of s M floor((T - tail) / (M x(s) + tail_layer)) / tp of the B L that there are, fewer than
(T - tail) r with r = max s / (tp x(s)). Embedding and head are as much again as their seconds times r of that kind.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from titan.config.planning import SearchSettings
from titan.errors import ConfigError
from titan.plan.cost import Costs
from titan.plan.memory import bytes_per_parameter
from titan.plan.profile import BlockKind, num_layer_parameters
from titan.plan.search.bound import ROUNDING
from titan.plan.search.choices import micro_batch_choices, tensor_choices
from titan.plan.search.options import Floats, Option, SearchProblem

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


MOST_SHARES = 64
"""Samples of a micro-batch up to which whole layers are counted for every share; beyond, parts of layers."""


@dataclass(frozen=True)
class Speed:
    """What one way to make a replica of a kind of device can do with a micro-batch, for every share of it looked at."""

    kind: str
    tp: int
    samples_S: Floats
    layer_s_S: Floats
    embedding_s_S: Floats
    head_s_S: Floats
    update_s: float
    """Optimizer of one layer."""

    @property
    def rate(self) -> float:
        """Layers of samples that a device does in a second."""
        return float((self.samples_S / (self.tp * self.layer_s_S)).max())


def every_bound_s(costs: Costs, search: SearchSettings) -> float:
    """No layout takes less, but for the accuracy, seconds: whatever its schedule, its replicas' kinds and their shares.

    Infinite if the profile knows no share of any micro-batch.
    """
    numbers = micro_batch_choices(costs.task.batch_size, search)
    return min((_bound_of_any_shares_s(costs, search, number) for number in numbers), default=math.inf)


def kind_rates(costs: Costs, search: SearchSettings) -> dict[str, float]:
    """By kind: layers of samples that a device does in a second at most, with any share of any micro-batch."""
    numbers = micro_batch_choices(costs.task.batch_size, search)
    return _rates([speed for number in numbers for speed in _speeds(costs, search, costs.task.batch_size // number)])


def _rates(speeds: Sequence[Speed]) -> dict[str, float]:
    rates: dict[str, float] = {}
    for speed in speeds:
        rates[speed.kind] = max(rates.get(speed.kind, 0.0), speed.rate)
    return rates


def _speeds(costs: Costs, search: SearchSettings, samples: int) -> list[Speed]:
    """All ways to make a replica; samples: of a micro-batch."""
    return [
        speed
        for kind in costs.fleet.kinds.values()
        for tp in tensor_choices(costs, search, kind)
        if (speed := _speed(costs, search, kind.name, tp, samples)) is not None
    ]


def _bound_of_any_shares_s(costs: Costs, search: SearchSettings, number: int) -> float:
    samples = costs.task.batch_size // number
    speeds = _speeds(costs, search, samples)
    if not speeds:
        return math.inf
    least_s = max(_by_rate_s(costs, speeds), _trip_s(costs, search, samples))
    if samples > MOST_SHARES or _in_whole_layers(costs, speeds, number, least_s):
        return least_s
    low_s, high_s = least_s, 2 * least_s
    while not _in_whole_layers(costs, speeds, number, high_s):
        low_s, high_s = high_s, 2 * high_s
    while high_s - low_s > ACCURACY * high_s:
        middle_s = (low_s + high_s) / 2
        low_s, high_s = (low_s, middle_s) if _in_whole_layers(costs, speeds, number, middle_s) else (middle_s, high_s)
    return low_s


def _speed(costs: Costs, search: SearchSettings, kind: str, tp: int, samples: int) -> Speed | None:
    """None where the profile knows no share of so many samples."""
    found = list[tuple[float, ...]]()
    for share in _shares(costs, kind, samples):
        names: tuple[BlockKind, ...] = ("layer", "embedding", "head")
        with suppress(ConfigError):
            layer, embedding, head = (costs.profile.block(kind, name, tp, share) for name in names)
            layer_s = layer.forward_s + layer.backward_in(search.recompute)
            found.append((share, layer_s, *(block.forward_s + block.backward_s for block in (embedding, head))))
    if not found:
        return None
    most_shards = costs.fleet.kinds[kind].devices if search.shard_optimizer else 1
    state = num_layer_parameters(costs.task) / tp * bytes_per_parameter(costs.task.precision, most_shards)
    update_s = state / costs.profile.update_bytes_per_s(kind)
    samples_S, layer_s_S, embedding_s_S, head_s_S = np.array(found, dtype=np.float64).T
    return Speed(kind, tp, samples_S, layer_s_S, embedding_s_S, head_s_S, update_s)


def _shares(costs: Costs, kind: str, samples: int) -> Iterator[int]:
    """All shares of few samples. Of many, those between which seconds are linear: there the ends do most a second."""
    if samples <= MOST_SHARES:
        yield from range(1, samples + 1)
        return
    measured = {
        block.samples for shape in costs.profile.settings.shapes for block in shape.blocks if block.kind == kind
    }
    yield from sorted({1, samples, *(each for each in measured if each <= samples)})


def _by_rate_s(costs: Costs, speeds: Sequence[Speed]) -> float:
    """Seconds if every device did layers, and parts of them, as fast as its kind can."""
    rates = _rates(speeds)
    layers = float(costs.task.model.layers)
    for part in ("embedding_s_S", "head_s_S"):
        layers += min(
            float((getattr(speed, part) * speed.tp / speed.samples_S).min()) * rates[speed.kind] for speed in speeds
        )
    whole = sum(costs.fleet.kinds[kind].devices * rate for kind, rate in rates.items())
    return costs.task.batch_size * layers / whole + min(speed.update_s for speed in speeds)


def _trip_s(costs: Costs, search: SearchSettings, samples: int) -> float:
    """Seconds of a micro-batch through all layers and back, on the replicas that have most of it."""
    each_s = math.inf
    for kind in costs.fleet.kinds.values():
        for tp in tensor_choices(costs, search, kind):
            share = math.ceil(samples / min(samples, costs.fleet.num_devices))
            try:
                layer = costs.profile.block(kind.name, "layer", tp, share)
            except ConfigError:  # a share that is known is larger, its seconds are more
                return 0.0
            each_s = min(each_s, layer.forward_s + layer.backward_in(search.recompute))
    return costs.task.model.layers * each_s


def _in_whole_layers(costs: Costs, speeds: Sequence[Speed], number: int, step_s: float) -> bool:
    """False if surely no layout takes at most this; number: of micro-batches."""
    done: dict[str, float] = {}
    for speed in speeds:
        layers_S = np.floor(step_s * (1 + ROUNDING) / (number * speed.layer_s_S + speed.update_s))
        most = (speed.samples_S * np.minimum(layers_S, costs.task.model.layers)).max() * number / speed.tp
        done[speed.kind] = max(done.get(speed.kind, 0.0), float(most))
    whole = sum(costs.fleet.kinds[kind].devices * each for kind, each in done.items())
    return whole * (1 + ROUNDING) >= costs.task.batch_size * costs.task.model.layers
