"""Runs a schedule: moves named tensors over the edges of the pipeline and calls forward and backward in order."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titan.parallel.edge import EdgeEnd, Expected, Tensors, TrailingShapes
from titan.parallel.world import World
from titan.plan.edges import owned, routes
from titan.plan.layout import Stage
from titan.plan.pace import Pace
from titan.plan.schedule import Action, Pass

StageForward = Callable[[Tensors, int], Tensors]
"""Inputs of a chunk and its number to its outputs."""
HeadStep = Callable[[int, Tensor], Tensor | None]
"""Takes a micro-batch's index and its last hidden states; returns their gradient, or None when only looking."""


@dataclass(frozen=True)
class EdgeSpec:
    """What crosses the edges of a pipeline in one step."""

    samples: int
    """In a micro-batch, over all replicas."""
    length: int
    shapes: TrailingShapes


class PipelineExecutor:
    """One rank's part of the pipeline.

    Sends do not block. The next message of every edge is asked for before it is needed, so that it travels while this
    rank computes; then the rank waits for it, up to the transport's deadline.
    """

    def __init__(self, world: World, dtype_of: Callable[[Stage], torch.dtype], pace: Pace | None = None):
        self.world, self.dtype_of, self.pace = world, dtype_of, pace
        self.seconds = {Pass.FORWARD: 0.0, Pass.BACKWARD: 0.0}
        """Computing, not waiting, in the last step."""

    def run(
        self,
        schedule: Sequence[Action],
        forward: StageForward,
        inputs: Sequence[Tensors],
        edge: EdgeSpec,
        head: HeadStep,
    ) -> None:
        """Run all actions of a step; gradients accumulate where the module keeps them.

        inputs: what this rank gets for each micro-batch besides the edge (tokens, rope, mask)
        head:   called on the last stage right after each forward pass
        """
        backward_wanted = any(action.kind is Pass.BACKWARD for action in schedule)
        edges = _Edges(self.world, self.dtype_of, edge, schedule)
        own_dtype = self.dtype_of(self.world.place.stage)
        in_flight: dict[tuple[int, int], tuple[Tensors, Tensors, Tensors]] = {}  # received, produced, head's gradient
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        for action in schedule:
            index, chunk = action.micro_batch, action.chunk
            arrived = {name: tensor.to(own_dtype) for name, tensor in edges.receive(action).items()}
            begin = time.perf_counter()
            if action.kind is Pass.FORWARD:
                received = {name: tensor.requires_grad_(backward_wanted) for name, tensor in arrived.items()}
                with torch.set_grad_enabled(backward_wanted):
                    produced = forward({**inputs[index], **received}, chunk)
                gradients: Tensors = {}
                if edges.is_last(chunk):
                    with torch.no_grad():
                        gradient = head(index, produced["hidden"].detach())
                    gradients = {} if gradient is None else {"hidden": gradient}
                if backward_wanted:
                    in_flight[index, chunk] = (received, produced, gradients)
                outgoing = {name: tensor.detach() for name, tensor in produced.items()}
            else:
                received, produced, gradients = in_flight.pop((index, chunk))
                gradients = gradients or arrived
                names = list(produced)
                torch.autograd.backward([produced[name] for name in names], [gradients[name] for name in names])
                outgoing = {name: _gradient(tensor) for name, tensor in received.items()}
            self._keep_pace(action, begin)
            self.seconds[action.kind] += time.perf_counter() - begin
            edges.send(action, outgoing)
        self.world.transport.flush()

    def _keep_pace(self, action: Action, begin: float) -> None:
        """On a paced device: wait until the pass has taken the told time."""
        if self.pace is not None:
            told_s = self.pace.pass_s(action)
            time.sleep(max(0.0, begin + told_s - time.perf_counter()))


class _Edges:
    """All edge ends of this rank for one step, and the messages asked for ahead."""

    def __init__(
        self, world: World, dtype_of: Callable[[Stage], torch.dtype], edge: EdgeSpec, schedule: Sequence[Action]
    ):
        self.world, self.dtype_of, self.edge = world, dtype_of, edge
        self.count = len(world.layout.stages)
        self.ends: dict[tuple[Pass, int], EdgeEnd] = {}
        for stage in world.place.stages:
            if stage.index > 0:
                self._join(stage.index - 1)
            if stage.index < self.count - 1:
                self._join(stage.index)
        self.left: dict[tuple[Pass, int], int] = {}
        """Messages still to be asked for, by direction and edge."""
        for action in schedule:
            wanted = self._incoming(action)
            if wanted is not None:
                self.left[wanted] = self.left.get(wanted, 0) + 1
        self.expected: dict[tuple[Pass, int], deque[Expected]] = {key: deque() for key in self.left}
        for key in self.left:
            self._ask(key)

    def is_last(self, chunk: int) -> bool:
        """Whether a chunk of this rank is the last stage."""
        return self.world.place.stages[chunk].index == self.count - 1

    def receive(self, action: Action) -> Tensors:
        """What a pass needs from a neighbour; nothing at the ends of the model. Asks for the one after it."""
        key = self._incoming(action)
        if key is None:
            return {}
        tensors = self.expected[key].popleft().wait()
        self._ask(key)
        return tensors

    def send(self, action: Action, tensors: Tensors) -> None:
        """Hand on what a pass made."""
        stage = self.world.place.stages[action.chunk].index
        edge = stage if action.kind is Pass.FORWARD else stage - 1
        if 0 <= edge < self.count - 1:
            self.ends[action.kind, edge].send(tensors)

    def _incoming(self, action: Action) -> tuple[Pass, int] | None:
        stage = self.world.place.stages[action.chunk].index
        edge = stage - 1 if action.kind is Pass.FORWARD else stage
        return (action.kind, edge) if 0 <= edge < self.count - 1 else None

    def _ask(self, key: tuple[Pass, int]) -> None:
        if self.left[key]:
            self.left[key] -= 1
            self.expected[key].append(self.ends[key].expect(self.edge.shapes))

    def _join(self, index: int) -> None:
        """Both directions of the edge after stage `index`."""
        layout, place, edge = self.world.layout, self.world.place, self.edge
        before, after = layout.stages[index], layout.stages[index + 1]
        cut = layout.sequence_parallel
        region = owned(place.stage, place.replica, place.tensor, edge.samples, edge.length, cut)
        for kind, source, target in ((Pass.FORWARD, before, after), (Pass.BACKWARD, after, before)):
            self.ends[kind, index] = EdgeEnd(
                self.world.transport,
                channel(index, kind),
                region,
                routes(source, target, edge.samples, edge.length, cut),
                place.rank,
                self.dtype_of(source),
                self.world.platform.device,
            )


def channel(edge: int, kind: Pass) -> int:
    """The channel of one direction of an edge."""
    return 2 * edge + (kind is Pass.BACKWARD)


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None, "every tensor of an edge takes part in the loss"
    return tensor.grad
