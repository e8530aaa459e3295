"""The exact timeline of a pipeline schedule: when every pass starts and ends, given the seconds of each stage.

What the engine does and this file follows: a pass starts when its position is free and its message has arrived; sends
do not hold up the computing; messages from one position to another queue one after the other, those of all chunks and
of both passes on the same connection.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from titan.plan.schedule import Action, Pass, Schedule


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one stage of the model, per micro-batch."""

    forward_s: float
    backward_s: float
    """Of the gradients of input and weights, or of the input only where weight_s is given."""
    weight_s: float = 0.0
    """Gradient of the weights on its own; only zero-bubble schedules ask for it."""
    to_next_s: float = 0.0
    """Activations over the edge to the next stage; 0 on the last."""
    to_previous_s: float = 0.0
    """Gradients over the edge to the previous stage; 0 on the first."""

    def of(self, kind: Pass) -> float:
        """Seconds of a pass of this kind."""
        if kind is Pass.FORWARD:
            return self.forward_s
        return self.backward_s if kind is Pass.BACKWARD else self.weight_s


@dataclass(frozen=True, slots=True)
class Span:
    """One pass: where, what and when, seconds from the start of the step."""

    position: int
    chunk: int
    kind: Pass
    micro_batch: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """All passes of a step; those of a position in the order it runs them, positions one after the other."""

    spans: tuple[Span, ...]
    finish_s: tuple[float, ...]
    """When each position has ended its passes."""
    tail_s: tuple[float, ...]
    """What each position does after them: gradient sync and optimizer."""

    @property
    def step_s(self) -> float:
        """Seconds of the step: until the last position has ended its tail."""
        return max(finish + tail for finish, tail in zip(self.finish_s, self.tail_s, strict=True))

    @property
    def busy_s(self) -> tuple[float, ...]:
        """Seconds that each position computes, its tail included."""
        busy = list(self.tail_s)
        for span in self.spans:
            busy[span.position] += span.end_s - span.start_s
        return tuple(busy)

    @property
    def idle_shares(self) -> tuple[float, ...]:
        """Share of the step that each position waits, 0 to 1."""
        step_s = self.step_s
        return tuple(1.0 - busy / step_s if step_s else 0.0 for busy in self.busy_s)

    @property
    def peak_in_flight(self) -> tuple[int, ...]:
        """Most micro-batches that each stage, by stage index, holds activations of at one time.

        A micro-batch is held from its forward to its backward, or to its weight gradient where that is another pass.
        """
        chunks = 1 + max((span.chunk for span in self.spans), default=0)
        positions = len(self.finish_s)
        weights_apart = any(span.kind is Pass.WEIGHT for span in self.spans)
        releasing = Pass.WEIGHT if weights_apart else Pass.BACKWARD
        held, peak = [0] * (chunks * positions), [0] * (chunks * positions)
        for span in self.spans:
            stage = span.chunk * positions + span.position
            if span.kind is Pass.FORWARD:
                held[stage] += 1
                peak[stage] = max(peak[stage], held[stage])
            elif span.kind is releasing:
                held[stage] -= 1
        return tuple(peak)


def timeline(
    schedules: Sequence[Schedule], chunks: int, times: Sequence[StageTimes], tail_s: Sequence[float]
) -> Timeline:
    """When every pass starts and ends: the longest path through schedules and messages, in O(number of actions).

    schedules: of each position;  chunks: stages that a position holds
    times:     by stage index, which is chunk * positions + position
    tail_s:    by position, gradient sync and optimizer after its last pass
    """
    positions, last = len(schedules), len(times) - 1
    assert len(times) == chunks * positions, f"{len(times)} stages' times for {positions} positions x {chunks} chunks"
    assert len(tail_s) == positions, f"{len(tail_s)} tails for {positions} positions"
    free_s = [0.0] * positions
    link_free_s: dict[tuple[int, int], float] = {}
    spans: list[list[Span]] = [[] for _ in schedules]
    arrived_s: dict[Need, float] = {}
    for position, action in passes_in_order(schedules, len(times)):
        stage, index = action.chunk * positions + position, action.micro_batch
        start_s = max(free_s[position], arrived_s.pop((action.kind, stage, index), 0.0))
        end_s = free_s[position] = start_s + times[stage].of(action.kind)
        spans[position].append(Span(position, action.chunk, action.kind, index, start_s, end_s))
        if action.kind is Pass.FORWARD and stage < last:
            receiver, takes_s = stage + 1, times[stage].to_next_s
        elif action.kind is Pass.BACKWARD and stage > 0:
            receiver, takes_s = stage - 1, times[stage].to_previous_s
        else:
            continue
        link = (position, receiver % positions)
        link_free_s[link] = arrival_s = max(end_s, link_free_s.get(link, 0.0)) + takes_s
        arrived_s[action.kind, receiver, index] = arrival_s
    return Timeline(tuple(span for each in spans for span in each), tuple(free_s), tuple(tail_s))


Need = tuple[Pass, int, int]
"""What a pass waits for, named as the pass itself: kind, stage and micro-batch."""


def passes_in_order(schedules: Sequence[Schedule], stages: int) -> list[tuple[int, Action]]:
    """All (position, action) of a step, each after what it waits for; times do not change this order.

    An assertion fails where a schedule deadlocks, which is our own bug.
    """
    positions, order = len(schedules), list[tuple[int, Action]]()
    done = [0] * positions
    met: set[Need] = set()
    waiting: dict[Need, int] = {}
    runnable = list(range(positions))
    while runnable:
        position = runnable.pop()
        schedule = schedules[position]
        while done[position] < len(schedule):
            action = schedule[done[position]]
            stage = action.chunk * positions + position
            need = (action.kind, stage, action.micro_batch)
            if need not in met and not (action.kind is Pass.FORWARD and stage == 0):
                waiting[need] = position
                break
            met.discard(need)
            done[position] += 1
            order.append((position, action))
            for given in _gives(action, stage, stages):
                met.add(given)
                if given in waiting:
                    runnable.append(waiting.pop(given))
    for position, schedule in enumerate(schedules):
        assert done[position] == len(schedule), (
            f"the schedule deadlocks: position {position} waits for ever with {schedule[done[position]]}"
        )
    return order


def _gives(action: Action, stage: int, stages: int) -> tuple[Need, ...]:
    """The passes that may start when this one has ended, as far as messages go."""
    index = action.micro_batch
    if action.kind is Pass.FORWARD:
        return ((Pass.FORWARD, stage + 1, index) if stage + 1 < stages else (Pass.BACKWARD, stage, index),)
    if action.kind is Pass.BACKWARD:
        return (Pass.WEIGHT, stage, index), (Pass.BACKWARD, stage - 1, index)
    return ()
