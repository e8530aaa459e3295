"""Label blocks as bytes: every codec keeps its bounds, damage is found, and a budget is kept and well spent."""

import heapq
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan.distill.codec.bits import BitReader, BitWriter, pack, packed_bytes, unpack, width_of
from titan.distill.codec.block import HEADER_BYTES, BlockHeader, LabelBlock, decode_block, encode_block
from titan.distill.codec.budget import NEGLIGIBLE_TAIL, EntryBits, share_out
from titan.distill.codec.codecs import from_bfloat16, to_bfloat16
from titan.distill.codec.codes import DrawScale, HeadScale, dither
from titan.distill.codec.context import DRAW_BITS, ENTROPY_LEVELS, HEAD_BITS
from titan.distill.codec.id_sets import read_id_sets, set_bits, write_id_sets
from titan.distill.codec.raw import RawLabels
from titan.errors import LabelError
from titan.tasks.sample_labels import SampleLabels

HEAD, NATS = HeadScale(HEAD_BITS), 1e-5


def zipf(vocab: int, exponent: float | np.ndarray) -> np.ndarray:
    p = np.arange(1, vocab + 1.0) ** -np.asarray(exponent)[..., None]
    normed: np.ndarray = p / p.sum(-1, keepdims=True)
    return normed


def teacher(
    p_BSV: np.ndarray, top_k: int, draws: int, temperature: float = 1.0, seed: int = 0, codec: str = "sampled"
) -> RawLabels:
    """What a teacher says whose distribution is known: head of its likeliest, independent draws from behind it."""
    rng = np.random.default_rng(seed)
    order = np.argsort(-p_BSV, axis=-1, kind="stable")
    tempered = p_BSV ** (1 / temperature)
    norm = tempered.sum(-1)
    falling = np.take_along_axis(tempered / norm[..., None], order, -1)
    falling[..., :top_k] *= codec == "random"
    upto = np.cumsum(falling, -1)
    points = rng.random((*norm.shape, draws)) * upto[..., -1:]
    ranks = np.minimum((upto[..., None, :] <= points[..., None]).sum(-1), p_BSV.shape[-1] - 1)
    with np.errstate(divide="ignore"):
        drawn = np.log(np.take_along_axis(falling, ranks, -1))
        entropy = -(p_BSV * np.log(np.maximum(p_BSV, 1e-30))).sum(-1)
    ids = order[..., :top_k]
    return RawLabels(
        codec,  # type: ignore[arg-type]
        temperature,
        ids.astype(np.int32),
        np.log(np.take_along_axis(p_BSV, ids, -1)).astype(np.float32),
        np.log(norm).astype(np.float32),
        entropy.astype(np.float32),
        np.take_along_axis(order, ranks, -1).astype(np.int32),
        drawn.astype(np.float32),
    )


def block_of(raw: RawLabels, vocab: int, step: int = 3, first: int = 0, seed: int = 0) -> LabelBlock:
    rng = np.random.default_rng(seed)
    shape = next(x.shape[:2] for x in (raw.ids_BSK, raw.dense_BSV, raw.hidden_BSD) if x is not None)
    tokens = rng.integers(0, vocab, (shape[0], shape[1] + 1)).astype(np.int32)
    return LabelBlock(step, first, rng.integers(0, 2**40, shape[0]), tokens, raw)


def round_trip(block: LabelBlock, vocab: int, budget: float | None = None) -> LabelBlock:
    data = encode_block(block, vocab, budget)
    got = decode_block(BlockHeader.unpack(data[:HEADER_BYTES]), data[HEADER_BYTES:])
    assert (got.step, got.first_sample) == (block.step, block.first_sample)
    np.testing.assert_array_equal(got.sample_ids_B, block.sample_ids_B)
    np.testing.assert_array_equal(got.tokens_BS1, block.tokens_BS1)
    assert got.tokens_BS1.dtype == np.int32 and got.labels.codec == block.labels.codec
    return got


def random_p(samples: int, length: int, vocab: int, sharpness: float, seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, sharpness, (samples, length, vocab))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    normed: np.ndarray = p / p.sum(-1, keepdims=True)
    return normed


