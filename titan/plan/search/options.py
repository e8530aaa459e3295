"""The planner's abstract problem: identical layers, kinds of devices, ways to make a stage of a kind, and what a
pipeline of such stages takes under 1F1B in seconds and bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from titan.plan.schedule import one_forward_one_backward
from titan.plan.timeline import StageTimes, Timeline, timeline

Floats = NDArray[np.float64]
Ints = NDArray[np.integer[Any]]
Number = TypeVar("Number", float, Floats)


@dataclass(frozen=True)
class StageCost:
    """What a part of the model costs a stage: seconds of one micro-batch, bytes on each device."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    state_bytes: float = 0.0
    """Weights, gradients, optimizer."""
    activation_bytes: float = 0.0
    """Of one micro-batch in flight."""

    @property
    def both_s(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class Option:
    """One way to make a stage of devices of one kind: `tp` tensor ranks in each of `dp` replicas."""

    kind: str
    tp: int
    dp: int
    layer: StageCost
    """Per layer."""
    embedding: StageCost
    """Comes on top on the first stage."""
    head: StageCost
    """Comes on top on the last stage."""
    fixed_bytes: float
    """Per device, whatever it holds."""
    limit_bytes: float
    tail_s: float = 0.0
    """Gradient sync and optimizer after the last pass of a step."""
    tail_layer_s: float = 0.0
    """The same, on top, for each layer."""

    @property
    def devices(self) -> int:
        """Devices of one stage."""
        return self.tp * self.dp


Combo = tuple[Option, ...]
"""One option a kind, of different kinds: every stage of a kind is made alike."""


@dataclass(frozen=True)
class SearchProblem:
    """What is searched: a pipeline of `layers` layers on some of the devices, one option a kind."""

    layers: int
    devices: Mapping[str, int]
    """Of each kind."""
    options: Mapping[str, tuple[Option, ...]]
    """Of each kind, costs for this number of micro-batches."""
    micro_batches: int
    edge_s: Mapping[tuple[str, str], float]
    """Seconds of one micro-batch from a stage of one kind to one of another (or the same); the same both ways."""

    def edge(self, one: str, other: str) -> float:
        """Seconds of an edge, named either way round; 0 where it is not given."""
        return self.edge_s.get((one, other), self.edge_s.get((other, one), 0.0))

    def units(self, option: Option) -> int:
        """Most stages of this option that the devices give."""
        return self.devices.get(option.kind, 0) // option.devices


@dataclass(frozen=True)
class PlacedStage:
    """One stage of a pipeline."""

    option: Option
    layers: int


Pipeline = tuple[PlacedStage, ...]
"""Stages from first to last; layers are contiguous."""


def stage_bytes(option: Option, layers: Number, in_flight: Number, first: bool, last: bool) -> Number:
    """Bytes on each device of a stage with so many micro-batches in flight, or of many stages at once."""
    extra = 0 * in_flight + option.fixed_bytes
    for part, there in ((option.embedding, first), (option.head, last)):
        if there:
            extra = extra + part.state_bytes + in_flight * part.activation_bytes
    return extra + layers * (option.layer.state_bytes + in_flight * option.layer.activation_bytes)


def fits(problem: SearchProblem, pipeline: Sequence[PlacedStage]) -> bool:
    """Whether every stage is within its memory under 1F1B and the devices suffice."""
    used: dict[str, int] = {}
    for index, stage in enumerate(pipeline):
        used[stage.option.kind] = used.get(stage.option.kind, 0) + stage.option.devices
        in_flight = min(problem.micro_batches, len(pipeline) - index)
        needed = stage_bytes(stage.option, stage.layers, in_flight, index == 0, index == len(pipeline) - 1)
        if stage.layers < 1 or needed > stage.option.limit_bytes:
            return False
    return all(number <= problem.devices.get(kind, 0) for kind, number in used.items())


def stage_times(problem: SearchProblem, pipeline: Sequence[PlacedStage]) -> tuple[list[StageTimes], list[float]]:
    """Times and tails of the stages, as `timeline` takes them."""
    times, last = list[StageTimes](), len(pipeline) - 1
    for index, stage in enumerate(pipeline):
        option, parts = stage.option, [(stage.option.layer, stage.layers)]
        parts += [(option.embedding, 1)] if index == 0 else []
        parts += [(option.head, 1)] if index == last else []
        before, after = (
            problem.edge(option.kind, pipeline[other].option.kind) if 0 <= other <= last else 0.0
            for other in (index - 1, index + 1)
        )
        forward_s = sum(number * part.forward_s for part, number in parts)
        backward_s = sum(number * part.backward_s for part, number in parts)
        times.append(StageTimes(forward_s, backward_s, to_next_s=after, to_previous_s=before))
    return times, [stage.option.tail_s + stage.layers * stage.option.tail_layer_s for stage in pipeline]


def timeline_of(problem: SearchProblem, pipeline: Sequence[PlacedStage]) -> Timeline:
    """The exact timeline of a step under 1F1B."""
    times, tails = stage_times(problem, pipeline)
    number = len(pipeline)
    schedules = [one_forward_one_backward(place, number, problem.micro_batches) for place in range(number)]
    return timeline(schedules, 1, times, tails)


def bottleneck_s(pipeline: Sequence[PlacedStage]) -> float:
    """Seconds of the slowest stage, forward and backward of one micro-batch."""
    last = len(pipeline) - 1
    return max(
        stage.layers * stage.option.layer.both_s
        + (stage.option.embedding.both_s if index == 0 else 0.0)
        + (stage.option.head.both_s if index == last else 0.0)
        for index, stage in enumerate(pipeline)
    )


def steps_s(problem: SearchProblem, combo: Combo, kinds_NP: Ints, layers_NP: Ints) -> Floats:
    """Step seconds of many pipelines of as many stages under 1F1B: what `timeline` gives, all at once.

    kinds_NP: which option of the combo each stage is;  layers_NP: its layers
    returns: [N]
    """
    forward_PN, backward_PN = (
        part_s(combo, kinds_NP, layers_NP, name).T.copy() for name in ("forward_s", "backward_s")
    )
    edge_KK = np.array([[problem.edge(one.kind, other.kind) for other in combo] for one in combo])
    edge_PN = edge_KK[kinds_NP[:, :-1], kinds_NP[:, 1:]].T.copy()
    free_PN = _finish_s(problem.micro_batches, forward_PN, backward_PN, edge_PN)
    tail, tail_layer = (np.array([getattr(option, name) for option in combo]) for name in ("tail_s", "tail_layer_s"))
    finish: Floats = (free_PN.T + tail[kinds_NP] + layers_NP * tail_layer[kinds_NP]).max(axis=1)
    return finish


def part_s(combo: Combo, kinds_NP: Ints, layers_NP: Ints, name: str) -> Floats:
    """Seconds of one direction of all stages."""
    layer, embedding, head = (
        np.array([getattr(getattr(option, part), name) for option in combo]) for part in ("layer", "embedding", "head")
    )
    times: Floats = layers_NP * layer[kinds_NP]
    times[:, 0] += embedding[kinds_NP[:, 0]]
    times[:, -1] += head[kinds_NP[:, -1]]
    return times


def _finish_s(micro_batches: int, forward_PN: Floats, backward_PN: Floats, edge_PN: Floats) -> Floats:
    """When each stage has ended its passes.

    Forward m of stage i is done in slot i + 2m and its backward in slot 2P - 1 - i + 2m: this is an order in which
    every pass comes after all it waits for, stages of a slot are independent, and each stage follows its 1F1B order.
    """
    stages, number = forward_PN.shape
    free = np.zeros((stages, number))
    # Row i is when the latest message has crossed the edge between stages i - 1 and i; the ends stay "at once".
    activations, gradients = np.zeros((stages + 1, number)), np.zeros((stages + 1, number))
    edge = np.zeros((stages + 1, number))
    edge[1:stages] = edge_PN
    for slot in range(2 * (stages + micro_batches) - 1):
        low, high = max(slot % 2, slot - 2 * (micro_batches - 1)), min(stages - 1, slot)
        if low <= high:
            here, after = slice(low, high + 1, 2), slice(low + 1, high + 2, 2)
            end = np.maximum(free[here], activations[here])
            end += forward_PN[here]
            free[here] = end
            if high == stages - 1 and (high - low) % 2 == 0:
                end, after = end[:-1], slice(low + 1, high + 1, 2)
            activations[after] = np.maximum(end, activations[after]) + edge[after]
        first = 2 * stages - 1 - slot
        low, high = max(first, (slot + 1) % 2), min(stages - 1, first + 2 * (micro_batches - 1))
        if low <= high:
            here, after = slice(low, high + 1, 2), slice(low + 1, high + 2, 2)
            end = np.maximum(free[here], gradients[after])
            end += backward_PN[here]
            free[here] = end
            if low == 0:
                end, here = end[1:], slice(2, high + 1, 2)
            gradients[here] = np.maximum(end, gradients[here]) + edge[here]
    return free
