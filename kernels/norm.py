"""Shapes and gradients of RMSNorm and LayerNorm."""

from typing import Any

import torch
from torch import Tensor


def register(library: str) -> None:
    """Tell torch about `<library>::rms_norm` and `<library>::layer_norm`."""
    _register_rms_norm(library)
    _register_layer_norm(library)


def _register_rms_norm(library: str) -> None:
    ops = getattr(torch.ops, library)

    @torch.library.register_fake(f"{library}::rms_norm")
    def _(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return *_rows(x, residual), _statistic(x)

    @torch.library.register_fake(f"{library}::rms_norm_backward")
    def _(
        grad: Tensor, grad_hidden: Tensor | None, hidden: Tensor, weight: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        return hidden.new_empty(hidden.shape), _sum_over_rows(weight)

    def setup(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor, float], output: tuple[Tensor, ...]) -> None:
        x, residual, weight, _ = inputs
        _, hidden, rstd = output
        ctx.save_for_backward(x if residual is None else hidden, weight, rstd)
        ctx.mark_non_differentiable(*([hidden, rstd] if residual is None else [rstd]))
        ctx.set_materialize_grads(False)
        ctx.has_residual = residual is not None

    def backward(ctx: Any, grad: Tensor | None, grad_hidden: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:  # only the sum went on: the gradient passes through it
            return grad_hidden, grad_hidden if ctx.has_residual else None, None, None
        hidden, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = ops.rms_norm_backward(grad, grad_hidden, hidden, weight, rstd)
        return grad_x, grad_x if ctx.has_residual else None, grad_weight.to(weight.dtype), None

    torch.library.register_autograd(f"{library}::rms_norm", backward, setup_context=setup)


def _register_layer_norm(library: str) -> None:
    ops = getattr(torch.ops, library)

    @torch.library.register_fake(f"{library}::layer_norm")
    def _(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        return *_rows(x, residual), _statistic(x), _statistic(x)

    @torch.library.register_fake(f"{library}::layer_norm_backward")
    def _(
        grad: Tensor, grad_hidden: Tensor | None, hidden: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return hidden.new_empty(hidden.shape), _sum_over_rows(weight), _sum_over_rows(weight)

    def setup(
        ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor, Tensor, float], output: tuple[Tensor, ...]
    ) -> None:
        x, residual, weight, _, _ = inputs
        _, hidden, mean, rstd = output
        ctx.save_for_backward(x if residual is None else hidden, weight, mean, rstd)
        ctx.mark_non_differentiable(*([hidden, mean, rstd] if residual is None else [mean, rstd]))
        ctx.set_materialize_grads(False)
        ctx.has_residual = residual is not None

    def backward(ctx: Any, grad: Tensor | None, grad_hidden: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return grad_hidden, grad_hidden if ctx.has_residual else None, None, None, None
        hidden, weight, mean, rstd = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = ops.layer_norm_backward(grad, grad_hidden, hidden, weight, mean, rstd)
        return (
            grad_x,
            grad_x if ctx.has_residual else None,
            grad_weight.to(weight.dtype),
            grad_bias.to(weight.dtype),
            None,
        )

    torch.library.register_autograd(f"{library}::layer_norm", backward, setup_context=setup)


def _rows(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Shapes of the normed rows and of hidden, which is empty without a residual: an output never is an input."""
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


def _statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def _sum_over_rows(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.float32)
