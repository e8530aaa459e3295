"""The head of a language model: hidden states and output weight in; loss, gradients and labels out, chunk by chunk.

Full logits never exist: a chunk of tokens, and if wanted of the vocabulary, is turned into logits, used and forgotten.
The vocabulary may be cut over tensor ranks; what each part saw of its columns is merged, so every layout gives the same
numbers. What looks at every logit is in titan.ops.vocab; here are the few numbers per token in between.

Shape letters: N tokens of a chunk or micro-batch, V rows of the output weight on this rank, D hidden width, K head
entries of a label, M tail draws of a label, P parts of the vocabulary (columns of a chunk, tensor ranks).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from titan.ops.divergence import DenseTeacher, DenseTerms, dense_gradient, dense_terms
from titan.ops.label import DenseLabels, SparseLabels, TailDraws, TeacherSays
from titan.ops.look import Look, TiledLogits, VocabShard, merge
from titan.ops.objective import Chunk, Objective, check_head, check_head_labels
from titan.ops.says import teacher_says
from titan.ops.sparse import LOOKED_AT, sparse_terms
from titan.ops.vocab import vocab_gradient_, vocab_statistics

CHUNK_TOKENS = 256
"""At least so many tokens of a chunk: the weight's gradient is read and written once a chunk."""
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits held at a time where that is more: 4 MB of float32 stay in a core's cache; a GPU wants more at once."""


@dataclass
class HeadResult:
    """Sums over the tokens of one micro-batch, and what goes back into the model."""

    cross_entropy: Tensor
    """float64 scalar, nats, weighted sum over tokens."""
    divergence: Tensor
    """float64 scalar, nats: the objective's D at temperature T as the labels tell it, weighted sum over tokens."""
    squared_log_norm: Tensor
    """float64 scalar: log_sum_exp^2, weighted sum over tokens."""
    grad_hidden_ND: Tensor | None
    """Gradient of grad_scale * loss, already summed over tensor ranks."""
    labels: TeacherSays | None
    tail_fit: Tensor | None = None
    """float64 [2]: sum w r and sum w r^2 over the labels' draws (titan.ops.divergence), each token's times its weight
    squared; their quotient is the best `control` for labels like these. None without draws."""


