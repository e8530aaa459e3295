"""Draws by priority: their random numbers, how they are written, and that a reader gets what it should of a token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.codec_teacher import (
    STEP,
    block_of,
    check_draws,
    check_head,
    exact,
    random_p,
    round_trip,
    rows_of,
    sample_ids,
    teacher,
)
from titan.distill.codec.bits import BitReader, BitWriter
from titan.distill.codec.block import encode_block
from titan.distill.codec.context import DITHER, DRAW_DITHER, ENTROPY_DITHER, ENTROPY_LEVELS, Context
from titan.distill.codec.priority import (
    CENTRE,
    Turns,
    draw_bits,
    part_of,
    parts_of,
    read_places,
    read_ratios,
    write_places,
    write_ratios,
)
from titan.distill.codec.priority import (
    STEP as RATIO_STEP,
)
from titan.errors import LabelError
from titan.ops.label import TailDraws
from titan.ops.look import VocabShard
from titan.ops.says import label_logits, token_turns
from titan.ops.vocab import vocab_tail_priorities_twin
from titan.tasks.sample_labels import SampleLabels

# --- the random numbers ---


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 18), st.integers(0, 2**63), st.integers(0, 2**40))
def test_places_are_a_permutation_of_the_ids_that_reads_backwards(width: int, step: int, sample: int) -> None:
    turns = Turns.of(step, np.array([sample]), 2, 1 << width)
    assert turns.width == width
    ids = np.arange(1 << width)
    places_SV = turns.places(np.broadcast_to(ids, (1, 2, len(ids))))[0]
    np.testing.assert_array_equal(np.sort(places_SV, axis=-1), np.broadcast_to(ids, places_SV.shape))
    tokens = np.repeat([0, 1], len(ids))
    np.testing.assert_array_equal(turns.at(tokens).ids(places_SV.ravel()), np.tile(ids, 2))
    np.testing.assert_array_equal(turns.at(tokens).places(np.tile(ids, 2)), places_SV.ravel())


def mixed(x: int) -> int:
    """The finaliser of splitmix64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def slow_uniform(step: int, sample: int, position: int, v: int, vocab: int) -> float:
    """u of one id in whole numbers; a float64 holds it exactly."""
    golden, width = 0x9E3779B97F4A7C15, (vocab - 1).bit_length()
    key = mixed((step * 8 + golden) % 2**64)
    word = mixed((mixed((sample + key) % 2**64) + (position + 1) * golden) % 2**64)
    other = mixed(word)
    place = ((word % 2**32 | 1) * v + (word >> 32)) % 2**width
    place = (other % 2**32 | 1) * (place ^ place >> (width + 1) // 2) % 2**width
    place ^= place >> (width + 1) // 2
    fraction = ((other % 2**32 | 1) * v + (other >> 32)) % 2**32 // 2**8
    return float((2 * (place * 2**24 + fraction) + 1) / 2 ** (width + 25))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**60),
    st.lists(st.integers(0, 2**62), min_size=1, max_size=3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 33, 4096, 151_936]),
    st.integers(0, 99),
)
def test_writer_reader_and_teacher_have_the_same_numbers(
    step: int, samples: list[int], length: int, vocab: int, seed: int
) -> None:
    ids = np.random.default_rng(seed).integers(0, vocab, (len(samples), length, 5))
    turns = Turns.of(step, np.array(samples), length, vocab)
    got = turns.uniform(ids)
    want = [
        [[slow_uniform(step, b, s, int(v), vocab) for v in row] for s, row in enumerate(rows)]
        for b, rows in zip(samples, ids, strict=True)
    ]
    np.testing.assert_array_equal(got, want)
    draws = TailDraws(
        1, step, torch.tensor(samples).repeat_interleave(length), torch.arange(length).repeat(len(samples))
    )
    turns_N4 = token_turns(draws)
    for column, want_BS in enumerate((turns.a, turns.b, turns.c, turns.d)):
        np.testing.assert_array_equal(turns_N4[:, column].numpy().astype(np.uint32), want_BS.ravel())
    only = int(ids[0, 0, 0])  # a vocabulary of which one entry is left says 1 / u as its priority
    logits = torch.full((len(turns_N4), vocab), -torch.inf)
    logits[:, only] = 0.0
    nothing = torch.empty(len(logits), 0, dtype=torch.int64)
    _, _, priority = vocab_tail_priorities_twin(
        logits.double(), nothing, torch.zeros(len(logits)), turns_N4, 1, 0, vocab, 1.0
    )
    uniform = [slow_uniform(step, b, s, only, vocab) for b in samples for s in range(length)]
    np.testing.assert_allclose(priority[:, 0], 1 / np.array(uniform), rtol=1.5e-7)  # teachers have float32


