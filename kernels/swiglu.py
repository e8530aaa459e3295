"""Shapes and gradient of SwiGLU."""

from typing import Any

import torch
from torch import Tensor


def register(library: str) -> None:
    """Tell torch about `<library>::swiglu`."""
    ops = getattr(torch.ops, library)

    @torch.library.register_fake(f"{library}::swiglu")
    def _(x: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)

    @torch.library.register_fake(f"{library}::swiglu_backward")
    def _(grad: Tensor, x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ops.swiglu_backward(grad, *ctx.saved_tensors)

    torch.library.register_autograd(f"{library}::swiglu", backward, setup_context=setup)
