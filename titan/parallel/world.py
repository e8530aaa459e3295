"""A role's world: its ranks, where this one stands, and the process groups inside. No group ever spans two roles."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch._C._distributed_c10d import Store

from titan.plan.layout import Layout, Place
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
    tied_group: dist.ProcessGroup | None
    """This rank and its partner on the other end of the pipeline, which hold copies of a tied embedding."""

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

    def neighbour(self, offset: int) -> int:
        """World rank at the same replica and tensor position of the stage `offset` further."""
        stage = self.layout.stages[self.place.stage.index + offset]
        return stage.rank(self.place.replica, self.place.tensor)


def join_world(
    role: str, layout: Layout, rank: int, platform: Platform, store: Store, timeout_s: float, tied: bool
) -> World:
    """Meet the other ranks of the role in `store` and form its groups. Every rank calls it once."""
    join_process_group(platform, store, rank, layout.num_ranks, timeout_s)
    place = layout.place(rank)

    def group_of(all_groups: list[list[int]]) -> dist.ProcessGroup:
        """Form every group, in one order on every rank; return the one this rank is in."""
        mine: dist.ProcessGroup | None = None
        for ranks in all_groups:
            group: dist.ProcessGroup = dist.new_group(ranks)
            if rank in ranks:
                mine = group
        assert mine is not None, "every rank is in one group of each kind"
        return mine

    stages = layout.stages
    tensor = group_of([[s.rank(r, t) for t in range(s.tp)] for s in stages for r in range(s.dp)])
    data = group_of([[s.rank(r, t) for r in range(s.dp)] for s in stages for t in range(s.tp)])
    alone = group_of([[r] for r in range(layout.num_ranks)])
    # ranks whose gradients together make one copy of the model: one replica of every stage
    model = group_of([[s.rank(r, t) for s in stages for t in range(s.tp)] for r in range(stages[0].dp)])
    tied_group = None
    if tied and len(stages) > 1:
        ends = (stages[0], stages[-1])
        pairs = [[end.rank(r, t) for end in ends] for r in range(ends[0].dp) for t in range(ends[0].tp)]
        formed = [dist.new_group(pair) for pair in pairs]
        tied_group = next((group for group, pair in zip(formed, pairs, strict=True) if rank in pair), None)
    groups = ProcessGroupCollection(
        tp=tensor, dp=data, dp_cp=data, cp=alone, pp=alone, ep=alone, embd=None, mp=model,
        expt_tp=alone, expt_dp=alone, tp_ep=alone, tp_ep_pp=alone, intra_dist_opt=dist.group.WORLD,
    )  # fmt: skip
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:  # scratch memory of sequence-parallel gathers; names no group
        parallel_state._set_global_memory_buffer()
    return World(role, layout, place, platform, groups, tied_group)