def bytes_a_token(block: LabelBlock, vocab: int, budget: float | None) -> float:
    """Of the labels alone: without header, sample ids and tokens."""
    data = encode_block(block, vocab, budget)
    tokens = packed_bytes(block.tokens_BS1.size, width_of(vocab)) + 8 * len(block.sample_ids_B)
    return (len(data) - HEADER_BYTES - tokens) / (block.tokens_BS1.shape[0] * (block.tokens_BS1.shape[1] - 1))


# --- bits ---


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 32), st.integers(0, 100), st.integers(0, 2**32))
def test_numbers_of_any_width_come_back_and_take_that_many_bits(width: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << width, count)
    data = pack(values, width)
    assert len(data) == packed_bytes(count, width) <= (count + 7) * width / 8
    np.testing.assert_array_equal(unpack(memoryview(data), count, width), values)


@pytest.mark.parametrize(("value", "width"), [(1, 0), (8, 3), (-1, 5), (2**32, 32)])
def test_a_number_that_does_not_fit_is_refused(value: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"numbers of {width} bits"):
        pack(np.array([value]), width)


def test_fields_that_end_too_early_are_damage() -> None:
    writer = BitWriter()
    writer.add(np.arange(10), 4)
    for action in (lambda r: r.take(17, 4), lambda r: r.take_array((3,), "<i8")):
        with pytest.raises(LabelError, match="damaged"):
            action(BitReader(writer.payload()))


@pytest.mark.parametrize(("count", "width"), [(1, 0), (2, 1), (50_000, 16), (65_536, 16), (65_537, 17), (151_936, 18)])
def test_an_id_takes_the_bits_that_the_vocabulary_needs(count: int, width: int) -> None:
    assert width_of(count) == width


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 30), st.integers(0, 40), st.sampled_from([1, 2, 9, 16, 17, 4096, 151_936]), st.integers(0, 2**32))
def test_sets_of_ids_come_back_and_take_the_stated_bits(tokens: int, most: int, vocab: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, most + 1, tokens) * (rng.random(tokens) < 0.7)
    ids = np.concatenate([np.sort(rng.integers(0, vocab, n)) for n in counts] + [np.zeros(0, np.int64)]).astype(
        np.int32
    )
    writer = BitWriter()
    write_id_sets(ids, counts, width_of(vocab), writer)
    data = writer.payload()
    each, any_ids = set_bits(width_of(vocab))
    assert abs(8 * len(data) - (each * len(ids) + any_ids * np.count_nonzero(counts) + tokens + 32)) <= 7 * (2 + each)
    got_ids, got_counts = read_id_sets(tokens, width_of(vocab), BitReader(data))
    np.testing.assert_array_equal(got_ids, ids)
    np.testing.assert_array_equal(got_counts, counts)


def test_a_set_whose_marks_do_not_add_up_is_damage() -> None:
    writer = BitWriter()
    write_id_sets(np.array([3, 70, 70]), np.array([1, 0, 2]), 7, writer)
    data = bytearray(writer.payload())
    data[5] ^= 1
    with pytest.raises(LabelError, match="3 ids have"):
        read_id_sets(3, 7, BitReader(bytes(data)))


# --- probabilities as codes ---


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-9, 0.5), st.floats(0, 0.999), st.integers(5, 12))
def test_a_probability_of_the_head_comes_back_within_the_stated_bound(p: float, offset: float, bits: int) -> None:
    scale, d = HeadScale(bits), np.array([offset], np.float32)
    x = np.array([p], np.float32)
    got = scale.decode(scale.encode(x, d), d)
    assert got > 0 and abs(float(got[0]) - p) <= float(scale.bound(np.float64(p))) + 1e-7
    if bits == 8 and p > 0.01:
        assert abs(float(got[0]) / p - 1) <= 0.0079 * (0.5 / p) ** 0.25 + 0.0002


@settings(max_examples=200, deadline=None)
@given(st.floats(-30, 0), st.floats(0, 0.999), st.sampled_from([300, 32_000, 152_000]))
def test_a_draw_comes_back_within_half_a_step_down_to_an_even_share_over_400(
    nats: float, offset: float, vocab: int
) -> None:
    scale, d = DrawScale(DRAW_BITS, vocab), np.array([offset], np.float32)
    got = float(scale.decode(scale.encode(np.array([nats], np.float32), d), d)[0])
    assert scale.step < 0.6 and scale.lowest < np.log(1 / (400 * vocab))
    assert abs(got - max(nats, scale.lowest)) <= scale.step / 2 + scale.centre + NATS


