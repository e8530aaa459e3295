"""What one look at all logits told: the few numbers per token from which losses and labels are made.

Shape letters as in titan.ops.head.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

PRODUCT_ROWS = 4096
"""Rows of the output weight multiplied at a time on a CPU: MKL packs them all first, in memory and time that show."""


@dataclass(frozen=True)
class VocabShard:
    """Rows [start, start + rows) of the output weight; ids from `size` on are padding."""

    start: int
    rows: int
    size: int
    group: dist.ProcessGroup | None
    """Tensor ranks that hold the other rows; None when this rank has all."""

    def real(self) -> "VocabShard":
        """Without its rows of padding."""
        return replace(self, rows=max(0, min(self.rows, self.size - self.start)))

    def within(self, whole: "VocabShard") -> slice:
        """Where its rows are among those of a part that holds them."""
        return slice(self.start - whole.start, self.start - whole.start + self.rows)


@dataclass
class TiledLogits:
    """Logits of a chunk of tokens, a tile at a time, in memory that all tiles and chunks use in turn."""

    hidden_ND: Tensor
    weight_VD: Tensor
    shard: VocabShard
    """What the weight's rows are."""
    space: Tensor
    """Of hidden's dtype, as many elements as the largest tile has logits."""
    here: int | None = None
    """Start of the tile that the memory holds."""

    def of(self, tile: VocabShard) -> Tensor:
        """[N, rows of the tile], multiplied unless the memory still holds them."""
        logits_NV = self.space[: len(self.hidden_ND) * tile.rows].view(len(self.hidden_ND), tile.rows)
        if tile.start == self.here:
            return logits_NV
        weight_VD = self.weight_VD[tile.within(self.shard)]
        step = PRODUCT_ROWS if self.hidden_ND.device.type == "cpu" else max(1, tile.rows)
        for row in range(0, tile.rows, step):
            rows = slice(row, min(row + step, tile.rows))
            torch.mm(self.hidden_ND, weight_VD[rows].t(), out=logits_NV[:, rows])
        self.here = tile.start
        return logits_NV

    def take(self, tile: VocabShard) -> Tensor:
        """The same, for a caller who writes over them."""
        logits_NV = self.of(tile)
        self.here = None
        return logits_NV


@dataclass(frozen=True)
class Look:
    """What all parts of the vocabulary together saw; float32."""

    log_sum_exp_N2: Tensor  # of logits, and of logits / T
    entropy_N: Tensor  # of softmax(logits)
    picked_NJ: Tensor
    top_values_NK: Tensor
    top_ids_NK: Tensor


def merge(seen: list[tuple[Tensor, Tensor, Tensor, Tensor]], shard: VocabShard, temperature: float) -> Look:
    """Chunks of columns, and tensor ranks through one exchange: in float64, where ids are whole and logits exact."""
    packed = torch.stack([torch.cat([item.double() for item in part], dim=1) for part in seen])
    if shard.group is not None:
        parts = [torch.empty_like(packed) for _ in range(shard.group.size())]
        dist.all_gather(parts, packed, group=shard.group)
        packed = torch.cat(parts)
    wanted = seen[0][2].shape[1]
    sums_PN4, picked_PNJ, values_PNK, ids_PNK = torch.split(packed, [4, seen[0][1].shape[1], wanted, wanted], dim=2)
    maximum_N = sums_PN4[..., 0].amax(dim=0)
    below_PN = (sums_PN4[..., 0] - maximum_N).clamp_min(-1e4)  # a part of padding alone has -inf, and sums of 0
    total_N = (below_PN.exp() * sums_PN4[..., 1]).sum(dim=0)
    tempered_N = ((below_PN / temperature).exp() * sums_PN4[..., 2]).sum(dim=0)
    moment_N = (below_PN.exp() * (sums_PN4[..., 3] + below_PN * sums_PN4[..., 1])).sum(dim=0)
    # Parts are in order of ids and each has its own in order, so a stable sort puts equal logits in order of ids.
    values_NK, order_NK = values_PNK.transpose(0, 1).flatten(1).sort(dim=1, descending=True, stable=True)
    ids_NK = ids_PNK.transpose(0, 1).flatten(1).gather(1, order_NK[:, :wanted])
    return Look(
        torch.stack([maximum_N + total_N.log(), maximum_N / temperature + tempered_N.log()], dim=1).float(),
        (total_N.log() - moment_N / total_N).float(),
        picked_PNJ.sum(dim=0).float(),
        values_NK[:, :wanted].float(),
        ids_NK.long(),
    )
