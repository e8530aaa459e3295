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

from titan.ops.label import SparseLabels, TailDraws, TeacherSays
from titan.ops.vocab import counter_uniform, vocab_gradient_, vocab_statistics, vocab_tail_blocks, vocab_tail_draws

CHUNK_TOKENS = 256
"""At least so many tokens of a chunk: the weight's gradient is read and written once a chunk."""
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits held at a time where that is more: 4 MB of float32 stay in a core's cache; a GPU wants more at once."""
PRODUCT_ROWS = 4096
"""Rows of the output weight multiplied at a time on a CPU: MKL packs them all first, in memory and time that show."""
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


@dataclass(frozen=True)
class Objective:
    """loss = (1 - weight) * cross-entropy + weight * T^2 * KL(teacher || student) + z_loss * log_sum_exp^2, a token."""

    weight: float = 0.0
    temperature: float = 1.0
    z_loss: float = 0.0
    """Keeps the softmax's normaliser near 1 (arXiv 2204.02311, section 5); always at temperature 1."""


@dataclass(frozen=True)
class Chunk:
    """How much of the logits exists at a time."""

    tokens: int | None = None
    """None: what CHUNK_ELEMENTS and CHUNK_TOKENS say."""
    columns: int | None = None
    """Rows of the output weight at a time; None for all of this rank's. With fewer, logits are computed twice."""


@dataclass
class HeadResult:
    """Sums over the tokens of one micro-batch, and what goes back into the model."""

    cross_entropy: Tensor
    """float64 scalar, nats, weighted sum over tokens."""
    divergence: Tensor
    """float64 scalar, nats: KL(teacher || student) at temperature T as the labels tell it, weighted sum over tokens."""
    squared_log_norm: Tensor
    """float64 scalar: log_sum_exp^2, weighted sum over tokens."""
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
    draws: TailDraws | None = None,
    chunk: Chunk | None = None,
) -> HeadResult:
    """Loss of every token, and in training the gradients, in one pass over chunks.

    hidden_ND: any float dtype;  targets_N: int64;  token_weight_N: float32, 0 for tokens that do not count
    labels:    needed when objective.weight > 0
    grad_weight_VD: float32 buffer to add the weight's gradient to; None runs forward only
    grad_scale: what the summed loss is multiplied by before gradients (1 / global token count, times a loss scale)
    top_k:     entries a label wants, 0 for none;  draws: what it wants of the tail
    raises:    ValueError naming the argument
    """
    chunk = chunk or Chunk()
    _check(hidden_ND, weight_VD, targets_N, token_weight_N, shard, objective, top_k, draws, chunk)
    if labels is not None:
        labels.check(len(hidden_ND), shard.size)
    sums = torch.zeros(3, dtype=torch.float64, device=hidden_ND.device)
    grad_hidden_ND = torch.empty_like(hidden_ND) if grad_weight_VD is not None else None
    says: list[TeacherSays] = []
    tiles = list(_tiles(shard, chunk))
    parts = list(_token_chunks(hidden_ND, shard, chunk))
    space = hidden_ND.new_empty(len(hidden_ND[parts[0]]) * tiles[0].rows if parts else 0)
    for part in parts:
        hidden, targets, weight_N = hidden_ND[part], targets_N[part, None], token_weight_N[part]
        part_labels = None if labels is None else labels.rows(part)
        ids_NJ = targets if part_labels is None else torch.cat([targets, *part_labels.ids()], dim=1)
        wanted = top_k if draws is None else min(top_k + 1, shard.size)
        seen = []
        for tile in tiles:
            logits = _logits(hidden, weight_VD, shard, tile, space)
            seen.append(vocab_statistics(logits, ids_NJ, wanted, tile.start, shard.size, objective.temperature))
        look = _merge(seen, shard, objective.temperature)
        terms = _terms(look, part_labels, objective)
        sums += (terms.losses_N3.double() * weight_N[:, None]).sum(dim=0)
        if top_k:
            says.append(_teacher_says(look, logits, top_k, draws and draws.rows(part), objective.temperature, shard))
        if grad_hidden_ND is None or grad_weight_VD is None:
            continue
        scale_N = (weight_N * grad_scale)[:, None]
        for tile in tiles:
            if len(tiles) > 1:
                logits = _logits(hidden, weight_VD, shard, tile, space)
            vocab_gradient_(
                logits, terms.coefficient_N2 * scale_N, look.log_sum_exp_N2, ids_NJ, terms.values_NJ * scale_N,
                tile.start, shard.size, objective.temperature,
            )  # fmt: skip
            rows = slice(tile.start - shard.start, tile.start - shard.start + tile.rows)
            _add_gradients(
                logits, hidden, weight_VD[rows], grad_hidden_ND[part], grad_weight_VD[rows], tile is tiles[0]
            )
    if grad_hidden_ND is not None and shard.group is not None:
        dist.all_reduce(grad_hidden_ND, group=shard.group)
    merged = TeacherSays.cat(says) if says else None
    return HeadResult(sums[0], sums[1], sums[2], grad_hidden_ND, merged)