@pytest.mark.parametrize("p", [0.5, 0.3, 0.031, 1e-3, 1e-5])
def test_over_all_dithers_the_mean_of_a_head_entry_and_of_the_inverse_of_a_draw_are_right(p: float) -> None:
    d = ((np.arange(100_000) + 0.5) / 100_000).astype(np.float32)
    head = HEAD.decode(HEAD.encode(np.full(d.shape, p, np.float32), d), d).astype(float).mean()
    assert head == pytest.approx(p, rel=2e-5 if p < 0.49 else 1e-2)
    scale = DrawScale(DRAW_BITS, 32_000)
    drawn = scale.decode(scale.encode(np.full(d.shape, np.log(p), np.float32), d), d).astype(float)
    assert np.exp(-drawn).mean() == pytest.approx(1 / p, rel=2e-5)


def test_dithers_of_a_token_are_spread_and_those_of_tokens_are_uniform() -> None:
    uniform = np.random.default_rng(0).random(20_000).astype(np.float32)
    for slot in (0, 7, -3, 40):
        values = np.sort(dither(uniform, np.full(20_000, slot)))
        assert values[0] >= 0 and values[-1] < 1
        assert np.abs(values - (np.arange(20_000) + 0.5) / 20_000).max() < 0.02  # Kolmogorov-Smirnov, far beyond 1 %


# --- the codec of head and draws ---


@settings(max_examples=80, deadline=None)
@given(
    samples=st.integers(1, 4),
    length=st.integers(1, 9),
    top_k=st.integers(0, 9),
    draws=st.integers(0, 5),
    vocab=st.sampled_from([9, 10, 64, 300]),
    padding=st.sampled_from([1, 200, 2**22]),
    sharpness=st.sampled_from([0.0, 1.0, 4.0, 40.0]),
    temperature=st.sampled_from([1.0, 0.5, 2.0, 0.7]),
    step=st.integers(0, 2**63),
    seed=st.integers(0, 1000),
)
def test_everything_a_teacher_said_comes_back_within_the_stated_bounds(
    samples: int, length: int, top_k: int, draws: int, vocab: int, padding: int, sharpness: float, temperature: float,
    step: int, seed: int,
) -> None:  # fmt: skip
    p_BSV = random_p(samples, length, vocab, sharpness, seed)
    raw = teacher(p_BSV, top_k, draws, temperature, seed)
    size = vocab * padding
    raw = replace(raw, ids_BSK=raw.ids_BSK * padding, draw_ids_BSM=raw.draw_ids_BSM * padding)  # type: ignore[operator]
    got = round_trip(block_of(raw, size, step), size).labels
    want, read = raw.at(temperature), got.at(temperature)
    sent = np.exp(want.log_prob_BSK) > 0
    entries = read.ids_BSK.shape[-1]
    assert entries == sent.sum(-1).max(initial=0)
    np.testing.assert_array_equal(np.where(sent, want.ids_BSK, 0)[..., :entries], read.ids_BSK)
    p, q = np.exp(want.log_prob_BSK.astype(float))[..., :entries], np.exp(read.log_prob_BSK.astype(float))
    tail, read_tail = 1 - p.sum(-1), 1 - q.sum(-1)
    assert (q.sum(-1) <= 1 + 1e-5).all()
    bounds = np.where(p > 0, HEAD.bound(np.minimum(p, 0.5)), 0)
    if entries:
        first = p[..., 0] > np.maximum(tail, 0)  # what is not sent is what the others leave
        tail_bound = HEAD.bound(np.clip(tail, 0, 0.5))
        rest = bounds[..., 1:].sum(-1)
        bounds[..., 0] = np.where(first, rest + tail_bound, bounds[..., 0])
        assert (np.abs(read_tail - tail) <= np.where(first, tail_bound, bounds.sum(-1)) + 4e-5).all()
        assert (np.abs(p - q) <= bounds + 4e-5).all()
    if draws:
        assert want.draw_log_prob_BSM is not None and read.draw_log_prob_BSM is not None
        drawn = want.draw_log_prob_BSM > -np.inf
        scale = DrawScale(DRAW_BITS, size)
        most = read.draw_ids_BSM.shape[-1]  # type: ignore[union-attr]
        assert most == drawn.sum(-1).max(initial=0)
        rising = np.argsort(np.where(drawn, want.draw_ids_BSM, size), axis=-1, kind="stable")[..., :most]
        there = np.take_along_axis(drawn, rising, -1)
        np.testing.assert_array_equal(
            np.where(there, np.take_along_axis(want.draw_ids_BSM, rising, -1), 0),  # type: ignore[arg-type]
            read.draw_ids_BSM,
        )
        with np.errstate(invalid="ignore"):
            in_tail = np.log(np.maximum(read_tail, 2.0**-20))[..., None]  # as the reader knows it, but for float32
            sent_share = np.clip(np.take_along_axis(want.draw_log_prob_BSM, rising, -1) - in_tail, scale.lowest, 0.0)
            off = np.abs(np.where(there, sent_share - (read.draw_log_prob_BSM - in_tail), 0))
        assert off[read_tail > 1e-3].max(initial=0) <= scale.step / 2 + scale.centre + 1e-3
    entropy_step = np.log(size) / ENTROPY_LEVELS
    assert np.abs(read.entropy_BS - raw.entropy_BS).max() <= entropy_step * 0.5 + 1e-4  # type: ignore[operator]
    assert read.ids_BSK.dtype == np.int32 and read.log_prob_BSK.dtype == np.float32


