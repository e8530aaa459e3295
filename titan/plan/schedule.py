"""Pipeline schedules as pure functions: per stage, the order of forward and backward passes."""

from dataclasses import dataclass
from enum import Enum


class Pass(Enum):
    """Direction of an action."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True)
class Action:
    """One pass of one micro-batch through one stage."""

    kind: Pass
    micro_batch: int


def one_forward_one_backward(stage: int, stages: int, micro_batches: int) -> tuple[Action, ...]:
    """1F1B (PipeDream-Flush, arXiv 2006.09503): fill, then alternate, then drain.

    Stage i holds at most min(micro_batches, stages - i) micro-batches in flight.
    """
    fill = min(stages - 1 - stage, micro_batches)
    actions = [Action(Pass.FORWARD, index) for index in range(fill)]
    for index in range(micro_batches - fill):
        actions += [Action(Pass.FORWARD, fill + index), Action(Pass.BACKWARD, index)]
    actions += [Action(Pass.BACKWARD, micro_batches - fill + index) for index in range(fill)]
    return tuple(actions)


def forward_only(micro_batches: int) -> tuple[Action, ...]:
    """Every micro-batch forward, in order: for evaluation."""
    return tuple(Action(Pass.FORWARD, index) for index in range(micro_batches))
