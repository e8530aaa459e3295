"""Pipeline schedules as pure functions: per pipeline position, the order of its passes.

A position is what holds one or several stages: with 1F1B one, with an interleaved schedule `chunks` of them, chunk c of
position p being stage c * positions + p of the model.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

ScheduleName = Literal["1f1b", "interleaved", "zero-bubble"]


class Pass(Enum):
    """Direction of an action."""

    FORWARD = "forward"
    BACKWARD = "backward"
    """Both gradients; in a zero-bubble schedule that of the input only."""
    WEIGHT = "weight"
    """Gradient of the weights on its own; only zero-bubble schedules have it, and they are only simulated."""


@dataclass(frozen=True)
class Action:
    """One pass of one micro-batch through one chunk of a position."""

    kind: Pass
    micro_batch: int
    chunk: int = 0


Schedule = tuple[Action, ...]


def one_forward_one_backward(position: int, positions: int, micro_batches: int) -> Schedule:
    """1F1B (PipeDream-Flush, arXiv 2006.09503): fill, then alternate, then drain.

    Position i holds at most min(micro_batches, positions - i) micro-batches in flight.
    """
    forwards = [Action(Pass.FORWARD, index) for index in range(micro_batches)]
    backwards = [Action(Pass.BACKWARD, index) for index in range(micro_batches)]
    return _alternate(forwards, backwards, min(positions - 1 - position, micro_batches))


def interleaved(position: int, positions: int, chunks: int, micro_batches: int) -> Schedule:
    """Interleaved 1F1B (arXiv 2104.04473, section 2.2): a smaller bubble for more messages and memory.

    micro_batches: a multiple of positions; they go through the chunks in groups of that many
    """
    assert micro_batches % positions == 0, f"{micro_batches} micro-batches are no multiple of {positions}"
    order = [
        (group * positions + index, chunk)
        for group in range(micro_batches // positions)
        for chunk in range(chunks)
        for index in range(positions)
    ]
    forwards = [Action(Pass.FORWARD, index, chunk) for index, chunk in order]
    backwards = [Action(Pass.BACKWARD, index, chunks - 1 - chunk) for index, chunk in order]
    fill = 2 * (positions - 1 - position) + (chunks - 1) * positions
    if positions == 1:
        fill = chunks - 1 if chunks > 1 else 0
    return _alternate(forwards, backwards, min(fill, len(forwards)))


def zero_bubble(position: int, positions: int, micro_batches: int) -> Schedule:
    """ZB-H1 (arXiv 2401.10241): 1F1B whose weight gradients wait, to fill the drain.

    Weight gradients of position i lag by i micro-batches, so that memory stays that of 1F1B's first position.
    """
    actions: list[Action] = []
    owed: list[int] = []
    for action in one_forward_one_backward(position, positions, micro_batches):
        actions.append(action)
        if action.kind is Pass.BACKWARD:
            owed.append(action.micro_batch)
            if len(owed) > position:
                actions.append(Action(Pass.WEIGHT, owed.pop(0)))
    return (*actions, *(Action(Pass.WEIGHT, index) for index in owed))


@functools.lru_cache(maxsize=512)
def make_schedule(name: ScheduleName, position: int, positions: int, chunks: int, micro_batches: int) -> Schedule:
    """One training step of a position; chunks is 1 unless interleaved.

    A planner asks for the same ones again and again.
    """
    if name == "interleaved":
        return interleaved(position, positions, chunks, micro_batches)
    assert chunks == 1, f"{name} has one chunk a position"
    if name == "zero-bubble":
        return zero_bubble(position, positions, micro_batches)
    return one_forward_one_backward(position, positions, micro_batches)


def forward_only(chunks: int, micro_batches: int) -> Schedule:
    """Every micro-batch forward, in order: for evaluation."""
    return tuple(Action(Pass.FORWARD, index, chunk) for index in range(micro_batches) for chunk in range(chunks))


def _alternate(forwards: Sequence[Action], backwards: Sequence[Action], fill: int) -> Schedule:
    """The first `fill` forwards, then a forward and a backward in turn, then the backwards that are left."""
    actions = list(forwards[:fill])
    steady = len(forwards) - fill
    for forward, backward in zip(forwards[fill:], backwards[:steady], strict=True):
        actions += [forward, backward]
    return (*actions, *backwards[steady:])
