"""Features of one layer between the ranks of a tensor-parallel group, and a loss that joins the pass it came from."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def whole(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Parts of all ranks along a dimension, in rank order, on every rank.

    Made for what every rank then does alike: in the backward pass a rank keeps the gradient of its own part, which each
    of them has in full. Nothing is exchanged there.
    """
    gathered: Tensor = _Whole.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return gathered


def part_of(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """A rank's own even part of what all ranks have; the inverse of `whole`."""
    return x.chunk(group.size(), dim=dim)[group.rank()]


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts, dim=dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return part_of(gradient, ctx.dim, ctx.group), None, None


def with_loss(hidden: Tensor, loss: Tensor, scale: float) -> Tensor:
    """The hidden states unchanged; when a gradient comes back for them, `scale * loss` is differentiated as well.

    So a stage in the middle of a pipeline may have a loss of its own, and what runs the pipeline need not know. As
    megatron-core does for the balance of experts.

    scale: 1 / the global count of tokens, times the loss scale of fp16
    """
    joined: Tensor = _WithLoss.apply(hidden, loss, scale)  # type: ignore[no-untyped-call]
    return joined


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(loss)
        ctx.scale = scale
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        return gradient, torch.full_like(loss, ctx.scale), None
