"""How alike a student's attention and self-attention relations are to its teacher's.

MiniLMv2 (arXiv 2012.15828) joins all heads of a layer's queries, keys or values, cuts them into R relation heads again,
and compares softmax(A_a A_a^T / sqrt(d_r)) of teacher and student by KL, for each relation head a. R is the same for
both, so head counts and widths may be unlike. With queries on the left and keys on the right, and R the number of
heads, the same is the layer's attention: ERNIE 3.0 Titan's loss (arXiv 2112.12731, section 5).

A decoder's position relates only to those it sees, itself included: its attention has no others, and what is taught at
a position must not depend on tokens that come later, which neither model knows there. A A^T is symmetric, so the later
half holds no score that the earlier half lacks.

Shape letters: S positions, B samples, H heads, D width of a head.
"""

import math

import torch.distributed as dist
from torch import Tensor

from titan.ops.attention import Visibility
from titan.ops.features.exchange import part_of, whole
from titan.ops.features.pairs import RuleName, Sides, compare_rows

Pair = tuple[Tensor, Tensor]
"""Left and right, [S, B, H, D] each; the right may have fewer heads, each serving several of the left."""


def relation_loss(
    student: Pair,
    teacher: Pair,
    relation_heads: int,
    visibility: Visibility,
    *,
    rule: RuleName = "kl",
    group: dist.ProcessGroup | None = None,
    chunk_elements: int | None = None,
) -> Tensor:
    """Loss of each token, a mean over relation heads, summed over tokens: a scalar, not divided by their number.

    student: this rank's heads; gradients flow into them
    teacher: all heads, as constants
    rule:    `kl`: KL(teacher || student) in nats; `squared`: the squared distance of the two distributions
    group:   tensor ranks that hold the student's heads. Where each has whole relation heads (`shared_out`), the ranks'
             results add up to the loss; else each has all of it
    raises:  ValueError if a width cannot be cut into that many relation heads
    """
    own = shared_out(relation_heads, group)
    if group is not None and not own:
        left = whole(student[0], 2, group)
        student = left, left if student[1] is student[0] else whole(student[1], 2, group)
    parts = group.size() if group is not None and own else 1
    learner = _sides(student, relation_heads // parts, None)
    told = _sides(teacher, relation_heads, group if own else None)
    return compare_rows(learner, told, visibility, rule, chunk_elements) / relation_heads


def shared_out(relation_heads: int, group: dist.ProcessGroup | None) -> bool:
    """Whether tensor ranks have whole relation heads each, so that they need not exchange anything."""
    return group is not None and relation_heads % group.size() == 0


def _sides(pair: Pair, relation_heads: int, group: dist.ProcessGroup | None) -> Sides:
    left, right = pair
    if left.shape[2] != right.shape[2]:
        right = right.repeat_interleave(left.shape[2] // right.shape[2], dim=2)
    cut = _relation_heads(left, relation_heads, group)
    other = cut if right is left else _relation_heads(right, relation_heads, group)
    return Sides(cut, other, 1.0 / math.sqrt(cut.shape[2]))


def _relation_heads(x: Tensor, count: int, group: dist.ProcessGroup | None) -> Tensor:
    """[S, B, H, D] to [B * count, S, H * D / count]: heads joined and cut again; with a group only this rank's."""
    heads, width = x.shape[2:]
    if heads * width % count:
        raise ValueError(
            f"{heads} heads of {width} cannot be cut into {count} relation heads; take a divisor of {heads}"
        )
    joined = x.reshape(*x.shape[:2], count, -1)
    if group is not None:
        joined = part_of(joined, 2, group)
    return joined.permute(1, 2, 0, 3).flatten(0, 1)
