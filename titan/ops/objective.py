"""What a head is asked for, and the mistakes in it that can be told before any work.

Shape letters as in titan.ops.head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from titan.ops.divergence import Loss, check_loss
from titan.ops.label import DenseLabels, SparseLabels, TailDraws
from titan.ops.look import VocabShard


@dataclass(frozen=True)
class Objective:
    """loss = (1 - weight) * cross-entropy + weight * T^2 * D(teacher, student) + z_loss * log_sum_exp^2, a token."""

    weight: float = 0.0
    temperature: float = 1.0
    z_loss: float = 0.0
    """Keeps the softmax's normaliser near 1 (arXiv 2204.02311, section 5); always at temperature 1."""
    loss: Loss = "forward_kl"
    """D at temperature T (titan.ops.divergence.parts): KL(p || q), KL(q || p), generalised JSD, or the mean
    squared difference of log-probabilities. Of sparse labels only forward KL with draws is unbiased."""
    beta: float = 0.5
    """Of jsd: the teacher's share of the middle, between 0 and 1. D goes to 0 at both ends, as beta KL(p || q) and as
    (1 - beta) KL(q || p)."""


@dataclass(frozen=True)
class Chunk:
    """How much of the logits exists at a time."""

    tokens: int | None = None
    """None: what titan.ops.head's CHUNK_ELEMENTS and CHUNK_TOKENS say."""
    columns: int | None = None
    """Rows of the output weight at a time; None for all of this rank's. With fewer, logits are computed twice."""


def check_head(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, token_weight_N: Tensor, shard: VocabShard,
    objective: Objective, chunk: Chunk,
) -> None:  # fmt: skip
    """Shapes, ids and numbers. Raises ValueError naming the argument."""
    tokens, width = hidden_ND.shape
    if weight_VD.shape != (shard.rows, width):
        raise ValueError(f"weight_VD must be [{shard.rows}, {width}], got {list(weight_VD.shape)}")
    for name, x in (("targets_N", targets_N), ("token_weight_N", token_weight_N)):
        if x.shape != (tokens,):
            raise ValueError(f"{name} must be [{tokens}], got {list(x.shape)}")
    if tokens and targets_N.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to wait
        low, high = int(targets_N.min()), int(targets_N.max())
        if low < 0 or high >= shard.size:
            raise ValueError(f"targets_N must be in [0, {shard.size}), got {low} to {high}")
    if weight_VD.dtype != hidden_ND.dtype:
        raise ValueError(f"weight_VD must be {hidden_ND.dtype} as hidden_ND is, got {weight_VD.dtype}")
    if not 0 <= objective.weight <= 1:
        raise ValueError(f"objective.weight must be from 0 to 1, got {objective.weight}")
    if objective.temperature <= 0 or objective.z_loss < 0:
        raise ValueError(f"objective must have a temperature above 0 and a z_loss of at least 0, got {objective}")
    for name, count in (("tokens", chunk.tokens), ("columns", chunk.columns)):
        if count is not None and count < 1:
            raise ValueError(f"chunk.{name} must be at least 1, got {count}")


def check_head_labels(
    tokens: int, shard: VocabShard, objective: Objective, labels: SparseLabels | DenseLabels | None, top_k: int,
    draws: TailDraws | None, whole: bool, chunk: Chunk,
) -> None:  # fmt: skip
    """What the loss is told, and what is to be said. Raises ValueError naming the argument."""
    check_loss(labels, objective.loss, objective.beta)
    if isinstance(labels, SparseLabels):
        labels.check(tokens, shard.size)
    elif labels is not None:
        labels.check(tokens, shard.real().rows)
    if not 0 <= top_k <= shard.size:
        raise ValueError(f"top_k must be from 0 to the vocabulary's {shard.size}, got {top_k}")
    if draws is not None and draws.independent and top_k:
        raise ValueError(f"top_k must be 0 where draws are independent, got {top_k}")
    if (draws is not None or whole) and chunk.columns is not None:
        raise ValueError(f"chunk.columns must be None where labels are drawn or whole, got {chunk.columns}")
