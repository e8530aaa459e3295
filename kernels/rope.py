"""Shape and gradient of the rotary position embedding."""

from typing import Any

import torch
from torch import Tensor


def register(library: str) -> None:
    """Tell torch about `<library>::rope`."""
    ops = getattr(torch.ops, library)

    @torch.library.register_fake(f"{library}::rope")
    def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
        return x.new_empty(x.shape)

    def setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
        _, cos, sin, ctx.inverse = inputs
        if cos.requires_grad or sin.requires_grad:
            raise RuntimeError("rope: cos and sin have no gradient; detach them")
        ctx.save_for_backward(cos, sin)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return ops.rope(grad, cos, sin, not ctx.inverse), None, None, None

    torch.library.register_autograd(f"{library}::rope", backward, setup_context=setup)