def label_logits(
    logits_NV: Tensor, top_k: int, draws: TailDraws | None, temperature: float, shard: VocabShard
) -> TeacherSays:
    """The label of a chunk of logits, which may be one tensor rank's part of the vocabulary; nothing is copied."""
    wanted = top_k if draws is None else min(top_k + 1, shard.size)
    no_ids = torch.empty(len(logits_NV), 0, dtype=torch.int64, device=logits_NV.device)
    seen = vocab_statistics(logits_NV, no_ids, wanted, shard.start, shard.size, temperature)
    return _teacher_says(_merge([seen], shard, temperature), logits_NV, top_k, draws, temperature, shard)


def _check(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, token_weight_N: Tensor, shard: VocabShard,
    objective: Objective, top_k: int, draws: TailDraws | None, chunk: Chunk,
) -> None:  # fmt: skip
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
    if not 0 <= top_k <= shard.size:
        raise ValueError(f"top_k must be from 0 to the vocabulary's {shard.size}, got {top_k}")
    if draws is not None and not top_k:
        raise ValueError("draws need a head: top_k must be at least 1, got 0")
    if draws is not None and chunk.columns is not None:
        raise ValueError(f"chunk.columns must be None where labels are drawn, got {chunk.columns}")
    for name, count in (("tokens", chunk.tokens), ("columns", chunk.columns)):
        if count is not None and count < 1:
            raise ValueError(f"chunk.{name} must be at least 1, got {count}")


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


def _logits(hidden_ND: Tensor, weight_VD: Tensor, shard: VocabShard, tile: VocabShard, space: Tensor) -> Tensor:
    """Logits of one tile, in memory that all chunks use in turn."""
    first = tile.start - shard.start
    logits_NV = space[: len(hidden_ND) * tile.rows].view(len(hidden_ND), tile.rows)
    step = PRODUCT_ROWS if hidden_ND.device.type == "cpu" else max(1, tile.rows)
    for row in range(0, tile.rows, step):
        rows = slice(row, min(row + step, tile.rows))
        torch.mm(hidden_ND, weight_VD[first + rows.start : first + rows.stop].t(), out=logits_NV[:, rows])
    return logits_NV


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
class _Look:
    """What all parts of the vocabulary together saw; float32."""

    log_sum_exp_N2: Tensor  # of logits, and of logits / T
    entropy_N: Tensor  # of softmax(logits)
    picked_NJ: Tensor
    top_values_NK: Tensor
    top_ids_NK: Tensor


def _merge(seen: list[tuple[Tensor, Tensor, Tensor, Tensor]], shard: VocabShard, temperature: float) -> _Look:
    """Chunks of columns, and tensor ranks through one exchange: in float64, where ids are whole and logits exact."""
    packed = torch.stack([torch.cat([item.double() for item in part], dim=1) for part in seen])
    if shard.group is not None:
        parts = [torch.empty_like(packed) for _ in range(shard.group.size())]
        dist.all_gather(parts, packed, group=shard.group)
        packed = torch.cat(parts)
    wanted = seen[0][2].shape[1]
    sums_PN4, picked_PNJ, values_PNK, ids_PNK = torch.split(packed, [4, seen[0][1].shape[1], wanted, wanted], dim=2)
    maximum_N = sums_PN4[..., 0].amax(dim=0)
    below_PN = (sums_PN4[..., 0] - maximum_N).clamp_min(-1e4)  # a part of padding alone has -inf, and sums of 0
    total_N = (below_PN.exp() * sums_PN4[..., 1]).sum(dim=0)
    tempered_N = ((below_PN / temperature).exp() * sums_PN4[..., 2]).sum(dim=0)
    moment_N = (below_PN.exp() * (sums_PN4[..., 3] + below_PN * sums_PN4[..., 1])).sum(dim=0)
    # Parts are in order of ids and each has its own in order, so a stable sort puts equal logits in order of ids.
    values_NK, order_NK = values_PNK.transpose(0, 1).flatten(1).sort(dim=1, descending=True, stable=True)
    ids_NK = ids_PNK.transpose(0, 1).flatten(1).gather(1, order_NK[:, :wanted])
    return _Look(
        torch.stack([maximum_N + total_N.log(), maximum_N / temperature + tempered_N.log()], dim=1).float(),
        (total_N.log() - moment_N / total_N).float(),
        picked_PNJ.sum(dim=0).float(),
        values_NK[:, :wanted].float(),
        ids_NK.long(),
    )