def run_head(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    token_weight_N: Tensor,
    shard: VocabShard,
    *,
    objective: Objective,
    labels: SparseLabels | DenseLabels | None = None,
    grad_weight_VD: Tensor | None = None,
    grad_scale: float = 1.0,
    top_k: int = 0,
    draws: TailDraws | None = None,
    whole: bool = False,
    chunk: Chunk | None = None,
) -> HeadResult:
    """Loss of every token, and in training the gradients, in one pass over chunks.

    hidden_ND: any float dtype;  targets_N: int64;  token_weight_N: float32, 0 for tokens that do not count
    labels:    needed when objective.weight > 0
    grad_weight_VD: float32 buffer to add the weight's gradient to; None runs forward only
    grad_scale: what the summed loss is multiplied by before gradients (1 / global token count, times a loss scale)
    top_k:     entries a label wants, 0 for none;  draws: what it wants of the rest;  whole: if it wants all
    raises:    ValueError naming the argument
    """
    chunk = chunk or Chunk()
    check_head(hidden_ND, weight_VD, targets_N, token_weight_N, shard, objective, chunk)
    check_head_labels(len(hidden_ND), shard, objective, labels, top_k, draws, whole, chunk)
    sums = torch.zeros(3, dtype=torch.float64, device=hidden_ND.device)
    tail_fit: Tensor | None = None
    grad_hidden_ND = torch.empty_like(hidden_ND) if grad_weight_VD is not None else None
    says: list[TeacherSays] = []
    tiles = list(_tiles(shard, chunk))
    parts = list(_token_chunks(hidden_ND, shard, chunk))
    elements = len(hidden_ND[parts[0]]) * tiles[0].rows if parts else 0
    space = hidden_ND.new_empty(elements)
    teacher_space = _teacher_space(labels, elements)
    for part in parts:
        targets, weight_N = targets_N[part, None], token_weight_N[part]
        student = TiledLogits(hidden_ND[part], weight_VD, shard, space)
        part_labels = None if labels is None else labels.rows(part)
        ids_NJ = torch.cat([targets, *part_labels.ids()], dim=1) if isinstance(part_labels, SparseLabels) else targets
        wanted = _wanted(part_labels, shard, top_k, draws)
        seen = [
            vocab_statistics(student.of(tile), ids_NJ, wanted, tile.start, shard.size, objective.temperature)
            for tile in tiles
        ]
        look = merge(seen, shard, objective.temperature)
        teacher = _teacher(part_labels, shard, objective, teacher_space)
        dense = None if teacher is None else dense_terms(look, teacher, student, tiles)
        terms = _terms(look, part_labels, dense, objective, ids_NJ)
        sums += (terms.losses_N3.double() * weight_N[:, None]).sum(dim=0)
        if terms.fit_N2 is not None:
            part_fit = (terms.fit_N2.double() * weight_N[:, None].square()).sum(dim=0)
            tail_fit = part_fit if tail_fit is None else tail_fit + part_fit
        if top_k or draws is not None or whole:
            logits, part_draws = student.of(tiles[0]), draws and draws.rows(part)
            says.append(teacher_says(look, logits, top_k, part_draws, objective.temperature, shard, whole))
        if grad_hidden_ND is None or grad_weight_VD is None:
            continue
        scale_N1 = (weight_N * grad_scale)[:, None]
        for tile in tiles:
            logits = student.take(tile)
            _to_gradient(logits, tile, look, terms, teacher, objective, scale_N1)
            rows, first = tile.within(shard), tile is tiles[0]
            _add_gradients(
                logits, student.hidden_ND, weight_VD[rows], grad_hidden_ND[part], grad_weight_VD[rows], first
            )
    if grad_hidden_ND is not None and shard.group is not None:
        dist.all_reduce(grad_hidden_ND, group=shard.group)
    merged = TeacherSays.cat(says) if says else None
    return HeadResult(sums[0], sums[1], sums[2], grad_hidden_ND, merged, tail_fit)