@pytest.mark.parametrize("temperature", [0.5, 2.0, 8.0])
def test_labels_at_a_temperature_give_its_probabilities_and_those_at_one(temperature: float) -> None:
    p_BSV = random_p(2, 40, 50, 3.0, 0)
    got = round_trip(block_of(teacher(p_BSV, 6, 3, temperature), 50), 50).labels
    tempered = p_BSV ** (1 / temperature)
    tempered /= tempered.sum(-1, keepdims=True)
    at, plain = got.at(temperature), got.at(1.0)
    want = np.take_along_axis(tempered, at.ids_BSK, -1)
    assert np.abs(np.exp(at.log_prob_BSK) - want).max() < 0.02 and at.draw_ids_BSM is not None
    ratio = np.exp(plain.log_prob_BSK / temperature - at.log_prob_BSK)
    norm = (p_BSV ** (1 / temperature)).sum(-1, keepdims=True)
    assert np.abs(np.log(ratio / norm)).max() <= 2.0**-11 + 1e-5 and plain.draw_ids_BSM is None
    with pytest.raises(LabelError, match=rf"at temperature 3 and the labels are at {temperature:g}"):
        got.at(3.0)


def test_the_same_block_gives_the_same_bytes_and_a_sample_reads_the_same_wherever_it_is() -> None:
    raw = teacher(random_p(6, 30, 400, 2.0, 5), 16, 12, seed=1)
    whole = block_of(raw, 400)
    assert encode_block(whole, 400, 30.0) == encode_block(whole, 400, 30.0)
    want = round_trip(whole, 400, 30.0).labels.at(1.0)

    def part(start: int, end: int) -> SampleLabels:
        names = [n for n, x in vars(raw).items() if isinstance(x, np.ndarray)]
        cut = replace(raw, **{n: getattr(raw, n)[start:end] for n in names})
        block = LabelBlock(3, start, whole.sample_ids_B[start:end], whole.tokens_BS1[start:end], cut)
        return round_trip(block, 400, 30.0).labels.at(1.0)

    got = SampleLabels.cat([part(0, 1), part(1, 4), part(4, 6)])
    for name, value in vars(want).items():
        np.testing.assert_array_equal(getattr(got, name), value, err_msg=name)


# --- the budget ---

MIXES = {
    "flat": np.full(4, 1.0),
    "middle": np.full(4, 1.5),
    "peaked": np.full(4, 2.0),
    "mixed": np.array([0.6, 1.2, 2.0, 4.0]),
}


