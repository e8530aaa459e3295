"""Runs a schedule: moves named tensors over the edges of the pipeline and calls forward and backward in order."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from titan.parallel.world import World
from titan.plan.schedule import Action, Pass

Tensors = dict[str, Tensor]
EdgeShapes = Mapping[str, tuple[int, ...]]
"""Shape of every tensor that crosses an edge, by name."""
StageForward = Callable[[Tensors], Tensors]
HeadStep = Callable[[int, Tensor], Tensor | None]
"""Takes a micro-batch's index and its last hidden states; returns their gradient, or None when only looking."""


class PipelineExecutor:
    """One rank's part of the pipeline.

    Neighbouring stages have equal `tp` and `dp`, so an edge joins the ranks at the same position; sends do not block,
    receives do, up to the process group's timeout.
    """

    def __init__(self, world: World, dtype: torch.dtype):
        self.world, self.dtype = world, dtype
        index = world.place.stage.index
        self.is_first, self.is_last = index == 0, index == len(world.layout.stages) - 1
        self.sends: list[tuple[dist.Work, Tensor]] = []

    def run(
        self,
        schedule: Sequence[Action],
        forward: StageForward,
        inputs: Sequence[Tensors],
        edge_shapes: Sequence[EdgeShapes],
        head: HeadStep,
    ) -> None:
        """Run all actions of a step; gradients accumulate where the module keeps them.

        inputs:      what this stage gets for each micro-batch besides the edge (tokens, rope, mask)
        edge_shapes: what crosses the edge for each micro-batch
        head:        called on the last stage right after each forward pass
        """
        backward_wanted = any(action.kind is Pass.BACKWARD for action in schedule)
        in_flight: dict[int, tuple[Tensors, Tensors, Tensors]] = {}  # received, produced, gradients of produced
        for action in schedule:
            index = action.micro_batch
            if action.kind is Pass.FORWARD:
                received = {} if self.is_first else self._receive(-1, edge_shapes[index])
                for tensor in received.values():
                    tensor.requires_grad_(backward_wanted)
                with torch.set_grad_enabled(backward_wanted):
                    produced = forward({**inputs[index], **received})
                gradients: Tensors = {}
                if self.is_last:
                    with torch.no_grad():
                        gradient = head(index, produced["hidden"].detach())
                    if gradient is not None:
                        gradients = {"hidden": gradient}
                else:
                    self._send(+1, {name: tensor.detach() for name, tensor in produced.items()})
                if backward_wanted:
                    in_flight[index] = (received, produced, gradients)
            else:
                received, produced, gradients = in_flight.pop(index)
                if not self.is_last:
                    gradients = self._receive(+1, edge_shapes[index])
                names = list(produced)
                torch.autograd.backward([produced[name] for name in names], [gradients[name] for name in names])
                if not self.is_first:
                    self._send(-1, {name: _gradient(tensor) for name, tensor in received.items()})
        for work, _ in self.sends:
            work.wait()
        self.sends.clear()

    def _send(self, offset: int, tensors: Tensors) -> None:
        peer = self.world.neighbour(offset)
        for name in sorted(tensors):
            tensor = tensors[name].contiguous()
            work = dist.isend(tensor, peer)
            assert work is not None
            self.sends.append((work, tensor))  # the tensor must live until it has left

    def _receive(self, offset: int, shapes: EdgeShapes) -> Tensors:
        peer = self.world.neighbour(offset)
        tensors = {
            name: torch.empty(shapes[name], dtype=self.dtype, device=self.world.platform.device)
            for name in sorted(shapes)
        }
        for tensor in tensors.values():
            dist.recv(tensor, peer)
        return tensors


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None, "every tensor of an edge takes part in the loss"
    return tensor.grad
