"""The codecs `sampled` and `top_k`: the likeliest entries of each token, and draws from what is behind them.

A token has k entries and m draws. Of its k + 1 classes (the entries, and the tail behind them) all but one are sent as
probabilities: the one left out is the larger of the first entry and the tail, and is what the others leave. So masses
sum to one exactly, a small tail keeps its relative accuracy, and no class is wrong by more than the others together.
Draws are sent as a set of ids (titan.distill.codec.id_sets), their probabilities as shares of the tail as it is read.

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
from titan.distill.codec.context import (
    DITHER,
    DRAW_DITHER,
    PLACES,
    Context,
    read_entropy,
    read_norm,
    write_entropy,
    write_norm,
)
from titan.distill.codec.id_sets import read_id_sets, write_id_sets
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
    writer.add(shares.head_BS, context.count_bits)
    uniform_BS = context.uniform(DITHER)
    tail_BS = np.ones(drawn_BS.shape, np.float32)
    if context.candidates:
        tail_BS = _write_head(raw.ids_BSK, p_BSK, shares.head_BS, uniform_BS, context, writer)
    if context.draws:
        write_id_sets(ids_E, draws_BS.ravel(), context.id_bits, writer)
        share_E = log_prob_E - np.repeat(np.log(tail_BS).ravel(), draws_BS.ravel())
        writer.add(
            context.draw_scale.encode(share_E, _dither(context.uniform(DRAW_DITHER), draws_BS)), context.draw_bits
        )
    write_entropy(raw, context, writer)
    write_norm(raw, context, writer)


def decode_sampled(codec: CodecName, context: Context, reader: BitReader) -> RawLabels:
    """Inverse of `encode_sampled` up to rounding; as wide as the token with most entries."""
    shape = (len(context.sample_ids_B), context.length)
    head_BS = reader.take(shape[0] * shape[1], context.count_bits).astype(np.int64).reshape(shape)
    uniform_BS = context.uniform(DITHER)
    ids_BSK, p_BSK, tail_BS = (
        np.zeros((*shape, 0), np.int32),
        np.zeros((*shape, 0), np.float32),
        np.ones(shape, np.float32),
    )
    if context.candidates:
        ids_BSK = _spread(reader.take(int(head_BS.sum()), context.id_bits).astype(np.int32), _first(head_BS), 0)
        first_is_sent_BS = reader.take(head_BS.size, 1).reshape(shape) > 0
        p_BSK, tail_BS = _read_masses(reader.take(int(head_BS.sum()), context.head_bits), first_is_sent_BS, head_BS,
                                      uniform_BS, context)  # fmt: skip
    with np.errstate(divide="ignore"):
        log_prob_BSK = np.log(p_BSK)
    draw_ids = draw_log_prob = None
    if context.draws:
        ids_E, counts_N = read_id_sets(head_BS.size, context.id_bits, reader)
        draws_BS = counts_N.reshape(shape)
        in_draws = _first(draws_BS)
        draw_ids = _spread(ids_E, in_draws, 0)
        codes = reader.take(len(ids_E), context.draw_bits)
        share_E = context.draw_scale.decode(codes, _dither(context.uniform(DRAW_DITHER), draws_BS))
        draw_log_prob = _spread(share_E + np.repeat(np.log(tail_BS).ravel(), counts_N), in_draws, -np.inf)
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


def _dither(uniform_BS: np.ndarray, counts_BS: np.ndarray) -> np.ndarray:
    """float32 [E], of so many entries of each token."""
    there = _first(counts_BS)
    dither_E: np.ndarray = dither(uniform_BS[..., None], np.arange(there.shape[-1]))[there]
    return dither_E


def _write_head(
    ids_BSK: np.ndarray, p_BSK: np.ndarray, head_BS: np.ndarray, uniform_BS: np.ndarray, context: Context,
    writer: BitWriter,
) -> np.ndarray:  # fmt: skip
    """float32 [B, S]: mass of the tail as it will be read."""
    in_head = np.arange(context.candidates) < head_BS[..., None]
    writer.add(ids_BSK[in_head], context.id_bits)
    tail_BS = 1.0 - np.where(in_head, p_BSK, np.float32(0.0)).sum(axis=-1)
    first_is_sent_BS = tail_BS >= p_BSK[..., 0]
    writer.add(first_is_sent_BS, 1)
    sent_BSK = p_BSK.copy()
    sent_BSK[..., 0] = np.where(first_is_sent_BS, p_BSK[..., 0], tail_BS)
    codes_E = context.head_scale.encode(sent_BSK[in_head], _dither(uniform_BS, head_BS))
    writer.add(codes_E, context.head_bits)
    return _read_masses(codes_E, first_is_sent_BS, head_BS, uniform_BS, context)[1]


def _read_masses(
    codes_E: np.ndarray, first_is_sent_BS: np.ndarray, head_BS: np.ndarray, uniform_BS: np.ndarray, context: Context
) -> tuple[np.ndarray, np.ndarray]:
    """float32 probabilities at the log's temperature, 0 where a token has fewer entries; and masses of the tails.

    first is sent: what the others leave is the tail's; else it is the first entry's
    """
    p_BSK = _spread(context.head_scale.decode(codes_E, _dither(uniform_BS, head_BS)), _first(head_BS), 0.0)
    sent_BS = p_BSK.sum(axis=-1)
    shrink_BS = np.minimum(1.0, (1 - MASS_FLOOR) / np.maximum(sent_BS, MASS_FLOOR))
    p_BSK *= shrink_BS[..., None]  # only where rounding left nothing for the class that is not sent
    rest_BS = np.maximum(1.0 - p_BSK.sum(axis=-1), MASS_FLOOR)
    if not p_BSK.shape[-1]:
        return p_BSK, rest_BS
    tail_BS = np.where(first_is_sent_BS | (head_BS == 0), rest_BS, p_BSK[..., 0])
    p_BSK[..., 0] = np.where(head_BS == 0, 0.0, np.where(first_is_sent_BS, p_BSK[..., 0], rest_BS))
    return p_BSK, tail_BS


def _draws(
    raw: RawLabels, p_BSK: np.ndarray, shares: Shares, context: Context
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws from behind each token's head, ids rising: ids [E], log-probabilities [E], and how many each has [B, S]."""
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
    rising = np.argsort(token_E * context.vocab_size + ids_E, kind="stable")
    return ids_E[rising], log_prob_E[rising], draws_BS - left_BS + beyond_BS


def _flat(x_BSK: np.ndarray) -> np.ndarray:
    """[B * S, K]."""
    return x_BSK.reshape(x_BSK.shape[0] * x_BSK.shape[1], x_BSK.shape[2])
