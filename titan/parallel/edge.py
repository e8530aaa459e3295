"""One rank's side of an edge: sends what it owns to those who need it, and puts together what it needs from parts."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from titan.parallel.transport import Arrival, Transport
from titan.plan.edges import Region, Route

Tensors = dict[str, Tensor]
TrailingShapes = Mapping[str, tuple[int, ...]]
"""Shape of every tensor of an edge after [positions, samples], by name."""


class EdgeEnd:
    """One direction of an edge on one rank, for micro-batches of one size."""

    def __init__(
        self, transport: Transport, channel: int, region: Region, routes: Sequence[Route], rank: int,
        dtype: torch.dtype, device: torch.device,
    ):  # fmt: skip
        """region: what this rank owns;  routes: of the whole edge in this direction;  dtype: of what travels"""
        self.transport, self.channel, self.region, self.dtype, self.device = transport, channel, region, dtype, device
        self.outgoing = [route for route in routes if route.source == rank]
        self.incoming = [route for route in routes if route.target == rank]

    def send(self, tensors: Tensors) -> None:
        """Send every peer its part of this rank's tensors, [positions, samples, ...]."""
        for name in sorted(tensors):
            for route in self.outgoing:
                self.transport.send(tensors[name][self.region.slices_of(route.region)], route.target, self.channel)

    def expect(self, shapes: TrailingShapes) -> "Expected":
        """Ask for the next micro-batch; its messages may come from now on."""
        whole = {name: self._empty(self.region, shapes[name]) for name in sorted(shapes)}
        parts: list[tuple[Arrival, Tensor | None]] = []
        for name, tensor in whole.items():
            for route in self.incoming:
                if route.region == self.region:
                    parts.append((self.transport.expect(tensor, route.source, self.channel), None))
                    continue
                piece = self._empty(route.region, shapes[name])
                place = tensor[self.region.slices_of(route.region)]
                parts.append((self.transport.expect(piece, route.source, self.channel), place))
        return Expected(whole, parts)

    def _empty(self, region: Region, trailing: tuple[int, ...]) -> Tensor:
        return torch.empty((*region.shape, *trailing), dtype=self.dtype, device=self.device)


class Expected:
    """Tensors of a micro-batch that are on their way."""

    def __init__(self, whole: Tensors, parts: list[tuple[Arrival, Tensor | None]]):
        self.whole, self.parts = whole, parts

    def wait(self) -> Tensors:
        """The tensors, all parts in place."""
        for arrival, place in self.parts:
            piece = arrival.wait()
            if place is not None:
                place.copy_(piece)
        return self.whole