def zipf_teacher(mix: str, vocab: int, samples: int, length: int, top_k: int, draws: int, seed: int = 0) -> RawLabels:
    """Ids are ranks; nested draws from behind the head."""
    rng = np.random.default_rng(seed)
    exponents = rng.choice(MIXES[mix], (samples, length)) + 0.1 * rng.standard_normal((samples, length))
    p = zipf(vocab, exponents)
    tail = np.cumsum(p[..., top_k:], -1)
    points = rng.random((samples, length, draws)) * tail[..., -1:]
    ranks = np.array(
        [
            np.searchsorted(t, x)
            for t, x in zip(tail.reshape(-1, tail.shape[-1]), points.reshape(-1, draws), strict=True)
        ]
    )
    ranks = np.minimum(ranks.reshape(points.shape) + top_k, vocab - 1)
    head = np.broadcast_to(np.arange(top_k, dtype=np.int32), (samples, length, top_k))
    entropy = -(p * np.log(p)).sum(-1)
    return RawLabels(
        "sampled", 1.0, head, np.log(p[..., :top_k]).astype(np.float32), None, entropy.astype(np.float32),
        ranks.astype(np.int32), np.log(np.take_along_axis(p, ranks, -1)).astype(np.float32),
    )  # fmt: skip


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("vocab", "budget"), [(4096, 36.0), (4096, 20.0), (32_000, 36.0), (32_000, 64.0)])
def test_each_sample_keeps_its_budget_within_two_percent(mix: str, vocab: int, budget: float) -> None:
    raw = zipf_teacher(mix, vocab, 4, 96, 32, 32)
    assert budget * 0.98 <= bytes_a_token(block_of(raw, vocab), vocab, budget) <= budget * 1.005


def test_a_budget_beyond_what_there_is_sends_what_there_is_and_one_too_small_one_draw_a_token() -> None:
    raw = zipf_teacher("middle", 4096, 2, 32, 8, 4)
    block = block_of(raw, 4096)
    much = round_trip(block, 4096, 1000.0).labels
    assert much.ids_BSK.shape == raw.ids_BSK.shape  # type: ignore[union-attr]
    np.testing.assert_array_equal(much.draw_ids_BSM, np.sort(raw.draw_ids_BSM, axis=-1))  # type: ignore[arg-type]
    least = round_trip(block, 4096, 1.0).labels
    assert (least.draw_log_prob_BSM > -np.inf).sum(-1).min() == 1  # type: ignore[operator]


def squared_error(p_K: np.ndarray, head: int, draws: int) -> float:
    """Of the tail's estimate, where points lie one stride apart: an entry is hit as often as strides fit in it, and
    once more with the probability that is left over. Up to a constant from behind all candidates.
    """
    tail = 1 - p_K[:head].sum()
    if not draws:
        return float(tail**2)
    stride = tail / draws
    left = p_K[head:] / stride % 1
    return float((stride**2 * left * (1 - left)).sum() + stride * (1 - p_K.sum()))


def brute_force(p_NK: np.ndarray, entries: int) -> float:
    """Least sum over tokens of squared errors with so many entries in all, one entry after the other (it is convex)."""

    def error(token: int, n: int) -> float:
        return min(squared_error(p_NK[token], k, n - k) for k in range(min(n - 1, p_NK.shape[1]) + 1))

    errors = {token: error(token, 1) for token in range(len(p_NK))}
    count = dict.fromkeys(errors, 1)
    heap = [(error(token, 2) - errors[token], token) for token in errors]
    heapq.heapify(heap)
    for _ in range(entries - len(p_NK)):
        change, token = heapq.heappop(heap)
        errors[token] += change
        count[token] += 1
        heapq.heappush(heap, (error(token, count[token] + 1) - errors[token], token))
    return sum(errors.values())


@pytest.mark.parametrize("mix", MIXES)
def test_the_shares_are_as_good_as_those_found_entry_by_entry(mix: str) -> None:
    p_BSK = np.exp(zipf_teacher(mix, 4096, 1, 48, 32, 1).log_prob_BSK)  # type: ignore[arg-type]
    shares = share_out(p_BSK, np.full((1, 48), 64), 64, EntryBits(20, 20, 0), 36.0)
    head, draws = shares.head_BS[0], shares.draws_BS[0]
    p_NK = p_BSK[0].astype(float)
    error = sum(squared_error(p, k, m) for p, k, m in zip(p_NK, head, draws, strict=True))
    assert all(1 - p[:k].sum() < NEGLIGIBLE_TAIL for p, k, m in zip(p_NK, head, draws, strict=True) if m == 0)
    assert error <= brute_force(p_NK, int((head + draws).sum())) * 1.02


