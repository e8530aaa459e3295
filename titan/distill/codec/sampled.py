"""The codecs `sampled` and `top_k`: the likeliest entries of each token, and draws from what is behind them.

A token has a threshold, a head of k entries above it, and draws of what is below (titan.distill.codec.priority). Of its
k + 1 classes (the head's entries, and the tail behind them) all but one are sent as probabilities: the one left out is
the larger of the first entry and the tail, and is what the others leave. So masses sum to one exactly, a small tail
keeps its relative accuracy, and no class is wrong by more than the others together.

The teacher gives K candidates, and of the entries behind them the M of highest priority. Under a budget all even tokens
of a sample have one threshold, and all odd ones (titan.distill.codec.budget); it says what the head is. The draws of a
token have a higher one where the teacher may not have given all that are above it: one that leaves room for chance
below M, or, where chance takes more, the priority of the last that the teacher gave, which itself is left out; and
never less than what is behind the candidates. Rounded up, as it is sent, and draws are compared with that.

Shape letters as in titan.distill.codec.raw; E entries of all tokens in a row.
"""

from dataclasses import dataclass

import numpy as np

from titan.distill.codec.bits import BitReader, BitWriter
from titan.distill.codec.budget import Tokens, threshold_of
from titan.distill.codec.codes import MASS_FLOOR, dither
from titan.distill.codec.context import (
    DITHER,
    DRAW_DITHER,
    Context,
    read_entropy,
    read_norm,
    write_entropy,
    write_norm,
)
from titan.distill.codec.priority import draw_bits, read_places, read_ratios, write_places, write_ratios
from titan.distill.codec.raw import CodecName, RawLabels
from titan.errors import LabelError

LOWEST, NATS = -24.0, 32.0
"""Logarithms of thresholds are from -24 to 8: above 0 only for a label of one or two draws."""
LEVELS = 0xFFFF
ROUGH, NEAR = 0.1, 0.7
"""Nats: how well a threshold is known from what draws usually take, and how far the right one may be from it."""
SPREAD = 2.5
"""Standard deviations of the number of a token's draws: so much less than M there are on average at least."""
FEW = 8
"""Draws of an expected size that a sample's own are added to, for what a draw takes on average."""


def encode_sampled(raw: RawLabels, context: Context, budget_bytes: float | None, writer: BitWriter) -> None:
    """Write the labels. budget_bytes: mean size of a token's label; None sends everything there is."""
    assert raw.ids_BSK is not None
    p_BSK = np.exp(raw.tempered_log_prob())
    tail = _Tail.of(raw, p_BSK, context)
    threshold_BS = np.full(p_BSK.shape[:2], np.exp(LOWEST))
    if budget_bytes is not None:
        threshold_BS = _thresholds_within(budget_bytes * 8 * context.length, p_BSK, tail, context)
    shared_BS = threshold_BS
    if context.draws:
        shared_BS, threshold_BS = _write_thresholds(threshold_BS, tail.least_BS, writer)
    head_BS = np.count_nonzero(p_BSK >= shared_BS[..., None], axis=-1)
    if not context.draws:
        head_BS = np.maximum(head_BS, min(1, context.candidates))
    writer.add(head_BS, context.count_bits)
    if context.candidates:
        _write_head(raw.ids_BSK, p_BSK, head_BS, context, writer)
    if context.draws:
        _write_draws(tail, shared_BS, threshold_BS, context, writer)
    write_entropy(raw, context, writer)
    write_norm(raw, context, writer)


