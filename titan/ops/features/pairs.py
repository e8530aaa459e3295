"""Compares how a student and its teacher relate the positions of a sample: rows of scores, a chunk at a time.

A score is left . right for a pair of positions; a rule turns a row of the student's scores and one of the teacher's
into a loss and its gradient in the student's. Both are made in one pass, so that the scores of one chunk are all that
lives: a few times `chunk_elements` numbers, whatever the number of heads and samples.

Shape letters: N pairs of (sample, head), S positions, D width of a head; K keys that a chunk of rows may see.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titan.ops.attention import Visibility

CHUNK_ELEMENTS = 1 << 24
"""Scores of one chunk: 64 MB of float32."""
CPU_CHUNK_ELEMENTS = 1 << 16
"""On a CPU, where 256 kB stay in its cache."""
RuleName = Literal["kl", "squared", "absolute"]
Rule = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Student's scores, teacher's scores and who sees whom, [n, rows, K] each, to the loss summed over rows, and its
gradient in the student's scores. May write over the scores."""


@dataclass(frozen=True)
class Sides:
    """What scores are made of: scale * left . right."""

    left_NSD: Tensor
    right_NSD: Tensor
    """May be the same tensor as the left."""
    scale: float = 1.0

    def scores(self, pairs: slice, rows: slice, keys: slice) -> Tensor:
        """[n, rows, K] in float32, or float64 where the sides are."""
        left, right = _wide(self.left_NSD[pairs, rows]), _wide(self.right_NSD[pairs, keys])
        return torch.bmm(left, right.transpose(1, 2)).mul_(self.scale)


def compare_rows(
    student: Sides, teacher: Sides, visibility: Visibility, rule: RuleName, chunk_elements: int | None = None
) -> Tensor:
    """The rule's loss summed over all rows of all pairs: a scalar, float32 or float64, to differentiate once.

    student, teacher: of unlike D; pairs run over samples, then heads. The teacher gets no gradient
    visibility:       a position's row has the positions it sees; there is no memory before the first
    """
    right = None if student.right_NSD is student.left_NSD else student.right_NSD
    if chunk_elements is None:
        chunk_elements = CPU_CHUNK_ELEMENTS if student.left_NSD.device.type == "cpu" else CHUNK_ELEMENTS
    loss: Tensor = _Compare.apply(  # type: ignore[no-untyped-call]
        student.left_NSD, right, student.scale, teacher, visibility, RULES[rule], chunk_elements
    )
    return loss


class _Compare(torch.autograd.Function):
    """The forward pass makes the gradient as well: a second pass would make every score again."""

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor | None, scale: float, teacher: Sides, visibility: Visibility, rule: Rule,
        chunk_elements: int,
    ) -> Tensor:  # fmt: skip
        student = Sides(left, left if right is None else right, scale)
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss, *gradients = _compare(student, teacher, visibility, rule, chunk_elements, wanted)
        if wanted and right is None:  # added before they are rounded to the type of the features
            gradients = [gradients[0].add_(gradients[1])]
        ctx.save_for_backward(*gradients)
        ctx.dtype = left.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_left, *of_right = [(gradient * upstream).to(ctx.dtype) for gradient in ctx.saved_tensors]
        return of_left, of_right[0] if of_right else None, None, None, None, None, None


def _compare(
    student: Sides, teacher: Sides, visibility: Visibility, rule: Rule, chunk_elements: int, wanted: bool
) -> tuple[Tensor, ...]:
    """Loss, and if wanted its gradients in the student's left and right."""
    left, right = student.left_NSD, student.right_NSD
    size, length = left.shape[:2]
    wide = torch.float64 if left.dtype == torch.float64 else torch.float32
    loss = torch.zeros((), dtype=wide, device=left.device)
    gradients = [torch.zeros_like(side, dtype=wide) for side in (left, right)] if wanted else []
    num_rows = min(length, max(1, chunk_elements // length))
    num_pairs = max(1, chunk_elements // (num_rows * length))
    for first in range(0, size, num_pairs):
        pairs = slice(first, min(first + num_pairs, size))
        for start in range(0, length, num_rows):
            rows = slice(start, min(start + num_rows, length))
            keys = slice(0, rows.stop if visibility.causal else length)
            seen = _seen(visibility, pairs, size, rows, keys, left.device)
            chunk = (pairs, rows, keys)
            part, slope = rule(student.scores(*chunk), teacher.scores(*chunk), seen)
            loss += part
            if wanted:
                slope.mul_(student.scale)
                gradients[0][pairs, rows] += torch.bmm(slope, _wide(right[pairs, keys]))
                gradients[1][pairs, keys] += torch.bmm(slope.transpose(1, 2), _wide(left[pairs, rows]))
    return loss, *gradients


def _seen(visibility: Visibility, pairs: slice, size: int, rows: slice, keys: slice, device: torch.device) -> Tensor:
    """True where a row sees a key: bool [n or 1, rows, K]."""
    row, key = (torch.arange(part.start, part.stop, device=device) for part in (rows, keys))
    seen = torch.ones(1, len(row), len(key), dtype=torch.bool, device=device)
    if visibility.causal:
        seen = seen.tril(rows.start - keys.start)
    if visibility.query_segments is not None and visibility.key_segments is not None:
        heads = size // len(visibility.query_segments)
        samples = torch.arange(pairs.start, pairs.stop, device=device) // heads
        queries, others = visibility.query_segments[samples, rows], visibility.key_segments[samples, keys]
        seen = seen & (queries[:, :, None] == others[:, None, :])
    return seen


# --- rules; every row sees itself ---


def _kl(student: Tensor, teacher: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) of p = softmax(teacher), q = softmax(student); its gradient in the student's scores is q - p."""
    log_p, log_q = _log_softmax(teacher, seen), _log_softmax(student, seen)
    p = log_p.exp()
    slope = log_q.exp().sub_(p)
    return p.mul_(log_p.sub_(log_q).masked_fill_(~seen, 0.0)).sum(), slope


def _squared(student: Tensor, teacher: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of (q - p)^2 over keys; for e = q - p the gradient is 2 q (e - sum of e q)."""
    q = _log_softmax(student, seen).exp_()
    error = q - _log_softmax(teacher, seen).exp_()
    loss = error.square().sum()
    error -= (error * q).sum(dim=-1, keepdim=True)
    return loss, error.mul_(q).mul_(2.0)


def _absolute(student: Tensor, teacher: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the keys of a row of |student - teacher|."""
    error = student.sub_(teacher).masked_fill_(~seen, 0.0)
    count = seen.sum(dim=-1, keepdim=True)
    return (error.abs() / count).sum(), error.sign_().div_(count)


RULES: dict[RuleName, Rule] = {"kl": _kl, "squared": _squared, "absolute": _absolute}


def _log_softmax(scores: Tensor, seen: Tensor) -> Tensor:
    return scores.masked_fill_(~seen, -torch.inf).log_softmax(dim=-1)


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()
