"""What losses and labels ask of a chunk of logits: the operations that look at every column, and their twins.

The logits may be one rank's part of the vocabulary: columns [start, start + V) of `size`; those from `size` on are
padding and count as absent. Shapes: N tokens, V columns here, J or K ids a token, M draws a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from titan.ops.choose import chosen

TAIL_BLOCK = 256
"""Columns whose tail weights are summed together."""
TAIL_SCALE = 2.0**35
"""Weight of the largest tail entry. A row of 2^17 such still sums exactly in float64."""


def vocab_statistics(
    logits_NV: Tensor, ids_NJ: Tensor, top_k: int, start: int, size: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One look at every logit.

    returns: [N, 4] float32: maximum m, sum e^(z-m), sum e^((z-m)/T), sum (z-m) e^(z-m)
             [N, J] float32: logits at ids, 0 where another part holds the id
             [N, K] float32 and int64: the largest logits and their ids, ties by smaller id; -inf and 0 beyond V
    """
    if chosen("head", logits_NV) == "torch":
        return vocab_statistics_twin(logits_NV, ids_NJ, top_k, start, size, temperature)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.titan.vocab_statistics(
        logits_NV, ids_NJ, top_k, start, size, temperature
    )
    return found


def vocab_gradient_(
    logits_NV: Tensor, coefficient_N2: Tensor, log_sum_exp_N2: Tensor, ids_NJ: Tensor, values_NJ: Tensor, start: int,
    size: int, temperature: float,
) -> None:  # fmt: skip
    """Turn logits into their gradient, in place; padding becomes 0. Ids may repeat, their values add up.

    z[n, v] = c[n, 0] e^(z - l[n, 0]) + c[n, 1] e^(z/T - l[n, 1]) + values at v; column 1 is unused at T = 1
    """
    by_torch = chosen("head", logits_NV) == "torch"
    function = vocab_gradient_twin_ if by_torch else torch.ops.titan.vocab_gradient_
    function(logits_NV, coefficient_N2, log_sum_exp_N2, ids_NJ, values_NJ, start, size, temperature)


def vocab_tail_blocks(
    logits_NV: Tensor, head_ids_NK: Tensor, threshold_N: Tensor, start: int, size: int, temperature: float
) -> Tensor:
    """Weights of the tail in whole numbers, so that sums are the same however the vocabulary is cut.

    w[v] = round(2^35 e^((z[v] - t)/T)) for z[v] <= t that are not among the head's ids, else 0

    threshold: float32, the largest logit of the tail
    head ids:  all above it, and those of the equal ones that are taken
    returns:   [N, ceil(V / 256)] float64, one sum a block
    """
    if chosen("head", logits_NV) == "torch":
        return vocab_tail_blocks_twin(logits_NV, head_ids_NK, threshold_N, start, size, temperature)
    blocks: Tensor = torch.ops.titan.vocab_tail_blocks(logits_NV, head_ids_NK, threshold_N, start, size, temperature)
    return blocks


