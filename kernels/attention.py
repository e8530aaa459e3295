"""Shapes and gradient of attention."""

from typing import Any

import torch
from torch import Tensor


def register(library: str) -> None:
    """Tell torch about `<library>::attention`."""
    ops = getattr(torch.ops, library)

    @torch.library.register_fake(f"{library}::attention")
    def _(
        query: Tensor, key: Tensor, value: Tensor, query_segments: Tensor | None, key_segments: Tensor | None,
        causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        queries, batch, heads, _ = query.shape
        return query.new_empty(query.shape), query.new_empty(batch, heads, queries, dtype=torch.float32)

    @torch.library.register_fake(f"{library}::attention_backward")
    def _(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, query_segments: Tensor | None,
        key_segments: Tensor | None, out: Tensor, log_sum_exp: Tensor, causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        grads = ops.attention_backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale)
        return *grads, None, None, None, None

    torch.library.register_autograd(f"{library}::attention", backward, setup_context=setup)