def decode_sampled(codec: CodecName, context: Context, reader: BitReader) -> RawLabels:
    """Inverse of `encode_sampled` up to rounding; as wide as the token with most entries."""
    shape = (len(context.sample_ids_B), context.length)
    threshold_BS = _read_thresholds(shape, reader) if context.draws else None
    head_BS = reader.take(shape[0] * shape[1], context.count_bits).astype(np.int64).reshape(shape)
    ids_BSK, p_BSK = np.zeros((*shape, 0), np.int32), np.zeros((*shape, 0), np.float32)
    if context.candidates:
        ids_BSK = _spread(reader.take(int(head_BS.sum()), context.id_bits).astype(np.int32), _first(head_BS), 0)
        first_is_sent_BS = reader.take(head_BS.size, 1).reshape(shape) > 0
        p_BSK = _read_masses(reader.take(int(head_BS.sum()), context.head_bits), first_is_sent_BS, head_BS, context)
    with np.errstate(divide="ignore"):
        log_prob_BSK = np.log(p_BSK)
    draw_ids = draw_log_prob = None
    if threshold_BS is not None:
        draw_ids, draw_log_prob = _read_draws(threshold_BS, context, reader)
        threshold_BS = threshold_BS.astype(np.float32)
    entropy_BS = read_entropy(context, reader)
    norm_BS = read_norm(context, reader)
    if norm_BS is not None:
        log_prob_BSK = ((log_prob_BSK + norm_BS[..., None]) * np.float32(context.temperature)).astype(np.float32)
    return RawLabels(
        codec, context.temperature, ids_BSK, log_prob_BSK, norm_BS, entropy_BS, draw_ids, draw_log_prob, threshold_BS
    )


@dataclass(frozen=True)
class _Tail:
    """What may be drawn: all candidates, and behind them what the teacher gave. J = K + M."""

    p_BSJ: np.ndarray
    uniform_BSJ: np.ndarray
    places_BSJ: np.ndarray
    behind_BS: np.ndarray
    """Mass behind all candidates."""
    least_BS: np.ndarray
    """The least threshold that has nothing above it but what is here."""
    candidates: int = 0

    @classmethod
    def of(cls, raw: RawLabels, p_BSK: np.ndarray, context: Context) -> "_Tail":
        shape = p_BSK.shape[:2]
        if not context.draws or raw.draw_ids_BSM is None or raw.draw_log_prob_BSM is None:
            nothing = np.zeros((*shape, 0))
            return cls(nothing, nothing, nothing, np.zeros(shape, np.float32), np.zeros(shape))
        p_BSM = np.exp(raw.draw_log_prob_BSM.astype(np.float64))
        ids_BSJ = np.concatenate([raw.ids_BSK, raw.draw_ids_BSM], axis=-1) if context.candidates else raw.draw_ids_BSM
        places_BSJ = context.turns.places(ids_BSJ)
        uniform_BSJ = context.turns.uniform(ids_BSJ, places_BSJ)
        behind_BS = np.where(p_BSM[..., 0] > 0, np.maximum(1.0 - p_BSK.sum(axis=-1), 0.0), 0.0)
        enough = max(1.0, context.draws - SPREAD * context.draws**0.5)
        least_BS = np.where(p_BSM[..., -1] > 0, behind_BS / enough, 0.0)
        least_BS = np.maximum(least_BS, np.maximum(p_BSM[..., -1] / uniform_BSJ[..., -1], p_BSM.max(axis=-1)))
        p_BSJ = np.concatenate([p_BSK, p_BSM], axis=-1)
        return cls(p_BSJ, uniform_BSJ, places_BSJ, behind_BS.astype(np.float32), least_BS, p_BSK.shape[-1])

    def drawn(self, shared_BS: np.ndarray, threshold_BS: np.ndarray) -> np.ndarray:
        """Bool [B, S, J]. shared: of the head, which must not depend on the token's own draws."""
        drawn_BSJ: np.ndarray = self.p_BSJ > threshold_BS[..., None] * self.uniform_BSJ
        drawn_BSJ[..., : self.candidates] &= self.p_BSJ[..., : self.candidates] < shared_BS[..., None]
        return drawn_BSJ

    def mean_bits(self, threshold_B: np.ndarray, context: Context) -> np.ndarray:
        """float64 [2, B]: of a sample's draws, those of its even and those of its odd tokens."""
        threshold_BS = np.maximum(threshold_B[:, None], self.least_BS)
        drawn = self.drawn(np.broadcast_to(threshold_B[:, None], threshold_BS.shape), threshold_BS)
        at = np.flatnonzero(drawn)
        token_E = at // drawn.shape[-1]
        ratio_E = self.p_BSJ.ravel()[at] / (threshold_BS.ravel()[token_E] * self.uniform_BSJ.ravel()[at])
        bits_E = draw_bits(self.places_BSJ.ravel()[at], np.log(ratio_E), context.id_bits)
        group_E = token_E % context.length % 2 * len(threshold_B) + token_E // context.length
        total, count = (np.bincount(group_E, weight, 2 * len(threshold_B)) for weight in (bits_E, None))
        mean_2B: np.ndarray = ((total + FEW * context.usual_draw) / (count + FEW)).reshape(2, -1)
        return mean_2B


