"""Teachers whose distribution is known, what they say, and the slow obvious way to tell what a reader should get."""

from dataclasses import dataclass

import numpy as np

from titan.distill.codec.bits import packed_bytes, width_of
from titan.distill.codec.block import HEADER_BYTES, BlockHeader, LabelBlock, decode_block, encode_block
from titan.distill.codec.codes import HeadScale
from titan.distill.codec.context import HEAD_BITS
from titan.distill.codec.priority import CENTRE, Turns
from titan.distill.codec.priority import STEP as RATIO_STEP
from titan.distill.codec.raw import RawLabels
from titan.tasks.sample_labels import SampleLabels

STEP = 3


def sample_ids(samples: int) -> np.ndarray:
    """int64 [B], the same of two counts as far as both go."""
    return np.random.default_rng(0).integers(0, 2**40, samples)


def zipf(vocab: int, exponent: float | np.ndarray) -> np.ndarray:
    """Probabilities [..., V] of ids in falling order."""
    p = np.arange(1, vocab + 1.0) ** -np.asarray(exponent)[..., None]
    normed: np.ndarray = p / p.sum(-1, keepdims=True)
    return normed


def random_p(samples: int, length: int, vocab: int, sharpness: float, seed: int) -> np.ndarray:
    """Probabilities [B, S, V]: softmax of normal logits."""
    logits = np.random.default_rng(seed).normal(0, sharpness, (samples, length, vocab))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    normed: np.ndarray = p / p.sum(-1, keepdims=True)
    return normed