def kolmogorov_smirnov(values: np.ndarray) -> float:
    """Distance from the uniform distribution, in units in which 1.95 is exceeded once in a thousand."""
    rising = np.sort(values)
    return float(np.abs(rising - (np.arange(len(rising)) + 0.5) / len(rising)).max() * np.sqrt(len(rising)))


@pytest.mark.parametrize("v", [0, 1, 4095, 2048])
def test_a_number_is_uniform_over_tokens_also_where_it_is_lowest(v: int) -> None:
    length, samples, vocab = 1000, 1000, 4096
    u = Turns.of(STEP, sample_ids(samples), length, vocab).uniform(np.full((samples, length, 1), v)).ravel()
    assert kolmogorov_smirnov(u) < 1.95
    lowest = u[u < 1 / vocab] * vocab
    assert abs(len(lowest) - len(u) / vocab) < 4.5 * np.sqrt(len(u) / vocab)
    assert kolmogorov_smirnov(lowest) < 1.95


@pytest.mark.parametrize(("one", "other"), [(0, 1), (1, 2), (0, 4095), (17, 1018), (3, 3 + 64), (5, 3000)])
def test_the_numbers_of_two_ids_of_a_token_are_uncorrelated(one: int, other: int) -> None:
    ids = np.broadcast_to(np.array([one, other]), (1000, 400, 2))
    u = Turns.of(STEP, sample_ids(1000), 400, 4096).uniform(ids).reshape(-1, 2)
    assert abs(np.corrcoef(u.T)[0, 1]) < 4.5 / np.sqrt(len(u))


def test_a_draw_is_rounded_with_another_dither_than_its_head() -> None:
    """Their errors are multiplied with each other, and would not average out."""
    context = Context(STEP, sample_ids(1000), 100, 4096)
    numbers = [context.uniform(purpose).ravel() for purpose in (DITHER, DRAW_DITHER, ENTROPY_DITHER)]
    u = Turns.of(STEP, sample_ids(1000), 100, 4096).uniform(np.zeros((1000, 100, 1), np.int64)).ravel()
    correlated = np.corrcoef([*numbers, u]) - np.eye(4)
    assert np.abs(correlated).max() < 4.5 / np.sqrt(len(u))


# --- places and ratios as bits ---


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 30), st.integers(0, 40), st.integers(0, 18), st.booleans(), st.integers(0, 2**32))
def test_places_come_back_and_take_the_stated_bits(tokens: int, most: int, width: int, low: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = np.minimum(rng.integers(0, most + 1, tokens) * (rng.random(tokens) < 0.7), 1 << width)
    within = np.maximum(counts, (1 << width) >> 6 * low)  # also sets of which all are in the lowest part
    places = np.concatenate(
        [np.sort(rng.choice(w, n, replace=False)) for w, n in zip(within, counts, strict=True)] + [np.zeros(0)]
    ).astype(np.int64)
    writer = BitWriter()
    write_places(places, counts, width, writer)
    data = writer.payload()
    parts, left = parts_of(width)
    stated = draw_bits(places, np.zeros(len(places)), width).sum() - len(places)  # without the ratio's closing 1
    stated += parts * np.count_nonzero(counts) + tokens + 32
    assert 0 <= 8 * len(data) - stated <= 7 * (2 + sum(left))
    got_places, got_counts = read_places(tokens, width, BitReader(data))
    np.testing.assert_array_equal(got_places, places)
    np.testing.assert_array_equal(got_counts, counts)


@pytest.mark.parametrize("width", range(19))
def test_each_part_of_the_places_is_as_long_as_all_before(width: int) -> None:
    parts, left = parts_of(width)
    assert parts == min(10, width + 1)
    edges = [0, *((1 << width) >> (parts - 1 - part) for part in range(parts))]
    slow = np.repeat(np.arange(parts), np.diff(edges))
    np.testing.assert_array_equal(part_of(np.arange(1 << width), width), slow)
    assert [1 << bits for bits in left] == np.diff(edges).tolist()


def test_places_whose_marks_do_not_add_up_are_damage() -> None:
    writer = BitWriter()
    write_places(np.array([3, 70, 71]), np.array([1, 0, 2]), 7, writer)
    data = bytearray(writer.payload())
    data[5] ^= 1
    with pytest.raises(LabelError, match="3 draws have"):
        read_places(3, 7, BitReader(bytes(data)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 40), st.floats(0, 0.999)), max_size=50))
