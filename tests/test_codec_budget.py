"""The budget of a label: it is kept, it is well spent, and the gradient is right on average whatever it is."""

import heapq

import numpy as np
import pytest

from tests.codec_teacher import (
    MIXES,
    Teacher,
    block_of,
    bytes_a_token,
    check_draws,
    check_head,
    exact,
    round_trip,
    rows_of,
    teacher,
    zipf,
    zipf_p,
)
from titan.distill.codec.block import encode_block
from titan.distill.codec.budget import EntryBits, Tokens, threshold_of
from titan.distill.codec.codes import HeadScale
from titan.distill.codec.context import HEAD_BITS
from titan.tasks.sample_labels import SampleLabels

# --- the threshold ---


def slow_bits(p_SK: np.ndarray, behind_S: np.ndarray, threshold: float, cost: EntryBits) -> float:
    """Mean size of a sample's labels, one token after the other."""
    total = 0.0
    for p_K, behind in zip(p_SK, behind_S, strict=True):
        head = sum(bool(p >= threshold) for p in p_K)
        total += cost.token + head * cost.head
        if cost.draw:
            draws = (behind + sum(float(p) for p in p_K if p < threshold)) / threshold
            total += draws * float(cost.draw) + (1 - np.exp(-draws)) * cost.any_draws
        elif not head:
            total += cost.head
    return total


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("draw", [0.0, 13.0])
def test_the_threshold_is_the_least_of_a_fine_grid_that_keeps_the_budget(mix: str, draw: float) -> None:
    p_BSV = zipf_p(mix, 1000, 3, 10)
    p_BSK, behind_BS = p_BSV[..., :15].astype(np.float32), 1 - p_BSV[..., :15].sum(-1)
    cost = EntryBits(22.0, draw, 6.0, 10.0 * (draw > 0))
    grid = np.exp(np.linspace(np.log(1e-6), 0, 4000))  # 0.35 % apart
    for budget in (60.0, 150.0, 290.0):
        got = threshold_of(Tokens(p_BSK, behind_BS), cost, budget * 10)
        for b in range(3):
            fits = [slow_bits(p_BSK[b], behind_BS[b], t, cost) <= budget * 10 for t in grid[::20]]
            start = max(0, 20 * (fits.index(True) - 1))
            best = next(t for t in grid[start:] if slow_bits(p_BSK[b], behind_BS[b], t, cost) <= budget * 10)
            assert abs(np.log(got[b] / best)) < 0.0035 + 0.0009
    assert threshold_of(Tokens(p_BSK, behind_BS), cost, 1.0).tolist() == [1.0] * 3


def squared_error(p_V: np.ndarray, threshold: float) -> float:
    """Of draws that stand for the threshold, each for itself."""
    below = p_V[p_V < threshold]
    return float((below**2 * (threshold / below - 1)).sum())


def entries_at(p_V: np.ndarray, threshold: float) -> float:
    """Of head and draws, on average."""
    return float(np.minimum(1, p_V / threshold).sum())


def least_error(p_NV: np.ndarray, entries: float, step: float = 0.25) -> float:
    """Of all ways to split so many entries between tokens, given out a bit at a time to who gains most by it."""
    grid = np.exp(np.linspace(np.log(1e-5), np.log(50), 3000))
    tables = [([entries_at(p, t) for t in grid[::-1]], [squared_error(p, t) for t in grid[::-1]]) for p in p_NV]

    def error(n: int, count: float) -> float:
        return float(np.interp(count, *tables[n]))

    counts = [step] * len(p_NV)
    heap = [(error(n, 2 * step) - error(n, step), n) for n in range(len(p_NV))]
    heapq.heapify(heap)
    for _ in range(int((entries - step * len(p_NV)) / step)):
        _, n = heapq.heappop(heap)
        counts[n] += step
        heapq.heappush(heap, (error(n, counts[n] + step) - error(n, counts[n]), n))
    return sum(error(n, count) for n, count in enumerate(counts))


@pytest.mark.parametrize("mix", MIXES)
def test_one_threshold_for_all_tokens_is_as_good_as_entries_given_out_one_by_one(mix: str) -> None:
    p_NV = zipf_p(mix, 256, 1, 24)[0]
    tokens = Tokens(p_NV[None].astype(np.float32), np.zeros((1, len(p_NV))))
    threshold = float(threshold_of(tokens, EntryBits(1.0, 1.0, 0.0), 12.0 * len(p_NV))[0])
    entries = sum(entries_at(p, threshold) for p in p_NV)
    assert entries == pytest.approx(12 * len(p_NV), rel=2e-3)
    error = sum(squared_error(p, threshold) for p in p_NV)
    assert error <= least_error(p_NV, entries) * 1.02
    own = [float(threshold_of(Tokens(p[None, None].astype(np.float32), np.zeros((1, 1))), EntryBits(1.0, 1.0, 0.0),
                              entries / len(p_NV))[0]) for p in p_NV]  # fmt: skip
    alike = sum(squared_error(p, t) for p, t in zip(p_NV, own, strict=True))
    assert error <= alike and (mix != "mixed" or error < 0.8 * alike), "tokens alike is another split"


