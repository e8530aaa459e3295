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
SMALLEST_TAIL = 1e-6
"""Floor of a tail mass in float32: below it 1 - Q is rounding noise."""
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


# --- sparse labels ---


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


def sparse_terms(
    look: Look, labels: SparseLabels, temperature: float, loss: Loss, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence from the teacher, and its gradient in logits / T: a multiple of q plus values at the label's ids.

    Weights that sum to one (a renormalised top k, or sampled ids), forward KL only: q - p.
    A head and its tail as one bucket: D over K + 1 classes. It is exact on the head and knows nothing of the
    distribution within the tail, so it is a lower bound of the whole D, and biased. In forward KL draws of the tail
    correct it (`_correct`). Reverse KL and JSD have this form alone: they are not linear in p.
    mse: the mean of (log p - log q)^2 over the given ids, head and draws. The student's log q depends on all logits,
    but other ids are missing from the mean, and the given ones were chosen by their probability: biased.
    """
    log_q_NJ = look.picked_NJ[:, 1:] / temperature - look.log_sum_exp_N2[:, 1:]
    head = labels.ids_NK.shape[1]
    log_q_NK, log_q_NM = log_q_NJ[:, :head], log_q_NJ[:, head:]
    if loss == "mse" or labels.tail == "none":
        both = loss == "mse" and labels.draw_log_prob_NM is not None
        log_p_NJ = torch.cat(labels.log_probs(), dim=1) if both else labels.log_prob_NK
        return _open(log_p_NJ, log_q_NJ, loss, beta)
    divergence_N, multiple_N, values_NK, ratio_N, teacher_tail_N = _bucket(labels.log_prob_NK, log_q_NK, loss, beta)
    if labels.draw_log_prob_NM is None:
        return divergence_N, multiple_N, values_NK
    added_N, values_NM = _correct(labels, log_q_NM, ratio_N, teacher_tail_N)
    return divergence_N + added_N, multiple_N, torch.cat([values_NK, values_NM], dim=1)


def _open(log_p_NJ: Tensor, log_q_NJ: Tensor, loss: Loss, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of the given ids alone."""
    present_NJ = log_p_NJ > -torch.inf
    log_p_NJ = log_p_NJ.where(present_NJ, 0.0)
    part_NJ = parts(log_p_NJ, log_q_NJ, loss, beta).where(present_NJ, 0.0)
    slope_NJ = slopes(log_p_NJ, log_q_NJ, loss, beta).where(present_NJ, 0.0)
    if loss == "mse":
        count_N1 = present_NJ.sum(dim=1, keepdim=True).clamp_min(1)
        part_NJ, slope_NJ = part_NJ / count_N1, slope_NJ / count_N1
    return part_NJ.sum(dim=1), -slope_NJ.sum(dim=1), slope_NJ


def _bucket(
    log_p_NK: Tensor, log_q_NK: Tensor, loss: Loss, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the head and the rest as one more class b: s - q S on the head, and (s_b / q_b - S) q on the tail.

    returns: D, multiple of q, values at the head's ids, (1 - P) / (1 - Q) of the masses behind the head, 1 - P
    """
    present_NK = log_p_NK > -torch.inf
    q_NK = log_q_NK.exp().where(present_NK, 0.0)
    # A teacher's large entries have exact logarithms, so its tail is known well beyond float32; the student's is not.
    teacher_tail_N = (1.0 - log_p_NK.double().exp().sum(dim=1)).clamp_min(SMALLEST_TAIL).float()
    student_tail_N = (1.0 - q_NK.sum(dim=1)).clamp_min(SMALLEST_TAIL)
    log_p_NK = log_p_NK.where(present_NK, 0.0)
    part_NK = parts(log_p_NK, log_q_NK, loss, beta).where(present_NK, 0.0)
    slope_NK = slopes(log_p_NK, log_q_NK, loss, beta).where(present_NK, 0.0)
    tails = teacher_tail_N.log(), student_tail_N.log()
    part_N, slope_N = parts(*tails, loss, beta), slopes(*tails, loss, beta)
    ratio_N = slope_N / student_tail_N
    return (
        part_NK.sum(dim=1) + part_N,
        ratio_N - slope_NK.sum(dim=1) - slope_N,
        slope_NK - q_NK * ratio_N[:, None],
        teacher_tail_N / student_tail_N,
        teacher_tail_N,
    )


def _correct(labels: SparseLabels, log_q_NM: Tensor, ratio_N: Tensor, teacher_tail_N: Tensor) -> tuple[Tensor, Tensor]:
    """What draws j of the tail add to the bucket's forward KL, and to its gradient at j.

    The gradient gets -(shrink / M) (1 - P) w_j, where w_j = 1 - q~_j / p~_j compares the distributions within the
    tail: the student's own tail is the control variate, so that with shrink 1 the gradient is that of the whole
    distribution on average, and its noise vanishes as the student learns. The divergence gets the mean of
    (1 - P) log(p~_j / q~_j), whatever the shrinkage.
    """
    assert labels.draw_log_prob_NM is not None
    drawn_NM = labels.draw_log_prob_NM > -torch.inf
    count_N1 = drawn_NM.sum(dim=1, keepdim=True).clamp_min(1)
    share_N1 = teacher_tail_N[:, None] / count_N1
    log_odds_NM = labels.draw_log_prob_NM - log_q_NM - ratio_N.log()[:, None]  # log(p~ / q~)
    log_odds_NM = log_odds_NM.where(drawn_NM, 0.0)
    weight_NM = -torch.expm1(-log_odds_NM)
    if isinstance(labels.shrink, Tensor):
        shrink: float | Tensor = labels.shrink[:, None]
    elif labels.shrink == "adaptive":
        tail_prob_NM = (labels.draw_log_prob_NM.exp() / teacher_tail_N[:, None]).clamp_max(1.0)
        shrink = adaptive_shrink(weight_NM, tail_prob_NM, labels.shrink_tokens * count_N1)
    else:
        shrink = float(labels.shrink)
    return (share_N1 * log_odds_NM).sum(dim=1), -shrink * share_N1 * weight_NM


def adaptive_shrink(weight_NM: Tensor, tail_prob_NM: Tensor, draws_N1: Tensor) -> Tensor:
    """[N, 1]: the shrinkage that minimises the expected squared error of the gradient in logits, as the draws tell it.

    The tail's missing part d = p~ - q~ is estimated by x = (1 / M) sum_j e_j w_j with mean d. In a mean over n tokens
    that have the same d, with M independent draws each,
        E |shrink x - d|^2 = (1 - shrink)^2 |d|^2 + shrink^2 (E w^2 - |d|^2) / (n M), which is smallest at
        shrink = n M |d|^2 / (E w^2 + (n M - 1) |d|^2),   where |d|^2 = E_{j ~ p~}[p~_j w_j^2]
    so that the draws themselves tell both: the means of w_j^2 and of p~_j w_j^2. 1 where w is 0.

    draws_N1: n M
    It assumes independent draws: spread ones are less noisy, so it shrinks too much, but little. It is biased, by
    shrinking and because the same draws tell how much.
    """
    square_N1 = weight_NM.square().sum(dim=1, keepdim=True)
    signal_N1 = (tail_prob_NM * weight_NM.square()).sum(dim=1, keepdim=True)
    shrink_N1 = draws_N1 * signal_N1 / (square_N1 + (draws_N1 - 1) * signal_N1)
    return shrink_N1.where(square_N1 > 0, 1.0)


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