def test_ratios_come_back_within_half_a_step_and_take_the_stated_bits(pairs: list[tuple[float, float]]) -> None:
    ratio = np.array([x for x, _ in pairs])
    offset = np.array([d for _, d in pairs], np.float32)
    writer = BitWriter()
    write_ratios(ratio, offset, writer)
    data = writer.payload()
    steps = ratio / RATIO_STEP
    assert abs(8 * len(data) - 32 - (steps + 1).sum()) <= 7 + len(pairs)
    got = read_ratios(offset, BitReader(data))
    assert np.abs(got - CENTRE - ratio).max(initial=0) <= RATIO_STEP / 2 * (1 + 1e-6)


def test_a_ratio_too_few_is_damage() -> None:
    writer = BitWriter()
    write_ratios(np.array([0.2, 1.7]), np.zeros(2, np.float32), writer)
    with pytest.raises(LabelError, match="3 draws have 2 probabilities"):
        read_ratios(np.zeros(3, np.float32), BitReader(writer.payload()))


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.59, 1.0, 7.3])
def test_over_all_dithers_the_mean_of_the_inverse_of_a_draw_is_right(ratio: float) -> None:
    d = ((np.arange(100_000) + 0.5) / 100_000).astype(np.float32)
    writer = BitWriter()
    write_ratios(np.full(len(d), ratio), d, writer)
    got = read_ratios(d, BitReader(writer.payload()))
    assert np.exp(-got).mean() == pytest.approx(np.exp(-ratio), rel=2e-5)


# --- the codec ---


@pytest.mark.parametrize(("top_k", "count", "temperature"), [(5, 9, 1.0), (0, 12, 2.0), (15, 33, 0.7)])
def test_the_slow_teacher_says_what_titans_does(top_k: int, count: int, temperature: float) -> None:
    samples, length, vocab = 3, 20, 300
    p_BSV = random_p(samples, length, vocab, 2.0, 8)
    want = teacher(p_BSV, top_k, count, temperature).raw
    ids_N = torch.from_numpy(sample_ids(samples)).repeat_interleave(length)
    draws = TailDraws(count, STEP, ids_N, torch.arange(length).repeat(samples))
    logits = torch.from_numpy(np.log(p_BSV) + 3.0).float().view(-1, vocab)
    says = label_logits(logits, top_k, draws, temperature, VocabShard(0, vocab, vocab, None))
    assert says.draw_ids_NM is not None and says.draw_log_prob_NM is not None
    np.testing.assert_array_equal(says.ids_NK.view(samples, length, -1), want.ids_BSK)
    np.testing.assert_array_equal(says.draw_ids_NM.view(samples, length, -1), want.draw_ids_BSM)
    np.testing.assert_allclose(says.log_prob_NK.view(samples, length, -1), want.log_prob_BSK, atol=2e-5)  # type: ignore[arg-type]
    drawn = says.draw_log_prob_NM.view(samples, length, -1)
    np.testing.assert_allclose(drawn, want.draw_log_prob_BSM, atol=2e-5)  # type: ignore[arg-type]


