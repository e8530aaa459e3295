"""Label blocks as bytes: every codec but that of head and draws keeps its bounds, and damage is found."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.codec_teacher import block_of, independent, random_p, round_trip, teacher
from titan.distill.codec.bits import BitReader, BitWriter, pack, packed_bytes, unpack, width_of
from titan.distill.codec.block import HEADER_BYTES, BlockHeader, LabelBlock, decode_block, encode_block
from titan.distill.codec.codecs import from_bfloat16, to_bfloat16
from titan.distill.codec.codes import HeadScale, dither
from titan.distill.codec.context import HEAD_BITS
from titan.distill.codec.raw import RawLabels
from titan.errors import LabelError
from titan.tasks.sample_labels import SampleLabels

HEAD = HeadScale(HEAD_BITS)


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
    with pytest.raises(LabelError, match="damaged"):
        BitReader(writer.payload()).take(17, 4)
    with pytest.raises(LabelError, match="damaged"):
        BitReader(writer.payload()).take_array((3,), "<i8")


@pytest.mark.parametrize(("count", "width"), [(1, 0), (2, 1), (50_000, 16), (65_536, 16), (65_537, 17), (151_936, 18)])
def test_an_id_takes_the_bits_that_the_vocabulary_needs(count: int, width: int) -> None:
    assert width_of(count) == width


# --- probabilities as codes ---


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-9, 0.5), st.floats(0, 0.999), st.integers(5, 12))
def test_a_probability_of_the_head_comes_back_within_the_stated_bound(p: float, offset: float, bits: int) -> None:
    scale, d = HeadScale(bits), np.array([offset], np.float32)
    x = np.array([p], np.float32)
    got = scale.decode(scale.encode(x, d), d)
    assert got > 0 and abs(float(got[0]) - p) <= float(scale.bound(np.array(p))) + 1e-7
    if bits == 8 and p > 0.01:
        assert abs(float(got[0]) / p - 1) <= 0.0079 * (0.5 / p) ** 0.25 + 0.0002


@pytest.mark.parametrize("p", [0.5, 0.3, 0.031, 1e-3, 1e-5])
def test_over_all_dithers_the_mean_of_a_head_entry_is_right(p: float) -> None:
    d = ((np.arange(100_000) + 0.5) / 100_000).astype(np.float32)
    head = HEAD.decode(HEAD.encode(np.full(d.shape, p, np.float32), d), d).astype(float).mean()
    assert head == pytest.approx(p, rel=2e-5 if p < 0.49 else 1e-2)


def test_dithers_of_a_token_are_spread_and_those_of_tokens_are_uniform() -> None:
    uniform = np.random.default_rng(0).random(20_000).astype(np.float32)
    for slot in (0, 7, -3, 40):
        values = np.sort(dither(uniform, np.full(20_000, slot)))
        assert values[0] >= 0 and values[-1] < 1
        assert np.abs(values - (np.arange(20_000) + 0.5) / 20_000).max() < 0.02  # Kolmogorov-Smirnov, far beyond 1 %


# --- the other codecs ---


def test_top_k_is_a_head_and_a_bucket() -> None:
    raw = teacher(random_p(3, 7, 100, 2.0, 0), 5, 4, codec="top_k").raw
    got = round_trip(block_of(raw, 100), 100).labels.at(1.0)
    assert got.tail == "bucket" and got.draw_ids_BSM is None
    np.testing.assert_array_equal(got.ids_BSK, raw.ids_BSK)
    assert np.abs(np.exp(got.log_prob_BSK) - np.exp(raw.log_prob_BSK)).max() < 0.02  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 60), st.sampled_from([1, 2, 30, 4000]), st.integers(0, 99))
def test_random_gives_the_distinct_ids_with_their_shares_of_the_draws(
    samples: int, length: int, draws: int, vocab: int, seed: int
) -> None:
    raw = independent(random_p(samples, length, vocab, 2.0, seed), draws, seed)
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
    assert np.abs(got.dense_BSV - np.log(p_BSV)).max() <= 2.0**-12 + 1e-6
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
    if codec == "random":
        return block_of(independent(p_BSV, 2), 20), 20
    return block_of(teacher(p_BSV, 3, 2, codec=codec).raw, 20), 20


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
    with pytest.raises(LabelError, match="format version 5, this titan reads up to 4; update titan"):
        BlockHeader.unpack(replace(header, version=5).pack())
    old = {1: b"TLB1" + bytes(HEADER_BYTES - 4)} | {n: replace(header, version=n).pack() for n in (2, 3)}
    for version, data in old.items():
        with pytest.raises(LabelError, match=f"format version {version}, which this titan no longer reads; make a new"):
            BlockHeader.unpack(data)
    with pytest.raises(LabelError, match="damaged"):
        BlockHeader.unpack(header.pack()[:-1])


@pytest.mark.parametrize("codec", CODECS)
def test_of_version_3_all_codecs_but_the_one_that_changed_are_read(codec: str) -> None:
    data = encode_block(*small_block(codec))
    header = replace(BlockHeader.unpack(data[:HEADER_BYTES]), version=3)
    if codec == "sampled":
        with pytest.raises(LabelError, match="format version 3, which this titan no longer reads; make a new log"):
            BlockHeader.unpack(header.pack())
    else:
        assert BlockHeader.unpack(header.pack()) == header


# --- labels of a task ---


def test_labels_are_cut_and_joined_by_samples() -> None:
    said = teacher(random_p(3, 4, 30, 1.0, 0), 5, 3), teacher(random_p(2, 4, 30, 1.0, 1), 2, 1)
    wide, narrow = (replace(one.raw, threshold_BS=one.least_BS.astype(np.float32)).at(1.0) for one in said)
    both = SampleLabels.cat([wide, narrow])
    assert both.ids_BSK.shape == (5, 4, 5) and both.draw_ids_BSM.shape == (5, 4, 3)  # type: ignore[union-attr]
    assert np.isneginf(both.log_prob_BSK[3:, :, 2:]).all() and np.isneginf(both.draw_log_prob_BSM[3:, :, 1:]).all()  # type: ignore[index]
    for name, value in vars(wide).items():
        np.testing.assert_array_equal(getattr(both.rows(0, 3), name), value)
    np.testing.assert_array_equal(both.rows(3, 5).ids_BSK[..., :2], narrow.ids_BSK)
    np.testing.assert_array_equal(both.draw_mass_BS[3:], narrow.draw_mass_BS)  # type: ignore[index]
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