# --- labels within a budget ---

CASES = [(4096, 36.0), (4096, 20.0), (32_000, 36.0), (32_000, 64.0)]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("vocab", "budget"), CASES)
def test_each_sample_keeps_its_budget_and_has_all_that_its_threshold_says(mix: str, vocab: int, budget: float) -> None:
    said = teacher(zipf_p(mix, vocab, 2, 320), 15, 160)
    block = block_of(said.raw, vocab)
    for sample in range(2):
        assert bytes_a_token(rows_of(block, sample, sample + 1), vocab, budget) == pytest.approx(budget, rel=0.03)
    read = round_trip(block, vocab, budget).labels.at(1.0)
    assert read.draw_mass_BS is not None
    threshold = exact(read.draw_mass_BS)
    of_sample = threshold.copy()
    for parity in (0, 1):
        shared = threshold[:, parity::2].min(axis=1)
        of_sample[:, parity::2] = shared[:, None]
        needed = np.maximum(said.least_BS[:, parity::2], shared[:, None])
        assert ((threshold[:, parity::2] >= needed) & (threshold[:, parity::2] < needed * 1.0006)).all()
    assert np.mean(said.least_BS > threshold * 0.999) < 0.1, "the list of nearly all tokens was long enough"
    check_head(said, of_sample, read)
    check_draws(said, threshold, read)
    peak = said.p_BSV.max(-1)
    if mix == "mixed":
        assert read.draw_log_prob_BSM is not None
        drawn = np.count_nonzero(read.draw_log_prob_BSM > -np.inf, axis=-1)
        assert drawn[peak < 0.1].mean() > 3 * drawn[peak > 0.8].mean(), "a flat token gets more than a peaked one"


def test_where_the_teacher_has_not_said_enough_for_the_budget_a_token_has_a_threshold_of_its_own() -> None:
    """Of 4,000 tokens some have their last priority just above the sample's threshold, others just below."""
    said = teacher(zipf_p("mixed", 300, 40, 100), 8, 20)
    read = round_trip(block_of(said.raw, 300), 300, 20.0).labels.at(1.0)
    assert read.draw_mass_BS is not None
    threshold = exact(read.draw_mass_BS)
    for parity in (0, 1):
        shared = threshold[:, parity::2].min(axis=1, keepdims=True)
        least = said.least_BS[:, parity::2]
        assert 0.1 < np.mean(least > shared) < 0.9
        np.testing.assert_array_equal(threshold[:, parity::2] > shared, least > shared)
    check_draws(said, threshold, read)


@pytest.mark.parametrize("mix", MIXES)
def test_over_many_samples_the_mean_size_is_the_budget_within_one_percent(mix: str) -> None:
    block = block_of(teacher(zipf_p(mix, 2000, 40, 64), 15, 100).raw, 2000)
    assert bytes_a_token(block, 2000, 30.0) == pytest.approx(30.0, rel=0.01)


@pytest.mark.parametrize("length", [1, 2, 33])
def test_a_budget_beyond_what_there_is_sends_what_there_is_and_one_too_small_the_fixed_part(length: int) -> None:
    said = teacher(zipf_p("middle", 4096, 20, length), 8, 5)
    block = block_of(said.raw, 4096)
    every = [encode_block(block, 4096, budget)[70:] for budget in (1000.0, None)]
    assert len(every[0]) == len(every[1])
    much, whole = (round_trip(block, 4096, budget).labels.at(1.0) for budget in (1000.0, None))
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(getattr(much, name), value, err_msg=name)
    least = round_trip(block, 4096, 0.1).labels.at(1.0)
    assert least.draw_mass_BS is not None
    threshold = exact(least.draw_mass_BS)
    assert ((threshold >= 1) & (threshold < 1.001 * np.maximum(1, said.least_BS))).all()
    assert least.ids_BSK.shape[-1] == 0
    check_draws(said, threshold, least)