@settings(max_examples=100, deadline=None)
@given(
    samples=st.integers(1, 4),
    length=st.integers(1, 9),
    top_k=st.integers(0, 9),
    draws=st.sampled_from([0, 2, 3, 6, 400]),
    vocab=st.sampled_from([9, 10, 64, 300]),
    spread=st.sampled_from([1, 199, 2**20 - 3]),
    sharpness=st.sampled_from([0.0, 1.0, 4.0, 40.0]),
    temperature=st.sampled_from([1.0, 0.5, 2.0, 0.7]),
    step=st.integers(0, 2**63),
    seed=st.integers(0, 1000),
)
def test_without_a_budget_everything_a_teacher_said_comes_back_within_the_stated_bounds(
    samples: int, length: int, top_k: int, draws: int, vocab: int, spread: int, sharpness: float, temperature: float,
    step: int, seed: int,
) -> None:  # fmt: skip
    said = teacher(random_p(samples, length, vocab, sharpness, seed), top_k, draws, temperature, spread, step)
    raw, size = said.raw, vocab * spread
    got = round_trip(block_of(raw, size, step), size).labels
    read = got.at(temperature)
    if draws:
        assert read.draw_mass_BS is not None
        threshold, needed = exact(read.draw_mass_BS), np.maximum(said.least_BS, np.exp(-24.0))
        assert ((threshold > needed) & (threshold < needed * 1.0006)).all(), "the last priority, rounded up"
        check_head(said, np.full((samples, length), np.exp(-24.0)), read)
        check_draws(said, threshold, read)
    else:
        assert read.draw_mass_BS is None and read.draw_ids_BSM is None
        check_head(said, np.exp(np.full((samples, length), -24.0)), read, min(top_k, 1))
    entropy_step = np.log(size) / ENTROPY_LEVELS
    assert np.abs(read.entropy_BS - raw.entropy_BS).max() <= entropy_step * 0.5 + 1e-4  # type: ignore[operator]
    assert read.ids_BSK.dtype == np.int32 and read.log_prob_BSK.dtype == np.float32


def test_a_vocabulary_of_candidates_alone_is_sent_whole() -> None:
    """Its threshold is the lowest there is: nothing is left to be drawn."""
    said = teacher(random_p(2, 30, 12, 2.0, 0), 12, 6)
    read = round_trip(block_of(said.raw, 12), 12).labels.at(1.0)
    assert read.ids_BSK.shape[-1] == 12 and (read.log_prob_BSK > -np.inf).all()
    assert read.draw_ids_BSM is not None and read.draw_ids_BSM.shape[-1] == 0
    np.testing.assert_allclose(np.log(read.draw_mass_BS), -24, atol=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.5, 2.0, 8.0])
def test_labels_at_a_temperature_give_its_probabilities_and_those_at_one(temperature: float) -> None:
    p_BSV = random_p(2, 40, 50, 3.0, 0)
    got = round_trip(block_of(teacher(p_BSV, 6, 20, temperature).raw, 50), 50).labels
    tempered = p_BSV ** (1 / temperature)
    tempered /= tempered.sum(-1, keepdims=True)
    at, plain = got.at(temperature), got.at(1.0)
    want = np.where(at.log_prob_BSK > -np.inf, np.take_along_axis(tempered, at.ids_BSK, -1), 0)
    assert np.abs(np.exp(at.log_prob_BSK) - want).max() < 0.02 and at.draw_ids_BSM is not None
    present = at.log_prob_BSK > -np.inf
    ratio = np.where(present, plain.log_prob_BSK, 0.0) / temperature - np.where(present, at.log_prob_BSK, 0.0)
    norm = np.log((p_BSV ** (1 / temperature)).sum(-1, keepdims=True))
    assert np.abs(ratio - norm)[present].max() <= 2.0**-11 + 1e-5 and plain.draw_ids_BSM is None
    with pytest.raises(LabelError, match=rf"at temperature 3 and the labels are at {temperature:g}"):
        got.at(3.0)


@pytest.mark.parametrize("budget", [None, 30.0])
def test_the_same_block_gives_the_same_bytes_and_a_sample_reads_the_same_wherever_it_is(budget: float | None) -> None:
    whole = block_of(teacher(random_p(6, 31, 400, 2.0, 5), 16, 20).raw, 400)
    assert encode_block(whole, 400, budget) == encode_block(whole, 400, budget)
    want = round_trip(whole, 400, budget).labels.at(1.0)
    parts = [round_trip(rows_of(whole, *ends), 400, budget).labels.at(1.0) for ends in ((0, 1), (1, 4), (4, 6))]
    for name, value in vars(want).items():
        np.testing.assert_array_equal(getattr(SampleLabels.cat(parts), name), value, err_msg=name)
