"""A role's world: its ranks, where this one stands, and the process groups inside. No group ever spans two roles."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._C._distributed_c10d import Store

from titan.parallel.host_transport import HostTransport
from titan.parallel.transport import DirectTransport, Transport
from titan.plan.layout import Layout, Place, Stage
from titan.platform.device import Platform, join_process_group


@dataclass(frozen=True)
class World:
    """One rank's view of its role."""

    role: str
    layout: Layout
    place: Place
    platform: Platform
    groups: ProcessGroupCollection
    """Explicit groups for megatron-core: `tp`, `dp` and the rest; nothing is looked up globally."""
    island_group: dist.ProcessGroup
    """Replicas of this rank's shard in its own island: all of them, unless the layout says otherwise."""
    transport: Transport
    """Messages between single ranks."""

    @property
    def is_lead(self) -> bool:
        """True on the rank that speaks for the role."""
        return self.place.rank == 0

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """float64 sums over the whole role; also a point that every rank has reached."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.layout.num_ranks > 1:
            dist.all_reduce(total)
        return total.tolist()

    def leave(self) -> None:
        """Close connections and groups."""
        self.transport.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def join_world(
    role: str, layout: Layout, rank: int, platform: Platform, store: Store, timeout_s: float, address: str = "127.0.0.1"
) -> World:
    """Meet the other ranks of the role in `store` and form its groups. Every rank calls it once.

    address: this host's, as the other ranks reach it
    """
    join_process_group(platform, store, rank, layout.num_ranks, timeout_s)
    place = layout.place(rank)
    positions = layout.positions
    tensor = _group_of(rank, [[s.rank(r, t) for t in range(s.tp)] for s in positions for r in range(s.dp)])
    data = _group_of(rank, [[s.rank(r, t) for r in range(s.dp)] for s in positions for t in range(s.tp)])
    island = data
    if any(stage.islands for stage in positions):
        island = _group_of(rank, [group for stage in positions for group in island_ranks(stage)])
    alone = _group_of(rank, [[r] for r in range(layout.num_ranks)])
    # Gradient norms are summed over the whole role: stages may have unlike numbers of replicas, so ranks do not fall
    # into groups that hold one copy of the model each; parallel.stage marks the copies that do not count.
    groups = ProcessGroupCollection(
        tp=tensor, dp=island, dp_cp=island, cp=alone, pp=alone, ep=alone, embd=None, mp=dist.group.WORLD,
        expt_tp=alone, expt_dp=alone, tp_ep=alone, tp_ep_pp=alone, intra_dist_opt=dist.group.WORLD,
    )  # fmt: skip
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:  # scratch memory of sequence-parallel gathers; names no group
        parallel_state._set_global_memory_buffer()
    if layout.transport == "host":
        transport: Transport = HostTransport(rank, layout.num_ranks, store, address, platform.device, timeout_s)
    else:
        transport = DirectTransport(_channel_groups(layout, platform))
    return World(role, layout, place, platform, groups, island, transport)


def island_ranks(stage: Stage) -> list[list[int]]:
    """Ranks that reduce gradients together inside one island of a stage, island by island and tensor rank by rank."""
    islands = stage.islands or (stage.dp,)
    starts = [0, *itertools.accumulate(islands)]
    return [
        [stage.rank(replica, tensor) for replica in range(start, start + size)]
        for start, size in zip(starts, islands, strict=False)
        for tensor in range(stage.tp)
    ]


def _group_of(rank: int, all_groups: list[list[int]]) -> dist.ProcessGroup:
    """Form every group, in one order on every rank; return the one this rank is in."""
    mine: dist.ProcessGroup | None = None
    for ranks in all_groups:
        group: dist.ProcessGroup = dist.new_group(ranks)
        if rank in ranks:
            mine = group
    assert mine is not None, "every rank is in one group of each kind"
    return mine


def _channel_groups(layout: Layout, platform: Platform) -> Callable[[int], dist.ProcessGroup | None]:
    """The group of each channel where the backend has no tags; gloo has."""
    if platform.has_tags:
        return lambda channel: None
    groups = [
        dist.new_group(sorted({*before.ranks, *after.ranks}))
        for before, after in itertools.pairwise(layout.stages)
        for _ in ("forward", "backward")
    ]
    # what is no edge's (the gradient bridge) is exchanged between steps, in one order on both ends
    return lambda channel: groups[channel] if channel < len(groups) else dist.group.WORLD
