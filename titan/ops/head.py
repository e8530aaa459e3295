"""The head of a language model: hidden states and output weight in; loss, gradients and labels out, chunk by chunk.

Full logits never exist: a chunk of tokens is turned into logits, used and forgotten. The vocabulary may be cut over
tensor ranks; maxima, sums and top-k are merged across them, so every layout gives the same numbers.

Shape letters: N tokens of a chunk or micro-batch, V rows of the output weight on this rank, D hidden width, K head
entries of a label.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20
"""Logits held at a time; 4 MB of float32, which stays in a core's cache."""
SMALLEST_TAIL = 1e-6
"""Floor of a tail mass in float32: below it 1 - Q is rounding noise."""


@dataclass(frozen=True)
class VocabShard:
    """Rows [start, start + rows) of the output weight; ids from `size` on are padding."""

    start: int
    rows: int
    size: int
    group: dist.ProcessGroup | None
    """Tensor ranks that hold the other rows; None when this rank has all."""

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce in place over the ranks that share the vocabulary."""
        if self.group is not None:
            dist.all_reduce(x, op, group=self.group)
        return x


@dataclass(frozen=True)
class SparseLabels:
    """What the teacher says about each token: its K most likely entries; the rest is one bucket."""

    ids_NK: Tensor
    """int64 vocabulary ids, distinct within a row."""
    log_prob_NK: Tensor
    """float32 log-probabilities at the temperature of the loss."""


@dataclass(frozen=True)
class Objective:
    """loss = (1 - weight) * cross-entropy + weight * T^2 * KL(teacher || student), both at most once a token."""

    weight: float = 0.0
    temperature: float = 1.0


@dataclass(frozen=True)
class TeacherSays:
    """Label parts of one micro-batch, before encoding."""

    ids_NK: Tensor
    """int64, most likely first."""
    log_prob_NK: Tensor
    """float32 log-probabilities at temperature 1."""
    log_norm_N: Tensor
    """float32: log of the sum over the vocabulary of p^(1/T); 0 at T = 1. It turns log p into log p_T."""


@dataclass
class HeadResult:
    """Sums over the tokens of one micro-batch, and what goes back into the model."""

    cross_entropy: Tensor
    """float64 scalar, nats, weighted sum over tokens."""
    divergence: Tensor
    """float64 scalar, nats: bucketed KL(teacher || student) at temperature T, weighted sum over tokens."""
    grad_hidden_ND: Tensor | None
    """Gradient of grad_scale * loss, already summed over tensor ranks."""
    labels: TeacherSays | None


def run_head(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    token_weight_N: Tensor,
    shard: VocabShard,
    *,
    objective: Objective,
    labels: SparseLabels | None = None,
    grad_weight_VD: Tensor | None = None,
    grad_scale: float = 1.0,
    top_k: int = 0,
) -> HeadResult:
    """Loss of every token, and in training the gradients, in one pass over chunks.

    hidden_ND: any float dtype;  targets_N: int64;  token_weight_N: float32, 0 for tokens that do not count
    labels:    needed when objective.weight > 0
    grad_weight_VD: float32 buffer to add the weight's gradient to; None runs forward only
    grad_scale: what the summed loss is multiplied by before gradients (1 / global token count, times a loss scale)
    top_k:     entries a label wants, 0 for none
    """
    sums = torch.zeros(2, dtype=torch.float64, device=hidden_ND.device)
    grad_hidden_ND = torch.empty_like(hidden_ND) if grad_weight_VD is not None else None
    says: list[TeacherSays] = []
    chunk = max(64, CHUNK_ELEMENTS // shard.rows)
    for start in range(0, hidden_ND.shape[0], chunk):
        part = slice(start, start + chunk)
        logits = _logits(hidden_ND[part], weight_VD, shard)
        chunk_labels = None if labels is None else SparseLabels(labels.ids_NK[part], labels.log_prob_NK[part])
        stats = _reduce(logits, targets_N[part], chunk_labels, objective.temperature, shard)
        weight_N = token_weight_N[part]
        sums[0] += (stats.cross_entropy_N.double() * weight_N).sum()
        if stats.divergence_N is not None:
            sums[1] += (stats.divergence_N.double() * weight_N).sum()
        if top_k:
            says.append(_teacher_says(logits, stats.log_sum_exp_N, top_k, objective.temperature, shard))
        if grad_hidden_ND is not None and grad_weight_VD is not None:
            grad = _grad_logits(logits, stats, targets_N[part], chunk_labels, weight_N * grad_scale, objective, shard)
            grad = grad.to(hidden_ND.dtype)
            torch.mm(grad, weight_VD, out=grad_hidden_ND[part])
            if grad.dtype == grad_weight_VD.dtype:
                grad_weight_VD.addmm_(grad.t(), hidden_ND[part])
            else:
                grad_weight_VD.add_(grad.t() @ hidden_ND[part])
    if grad_hidden_ND is not None:
        shard.all_reduce(grad_hidden_ND)
    merged = None
    if says:
        merged = TeacherSays(
            *(torch.cat([getattr(part, name) for part in says]) for name in ("ids_NK", "log_prob_NK", "log_norm_N"))
        )
    return HeadResult(sums[0], sums[1], grad_hidden_ND, merged)


@dataclass(frozen=True)
class _Statistics:
    log_sum_exp_N: Tensor
    log_sum_exp_tempered_N: Tensor  # of logits / T
    cross_entropy_N: Tensor
    divergence_N: Tensor | None
    student_NK: Tensor | None  # student's probabilities of the label's ids at T
    tail_ratio_N: Tensor | None  # teacher's tail mass over student's


def _logits(hidden_ND: Tensor, weight_VD: Tensor, shard: VocabShard) -> Tensor:
    logits = (hidden_ND @ weight_VD.t()).float()
    real = shard.size - shard.start
    if real < shard.rows:
        logits[:, max(real, 0) :] = -torch.inf
    return logits


def _reduce(
    logits_NV: Tensor, targets_N: Tensor, labels: SparseLabels | None, temperature: float, shard: VocabShard
) -> _Statistics:
    """Two reductions over the vocabulary: the maximum, then all sums and gathered logits packed together."""
    top_N = shard.all_reduce(logits_NV.amax(dim=1), dist.ReduceOp.MAX)
    columns = [
        (logits_NV - top_N[:, None]).exp_().sum(dim=1, keepdim=True),
        _pick(logits_NV, targets_N[:, None], shard),
    ]
    if temperature != 1.0:
        columns.append(((logits_NV - top_N[:, None]) / temperature).exp_().sum(dim=1, keepdim=True))
    if labels is not None:
        columns.append(_pick(logits_NV, labels.ids_NK, shard))
    packed = shard.all_reduce(torch.cat(columns, dim=1))
    log_sum_exp_N = top_N + packed[:, 0].log()
    tempered_N = log_sum_exp_N if temperature == 1.0 else top_N / temperature + packed[:, 2].log()
    cross_entropy_N = log_sum_exp_N - packed[:, 1]
    if labels is None:
        return _Statistics(log_sum_exp_N, tempered_N, cross_entropy_N, None, None, None)
    log_student_NK = packed[:, -labels.ids_NK.shape[1] :] / temperature - tempered_N[:, None]
    teacher_NK, student_NK = labels.log_prob_NK.exp(), log_student_NK.exp()
    teacher_tail_N = (1.0 - teacher_NK.sum(dim=1)).clamp_min(SMALLEST_TAIL)
    student_tail_N = (1.0 - student_NK.sum(dim=1)).clamp_min(SMALLEST_TAIL)
    divergence_N = (teacher_NK * (labels.log_prob_NK - log_student_NK)).sum(dim=1)
    divergence_N += teacher_tail_N * (teacher_tail_N / student_tail_N).log()
    ratio_N = teacher_tail_N / student_tail_N
    return _Statistics(log_sum_exp_N, tempered_N, cross_entropy_N, divergence_N, student_NK, ratio_N)


def _pick(logits_NV: Tensor, ids_NK: Tensor, shard: VocabShard) -> Tensor:
    """Logits at global ids, 0 where another rank holds the id."""
    local_NK = ids_NK - shard.start
    mine_NK = (local_NK >= 0) & (local_NK < shard.rows)
    return logits_NV.gather(1, local_NK.clamp(0, shard.rows - 1)).where(mine_NK, 0.0)


def _add_at(grad_NV: Tensor, ids_NK: Tensor, values_NK: Tensor, shard: VocabShard) -> None:
    """grad[n, ids[n, k]] += values[n, k] for the ids that this rank holds."""
    local_NK = ids_NK - shard.start
    mine_NK = (local_NK >= 0) & (local_NK < shard.rows)
    grad_NV.scatter_add_(1, local_NK.clamp(0, shard.rows - 1), values_NK.where(mine_NK, 0.0))


def _grad_logits(
    logits_NV: Tensor,
    stats: _Statistics,
    targets_N: Tensor,
    labels: SparseLabels | None,
    scale_N: Tensor,
    objective: Objective,
    shard: VocabShard,
) -> Tensor:
    """Gradient in the logits: a per-token multiple of the student's probabilities plus sparse terms.

    Cross-entropy gives q - onehot. The bucketed KL at temperature T gives T * (q_T - p_T) on the label's ids and
    T * q_T * (1 - r) elsewhere, r being the teacher's tail mass over the student's.
    """
    soft = objective.weight if labels is not None else 0.0
    hard_N = scale_N * (1.0 - soft)
    if labels is None or stats.student_NK is None or stats.tail_ratio_N is None:
        grad_NV = (logits_NV - stats.log_sum_exp_N[:, None]).exp_().mul_(hard_N[:, None])
    else:
        soft_N = scale_N * (soft * objective.temperature)
        dense_N = soft_N * (1.0 - stats.tail_ratio_N)
        if objective.temperature == 1.0:
            grad_NV = (logits_NV - stats.log_sum_exp_N[:, None]).exp_().mul_((hard_N + dense_N)[:, None])
        else:
            grad_NV = (logits_NV / objective.temperature - stats.log_sum_exp_tempered_N[:, None]).exp_()
            grad_NV.mul_(dense_N[:, None])
            grad_NV += (logits_NV - stats.log_sum_exp_N[:, None]).exp_().mul_(hard_N[:, None])
        head_NK = stats.tail_ratio_N[:, None] * stats.student_NK - labels.log_prob_NK.exp()
        _add_at(grad_NV, labels.ids_NK, head_NK * soft_N[:, None], shard)
    _add_at(grad_NV, targets_N[:, None], -hard_N[:, None], shard)
    return grad_NV


def _teacher_says(
    logits_NV: Tensor, log_sum_exp_N: Tensor, top_k: int, temperature: float, shard: VocabShard
) -> TeacherSays:
    """Top-k over the whole vocabulary: each rank's own candidates, merged. Among equal logits any may be named."""
    values, ids = logits_NV.topk(min(top_k, shard.rows), dim=1)
    ids = ids + shard.start
    if shard.group is not None:
        ranks = shard.group.size()
        all_values = [torch.empty_like(values) for _ in range(ranks)]
        all_ids = [torch.empty_like(ids) for _ in range(ranks)]
        dist.all_gather(all_values, values, group=shard.group)
        dist.all_gather(all_ids, ids, group=shard.group)
        values, order = torch.cat(all_values, dim=1).topk(top_k, dim=1)
        ids = torch.cat(all_ids, dim=1).gather(1, order)
    log_norm_N = torch.zeros_like(log_sum_exp_N)
    if temperature != 1.0:
        log_norm_N = ((logits_NV - log_sum_exp_N[:, None]) / temperature).exp_().sum(dim=1)
        log_norm_N = shard.all_reduce(log_norm_N).log()
    return TeacherSays(ids, values - log_sum_exp_N[:, None], log_norm_N)