def test_no_token_draws_an_entry_twice_and_a_flat_one_gets_more_draws_than_a_peaked_one() -> None:
    raw = zipf_teacher("mixed", 4096, 4, 64, 32, 32)
    got = round_trip(block_of(raw, 4096), 4096, 36.0).labels.at(1.0)
    assert got.draw_ids_BSM is not None and got.draw_log_prob_BSM is not None
    drawn = got.draw_log_prob_BSM > -np.inf
    peak = np.exp(raw.log_prob_BSK[..., 0])  # type: ignore[index]
    assert drawn[peak < 0.1].sum(-1).mean() > 3 * drawn[peak > 0.8].sum(-1).mean()
    for ids, mask, head, size in zip(
        got.draw_ids_BSM.reshape(-1, drawn.shape[-1]), drawn.reshape(-1, drawn.shape[-1]),
        got.ids_BSK.reshape(-1, got.ids_BSK.shape[-1]), (got.log_prob_BSK > -np.inf).sum(-1).ravel(), strict=True,
    ):  # fmt: skip
        near = [i for i in ids[mask] if i < 32]  # candidates: what is behind them is drawn independently in this test
        assert len(set(near)) == len(near) and not set(near) & set(head[:size])


def control_variate_gradient(labels: SampleLabels, q_V: np.ndarray) -> np.ndarray:
    """[N, V]: q - t of titan.ops.divergence, one entry after the other, in float64."""
    samples, length, entries = labels.ids_BSK.shape
    ids = labels.ids_BSK.reshape(samples * length, entries)
    p = np.exp(labels.log_prob_BSK.astype(float)).reshape(ids.shape)
    q = np.where(p > 0, q_V[ids], 0)
    tail, student_tail = 1 - p.sum(-1), 1 - q.sum(-1)
    ratio = tail / student_tail
    grad = (1 - ratio)[:, None] * q_V
    rows = np.arange(len(q))
    for k in range(ids.shape[-1]):
        np.add.at(grad, (rows, ids[:, k]), ratio * q[:, k] - p[:, k])
    assert labels.draw_ids_BSM is not None and labels.draw_log_prob_BSM is not None
    draw_ids = labels.draw_ids_BSM.reshape(len(ids), -1)
    draw_log_p = labels.draw_log_prob_BSM.reshape(len(ids), -1).astype(float)
    count = np.maximum((draw_log_p > -np.inf).sum(-1), 1)
    for m in range(draw_ids.shape[-1]):
        there = draw_log_p[:, m] > -np.inf
        weight = 1 - ratio * q_V[draw_ids[:, m]] / np.exp(np.where(there, draw_log_p[:, m], 0))
        np.add.at(grad, (rows, draw_ids[:, m]), np.where(there, -tail / count * weight, 0))
    return grad


@pytest.mark.parametrize(("exponent", "budget"), [(1.0, 14.0), (1.5, 14.0), (2.0, 14.0), (1.0, 6.0), (3.0, 9.0)])
def test_the_gradient_is_unbiased_through_the_codec(exponent: float, budget: float) -> None:
    """Mean over 1e5 tokens with the same teacher and student, whose draws and dithers differ."""
    vocab, samples, length = 40, 1000, 100
    p_V = zipf(vocab, exponent)
    q_V = p_V * np.exp(np.random.default_rng(3).normal(0, 0.5, vocab))
    q_V /= q_V.sum()
    p_BSV = np.broadcast_to(p_V, (samples, length, vocab))
    raw = teacher(p_BSV, 12, 6, seed=4)
    got = round_trip(block_of(raw, vocab), vocab, budget).labels.at(1.0)
    assert got.draw_ids_BSM is not None
    grad_NV = control_variate_gradient(got, q_V)
    bias, noise = grad_NV.mean(0) - (q_V - p_V), grad_NV.std(0) / np.sqrt(len(grad_NV))
    tail = 1 - np.exp(got.log_prob_BSK.astype(float)).sum(-1).mean()
    # the square of the tail's mass is not linear: a relative error of s^2 / 12 with a relative step s of a code
    stated = tail * (4 * HEAD.step / tail**0.25) ** 2 / 12
    assert (np.abs(bias) <= 4.5 * noise + stated).all(), (np.abs(bias) / noise).max()
    assert np.abs(q_V - p_V).max() > 50 * np.abs(bias).max()