@pytest.mark.parametrize("budget", [2.0, 4.0, 10.0, 30.0, 1000.0])
def test_a_head_alone_keeps_its_budget_and_has_at_least_one_entry(budget: float) -> None:
    said = teacher(zipf_p("mixed", 4096, 8, 64), 40, 0, codec="top_k")
    block = block_of(said.raw, 4096)
    read = round_trip(block, 4096, budget).labels.at(1.0)
    size = (read.log_prob_BSK > -np.inf).sum(-1)
    assert size.min() >= 1 and read.draw_ids_BSM is None
    one_each = (12 + HEAD_BITS + 6 + 1 + 6) / 8
    for sample in range(8):
        got = bytes_a_token(rows_of(block, sample, sample + 1), 4096, budget)
        assert got <= max(budget, one_each) + 0.6, "fields end at a byte"
        assert got >= min(0.93 * budget, 40 * 12 / 8) or budget > 60
        least = min(said.p_BSV[sample, s, k - 1] for s, k in enumerate(size[sample]) if k > 1) if budget > 4 else 1
        assert all(said.p_BSV[sample, s, k] <= least for s, k in enumerate(size[sample]) if k < 40)


# --- the mean of the gradient ---


def gradient(labels: SampleLabels, spread: int, q_V: np.ndarray, control: float) -> np.ndarray:
    """[N, V] float64: q - t of titan.ops.sparse without its cap, t being the head, the student's own tail as far as it
    is trusted, and what draws say in addition.
    """
    assert labels.draw_ids_BSM is not None and labels.draw_log_prob_BSM is not None and labels.draw_mass_BS is not None
    ids, log_p = np.concatenate(list(labels.ids_BSK)) // spread, np.concatenate(list(labels.log_prob_BSK)).astype(float)
    draw_ids, draw_log_p = (
        np.concatenate(list(labels.draw_ids_BSM)) // spread,
        np.concatenate(list(labels.draw_log_prob_BSM)).astype(float),
    )
    rows = np.arange(len(ids))[:, None]
    target_NV, head_NV = np.zeros((len(ids), len(q_V))), np.zeros((len(ids), len(q_V)), bool)
    np.add.at(target_NV, (rows, ids), np.exp(log_p))
    np.logical_or.at(head_NV, (rows, ids), log_p > -np.inf)
    tail_N1 = 1 - np.exp(log_p).sum(-1, keepdims=True)
    own_NV = np.where(head_NV, 0.0, q_V)
    own_NV *= tail_N1 / own_NV.sum(-1, keepdims=True)
    there = draw_log_p > -np.inf
    relative = np.where(there, own_NV[rows, draw_ids] / np.exp(np.where(there, draw_log_p, 0.0)), 0.0)
    mass = labels.draw_mass_BS.reshape(-1, 1).astype(float)
    np.add.at(target_NV, (rows, draw_ids), np.where(there, mass * (1 - control * relative), 0.0))
    return q_V - target_NV - control * own_NV


def bias_and_noise(said: Teacher, budget: float | None, control: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the mean over all tokens, and by how much the head's rounding may miss."""
    p_V = said.p_BSV[0, 0]
    q_V = p_V * np.exp(np.random.default_rng(3).normal(0, 0.5, len(p_V)))
    q_V /= q_V.sum()
    labels = round_trip(block_of(said.raw, said.vocab), said.vocab, budget).labels.at(1.0)
    grad_NV = gradient(labels, said.spread, q_V, control)
    scale, present = HeadScale(HEAD_BITS), np.concatenate(list(labels.log_prob_BSK)) > -np.inf
    stated = 7 / 240 * scale.step**4 * present.sum(-1).mean() + 1e-7
    return grad_NV.mean(0) - (q_V - p_V), grad_NV.std(0) / np.sqrt(len(grad_NV)), np.full(len(p_V), stated)


@pytest.mark.parametrize(("samples", "length"), [(1000, 100), (100_000, 1)])
@pytest.mark.parametrize(("exponent", "budget"), [(1.0, 14.0), (1.5, 14.0), (2.0, 14.0), (1.0, 6.0), (3.0, 9.0)])
def test_the_gradient_is_right_on_average_within_a_budget(
    exponent: float, budget: float, samples: int, length: int
) -> None:
    """Mean over 1e5 tokens with the same teacher and student, whose draws and dithers differ."""
    said = teacher(np.broadcast_to(zipf(40, exponent), (samples, length, 40)), 12, 28)
    for control in (0.0, 0.5, 1.0):
        bias, noise, stated = bias_and_noise(said, budget, control)
        assert (np.abs(bias) <= 4.5 * noise + stated).all(), (control, (np.abs(bias) / noise).max())


@pytest.mark.parametrize("control", [0.0, 1.0])
@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_the_gradient_is_right_on_average_where_a_token_has_a_threshold_of_its_own(
    exponent: float, control: float
) -> None:
    """The teacher has said few draws, there is no budget, and ids are few of many, so that places hardly collide."""
    said = teacher(np.broadcast_to(zipf(40, exponent), (1000, 100, 40)), 12, 16, spread=101)
    bias, noise, stated = bias_and_noise(said, None, control)
    assert (np.abs(bias) <= 4.5 * noise + stated).all(), (np.abs(bias) / noise).max()