def vocab_tail_draws(
    logits_NV: Tensor, head_ids_NK: Tensor, threshold_N: Tensor, blocks: Tensor, targets_NM: Tensor, start: int,
    size: int, temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The tail entry that each target falls on, counting weights from column 0 of this part up.

    blocks:  from vocab_tail_blocks;  targets: float64 whole numbers; below 0 or beyond the part's sum is elsewhere
    returns: [N, M] int64 ids and float32 logits; 0 and 0 where the target is not here
    """
    if chosen("head", logits_NV) == "torch":
        return vocab_tail_draws_twin(logits_NV, head_ids_NK, threshold_N, blocks, targets_NM, start, size, temperature)
    drawn: tuple[Tensor, Tensor] = torch.ops.titan.vocab_tail_draws(
        logits_NV, head_ids_NK, threshold_N, blocks, targets_NM, start, size, temperature
    )
    return drawn


def vocab_tail_priorities(
    logits_NV: Tensor, head_ids_NK: Tensor, threshold_N: Tensor, turns_N4: Tensor, count: int, start: int, size: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The tail entries of highest priority e^((z - t)/T) / u, where u(v) in (0, 1) is a number that readers know too.

    u(v) = (r + (f + 1/2) / 2^24) / 2^w,  f = floor((c v + d) mod 2^32 / 2^8),  2^w >= size
    r = s(c s(a v + b)) mod 2^w,  s(x) = x xor floor(x / 2^h) for x mod 2^w,  h = ceil(w / 2): a permutation

    threshold: float32, the largest logit of the tail
    head ids:  all above it, and those of the equal ones that are taken
    turns:     int64 in [0, 2^32): a, b, c and d of each token, a and c odd
    returns:   [N, count] int64 ids, float32 logits and float32 priorities, falling, ties by smaller id; 0, -inf and 0
               where this part has no more entries of a priority above 0
    """
    if chosen("head", logits_NV) == "torch":
        return vocab_tail_priorities_twin(
            logits_NV, head_ids_NK, threshold_N, turns_N4, count, start, size, temperature
        )
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.titan.vocab_tail_priorities(
        logits_NV, head_ids_NK, threshold_N, turns_N4, count, start, size, temperature
    )
    return found


def counter_uniform(seed: int, sample_N: Tensor, position_N: Tensor, draws: int) -> Tensor:
    """[N, draws] float64 in [0, 1), a pure function of (seed, sample, position, draw): Philox 4x32-10 (Salmon 2011)."""
    if chosen("head", sample_N) == "torch":
        return counter_uniform_twin(seed, sample_N, position_N, draws)
    uniform: Tensor = torch.ops.titan.counter_uniform(seed, sample_N, position_N, draws)
    return uniform


# --- the same in plain torch ---


def vocab_statistics_twin(
    logits_NV: Tensor, ids_NJ: Tensor, top_k: int, start: int, size: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See vocab_statistics."""
    z_NV = _wide(_real(logits_NV, start, size))
    maximum_N = z_NV.amax(dim=1) if z_NV.shape[1] else z_NV.new_full((len(z_NV),), -torch.inf)
    shifted_NV = z_NV - maximum_N[:, None]
    tempered_N = (shifted_NV / temperature).exp_().sum(dim=1) if temperature != 1.0 else None
    power_NV = shifted_NV.exp()
    total_N = power_NV.sum(dim=1)
    moment_N = shifted_NV.clamp_min_(-1e4).mul_(power_NV).sum(dim=1)  # a logit of -inf adds 0, not NaN
    sums_N4 = torch.stack([maximum_N, total_N, total_N if tempered_N is None else tempered_N, moment_N], dim=1)
    values_NK, order_NK = _top(z_NV, min(top_k, z_NV.shape[1]))
    missing = top_k - values_NK.shape[1]
    ids_NK = F.pad(order_NK + start, (0, missing))
    return sums_N4, _pick(z_NV, ids_NJ, start), F.pad(values_NK, (0, missing), value=-torch.inf), ids_NK


def vocab_gradient_twin_(
    logits_NV: Tensor, coefficient_N2: Tensor, log_sum_exp_N2: Tensor, ids_NJ: Tensor, values_NJ: Tensor, start: int,
    size: int, temperature: float,
) -> None:  # fmt: skip
    """See vocab_gradient_."""
    z_NV = _real(logits_NV, start, size)
    grad_NV = _wide(z_NV)  # z itself where it is wide enough
    tempered_NV = None
    if temperature != 1.0:
        tempered_NV = (grad_NV / temperature).sub_(log_sum_exp_N2[:, 1:]).exp_().mul_(coefficient_N2[:, 1:])
    grad_NV.sub_(log_sum_exp_N2[:, :1]).exp_().mul_(coefficient_N2[:, :1])
    if tempered_NV is not None:
        grad_NV += tempered_NV
    if z_NV.shape[1]:
        local_NJ = ids_NJ - start
        mine_NJ = (local_NJ >= 0) & (local_NJ < z_NV.shape[1])
        grad_NV.scatter_add_(1, local_NJ.clamp(0, z_NV.shape[1] - 1), values_NJ.where(mine_NJ, 0.0).to(grad_NV.dtype))
    if grad_NV is not z_NV:
        z_NV.copy_(grad_NV)
    logits_NV[:, z_NV.shape[1] :] = 0.0


def vocab_tail_blocks_twin(
    logits_NV: Tensor, head_ids_NK: Tensor, threshold_N: Tensor, start: int, size: int, temperature: float
) -> Tensor:
    """See vocab_tail_blocks."""
    weights_NV = _tail_weights(logits_NV, head_ids_NK, threshold_N, start, size, temperature)
    missing = -weights_NV.shape[1] % TAIL_BLOCK
    return F.pad(weights_NV, (0, missing)).view(len(weights_NV), -1, TAIL_BLOCK).sum(dim=2)


def vocab_tail_draws_twin(
    logits_NV: Tensor, head_ids_NK: Tensor, threshold_N: Tensor, blocks: Tensor, targets_NM: Tensor, start: int,
    size: int, temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See vocab_tail_draws; it does without the blocks."""
    if logits_NV.shape[1] == 0:
        return torch.zeros_like(targets_NM, dtype=torch.int64), torch.zeros_like(targets_NM, dtype=torch.float32)
    end_NV = _tail_weights(logits_NV, head_ids_NK, threshold_N, start, size, temperature).cumsum(dim=1)
    local_NM = torch.searchsorted(end_NV, targets_NM, right=True)
    here_NM = (targets_NM >= 0) & (targets_NM < end_NV[:, -1:])
    local_NM = local_NM.clamp_max(logits_NV.shape[1] - 1)
    drawn_NM = _wide(logits_NV.gather(1, local_NM)).where(here_NM, 0.0)
    return (local_NM + start).where(here_NM, 0), drawn_NM


def vocab_tail_priorities_twin(
    logits_NV: Tensor, head_ids_NK: Tensor, threshold_N: Tensor, turns_N4: Tensor, count: int, start: int, size: int,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See vocab_tail_priorities."""
    z_NV = _wide(_real(logits_NV, start, size))
    power_NV = (
        ((z_NV - threshold_N[:, None]) / temperature).exp().where(z_NV <= threshold_N[:, None], 0.0).nan_to_num_(0.0)
    )
    id_V = torch.arange(start, start + z_NV.shape[1], device=z_NV.device)
    width = max(0, size - 1).bit_length()
    a_N1, b_N1, c_N1, d_N1 = (turns_N4[:, j : j + 1] for j in range(4))
    mask, half = (1 << width) - 1, (width + 1) // 2
    place_NV = a_N1 * id_V + b_N1 & mask
    place_NV ^= place_NV >> half
    place_NV = c_N1 * place_NV & mask
    place_NV ^= place_NV >> half
    fraction_NV = (c_N1 * id_V + d_N1 & 0xFFFFFFFF) >> 8
    uniform_NV = (place_NV + (fraction_NV + 0.5) * 2.0**-24) * 2.0**-width
    priority_NV = _without(power_NV / uniform_NV, head_ids_NK, start)
    values_NM, order_NM = _top(priority_NV, min(count, z_NV.shape[1]))
    missing = count - order_NM.shape[1]
    there_NM = values_NM > 0
    ids_NM = F.pad((order_NM + start).where(there_NM, 0), (0, missing))
    drawn_NM = z_NV.gather(1, order_NM).where(there_NM, -torch.inf)
    return ids_NM, F.pad(drawn_NM, (0, missing), value=-torch.inf), F.pad(values_NM, (0, missing))


def counter_uniform_twin(seed: int, sample_N: Tensor, position_N: Tensor, draws: int) -> Tensor:
    """See counter_uniform. 32-bit words in int64; a product of two is made of 16-bit halves to stay below 2^63."""
    low = 0xFFFFFFFF
    draw_NM = torch.arange(draws, device=sample_N.device).expand(len(sample_N), draws)
    position_NM = (position_N & low)[:, None].expand_as(draw_NM)
    words = [
        draw_NM,
        position_NM,
        (sample_N & low)[:, None] + 0 * draw_NM,
        (sample_N >> 32 & low)[:, None] + 0 * draw_NM,
    ]
    key_low, key_high = seed & low, seed >> 32 & low
    for _ in range(10):
        left_high, left_low = _product(words[0], 0xD2511F53)
        right_high, right_low = _product(words[2], 0xCD9E8D57)
        words = [right_high ^ words[1] ^ key_low, right_low, left_high ^ words[3] ^ key_high, left_low]
        key_low, key_high = key_low + 0x9E3779B9 & low, key_high + 0xBB67AE85 & low
    mantissa = (words[0] << 21) ^ (words[1] >> 11)
    return mantissa.double() * 2.0**-53


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of a product of 32-bit words."""
    small = word * (factor & 0xFFFF)
    middle = word * (factor >> 16) + (small >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (small & 0xFFFF)


def _tail_weights(
    logits_NV: Tensor, head_ids_NK: Tensor, threshold_N: Tensor, start: int, size: int, temperature: float
) -> Tensor:
    z_NV = _wide(_real(logits_NV, start, size))
    weights_NV = torch.round(((z_NV - threshold_N[:, None]) / temperature).exp() * TAIL_SCALE)
    weights_NV = weights_NV.double().where(z_NV <= threshold_N[:, None], 0.0)
    return F.pad(_without(weights_NV, head_ids_NK, start), (0, logits_NV.shape[1] - z_NV.shape[1]))


def _without(weights_NV: Tensor, head_ids_NK: Tensor, start: int) -> Tensor:
    """0 at the head's ids."""
    local_NK, columns = head_ids_NK - start, weights_NV.shape[1]
    mine_NK = (local_NK >= 0) & (local_NK < columns)
    padded_NV = F.pad(weights_NV, (0, 1))  # one more column takes ids held elsewhere
    padded_NV.scatter_(1, local_NK.where(mine_NK, columns), 0.0)
    return padded_NV[:, :-1]


def _top(z_NV: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The largest and their places, ties by smaller place. A key has the float's order in its upper 32 bits."""
    if top_k == 0:
        return z_NV[:, :0], torch.empty(len(z_NV), 0, dtype=torch.int64, device=z_NV.device)
    if z_NV.dtype == torch.float64:
        values_NV, order_NV = z_NV.sort(dim=1, descending=True, stable=True)
        return values_NV[:, :top_k], order_NV[:, :top_k]
    bits_NV = (z_NV + 0.0).view(torch.int32).long()  # + 0.0 makes one zero of two
    rising_NV = torch.where(bits_NV < 0, bits_NV ^ 0x7FFFFFFF, bits_NV)
    place_V = torch.arange(z_NV.shape[1], device=z_NV.device)
    order_NK = ((rising_NV << 32) - place_V).topk(top_k, dim=1).indices
    return z_NV.gather(1, order_NK), order_NK


def _real(logits_NV: Tensor, start: int, size: int) -> Tensor:
    return logits_NV[:, : max(0, size - start)]


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def _pick(z_NV: Tensor, ids_NJ: Tensor, start: int) -> Tensor:
    local_NJ = ids_NJ - start
    mine_NJ = (local_NJ >= 0) & (local_NJ < z_NV.shape[1])
    if not z_NV.shape[1]:
        return torch.zeros_like(ids_NJ, dtype=z_NV.dtype)
    return z_NV.gather(1, local_NJ.clamp(0, z_NV.shape[1] - 1)).where(mine_NJ, 0.0)
