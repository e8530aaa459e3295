"""The codecs `sampled` and `top_k`: the likeliest entries of each token, and draws from what is behind them.

A token has k entries and m draws. Of its k + 1 classes (the entries, and the tail behind them) all but one are sent as
probabilities: the one left out is the larger of the first entry and the tail, and is what the others leave. So masses
sum to one exactly, a small tail keeps its relative accuracy, and no class is wrong by more than the others together.

The teacher gives K candidates and draws from behind all of them. Where fewer than K become the head, draws from behind
the head are made here: on the line of its tail's mass, candidates first, m points lie one stride apart (systematic
sampling: each entry is hit with the probability it should have, none twice that is smaller than a stride), and the
points beyond the candidates take the teacher's draws, any first few of which are a sample.

Shape letters as in titan.distill.codec.raw; E entries of all tokens in a row.
"""

import numpy as np

from titan.distill.codec.bits import BitReader, BitWriter
from titan.distill.codec.budget import Shares, everything, share_out
from titan.distill.codec.codes import MASS_FLOOR, dither
from titan.distill.codec.context import DITHER, PLACES, Context, read_entropy, read_norm, write_entropy, write_norm
from titan.distill.codec.raw import CodecName, RawLabels


def encode_sampled(raw: RawLabels, context: Context, budget_bytes: float | None, writer: BitWriter) -> None:
    """Write the labels. budget_bytes: mean size of a token's label; None sends everything there is."""
    assert raw.ids_BSK is not None
    p_BSK = np.exp(raw.tempered_log_prob())
    drawn_BS = np.zeros(p_BSK.shape[:2], np.int64)
    if context.draws and raw.draw_log_prob_BSM is not None:
        drawn_BS = np.count_nonzero(raw.draw_log_prob_BSM > -np.inf, axis=-1)
    if budget_bytes is None:
        shares = everything(p_BSK, drawn_BS)
    else:
        shares = share_out(p_BSK, drawn_BS, context.most_draws, context.cost, budget_bytes)
    ids_E, log_prob_E, draws_BS = _draws(raw, p_BSK, shares, context)
    for counts_BS, width in zip((shares.head_BS, draws_BS), context.count_bits, strict=True):
        writer.add(counts_BS, width)
    uniform_BS = context.uniform(DITHER)
    if context.candidates:
        _write_head(raw.ids_BSK, p_BSK, shares.head_BS, uniform_BS, context, writer)
    if context.draws:
        writer.add(ids_E, context.id_bits)
        writer.add(context.draw_scale.encode(log_prob_E, _draw_dither(uniform_BS, draws_BS)), context.draw_bits)
    write_entropy(raw, context, writer)
    write_norm(raw, context, writer)


def decode_sampled(codec: CodecName, context: Context, reader: BitReader) -> RawLabels:
    """Inverse of `encode_sampled` up to rounding; as wide as the token with most entries."""
    shape = (len(context.sample_ids_B), context.length)
    head_BS, draws_BS = (
        reader.take(shape[0] * shape[1], width).astype(np.int64).reshape(shape) for width in context.count_bits
    )
    uniform_BS = context.uniform(DITHER)
    ids_BSK, p_BSK = np.zeros((*shape, 0), np.int32), np.zeros((*shape, 0), np.float32)
    if context.candidates:
        ids_BSK, p_BSK = _read_head(head_BS, uniform_BS, context, reader)
    with np.errstate(divide="ignore"):
        log_prob_BSK = np.log(p_BSK)
    draw_ids = draw_log_prob = None
    if context.draws:
        in_draws = _first(draws_BS)
        draw_ids = _spread(reader.take(int(draws_BS.sum()), context.id_bits).astype(np.int32), in_draws, 0)
        codes = reader.take(int(draws_BS.sum()), context.draw_bits)
        read = context.draw_scale.decode(codes, _draw_dither(uniform_BS, draws_BS))
        draw_log_prob = _spread(read, in_draws, -np.inf)
    entropy_BS = read_entropy(context, reader)
    norm_BS = read_norm(context, reader)
    if norm_BS is not None:
        log_prob_BSK = (log_prob_BSK + norm_BS[..., None]) * np.float32(context.temperature)
    return RawLabels(
        codec, context.temperature, ids_BSK, log_prob_BSK, norm_BS, entropy_BS, draw_ids, draw_log_prob
    )  # fmt: skip


def _first(counts_BS: np.ndarray) -> np.ndarray:
    """Bool [B, S, most]: the first so many of each token."""
    mask: np.ndarray = np.arange(int(counts_BS.max(initial=0))) < counts_BS[..., None]
    return mask


def _spread(values_E: np.ndarray, mask: np.ndarray, fill: float) -> np.ndarray:
    """An array of the mask's shape with the values where it is set."""
    out = np.full(mask.shape, fill, values_E.dtype)
    out[mask] = values_E
    return out


def _head_dither(uniform_BS: np.ndarray, head_BS: np.ndarray) -> np.ndarray:
    """float32 [E]."""
    in_head = _first(head_BS)
    dither_E: np.ndarray = dither(uniform_BS[..., None], np.arange(in_head.shape[-1]))[in_head]
    return dither_E


def _draw_dither(uniform_BS: np.ndarray, draws_BS: np.ndarray) -> np.ndarray:
    """float32 [E]: other slots than those of the head."""
    in_draws = _first(draws_BS)
    dither_E: np.ndarray = dither(uniform_BS[..., None], -1 - np.arange(in_draws.shape[-1]))[in_draws]
    return dither_E