@dataclass(frozen=True)
class _Terms:
    """Losses of each token, and their gradient as vocab_gradient_ takes it, before token weights."""

    losses_N3: Tensor  # cross-entropy, divergence, log_sum_exp^2
    coefficient_N2: Tensor
    values_NJ: Tensor


def _terms(look: _Look, labels: SparseLabels | None, objective: Objective) -> _Terms:
    """Cross-entropy has the gradient q - onehot and z-loss 2 l q, at temperature 1; for labels see _soft."""
    log_norm_N = look.log_sum_exp_N2[:, 0]
    cross_entropy_N = log_norm_N - look.picked_NJ[:, 0]
    soft = objective.weight if labels is not None else 0.0
    dense_N = (1.0 - soft) + 2.0 * objective.z_loss * log_norm_N
    values_NJ = torch.full_like(look.picked_NJ, soft - 1.0)
    divergence_N = tempered_N = torch.zeros_like(log_norm_N)
    if labels is not None:
        divergence_N, multiple_N, sparse_NJ = _soft(look, labels, objective.temperature)
        tempered_N = soft * objective.temperature * multiple_N
        values_NJ = torch.cat([values_NJ[:, :1], soft * objective.temperature * sparse_NJ], dim=1)
    if objective.temperature == 1.0:
        dense_N, tempered_N = dense_N + tempered_N, torch.zeros_like(tempered_N)
    return _Terms(
        torch.stack([cross_entropy_N, divergence_N, log_norm_N.square()], dim=1),
        torch.stack([dense_N, tempered_N], dim=1),
        values_NJ,
    )