def _token_chunks(hidden_ND: Tensor, shard: VocabShard, chunk: Chunk) -> Iterator[slice]:
    columns = min(chunk.columns or shard.rows, shard.rows)
    tokens = chunk.tokens or max(CHUNK_TOKENS, CHUNK_ELEMENTS.get(hidden_ND.device.type, 1 << 20) // columns)
    for start in range(0, len(hidden_ND), tokens):
        yield slice(start, start + tokens)


def _tiles(shard: VocabShard, chunk: Chunk) -> Iterator[VocabShard]:
    """This rank's part of the vocabulary, a chunk of columns at a time."""
    columns = min(chunk.columns or shard.rows, shard.rows)
    for start in range(0, shard.rows, columns):
        yield VocabShard(shard.start + start, min(columns, shard.rows - start), shard.size, shard.group)


def _teacher_space(labels: SparseLabels | DenseLabels | None, elements: int) -> Tensor | None:
    """Memory for the teacher's logits, where they have to be multiplied."""
    if not isinstance(labels, DenseLabels) or labels.hidden_ND is None:
        return None
    return labels.hidden_ND.new_empty(elements)


def _teacher(
    labels: SparseLabels | DenseLabels | None, shard: VocabShard, objective: Objective, space: Tensor | None
) -> DenseTeacher | None:
    """The whole distributions of a chunk's tokens, where labels are that."""
    if not isinstance(labels, DenseLabels):
        return None
    logits = None
    if labels.hidden_ND is not None and labels.weight_VD is not None and space is not None:
        logits = TiledLogits(labels.hidden_ND, labels.weight_VD, shard, space)
    return DenseTeacher(labels, logits, shard, objective.temperature, objective.loss, objective.beta)


def _wanted(labels: SparseLabels | DenseLabels | None, shard: VocabShard, top_k: int, draws: TailDraws | None) -> int:
    """Largest logits to be found: those of the label to be said and one behind, and those that draws cap."""
    capped = LOOKED_AT if isinstance(labels, SparseLabels) and labels.draw_ids_NM is not None else 0
    return min(max(top_k + (draws is not None), capped), shard.size)


def _to_gradient(
    logits_NV: Tensor, tile: VocabShard, look: Look, terms: "_Terms", teacher: DenseTeacher | None,
    objective: Objective, scale_N1: Tensor,
) -> None:  # fmt: skip
    """Turn a tile's logits into the gradient of scale * loss, in place."""
    added, temperature = None, objective.temperature
    if teacher is not None and terms.dense is not None:
        added = dense_gradient(logits_NV, teacher, tile, terms.dense)
        added *= objective.weight * temperature * scale_N1
        temperature = 1.0  # what is left is
    vocab_gradient_(
        logits_NV, terms.coefficient_N2 * scale_N1, look.log_sum_exp_N2, terms.ids_NJ, terms.values_NJ * scale_N1,
        tile.start, tile.size, temperature,
    )  # fmt: skip
    if added is not None:
        logits_NV[:, : added.shape[1]] += added


def _add_gradients(
    grad_logits_NV: Tensor, hidden_ND: Tensor, weight_VD: Tensor, grad_hidden_ND: Tensor, grad_weight_VD: Tensor,
    first: bool,
) -> None:  # fmt: skip
    """grad_hidden is overwritten by the first tile and added to by the others."""
    grad_hidden_ND.addmm_(grad_logits_NV, weight_VD, beta=0.0 if first else 1.0)
    if grad_logits_NV.dtype == grad_weight_VD.dtype:
        grad_weight_VD.addmm_(grad_logits_NV.t(), hidden_ND)
    else:
        grad_weight_VD.add_(grad_logits_NV.t() @ hidden_ND)


@dataclass(frozen=True)
class _Terms:
    """Losses of each token, and their gradient as vocab_gradient_ takes it, before token weights."""

    losses_N3: Tensor  # cross-entropy, divergence, log_sum_exp^2
    coefficient_N2: Tensor
    ids_NJ: Tensor
    values_NJ: Tensor
    dense: DenseTerms | None
    """Where labels are whole: their part of the gradient is none of the above."""
    fit_N2: Tensor | None


def _terms(
    look: Look, labels: SparseLabels | DenseLabels | None, dense: DenseTerms | None, objective: Objective,
    ids_NJ: Tensor,
) -> _Terms:  # fmt: skip
    """Cross-entropy has the gradient q - onehot and z-loss 2 l q, at temperature 1; sparse labels add theirs.

    ids: the targets, and those of sparse labels
    """
    log_norm_N = look.log_sum_exp_N2[:, 0]
    cross_entropy_N = log_norm_N - look.picked_NJ[:, 0]
    soft = objective.weight if labels is not None else 0.0
    dense_N = (1.0 - soft) + 2.0 * objective.z_loss * log_norm_N
    values_NJ = torch.full_like(look.picked_NJ, soft - 1.0)
    divergence_N = tempered_N = torch.zeros_like(log_norm_N)
    fit_N2 = None
    if dense is not None:
        divergence_N = dense.divergence_N
    elif isinstance(labels, SparseLabels):
        sparse = sparse_terms(look, labels, objective.temperature, objective.loss, objective.beta)
        divergence_N, fit_N2 = sparse.divergence_N, sparse.fit_N2
        tempered_N = soft * objective.temperature * sparse.multiple_N
        values = [sparse.values_NJ] if sparse.capped is None else [sparse.values_NJ, sparse.capped[1]]
        values_NJ = torch.cat([values_NJ[:, :1], *(soft * objective.temperature * x for x in values)], dim=1)
        ids_NJ = ids_NJ if sparse.capped is None else torch.cat([ids_NJ, sparse.capped[0]], dim=1)
    if objective.temperature == 1.0:
        dense_N, tempered_N = dense_N + tempered_N, torch.zeros_like(tempered_N)
    return _Terms(
        torch.stack([cross_entropy_N, divergence_N, log_norm_N.square()], dim=1),
        torch.stack([dense_N, tempered_N], dim=1),
        ids_NJ,
        values_NJ,
        dense,
        fit_N2,
    )