def _thresholds_within(budget_bits: float, p_BSK: np.ndarray, tail: _Tail, context: Context) -> np.ndarray:
    """float64 [B, S]. What draws take is told to even tokens by the odd ones' and to odd tokens by the even ones', so
    that no token's threshold depends on its own draws, which would be biased.
    """
    tokens = Tokens(p_BSK, tail.behind_BS)
    if not context.draws:
        return np.repeat(threshold_of(tokens, context.cost(0.0), budget_bits)[:, None], context.length, axis=1)
    usual_B = threshold_of(tokens, context.cost(context.usual_draw), budget_bits, precision=ROUGH)
    near = np.log(usual_B) - NEAR, np.minimum(np.log(usual_B) + NEAR, 0.0)
    even_B, odd_B = tail.mean_bits(usual_B, context)
    threshold_BS = np.empty(p_BSK.shape[:2])
    threshold_BS[:, ::2] = threshold_of(tokens, context.cost(odd_B), budget_bits, *near)[:, None]
    threshold_BS[:, 1::2] = threshold_of(tokens, context.cost(even_B), budget_bits, *near)[:, None]
    return threshold_BS


def _write_thresholds(
    threshold_BS: np.ndarray, least_BS: np.ndarray, writer: BitWriter
) -> tuple[np.ndarray, np.ndarray]:
    """Each sample's two, and those of the tokens that need a higher one.

    returns: both as they will be read: the sample's, from which on entries are the head, and the draws'
    """
    codes_B2 = _threshold_codes(threshold_BS[:, : 2 if threshold_BS.shape[1] > 1 else 1])
    read_BS = _by_parity(codes_B2, threshold_BS.shape[1])
    own_BS = least_BS > read_BS
    codes_E = _threshold_codes(least_BS[own_BS])
    writer.add_array(codes_B2, "<u2")
    writer.add_array(np.array([len(codes_E)]), "<u4")
    if len(codes_E):
        writer.add(own_BS, 1)
        writer.add_array(codes_E, "<u2")
    own_read_BS = read_BS.copy()
    own_read_BS[own_BS] = _thresholds(codes_E)
    return read_BS, own_read_BS


def _read_thresholds(shape: tuple[int, int], reader: BitReader) -> np.ndarray:
    """float64 [B, S]."""
    threshold_BS = _by_parity(reader.take_array((shape[0], min(2, shape[1])), "<u2"), shape[1])
    count = int(reader.take_array((1,), "<u4")[0])
    if count:
        own_BS = reader.take(threshold_BS.size, 1).reshape(shape) > 0
        if np.count_nonzero(own_BS) != count:
            raise LabelError(f"label data is damaged: {count} tokens have {np.count_nonzero(own_BS)} thresholds")
        threshold_BS[own_BS] = _thresholds(reader.take_array((count,), "<u2"))
    return threshold_BS


def _by_parity(codes_B2: np.ndarray, length: int) -> np.ndarray:
    """float64 [B, S]: of even and of odd tokens."""
    threshold_BS: np.ndarray = _thresholds(codes_B2)[:, np.arange(length) % 2]
    return threshold_BS


def _threshold_codes(threshold: np.ndarray) -> np.ndarray:
    """Rounded up."""
    steps = (np.log(np.maximum(threshold, np.exp(LOWEST))) - LOWEST) * (LEVELS / NATS)
    codes: np.ndarray = np.minimum(np.ceil(steps + 1e-6), LEVELS).astype(np.int64)
    return codes


