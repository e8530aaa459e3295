"""The gradient bridge: the two places where gradients leave an island. Both exchange float32 between single ranks.

A tied embedding has a copy on the last stage. Its gradient travels to the first stage, which alone updates the weight
and sends it back; so the copies never drift apart, whatever `tp` and `dp` the two stages have.

A stage whose replicas sit in several islands reduces inside each, then the islands' first replicas exchange their sums.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan.parallel.world import World, island_ranks
from titan.plan.edges import Interval, row_routes

Message = tuple[int, Interval]
"""Peer, and rows of this rank's part of the weight."""


class TiedBridge:
    """One rank's part in keeping the two copies of a tied embedding one parameter."""

    def __init__(self, world: World, weight: nn.Parameter | None):
        """weight: this rank's part of the embedding or its copy; None where it holds neither"""
        layout, self.world, self.weight = world.layout, world, weight
        first, last = layout.positions[0], layout.positions[-1]
        self.channel = 2 * (len(layout.stages) - 1)
        self.owners: list[Message] = []
        """Ranks that hold the weight of which this rank has a copy."""
        self.copies: list[Message] = []
        if first is last or weight is None:
            return
        place = world.place
        rows = weight.shape[0]
        for owner, copy, (start, end) in row_routes(first, last, rows * place.stage.tp):
            own = (start - place.tensor * rows, end - place.tensor * rows)
            if copy == place.rank:
                self.owners.append((owner, own))
            if owner == place.rank:
                self.copies.append((copy, own))

    def collect_gradients(self, gradient: Tensor | None) -> None:
        """Before replicas are summed: add the copies' gradients to those of the weight.

        What is left at the copies does not count in the norm, and what it does to them is overwritten.

        gradient: the float32 buffer of this rank's part
        """
        if gradient is None:
            return
        transport = self.world.transport
        for owner, (start, end) in self.owners:
            transport.send(gradient[start:end].clone(), owner, self.channel)
        for copy, (start, end) in self.copies:
            gradient[start:end] += transport.expect(torch.empty_like(gradient[start:end]), copy, self.channel).wait()
        transport.flush()

    def publish_weight(self) -> None:
        """After the update: give the copies the weight."""
        if self.weight is None:
            return
        transport, weight = self.world.transport, self.weight.detach()
        for copy, (start, end) in self.copies:
            transport.send(weight[start:end].float(), copy, self.channel + 1)
        for owner, (start, end) in self.owners:
            into = torch.empty_like(weight[start:end], dtype=torch.float32)
            weight[start:end] = transport.expect(into, owner, self.channel + 1).wait()
        transport.flush()


def sum_over_islands(world: World, gradients: Sequence[Tensor]) -> None:
    """Turn sums over the replicas of an island into sums over all, in place; in one order, so bit for bit equal.

    gradients: flat float32 buffers, the same on all replicas of this island
    """
    place = world.place
    stage = place.stage
    if len(stage.islands) < 2:
        return
    starts = [0, *itertools.accumulate(stage.islands)]
    leaders = [stage.rank(start, place.tensor) for start in starts[:-1]]
    mine = next(ranks for ranks in island_ranks(stage) if place.rank in ranks)
    channel = 2 * len(world.layout.stages)
    for gradient in gradients:
        if place.rank in leaders:
            others = {peer: torch.empty_like(gradient) for peer in leaders if peer != place.rank}
            arrivals = {peer: world.transport.expect(into, peer, channel) for peer, into in others.items()}
            own = gradient.clone()
            for peer in others:
                world.transport.send(own, peer, channel)
            parts = [own if peer == place.rank else arrivals[peer].wait() for peer in leaders]
            gradient.copy_(torch.stack(parts).sum(dim=0))
            world.transport.flush()
        if len(mine) > 1:
            dist.broadcast(gradient, src=mine[0], group=world.island_group)