@dataclass(frozen=True)
class Teacher:
    """A label, and what a reader has no way to know. V entries; entry v has id v times `spread`."""

    raw: RawLabels
    p_BSV: np.ndarray
    """float64 of all entries at the log's temperature, as exact as labels give them."""
    uniform_BSV: np.ndarray
    """The random numbers that draws are made with."""
    least_BS: np.ndarray
    """The least threshold that surely has nothing above it but what the teacher said, by a margin for chance; 0 where
    nothing is behind the head."""
    vocab: int
    """Ids are below this."""

    @property
    def spread(self) -> int:
        """Between the ids of two entries."""
        return int(self.vocab // self.p_BSV.shape[-1])

    def drawn(self, threshold_BS: np.ndarray, head: list[set[int]]) -> list[set[int]]:
        """Ids that each token should have drawn, in the whole vocabulary."""
        above = self.p_BSV / self.uniform_BSV > threshold_BS[..., None]
        rows = above.reshape(-1, above.shape[-1])
        return [set((np.flatnonzero(row) * self.spread).tolist()) - ids for row, ids in zip(rows, head, strict=True)]


def teacher(
    p_BSV: np.ndarray, top_k: int, draws: int, temperature: float = 1.0, spread: int = 1, step: int = STEP,
    codec: str = "sampled",
) -> Teacher:  # fmt: skip
    """What a teacher says: the likeliest entries, and of the others those of highest priority p / u."""
    samples, length, entries = p_BSV.shape
    with np.errstate(divide="ignore"):
        log_p = np.log(p_BSV)
        tempered = p_BSV ** (1 / temperature)
        norm = tempered.sum(-1)
        said = np.log(tempered / norm[..., None]).astype(np.float32)
    entropy = -np.where(p_BSV > 0, p_BSV * np.maximum(log_p, -1e30), 0).sum(-1)
    head = np.argsort(-p_BSV, axis=-1, kind="stable")[..., :top_k]
    raw = RawLabels(
        codec,  # type: ignore[arg-type]
        temperature,
        (head * spread).astype(np.int32),
        np.take_along_axis(log_p, head, -1).astype(np.float32),
        np.log(norm).astype(np.float32),
        entropy.astype(np.float32),
    )
    p = np.exp(said.astype(float))
    np.put_along_axis(p, head, np.exp(raw.tempered_log_prob()).astype(float), -1)
    ids = np.broadcast_to(np.arange(entries) * spread, p.shape)
    uniform = Turns.of(step, sample_ids(samples), length, entries * spread).uniform(ids)
    priority = p / uniform
    np.put_along_axis(priority, head, 0.0, -1)
    behind = p.copy()
    np.put_along_axis(behind, head, 0.0, -1)
    order = np.argsort(-priority, axis=-1, kind="stable")[..., :draws]
    order = np.pad(order, ((0, 0), (0, 0), (0, draws - order.shape[-1])), constant_values=-1)
    there = (order >= 0) & (np.take_along_axis(priority, order, -1) > 0)
    least = np.where(there, np.take_along_axis(priority, order, -1), 0.0)[..., -1] if draws else np.zeros(norm.shape)
    raw = replace_draws(
        raw,
        np.where(there, order * spread, 0).astype(np.int32),
        np.where(there, np.take_along_axis(said, order, -1), -np.inf).astype(np.float32),
    )
    if draws:
        mass = np.maximum(1 - np.exp(raw.tempered_log_prob()).sum(-1), 0.0)  # in float32, as labels know it
        enough = max(1.0, draws - 2.5 * draws**0.5)
        least = np.maximum(least, np.where(there[..., -1], mass / enough, 0.0))
        least = np.maximum(least, behind.max(-1))
    return Teacher(raw, p, uniform, least, entries * spread)


def replace_draws(raw: RawLabels, ids_BSM: np.ndarray, log_prob_BSM: np.ndarray) -> RawLabels:
    """The label with these draws."""
    return RawLabels(**(vars(raw) | {"draw_ids_BSM": ids_BSM, "draw_log_prob_BSM": log_prob_BSM}))


def independent(p_BSV: np.ndarray, draws: int, seed: int = 0) -> RawLabels:
    """What a teacher says with the codec `random`."""
    rng = np.random.default_rng(seed)
    upto = np.cumsum(p_BSV, -1)
    points = rng.random((*p_BSV.shape[:2], draws)) * upto[..., -1:]
    ids = np.minimum((upto[..., None, :] <= points[..., None]).sum(-1), p_BSV.shape[-1] - 1)
    entropy = -(p_BSV * np.log(np.maximum(p_BSV, 1e-30))).sum(-1)
    said = np.log(np.take_along_axis(p_BSV, ids, -1)).astype(np.float32)
    return replace_draws(RawLabels("random", entropy_BS=entropy.astype(np.float32)), ids.astype(np.int32), said)


def block_of(raw: RawLabels, vocab: int, step: int = STEP, first: int = 0) -> LabelBlock:
    """Some tokens, and samples from `sample_ids`."""
    arrays = raw.ids_BSK, raw.draw_ids_BSM, raw.dense_BSV, raw.hidden_BSD
    samples, length = next(x.shape[:2] for x in arrays if x is not None)
    tokens = np.random.default_rng(0).integers(0, vocab, (samples, length + 1)).astype(np.int32)
    return LabelBlock(step, first, sample_ids(samples), tokens, raw)


def rows_of(block: LabelBlock, start: int, end: int) -> LabelBlock:
    """Some of the samples, as a block of their own."""
    arrays = {name: x[start:end] for name, x in vars(block.labels).items() if isinstance(x, np.ndarray)}
    labels = RawLabels(**(vars(block.labels) | arrays))
    return LabelBlock(
        block.step, block.first_sample + start, block.sample_ids_B[start:end], block.tokens_BS1[start:end], labels
    )


def round_trip(block: LabelBlock, vocab: int, budget: float | None = None) -> LabelBlock:
    """Through bytes. Everything but the labels is the same."""
    data = encode_block(block, vocab, budget)
    got = decode_block(BlockHeader.unpack(data[:HEADER_BYTES]), data[HEADER_BYTES:])
    assert (got.step, got.first_sample) == (block.step, block.first_sample)
    np.testing.assert_array_equal(got.sample_ids_B, block.sample_ids_B)
    np.testing.assert_array_equal(got.tokens_BS1, block.tokens_BS1)
    assert got.tokens_BS1.dtype == np.int32 and got.labels.codec == block.labels.codec
    return got


def bytes_a_token(block: LabelBlock, vocab: int, budget: float | None) -> float:
    """Of the labels alone: without header, sample ids and tokens."""
    data = encode_block(block, vocab, budget)
    tokens = packed_bytes(block.tokens_BS1.size, width_of(vocab)) + 8 * len(block.sample_ids_B)
    return float((len(data) - HEADER_BYTES - tokens) / block.tokens_BS1[:, 1:].size)


def entries_of(ids: np.ndarray, log_prob: np.ndarray) -> list[set[int]]:
    """The ids that each token has, of [B, S, entries]."""
    return [
        set(i[p > -np.inf].tolist())
        for i, p in zip(np.concatenate(list(ids)), np.concatenate(list(log_prob)), strict=True)
    ]


def exact(threshold_BS: np.ndarray) -> np.ndarray:
    """float64 thresholds as they were sent, of those that labels have as float32: one of 65536, from e^-24 to e^8."""
    sent: np.ndarray = np.exp(np.rint((np.log(threshold_BS.astype(float)) + 24) / 32 * 65535) * (32 / 65535) - 24)
    assert (np.abs(sent / threshold_BS - 1) < 1e-6).all()
    return sent


def check_head(said: Teacher, threshold_BS: np.ndarray, read: SampleLabels, at_least: int = 0) -> None:
    """It has the candidates at or above the threshold, with masses that are off by no more than codes allow.

    The class that is not sent, the larger of the first entry and the tail, is off by what the others are.
    """
    assert said.raw.ids_BSK is not None
    scale = HeadScale(HEAD_BITS)
    p = np.exp(said.raw.tempered_log_prob()).astype(float)
    size = np.maximum(np.count_nonzero(p >= threshold_BS[..., None], axis=-1), at_least)
    sent = np.arange(p.shape[-1]) < size[..., None]
    entries = read.ids_BSK.shape[-1]
    assert entries == size.max(initial=0)
    np.testing.assert_array_equal(np.where(sent, said.raw.ids_BSK, 0)[..., :entries], read.ids_BSK)
    np.testing.assert_array_equal(read.log_prob_BSK > -np.inf, sent[..., :entries])
    p = np.where(sent, p, 0.0)[..., :entries]
    q = np.exp(read.log_prob_BSK.astype(float))
    tail, read_tail = 1 - p.sum(-1), 1 - q.sum(-1)
    assert (q.sum(-1) <= 1 + 1e-5).all()
    if entries:
        bounds = np.where(p > 0, scale.bound(np.minimum(p, 0.5)), 0)
        first = p[..., 0] > np.maximum(tail, 0)  # is not sent
        tail_bound = scale.bound(np.clip(tail, 0, 0.5))
        bounds[..., 0] = np.where(first, bounds[..., 1:].sum(-1) + tail_bound, bounds[..., 0])
        assert (np.abs(read_tail - tail) <= np.where(first, tail_bound, bounds.sum(-1)) + 4e-5).all()
        assert (np.abs(p - q) <= bounds + 4e-5).all()


def check_draws(said: Teacher, threshold_BS: np.ndarray, read: SampleLabels) -> None:
    """They are all ids of the vocabulary with p / u above the threshold but the head's, and about as likely."""
    assert read.draw_ids_BSM is not None and read.draw_log_prob_BSM is not None
    there = read.draw_log_prob_BSM > -np.inf
    drawn = entries_of(read.draw_ids_BSM, read.draw_log_prob_BSM)
    assert np.count_nonzero(there) == sum(map(len, drawn)), "no id twice"
    assert drawn == said.drawn(threshold_BS, entries_of(read.ids_BSK, read.log_prob_BSK))
    assert there.shape[-1] == max(map(len, drawn), default=0)
    with np.errstate(divide="ignore"):
        want = np.log(np.take_along_axis(said.p_BSV, read.draw_ids_BSM // said.spread, -1))
    off = np.abs(read.draw_log_prob_BSM.astype(float) - want - CENTRE)
    assert off[there].max(initial=0) <= RATIO_STEP / 2 + 1e-4


MIXES = {
    "flat": np.full(4, 1.0),
    "middle": np.full(4, 1.5),
    "peaked": np.full(4, 2.0),
    "mixed": np.array([0.6, 1.2, 2.0, 4.0]),
}
"""Exponents of a Zipf law, one of which a token has."""


def zipf_p(mix: str, vocab: int, samples: int, length: int, seed: int = 0) -> np.ndarray:
    """Probabilities [B, S, V]; ids are ranks."""
    rng = np.random.default_rng(seed)
    return zipf(vocab, rng.choice(MIXES[mix], (samples, length)) + 0.1 * rng.standard_normal((samples, length)))