# --- the other codecs ---


def test_top_k_is_a_head_and_a_bucket() -> None:
    raw = teacher(random_p(3, 7, 100, 2.0, 0), 5, 4, codec="top_k")
    got = round_trip(block_of(raw, 100), 100).labels.at(1.0)
    assert got.tail == "bucket" and got.draw_ids_BSM is None
    np.testing.assert_array_equal(got.ids_BSK, raw.ids_BSK)
    assert np.abs(np.exp(got.log_prob_BSK) - np.exp(raw.log_prob_BSK)).max() < 0.02  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 60), st.sampled_from([1, 2, 30, 4000]), st.integers(0, 99))
def test_random_gives_the_distinct_ids_with_their_shares_of_the_draws(
    samples: int, length: int, draws: int, vocab: int, seed: int
) -> None:
    raw = teacher(random_p(samples, length, vocab, 2.0, seed), 0, draws, codec="random", seed=seed)
    got = round_trip(block_of(raw, vocab), vocab).labels.at(1.0)
    assert got.tail == "none" and raw.draw_ids_BSM is not None
    for b in range(samples):
        for s in range(length):
            want = Counter(raw.draw_ids_BSM[b, s].tolist())
            there = got.log_prob_BSK[b, s] > -np.inf
            shares = dict(zip(got.ids_BSK[b, s][there].tolist(), np.exp(got.log_prob_BSK[b, s][there]), strict=True))
            assert len(shares) == there.sum() == len(want)
            assert all(shares[i] == pytest.approx(count / draws, rel=1e-5) for i, count in want.items())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_full_gives_every_log_probability_within_a_4096th_of_a_nat(temperature: float) -> None:
    p_BSV = random_p(2, 3, 77, 3.0, 0)
    raw = RawLabels("full", dense_BSV=np.log(p_BSV).astype(np.float32))
    got = round_trip(block_of(raw, 77), 77).labels
    assert np.abs(got.dense_BSV - np.log(p_BSV)).max() <= 2.0**-12 + 1e-6  # type: ignore[operator]
    dense = got.at(temperature).dense_BSV
    want = p_BSV ** (1 / temperature)
    want = np.log(want / want.sum(-1, keepdims=True))
    assert dense is not None and np.abs(dense - want).max() <= 2.0**-11 and dense.dtype == np.float32
    assert np.abs(np.exp(dense.astype(float)).sum(-1) - 1).max() < 1e-5


@pytest.mark.parametrize("samples", [2, 0])
def test_hidden_gives_hidden_states_and_where_it_is_there_the_output_weight(samples: int) -> None:
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(samples, 5, 8)).astype(np.float32), rng.normal(size=(33, 8)).astype(np.float32)
    for has in (True, False):
        raw = RawLabels("hidden", hidden_BSD=hidden, output_weight_VD=weight if has else None, weight_version=7)
        got = round_trip(block_of(raw, 33), 33).labels
        assert got.weight_version == 7
        labels = got.at(1.5)
        np.testing.assert_array_equal(labels.hidden_BSD, from_bfloat16(to_bfloat16(hidden)))
        assert (labels.output_weight_VD is not None) == has
        if has:
            np.testing.assert_array_equal(labels.output_weight_VD, from_bfloat16(to_bfloat16(weight)))


@given(st.lists(st.floats(allow_nan=False, width=32), min_size=1))
def test_bfloat16_is_that_of_torch(values: list[float]) -> None:
    x = np.array(values, np.float32)
    want = torch.from_numpy(x).bfloat16().float().numpy()
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(x)), want)


# --- blocks ---


