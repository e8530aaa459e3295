"""How far a student is from its teacher, and the gradient of that, from what looks at the logits gave.

A loss is a function D(q) of the student's class probabilities. With s_c = q_c dD/dq_c its gradient in logits / T is
s_c - q_c S, where S is the sum of all s: a multiple of q plus, for sparse labels, values at the label's ids. All
a loss needs of a class is its part of D and its s (`parts`, `slopes`).

Shape letters as in titan.ops.head; C classes of any kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from titan.ops.label import DenseLabels, SparseLabels
from titan.ops.look import Look, TiledLogits, VocabShard

Loss = Literal["forward_kl", "reverse_kl", "jsd", "mse"]
BLOCK_ELEMENTS = 1 << 18
"""1 MB of float32."""
SMALLEST_LOG_PROB = -1e4
"""Log of a teacher's probability of zero: times zero it is 0, not NaN."""


def parts(log_p_NC: Tensor, log_q_NC: Tensor, loss: Loss, beta: float) -> Tensor:
    """Each class's part of D.

    forward_kl: KL(p || q)          reverse_kl: KL(q || p)          mse: (log p - log q)^2
    jsd:        beta KL(p || M) + (1 - beta) KL(q || M) with M = beta p + (1 - beta) q  (arXiv 2306.13649, eq. 1)
    """
    if loss == "mse":
        return (log_q_NC - log_p_NC).square_()
    if loss == "forward_kl":
        return (log_p_NC - log_q_NC).mul_(log_p_NC.exp())
    if loss == "reverse_kl":
        return (log_q_NC - log_p_NC).mul_(log_q_NC.exp())
    p_NC, q_NC = log_p_NC.exp(), log_q_NC.exp()
    log_middle_NC = _log_middle(p_NC, q_NC, beta)
    p_NC.mul_(log_p_NC - log_middle_NC).mul_(beta)
    return p_NC.add_(q_NC.mul_(log_q_NC - log_middle_NC), alpha=1.0 - beta)


def slopes(log_p_NC: Tensor, log_q_NC: Tensor, loss: Loss, beta: float) -> Tensor:
    """Each class's s: q_c dD/dq_c up to a multiple of q_c, which changes no gradient."""
    if loss == "mse":
        return (log_q_NC - log_p_NC).mul_(2.0)
    if loss == "forward_kl":
        return log_p_NC.exp().neg_()
    q_NC = log_q_NC.exp()
    if loss == "reverse_kl":
        return q_NC.mul_(log_q_NC - log_p_NC)
    log_middle_NC = _log_middle(log_p_NC.exp(), q_NC, beta)
    return q_NC.mul_(log_q_NC - log_middle_NC).mul_(1.0 - beta)


def _log_middle(p_NC: Tensor, q_NC: Tensor, beta: float) -> Tensor:
    """Log M; where both are 0 it does not matter, but it has to be finite."""
    return (p_NC * beta).add_(q_NC, alpha=1.0 - beta).clamp_min_(torch.finfo(p_NC.dtype).tiny).log_()


def check_loss(labels: SparseLabels | DenseLabels | None, loss: str, beta: float) -> None:
    """Raise ValueError for a loss that there is not, or that the labels cannot give."""
    if loss not in Loss.__args__:  # type: ignore[attr-defined]
        raise ValueError(f"objective.loss must be forward_kl, reverse_kl, jsd or mse, got {loss}")
    if not 0 < beta < 1:
        raise ValueError(
            f"objective.beta must be between 0 and 1, got {beta}; at the ends use forward_kl or reverse_kl"
        )
    if not isinstance(labels, SparseLabels) or loss == "forward_kl":
        return
    if labels.tail == "none":
        raise ValueError(
            f"objective.loss {loss} needs the teacher's own probabilities, got labels.tail none;"
            " use tail bucket, whole labels, or forward_kl"
        )
    if loss != "mse" and labels.draw_ids_NM is not None:
        raise ValueError(
            f"objective.loss {loss} is not linear in the teacher's probabilities, so draws would bias it;"
            " use labels without draws, whole labels, or forward_kl"
        )


# --- the whole distribution ---


