"""The label of a chunk of tokens: its head from one look at the logits, its draws by a second.

Shape letters as in titan.ops.head.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from titan.ops.label import TailDraws, TeacherSays
from titan.ops.look import Look, VocabShard, merge
from titan.ops.vocab import (
    counter_uniform,
    vocab_statistics,
    vocab_tail_blocks,
    vocab_tail_draws,
    vocab_tail_priorities,
)


def label_logits(
    logits_NV: Tensor,
    top_k: int,
    draws: TailDraws | None,
    temperature: float,
    shard: VocabShard,
    whole: bool = False,
) -> TeacherSays:
    """The label of a chunk of logits, which may be one tensor rank's part of the vocabulary; nothing is copied."""
    wanted = top_k if draws is None else min(top_k + 1, shard.size)
    no_ids = torch.empty(len(logits_NV), 0, dtype=torch.int64, device=logits_NV.device)
    seen = vocab_statistics(logits_NV, no_ids, wanted, shard.start, shard.size, temperature)
    return teacher_says(merge([seen], shard, temperature), logits_NV, top_k, draws, temperature, shard, whole)


def teacher_says(
    look: Look,
    logits_NV: Tensor,
    top_k: int,
    draws: TailDraws | None,
    temperature: float,
    shard: VocabShard,
    whole: bool = False,
) -> TeacherSays:
    """The label of a chunk: its head from what all parts saw, its draws from the logits, and if wanted all of them."""
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
        _whole(logits_NV, log_norm_N, shard) if whole else None,
    )


def _whole(logits_NV: Tensor, log_norm_N: Tensor, shard: VocabShard) -> Tensor:
    """Log-probabilities of the whole vocabulary; tensor ranks hold equally many rows."""
    log_prob_NV = logits_NV.float() - log_norm_N[:, None]
    if shard.group is None:
        return log_prob_NV[:, : shard.size]
    parts = [torch.empty_like(log_prob_NV) for _ in range(shard.group.size())]
    dist.all_gather(parts, log_prob_NV, group=shard.group)
    return torch.cat(parts, dim=1)[:, : shard.size]


def _draw(
    look: Look, logits_NV: Tensor, head_ids_NK: Tensor, draws: TailDraws, temperature: float, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """[N, M] ids and logits drawn from the tail; logit -inf where it has no more entries."""
    top_k = head_ids_NK.shape[1]
    if look.top_values_NK.shape[1] == top_k:
        shape = (len(logits_NV), draws.count)
        return head_ids_NK.new_zeros(shape), look.top_values_NK.new_full(shape, -torch.inf)
    threshold_N = look.top_values_NK[:, top_k].contiguous()
    if draws.independent:
        return _draw_independent(logits_NV, head_ids_NK, threshold_N, draws, temperature, shard)
    found = vocab_tail_priorities(
        logits_NV, head_ids_NK, threshold_N, token_turns(draws), draws.count, shard.start, shard.size, temperature
    )
    if shard.group is None:
        return found[0], found[1]
    packed = torch.stack([item.double() for item in found])
    parts = [torch.empty_like(packed) for _ in range(shard.group.size())]
    dist.all_gather(parts, packed, group=shard.group)
    ids_NM, drawn_NM, priority_NM = torch.cat(parts, dim=2)  # parts are in order of ids, and so are equals after a sort
    order_NM = priority_NM.sort(dim=1, descending=True, stable=True).indices[:, : draws.count]
    return ids_NM.gather(1, order_NM).long(), drawn_NM.gather(1, order_NM).float()


def token_turns(draws: TailDraws) -> Tensor:
    """int64 [N, 4] in [0, 2^32): a, b, c and d of titan.ops.vocab.vocab_tail_priorities; a and c are odd.

    titan.distill.codec.priority makes the same of step, sample and position.
    """
    low = 0xFFFFFFFF
    key = _mix(torch.tensor(_signed(draws.seed * 8 + GOLDEN), device=draws.sample_N.device))
    word_N = _mix(_mix(draws.sample_N + key) + (draws.position_N + 1) * _signed(GOLDEN))
    other_N = _mix(word_N)
    turns = [word_N & low | 1, word_N >> 32 & low, other_N & low | 1, other_N >> 32 & low]
    return torch.stack(turns, dim=1)


GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, on uint64 that torch takes for int64."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _signed(word: int) -> int:
    """The int64 with the bits of a uint64."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


def _draw_independent(
    logits_NV: Tensor, head_ids_NK: Tensor, threshold_N: Tensor, draws: TailDraws, temperature: float, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Weights of entries are whole numbers in order of ids, so that draws are the same however the vocabulary is cut.
    Those below 2^-36 of the largest are 0 and are never drawn.
    """
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
    points_NM = counter_uniform(draws.seed, draws.sample_N, draws.position_N, draws.count)
    targets_NM = (points_NM * total_N[:, None]).floor().minimum(total_N[:, None] - 1)
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