def _soft(look: _Look, labels: SparseLabels, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence from the teacher, and its gradient in logits / T: a multiple of q plus values at the label's ids.

    Weights that sum to one (a renormalised top k, or sampled ids): q - p.
    A head and its tail as one bucket, with r = (1 - P) / (1 - Q) of the masses behind the heads: q - p on the head and
    (1 - r) q on the tail. Draws j of the tail add -(shrink / M) (1 - P) w_j at j, where w_j = 1 - q~_j / p~_j compares
    the distributions within the tail: the student's own tail is the control variate, so that with shrink 1 the
    gradient is that of the whole distribution on average, and its noise vanishes as the student learns.
    """
    log_q_NJ = look.picked_NJ[:, 1:] / temperature - look.log_sum_exp_N2[:, 1:]
    head = labels.ids_NK.shape[1]
    log_q_NK, log_q_NM = log_q_NJ[:, :head], log_q_NJ[:, head:]
    present_NK = labels.log_prob_NK > -torch.inf
    p_NK = labels.log_prob_NK.exp()
    divergence_N = (p_NK * (labels.log_prob_NK - log_q_NK)).where(present_NK, 0.0).sum(dim=1)
    if labels.tail == "none":
        return divergence_N, p_NK.sum(dim=1), -p_NK
    q_NK = log_q_NK.exp().where(present_NK, 0.0)
    teacher_tail_N = (1.0 - p_NK.sum(dim=1)).clamp_min(SMALLEST_TAIL)
    student_tail_N = (1.0 - q_NK.sum(dim=1)).clamp_min(SMALLEST_TAIL)
    ratio_N = teacher_tail_N / student_tail_N
    bucket_N = teacher_tail_N * ratio_N.log()
    values_NJ = ratio_N[:, None] * q_NK - p_NK
    if labels.draw_ids_NM is None or labels.draw_log_prob_NM is None:
        return divergence_N + bucket_N, 1.0 - ratio_N, values_NJ
    drawn_NM = labels.draw_log_prob_NM > -torch.inf
    share_N1 = (teacher_tail_N / drawn_NM.sum(dim=1).clamp_min(1))[:, None]
    lead_NM = (labels.draw_log_prob_NM - log_q_NM).where(drawn_NM, 0.0)  # log p - log q
    tail_N = (share_N1 * lead_NM).sum(dim=1).where(drawn_NM.any(dim=1), bucket_N)
    weight_NM = (1.0 - ratio_N[:, None] * (-lead_NM).exp()).where(drawn_NM, 0.0)
    shrink = labels.shrink if isinstance(labels.shrink, float) else labels.shrink[:, None]
    values_NJ = torch.cat([values_NJ, -shrink * share_N1 * weight_NM], dim=1)
    return divergence_N + tail_N, 1.0 - ratio_N, values_NJ


def _teacher_says(
    look: _Look, logits_NV: Tensor, top_k: int, draws: TailDraws | None, temperature: float, shard: VocabShard
) -> TeacherSays:
    """The label of a chunk: its head from what all parts saw, its draws from the logits."""
    log_norm_N = look.log_sum_exp_N2[:, 0]
    head_ids_NK = look.top_ids_NK[:, :top_k].contiguous()
    draw_ids_NM = draw_log_prob_NM = None
    if draws is not None:
        draw_ids_NM, drawn_NM = _draw(look, logits_NV, head_ids_NK, draws, temperature, shard)
        draw_log_prob_NM = drawn_NM / temperature - look.log_sum_exp_N2[:, 1:]
    return TeacherSays(
        head_ids_NK,
        look.top_values_NK[:, :top_k] - log_norm_N[:, None],
        look.log_sum_exp_N2[:, 1] - log_norm_N / temperature,
        look.entropy_N,
        draw_ids_NM,
        draw_log_prob_NM,
    )


def _draw(
    look: _Look, logits_NV: Tensor, head_ids_NK: Tensor, draws: TailDraws, temperature: float, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """[N, M] ids and logits drawn from the tail; logit -inf where the head is the whole vocabulary.

    Draw j falls into the j-th of M equal slices of the tail's mass, in order of ids: each slice is hit once, so a mean
    over the draws is as unbiased as with independent ones and never noisier. Weights are whole numbers, so that draws
    are the same however the vocabulary is cut.
    """
    top_k = head_ids_NK.shape[1]
    if look.top_values_NK.shape[1] == top_k:
        shape = (len(logits_NV), draws.count)
        return head_ids_NK.new_zeros(shape), look.top_values_NK.new_full(shape, -torch.inf)
    threshold_N = look.top_values_NK[:, top_k].contiguous()
    blocks = vocab_tail_blocks(logits_NV, head_ids_NK, threshold_N, shard.start, shard.size, temperature)
    own_N = blocks.sum(dim=1)
    total_N, before_N = own_N, torch.zeros_like(own_N)
    if shard.group is not None:
        parts = [torch.empty_like(own_N) for _ in range(shard.group.size())]
        dist.all_gather(parts, own_N, group=shard.group)
        total_N, before_N = (
            torch.stack(parts).sum(dim=0),
            torch.stack([before_N, *parts])[: shard.group.rank() + 1].sum(0),
        )
    uniform_NM = counter_uniform(draws.seed, draws.sample_N, draws.position_N, draws.count)
    slice_M = torch.arange(draws.count, device=uniform_NM.device)
    targets_NM = ((slice_M + uniform_NM) / draws.count * total_N[:, None]).floor().minimum(total_N[:, None] - 1)
    ids_NM, drawn_NM = vocab_tail_draws(
        logits_NV,
        head_ids_NK,
        threshold_N,
        blocks,
        targets_NM - before_N[:, None],
        shard.start,
        shard.size,
        temperature,
    )
    if shard.group is not None:
        found = torch.stack([ids_NM.double(), drawn_NM.double()])  # a draw is on one rank, the others have 0
        dist.all_reduce(found, group=shard.group)
        ids_NM, drawn_NM = found[0].long(), found[1].float()
    return ids_NM, drawn_NM