def _thresholds(codes: np.ndarray) -> np.ndarray:
    read: np.ndarray = np.exp(codes.astype(np.float64) * (NATS / LEVELS) + LOWEST)
    return read


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
    ids_BSK: np.ndarray, p_BSK: np.ndarray, head_BS: np.ndarray, context: Context, writer: BitWriter
) -> None:
    in_head = np.arange(context.candidates) < head_BS[..., None]
    writer.add(ids_BSK[in_head], context.id_bits)
    tail_BS = 1.0 - np.where(in_head, p_BSK, np.float32(0.0)).sum(axis=-1)
    first_is_sent_BS = tail_BS >= p_BSK[..., 0]
    writer.add(first_is_sent_BS, 1)
    sent_BSK = p_BSK.copy()
    sent_BSK[..., 0] = np.where(first_is_sent_BS, p_BSK[..., 0], tail_BS)
    writer.add(
        context.head_scale.encode(sent_BSK[in_head], _dither(context.uniform(DITHER), head_BS)), context.head_bits
    )


def _read_masses(
    codes_E: np.ndarray, first_is_sent_BS: np.ndarray, head_BS: np.ndarray, context: Context
) -> np.ndarray:
    """float32 probabilities at the log's temperature, 0 where a token has fewer entries.

    first is sent: what the others leave is the tail's; else it is the first entry's
    """
    dither_E = _dither(context.uniform(DITHER), head_BS)
    p_BSK = _spread(context.head_scale.decode(codes_E, dither_E), _first(head_BS), 0.0)
    sent_BS = p_BSK.sum(axis=-1)
    shrink_BS = np.minimum(1.0, (1 - MASS_FLOOR) / np.maximum(sent_BS, MASS_FLOOR))
    p_BSK *= shrink_BS[..., None]  # only where rounding left nothing for the class that is not sent
    if p_BSK.shape[-1]:
        rest_BS = np.maximum(1.0 - p_BSK.sum(axis=-1), MASS_FLOOR)
        p_BSK[..., 0] = np.where(first_is_sent_BS | (head_BS == 0), p_BSK[..., 0], rest_BS)
    return p_BSK


def _write_draws(
    tail: _Tail, shared_BS: np.ndarray, threshold_BS: np.ndarray, context: Context, writer: BitWriter
) -> None:
    drawn = np.flatnonzero(tail.drawn(shared_BS, threshold_BS))
    token_E = drawn // tail.p_BSJ.shape[-1]
    place_E = tail.places_BSJ.ravel()[drawn]
    rising = np.argsort(token_E << context.id_bits | place_E)
    drawn, place_E = drawn[rising], place_E[rising]
    counts_BS = np.bincount(token_E, minlength=threshold_BS.size).reshape(threshold_BS.shape)
    write_places(place_E, counts_BS.ravel(), context.id_bits, writer)
    ratio_E = tail.p_BSJ.ravel()[drawn] / (threshold_BS.ravel()[token_E] * tail.uniform_BSJ.ravel()[drawn])
    write_ratios(np.log(ratio_E), _dither(context.uniform(DRAW_DITHER), counts_BS), writer)


def _read_draws(threshold_BS: np.ndarray, context: Context, reader: BitReader) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities, -inf where a token has fewer."""
    place_E, counts_N = read_places(threshold_BS.size, context.id_bits, reader)
    counts_BS = counts_N.reshape(threshold_BS.shape)
    token_E = np.repeat(np.arange(len(counts_N)), counts_N)
    here = context.turns.at(token_E)
    ids_E = here.ids(place_E)
    ratio_E = read_ratios(_dither(context.uniform(DRAW_DITHER), counts_BS), reader)
    log_prob_E = ratio_E + np.log(threshold_BS.ravel()[token_E] * here.uniform(ids_E, place_E))
    in_draws = _first(counts_BS)
    return _spread(ids_E, in_draws, 0), _spread(log_prob_E.astype(np.float32), in_draws, -np.inf)
