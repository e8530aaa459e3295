"""How alike a student's hidden states are to its teacher's: position by position, or as positions resemble each other.

Shape letters: S positions, B samples, D the student's width, T the teacher's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from titan.ops.attention import Visibility
from titan.ops.features.pairs import Sides, compare_rows

HINT_ROWS = 4096
"""Tokens whose error is made at a time."""


def hint_loss(student_SBD: Tensor, teacher_SBT: Tensor, projection_TD: Tensor | None, rows: int = HINT_ROWS) -> Tensor:
    """Squared distance of the projected student to the teacher (FitNets, arXiv 1412.6550, eq. 3), a mean over the
    teacher's width, summed over tokens: a scalar, not divided by their number.

    projection_TD: the learned regressor; None where the widths are the same
    raises:        ValueError if the widths are unlike and there is no projection
    """
    if projection_TD is None and student_SBD.shape[-1] != teacher_SBT.shape[-1]:
        raise ValueError(
            f"hidden states of {student_SBD.shape[-1]} and {teacher_SBT.shape[-1]} need a projection between them"
        )
    loss: Tensor = _Hint.apply(student_SBD, teacher_SBT, projection_TD, rows)  # type: ignore[no-untyped-call]
    return loss


class _Hint(torch.autograd.Function):
    """The forward pass makes the gradient as well, so that the error of all tokens never exists at once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, told: Tensor, projection: Tensor | None, rows: int) -> Tensor:
        student, teacher = hidden.flatten(0, 1), told.flatten(0, 1)
        weight = None if projection is None else _wide(projection)
        gradient = torch.empty_like(student, dtype=_wide(student[:0]).dtype)
        of_weight = None if weight is None else torch.zeros_like(weight)
        loss = gradient.new_zeros(())
        for start in range(0, len(student), rows):
            chunk = slice(start, start + rows)
            seen = _wide(student[chunk])
            error = (seen if weight is None else seen @ weight.T) - _wide(teacher[chunk])
            loss += error.square().sum()
            gradient[chunk] = error if weight is None else error @ weight
            if of_weight is not None:
                of_weight.addmm_(error.T, seen)
        ctx.save_for_backward(gradient.view(hidden.shape), of_weight)
        ctx.width, ctx.dtypes = teacher.shape[1], (hidden.dtype, None if projection is None else projection.dtype)
        mean: Tensor = loss / ctx.width
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        factor = upstream * (2.0 / ctx.width)
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        of_hidden, of_projection = (None if g is None else (g * factor).to(dtype) for g, dtype in gradients)
        return of_hidden, None, of_projection, None


def affinity_loss(
    student_SBD: Tensor, teacher_SBT: Tensor, visibility: Visibility, chunk_elements: int | None = None
) -> Tensor:
    """|cos(h_t, h_u) of the student - that of the teacher|, a mean over the positions u that t sees, summed over tokens
    (the affinity of arXiv 2107.12087, over what a decoder sees): a scalar, not divided by their number.
    """
    student, teacher = _directions(student_SBD), _directions(teacher_SBT.detach())
    return compare_rows(Sides(student, student), Sides(teacher, teacher), visibility, "absolute", chunk_elements)


def _directions(hidden: Tensor) -> Tensor:
    """[S, B, D] to [B, S, D] of length one."""
    return F.normalize(_wide(hidden), dim=-1).transpose(0, 1).contiguous()


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()