def small_block(codec: str) -> tuple[LabelBlock, int]:
    p_BSV = random_p(1, 2, 20, 1.0, 0)
    if codec == "full":
        return block_of(RawLabels("full", dense_BSV=np.log(p_BSV).astype(np.float32)), 20), 20
    if codec == "hidden":
        return block_of(RawLabels("hidden", hidden_BSD=p_BSV.astype(np.float32)), 20), 20
    return block_of(teacher(p_BSV, 0 if codec == "random" else 3, 2, codec=codec), 20), 20


CODECS = ["sampled", "top_k", "random", "full", "hidden"]


@pytest.mark.parametrize("codec", CODECS)
def test_any_flipped_bit_of_a_block_is_found(codec: str) -> None:
    data = bytearray(encode_block(*small_block(codec)))
    for place in range(len(data)):
        data[place] ^= 1 << place % 8
        with pytest.raises(LabelError, match=r"damaged|no longer"):
            decode_block(BlockHeader.unpack(bytes(data[:HEADER_BYTES])), bytes(data[HEADER_BYTES:]))
        data[place] ^= 1 << place % 8


@pytest.mark.parametrize("codec", CODECS)
def test_a_header_says_what_its_block_holds(codec: str) -> None:
    block, vocab = small_block(codec)
    data = encode_block(replace(block, step=2**63, first_sample=12), vocab)
    header = BlockHeader.unpack(data[:HEADER_BYTES])
    assert header == BlockHeader.unpack(header.pack())
    assert (header.codec, header.vocab_size, header.step, header.first_sample) == (codec, 20, 2**63, 12)
    assert (header.samples, header.sequence_length, header.payload_bytes) == (1, 2, len(data) - HEADER_BYTES)
    for cut in (0, 1, len(data) - HEADER_BYTES - 1):
        with pytest.raises(LabelError, match=f"labels of step {2**63}, samples from 12, are damaged"):
            decode_block(header, data[HEADER_BYTES : HEADER_BYTES + cut])


def test_a_block_of_another_version_is_refused_by_name() -> None:
    header = BlockHeader.unpack(encode_block(*small_block("sampled"))[:HEADER_BYTES])
    with pytest.raises(LabelError, match="format version 4, this titan reads up to 3"):
        BlockHeader.unpack(replace(header, version=4).pack())
    for old in (b"TLB1" + bytes(HEADER_BYTES - 4), replace(header, version=2).pack()):
        with pytest.raises(LabelError, match=r"format version [12], which this titan no longer reads"):
            BlockHeader.unpack(old)
    with pytest.raises(LabelError, match="damaged"):
        BlockHeader.unpack(header.pack()[:-1])


# --- labels of a task ---


def test_labels_are_cut_and_joined_by_samples() -> None:
    wide = teacher(random_p(3, 4, 30, 1.0, 0), 5, 3).at(1.0)
    narrow = teacher(random_p(2, 4, 30, 1.0, 1), 2, 1).at(1.0)
    both = SampleLabels.cat([wide, narrow])
    assert both.ids_BSK.shape == (5, 4, 5) and both.draw_ids_BSM.shape == (5, 4, 3)  # type: ignore[union-attr]
    assert np.isneginf(both.log_prob_BSK[3:, :, 2:]).all() and np.isneginf(both.draw_log_prob_BSM[3:, :, 1:]).all()  # type: ignore[index]
    for name, value in vars(wide).items():
        np.testing.assert_array_equal(getattr(both.rows(0, 3), name), value)
    np.testing.assert_array_equal(both.rows(3, 5).ids_BSK[..., :2], narrow.ids_BSK)
    with pytest.raises(ValueError, match="one tail"):
        SampleLabels.cat([wide, replace(wide, tail="none")])
    with pytest.raises(ValueError, match="entropy_BS or none, 1 of 2 lack it"):
        SampleLabels.cat([wide, replace(wide, entropy_BS=None)])


def test_an_output_weight_is_no_matter_of_samples() -> None:
    weight = np.ones((7, 3), np.float32)
    labels = RawLabels("hidden", hidden_BSD=np.ones((4, 2, 3), np.float32), output_weight_VD=weight).at(1.0)
    assert labels.rows(1, 2).output_weight_VD is weight
    joined = SampleLabels.cat([labels.rows(0, 1), labels.rows(1, 4)])
    assert joined.output_weight_VD is weight and joined.hidden_BSD.shape == (4, 2, 3)  # type: ignore[union-attr]