def _write_head(
    ids_BSK: np.ndarray, p_BSK: np.ndarray, head_BS: np.ndarray, uniform_BS: np.ndarray, context: Context,
    writer: BitWriter,
) -> None:  # fmt: skip
    in_head = np.arange(context.candidates) < head_BS[..., None]
    writer.add(ids_BSK[in_head], context.id_bits)
    tail_BS = 1.0 - np.where(in_head, p_BSK, np.float32(0.0)).sum(axis=-1)
    tail_is_rest_BS = tail_BS >= p_BSK[..., 0]
    writer.add(tail_is_rest_BS, 1)
    sent_BSK = p_BSK.copy()
    sent_BSK[..., 0] = np.where(tail_is_rest_BS, p_BSK[..., 0], tail_BS)
    writer.add(context.head_scale.encode(sent_BSK[in_head], _head_dither(uniform_BS, head_BS)), context.head_bits)


def _read_head(
    head_BS: np.ndarray, uniform_BS: np.ndarray, context: Context, reader: BitReader
) -> tuple[np.ndarray, np.ndarray]:
    """int32 ids and float32 probabilities at the log's temperature, 0 where a token has fewer entries."""
    entries, in_head = int(head_BS.sum()), _first(head_BS)
    ids_BSK = _spread(reader.take(entries, context.id_bits).astype(np.int32), in_head, 0)
    tail_is_rest_BS = reader.take(head_BS.size, 1).reshape(head_BS.shape) > 0
    codes_E = reader.take(entries, context.head_bits)
    p_BSK = _spread(context.head_scale.decode(codes_E, _head_dither(uniform_BS, head_BS)), in_head, 0.0)
    sent_BS = p_BSK.sum(axis=-1)
    shrink_BS = np.minimum(1.0, (1 - MASS_FLOOR) / np.maximum(sent_BS, MASS_FLOOR))
    p_BSK *= shrink_BS[..., None]  # only where rounding left nothing for the class that is not sent
    if p_BSK.shape[-1]:
        rest_BS = np.maximum(1.0 - p_BSK.sum(axis=-1), MASS_FLOOR)
        first_BS = np.where(tail_is_rest_BS, p_BSK[..., 0], rest_BS)
        p_BSK[..., 0] = np.where(head_BS > 0, first_BS, 0.0)
    return ids_BSK, p_BSK


def _draws(
    raw: RawLabels, p_BSK: np.ndarray, shares: Shares, context: Context
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws from behind each token's head: ids [E], log-probabilities [E], and how many each token has [B, S]."""
    assert raw.ids_BSK is not None
    draws_BS = shares.draws_BS
    if not context.draws or raw.draw_ids_BSM is None or raw.draw_log_prob_BSM is None:
        return np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros_like(draws_BS)
    available_BS = np.count_nonzero(raw.draw_log_prob_BSM > -np.inf, axis=-1)
    times = np.zeros((*draws_BS.shape, context.candidates + context.draws), np.int16)
    left_BS = draws_BS
    if context.candidates:
        behind_BSK = np.where(np.arange(context.candidates) < shares.head_BS[..., None], np.float32(0.0), p_BSK)
        upto_BSK = np.cumsum(behind_BSK, axis=-1, dtype=np.float32)
        tail_BS = np.where(available_BS > 0, 1.0 - (p_BSK - behind_BSK).sum(axis=-1), upto_BSK[..., -1])
        stride_BS = np.maximum(tail_BS, np.float32(1e-12)) / np.maximum(draws_BS, 1).astype(np.float32)
        points_BSK = upto_BSK / stride_BS[..., None] - context.uniform(PLACES)[..., None]
        hit_BSK = np.clip(np.ceil(points_BSK), 0.0, draws_BS[..., None].astype(np.float32)).astype(np.int16)
        times[..., 0] = hit_BSK[..., 0]  # of the points j + uniform, those below the first candidate's end
        times[..., 1 : context.candidates] = hit_BSK[..., 1:] - hit_BSK[..., :-1]
        left_BS = draws_BS - hit_BSK[..., -1]
    beyond_BS = np.minimum(left_BS, available_BS)
    times[..., context.candidates :] = np.arange(context.draws) < beyond_BS[..., None]
    hit = np.flatnonzero(times)
    token_E, column_E = np.divmod(np.repeat(hit, times.ravel()[hit]), times.shape[-1])
    own_E = column_E < context.candidates
    own, others = (token_E[own_E], column_E[own_E]), (token_E[~own_E], column_E[~own_E] - context.candidates)
    ids_E, log_prob_E = np.empty(len(token_E), np.int32), np.empty(len(token_E), np.float32)
    norm_BS = raw.log_norm_BS if raw.temperature != 1.0 else np.zeros(draws_BS.shape, np.float32)
    assert raw.log_prob_BSK is not None and norm_BS is not None
    ids_E[own_E] = _flat(raw.ids_BSK)[own]
    log_prob_E[own_E] = _flat(raw.log_prob_BSK)[own] / np.float32(raw.temperature) - norm_BS.ravel()[own[0]]
    ids_E[~own_E] = _flat(raw.draw_ids_BSM)[others]
    log_prob_E[~own_E] = _flat(raw.draw_log_prob_BSM)[others]
    return ids_E, log_prob_E, draws_BS - left_BS + beyond_BS


def _flat(x_BSK: np.ndarray) -> np.ndarray:
    """[B * S, K]."""
    return x_BSK.reshape(x_BSK.shape[0] * x_BSK.shape[1], x_BSK.shape[2])