@dataclass(frozen=True)
class DenseTeacher:
    """A teacher's distributions of a chunk of tokens on this rank's columns, and how a student is held against them."""

    labels: DenseLabels
    logits: TiledLogits | None
    """Where the labels are hidden states."""
    shard: VocabShard
    temperature: float
    loss: Loss
    beta: float

    def of(self, tile: VocabShard) -> Tensor:
        """Logits of a tile's real columns."""
        real = tile.real()
        if self.labels.logits_NV is not None:
            return self.labels.logits_NV[:, real.within(self.shard)]
        assert self.logits is not None
        return self.logits.of(real)

    def log_norm(self, tiles: Sequence[VocabShard]) -> Tensor:
        """[N, 1] log-sum-exp of logits / T over the whole vocabulary."""
        log_norm_PN = torch.stack([self._log_norm(self.of(tile)) for tile in tiles]).double()
        if self.shard.group is not None:
            own_N = log_norm_PN.logsumexp(dim=0)
            gathered = [torch.empty_like(own_N) for _ in range(self.shard.group.size())]
            dist.all_gather(gathered, own_N, group=self.shard.group)
            log_norm_PN = torch.stack(gathered)
        return log_norm_PN.logsumexp(dim=0).float()[:, None]

    def _log_norm(self, logits_NV: Tensor) -> Tensor:
        blocks = [(_wide(logits_NV[rows]) / self.temperature).logsumexp(dim=1) for rows in _row_blocks(logits_NV)]
        return torch.cat(blocks)

    def log_probs(
        self, teacher_NV: Tensor, student_NV: Tensor, rows: slice, log_norms: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Log p and log q of some tokens, from the logits of a tile."""
        log_p_NV = (_wide(teacher_NV[rows]) / self.temperature).sub_(log_norms[0][rows])
        student_NV = student_NV[rows, : teacher_NV.shape[1]]
        log_q_NV = (_wide(student_NV) / self.temperature).sub_(log_norms[1][rows])
        return log_p_NV.clamp_min_(SMALLEST_LOG_PROB), log_q_NV


@dataclass(frozen=True)
class DenseTerms:
    """Divergence of each token, and what the gradient of a tile needs to know of all others."""

    divergence_N: Tensor
    slope_N1: Tensor
    """S, the sum of s over the vocabulary."""
    log_norms: tuple[Tensor, Tensor]
    """[N, 1] each, of logits / T: the teacher's and the student's."""


def dense_terms(look: Look, teacher: DenseTeacher, student: TiledLogits, tiles: Sequence[VocabShard]) -> DenseTerms:
    """Divergence from the teacher's whole distribution, exact; two looks at its logits, one more at the student's."""
    log_norms = teacher.log_norm(tiles), look.log_sum_exp_N2[:, 1:]
    sums_N2 = torch.zeros_like(look.log_sum_exp_N2, dtype=torch.float64)
    for tile in tiles:
        teacher_NV, student_NV = teacher.of(tile), student.of(tile)
        for rows in _row_blocks(teacher_NV):
            compared = *teacher.log_probs(teacher_NV, student_NV, rows, log_norms), teacher.loss, teacher.beta
            sums_N2[rows, 0] += parts(*compared).sum(dim=1)
            sums_N2[rows, 1] += slopes(*compared).sum(dim=1)
    if teacher.shard.group is not None:
        dist.all_reduce(sums_N2, group=teacher.shard.group)
    if teacher.loss == "mse":
        sums_N2 /= teacher.shard.size
    return DenseTerms(sums_N2[:, 0].float(), sums_N2[:, 1:].float(), log_norms)


def dense_gradient(student_NV: Tensor, teacher: DenseTeacher, tile: VocabShard, terms: DenseTerms) -> Tensor:
    """Gradient of the divergence in a tile's real logits / T: s - q S; float32 or wider."""
    teacher_NV = teacher.of(tile)
    share = 1.0 / tile.size if teacher.loss == "mse" else 1.0
    blocks = []
    for rows in _row_blocks(teacher_NV):
        log_p_NV, log_q_NV = teacher.log_probs(teacher_NV, student_NV, rows, terms.log_norms)
        slope_NV = slopes(log_p_NV, log_q_NV, teacher.loss, teacher.beta)
        blocks.append(slope_NV.mul_(share).sub_(log_q_NV.exp_().mul_(terms.slope_N1[rows])))
    return torch.cat(blocks)


def _row_blocks(logits_NV: Tensor) -> list[slice]:
    """Tokens whose logits are worked on at a time, so that on a CPU what lies between stays in its cache."""
    tokens, columns = logits_NV.shape
    rows = max(1, BLOCK_ELEMENTS // max(1, columns)) if logits_NV.device.type == "cpu" else max(1, tokens)
    return [slice(start, start + rows) for start in range(0, tokens, rows)]


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()
