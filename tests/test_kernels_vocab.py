"""What losses and labels ask of logits, on every place, against float64."""

import pytest
import torch
from torch import Tensor

from tests.kernels import CPU, PLACES, SHIM, Place, assert_near, in_both_orders, ready, relative_error
from titan.ops import vocab

DTYPES = [torch.float32, torch.bfloat16]
PARTS = [(1, 0, 1), (7, 0, 7), (64, 0, 50), (65, 0, 65), (300, 0, 290), (1031, 0, 1031), (520, 1000, 1400),
         (48, 990, 1000), (33, 2000, 1000)]  # fmt: skip
"""Columns here, the first one's id, size of the vocabulary: odd, padded, a rank's part, a part of padding alone."""


def logits_of(tokens: int, columns: int, dtype: torch.dtype, place: Place, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, columns, generator=generator) * 3).to(place.device, dtype)


def ids_of(tokens: int, count: int, size: int, place: Place) -> Tensor:
    return torch.randint(0, size, (tokens, count), generator=torch.Generator().manual_seed(1)).to(place.device)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_statistics_are_those_of_the_float64_twin(place: Place, dtype: torch.dtype, temperature: float) -> None:
    ready(place)
    for columns, start, size in PARTS:
        for top_k in (0, 1, 9):
            logits, ids = logits_of(3, columns, dtype, place), ids_of(3, 5, size, place)
            arguments = (ids, top_k, start, size, temperature)
            got = place.ops.vocab_statistics(logits, *arguments)
            wanted = vocab.vocab_statistics_twin(logits.double(), *arguments)
            for column in range(4):  # each against its own size
                assert_near(got[0][:, column], wanted[0][:, column], torch.float32)
            assert_near(got[1], wanted[1], torch.float32)
            assert_near(got[2], wanted[2], torch.float32)
            assert torch.equal(got[3], wanted[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_the_top_is_in_order_with_ties_by_smaller_id(place: Place, dtype: torch.dtype) -> None:
    ready(place)
    levels = torch.tensor([-torch.inf, -0.0, 0.0, 1.0, 5.0], dtype=dtype)
    tied = levels[torch.randint(0, 5, (4, 700), generator=torch.Generator().manual_seed(3))].to(place.device)
    equal = torch.full((2, 700), 2.5, dtype=dtype, device=place.device)
    lost = torch.full((1, 700), -torch.inf, dtype=dtype, device=place.device)
    lost[0, 99] = 3.0
    for logits in (tied, equal, lost, -tied.abs()):
        none = torch.empty(len(logits), 0, dtype=torch.int64, device=place.device)
        *_, values, ids = place.ops.vocab_statistics(logits, none, 40, 0, 700, 1.0)
        wanted = logits.double().sort(dim=1, descending=True, stable=True)
        assert torch.equal(ids, wanted.indices[:, :40])
        assert torch.equal(values.double(), wanted.values[:, :40])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_the_gradient_is_that_of_the_float64_twin(place: Place, dtype: torch.dtype, temperature: float) -> None:
    """Some ids are named twice; their values add up."""
    ready(place)
    for columns, start, size in PARTS:
        logits, ids = logits_of(4, columns, dtype, place), ids_of(4, 6, size, place)
        ids[:, 1] = ids[:, 0]
        values = torch.randn(ids.shape).to(place.device)
        coefficient = torch.rand(4, 2).to(place.device)
        real = logits[:, : max(0, size - start)].double()
        norms = [real.logsumexp(1), (real / temperature).logsumexp(1)] if real.shape[1] else [torch.zeros(4)] * 2
        norm = torch.stack(norms, dim=1).float().to(place.device)
        exact = logits.double()
        place.ops.vocab_gradient_(logits, coefficient, norm, ids, values, start, size, temperature)
        vocab.vocab_gradient_twin_(
            exact, coefficient.double(), norm.double(), ids, values.double(), start, size, temperature
        )
        assert_near(logits, exact, dtype)


@pytest.mark.parametrize("place", PLACES)
def test_a_probability_near_one_keeps_its_digits_in_bfloat16(place: Place) -> None:
    """q - 1 is taken before rounding: q alone would round to 1, and the gradient to 0."""
    ready(place)
    logits = torch.zeros(1, 40, dtype=torch.bfloat16, device=place.device)
    logits[0, 3] = 10.0
    norm = logits.double().logsumexp(1)
    expected = (10.0 - norm).exp() - 1
    both = norm.float()[:, None].expand(1, 2)
    one = torch.ones(1, 2, device=place.device)
    ids = torch.tensor([[3]], device=place.device)
    place.ops.vocab_gradient_(logits, one, both, ids, torch.tensor([[-1.0]], device=place.device), 0, 40, 1.0)
    assert logits[0, 3].item() == pytest.approx(expected.item(), rel=1e-2)


@pytest.mark.parametrize("place", PLACES)
def test_huge_tiny_and_missing_logits(place: Place) -> None:
    ready(place)
    rows = torch.tensor([[1e4, -1e4, 9999.0, 0.0], [3e38, -3e38, 0.0, 1.0], [1e-30, 0.0, -1e-30, 1e-38],
                         [-torch.inf, 2.0, -torch.inf, 1.0]], device=place.device)  # fmt: skip
    none = torch.empty(4, 0, dtype=torch.int64, device=place.device)
    sums, *_, ids = place.ops.vocab_statistics(rows, none, 4, 0, 4, 1.0)
    wanted = vocab.vocab_statistics_twin(rows.double(), none, 4, 0, 4, 1.0)
    assert_near(sums[:, 1], wanted[0][:, 1], torch.float32)
    assert torch.equal(ids[[0, 1, 3]], wanted[3][[0, 1, 3]])
    rows[1, 2] = torch.nan
    assert place.ops.vocab_statistics(rows, none, 2, 0, 4, 1.0)[0][1, 1].isnan()


def head_and_threshold(logits: Tensor, top_k: int, place: Place) -> tuple[Tensor, Tensor]:
    """The first `top_k` ids, and the largest logit that is not among them."""
    none = torch.empty(len(logits), 0, dtype=torch.int64, device=place.device)
    *_, values, ids = place.ops.vocab_statistics(logits, none, top_k + 1, 0, logits.shape[1], 1.0)
    return ids[:, :top_k].contiguous(), values[:, top_k].contiguous()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_tail_weights_and_draws_are_the_twins(place: Place, dtype: torch.dtype, temperature: float) -> None:
    """Whole numbers of 2^-35: weights differ by the rounding of e^x, draws only where one falls on an edge."""
    ready(place)
    for columns, padding in [(2, 0), (40, 8), (257, 0), (1200, 100)]:
        size = columns - padding
        logits = logits_of(6, columns, dtype, place)
        head, threshold = head_and_threshold(logits[:, :size], 1, place)
        arguments = (head, threshold)
        blocks = place.ops.vocab_tail_blocks(logits, *arguments, 0, size, temperature)
        wanted = vocab.vocab_tail_blocks_twin(logits, *arguments, 0, size, temperature)
        assert relative_error(blocks, wanted) < 1e-6
        assert torch.equal(blocks, blocks.round())
        total = blocks.sum(dim=1, keepdim=True)
        targets = (torch.rand(6, 9, dtype=torch.float64).to(place.device) * total).floor()
        targets[:, 0], targets[:, 1], targets[:, 2], targets[:, 3] = -1, total[:, 0], 0, total[:, 0] - 1
        got = place.ops.vocab_tail_draws(logits, *arguments, blocks, targets, 0, size, temperature)
        twin = vocab.vocab_tail_draws_twin(logits, *arguments, blocks, targets, 0, size, temperature)
        assert (got[0][:, 4:] == twin[0][:, 4:]).float().mean() > 0.95
        assert (got[0][:, :2] == 0).all() and (got[1][:, :2] == 0).all()
        assert torch.equal(got[0][:, 2:3], twin[0][:, 2:3])
        assert torch.equal(got[1][:, 2:], logits.gather(1, got[0][:, 2:]).float())
        assert (got[0][:, 2:, None] != head[:, None, :]).all() and (got[0] < size).all()


@pytest.mark.parametrize("place", PLACES)
def test_equal_logits_at_the_threshold_are_told_apart_by_the_heads_ids(place: Place) -> None:
    ready(place)
    logits = torch.zeros(1, 600, device=place.device)
    head, threshold = head_and_threshold(logits, 5, place)
    blocks = place.ops.vocab_tail_blocks(logits, head, threshold, 0, 600, 1.0)
    assert blocks.sum() == 595 * 2.0**35
    targets = torch.arange(595, dtype=torch.float64, device=place.device)[None] * 2.0**35
    ids, _ = place.ops.vocab_tail_draws(logits, head, threshold, blocks, targets, 0, 600, 1.0)
    assert torch.equal(ids[0].cpu(), torch.arange(5, 600))


@pytest.mark.parametrize("place", PLACES)
def test_cutting_the_vocabulary_changes_no_weight_and_no_draw(place: Place) -> None:
    ready(place)
    logits = logits_of(5, 1024, torch.float32, place)
    head, threshold = head_and_threshold(logits, 4, place)
    total = place.ops.vocab_tail_blocks(logits, head, threshold, 0, 1000, 1.0).sum(dim=1)
    targets = (torch.rand(5, 12, dtype=torch.float64).to(place.device) * total[:, None]).floor()
    whole = None
    for parts in (1, 2, 4, 8):
        before, ids = torch.zeros_like(total), torch.zeros(5, 12, dtype=torch.int64, device=place.device)
        for index, part in enumerate(logits.chunk(parts, dim=1)):
            start = index * part.shape[1]
            blocks = place.ops.vocab_tail_blocks(part, head, threshold, start, 1000, 1.0)
            own = targets - before[:, None]
            ids += place.ops.vocab_tail_draws(part, head, threshold, blocks, own, start, 1000, 1.0)[0]
            before += blocks.sum(dim=1)
        assert torch.equal(before, total)
        whole = ids if whole is None else whole
        assert torch.equal(ids, whole)


@pytest.mark.parametrize("place", PLACES)
def test_draws_are_distributed_as_the_tail(place: Place) -> None:
    """Chi-square of 20,000 draws over 27 ids: above 60 about once in 10,000 times."""
    ready(place)
    row = logits_of(1, 30, torch.float32, place) / 2
    head, threshold = head_and_threshold(row, 3, place)
    blocks = place.ops.vocab_tail_blocks(row, head, threshold, 0, 30, 1.0)
    places = torch.arange(200, device=place.device)
    uniform = place.ops.counter_uniform(7, places, places % 11, 100).flatten()[None]
    targets = (uniform * blocks.sum()).floor()
    ids, _ = place.ops.vocab_tail_draws(row, head, threshold, blocks, targets, 0, 30, 1.0)
    expected = row[0].double().exp().scatter(0, head[0], 0.0)
    expected = expected / expected.sum() * ids.numel()
    counts = torch.bincount(ids[0], minlength=30).double()
    chosen = expected > 0
    assert counts[~chosen].sum() == 0
    assert ((counts - expected)[chosen].square() / expected[chosen]).sum() < 60


@pytest.mark.parametrize("place", PLACES)
def test_uniform_numbers_are_philox(place: Place) -> None:
    """Known answers of Random123's kat_vectors: philox4x32-10 of zeros starts 6627e8d5 e169c58d."""
    ready(place)
    samples = torch.tensor([0, 5, 2**40 + 3, 2**33], device=place.device)
    positions = torch.tensor([0, 7, 2047, 0], device=place.device)
    got = place.ops.counter_uniform(0, samples, positions, 3)
    assert got[0, 0].item() == ((0x6627E8D5 << 21) ^ (0xE169C58D >> 11)) * 2.0**-53
    for seed in (0, 1, 2**63 - 1, -5):
        wanted = vocab.counter_uniform_twin(seed, samples, positions, 3)
        assert torch.equal(place.ops.counter_uniform(seed, samples, positions, 3), wanted)
    seeds = torch.stack([place.ops.counter_uniform(seed, samples, positions, 3) for seed in range(4)])
    assert len(seeds.unique()) == seeds.numel()


@pytest.mark.parametrize("place", PLACES)
def test_nothing_gives_nothing(place: Place) -> None:
    ready(place)
    logits = torch.empty(0, 8, device=place.device)
    ids = torch.empty(0, 2, dtype=torch.int64, device=place.device)
    assert [x.shape[0] for x in place.ops.vocab_statistics(logits, ids, 3, 0, 8, 1.0)] == [0] * 4
    place.ops.vocab_gradient_(logits, *[torch.empty(0, 2, device=place.device)] * 2, ids, ids.float(), 0, 8, 1.0)
    assert place.ops.vocab_tail_blocks(logits, ids, logits[:, 0], 0, 8, 1.0).shape == (0, 1)
    assert place.ops.counter_uniform(1, ids[:, 0], ids[:, 0], 4).shape == (0, 4)


@pytest.mark.parametrize("place", PLACES)
def test_reading_takes_strided_logits_and_writing_refuses_them(place: Place) -> None:
    ready(place)
    logits = logits_of(20, 9, torch.float32, place).t()
    ids = ids_of(9, 2, 20, place)
    for got, wanted in zip(
        place.ops.vocab_statistics(logits, ids, 3, 0, 20, 1.0),
        place.ops.vocab_statistics(logits.contiguous(), ids, 3, 0, 20, 1.0),
        strict=True,
    ):
        assert torch.equal(got, wanted)
    two = torch.ones(9, 2, device=place.device)
    with pytest.raises(RuntimeError, match="vocab_gradient_: logits must be contiguous"):
        place.ops.vocab_gradient_(logits, two, two, ids, two, 0, 20, 1.0)


def test_the_order_of_threads_changes_nothing() -> None:
    ready(SHIM)
    logits, ids = logits_of(2, 1100, torch.float32, SHIM), ids_of(2, 5, 1100, SHIM)
    two, values = torch.full((2, 2), 6.0), torch.randn(2, 5)

    def run() -> list[Tensor]:
        gradient = logits.clone()
        SHIM.ops.vocab_gradient_(gradient, two, two, ids, values, 0, 1100, 2.0)
        return [*SHIM.ops.vocab_statistics(logits, ids, 7, 0, 1100, 2.0), gradient]

    for forward, backward in zip(*in_both_orders(run), strict=True):
        assert torch.equal(forward, backward)


@pytest.mark.parametrize("place", PLACES)
def test_they_pass_opcheck_and_compile_whole(place: Place) -> None:
    ready(place)
    logits, ids = logits_of(3, 20, torch.float32, place), ids_of(3, 2, 20, place)
    two = torch.full((3, 2), 4.0, device=place.device)
    ops = place.ops
    torch.library.opcheck(ops.vocab_statistics.default, (logits, ids, 2, 0, 20, 1.0))
    torch.library.opcheck(ops.vocab_gradient_.default, (logits.clone(), two, two, ids, two, 0, 20, 2.0))
    head, threshold = head_and_threshold(logits, 2, place)
    blocks = ops.vocab_tail_blocks(logits, head, threshold, 0, 20, 1.0)
    torch.library.opcheck(ops.vocab_tail_blocks.default, (logits, head, threshold, 0, 20, 1.0))
    targets = blocks.new_zeros(3, 2)
    torch.library.opcheck(ops.vocab_tail_draws.default, (logits, head, threshold, blocks, targets, 0, 20, 1.0))
    torch.library.opcheck(ops.counter_uniform.default, (1, ids[:, 0].clone(), ids[:, 1].clone(), 2))

    def both(logits: Tensor) -> Tensor:
        sums, picked, _, _ = ops.vocab_statistics(logits, ids, 2, 0, 20, 1.0)
        gradient = logits.clone()
        ops.vocab_gradient_(gradient, two, two, ids, picked, 0, 20, 1.0)
        return gradient * sums[:, :1]

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), both(logits))


@pytest.mark.parametrize("place", PLACES)
def test_bad_input_is_named(place: Place) -> None:
    ready(place)
    logits, ids = logits_of(3, 20, torch.float32, place), ids_of(3, 2, 20, place)
    two = torch.ones(3, 2, device=place.device)
    one = torch.ones(3, device=place.device)
    double = torch.ones(3, 1, device=place.device, dtype=torch.float64)
    statistics, gradient = place.ops.vocab_statistics, place.ops.vocab_gradient_
    blocks, draws, uniform = place.ops.vocab_tail_blocks, place.ops.vocab_tail_draws, place.ops.counter_uniform
    rows = [
        (statistics, (logits.double(), ids, 0, 0, 20, 1.0), "logits must be float32 or bfloat16, got float64"),
        (statistics, (logits[0], ids, 0, 0, 20, 1.0), r"logits must be \[tokens, columns\], got \[20\]"),
        (statistics, (logits, ids, 0, -1, 20, 1.0), "start must be at least 0, got -1"),
        (statistics, (logits, ids, 0, 0, 0, 1.0), "size must be at least 1, got 0"),
        (statistics, (logits, ids.int(), 0, 0, 20, 1.0), "ids must be int64, got int32"),
        (statistics, (logits, ids[1:], 0, 0, 20, 1.0), r"ids must be \[3, any\], got \[2, 2\]"),
        (statistics, (logits, ids, -1, 0, 20, 1.0), "top_k must be from 0 to"),
        (statistics, (logits, ids, 2**21, 0, 20, 1.0), "top_k must be from 0 to"),
        (statistics, (logits, ids, 0, 0, 20, 0.0), "temperature must be above 0"),
        (gradient, (logits, two[1:], two, ids, two, 0, 20, 1.0), r"coefficient must be \[3, 2\], got \[2, 2\]"),
        (gradient, (logits, two, two.double(), ids, two, 0, 20, 1.0), "log_sum_exp must be float32, got float64"),
        (gradient, (logits, two, two, ids, one[:, None], 0, 20, 1.0), r"values must be \[3, 2\], got \[3, 1\]"),
        (blocks, (logits, ids, two, 0, 20, 1.0), r"threshold must be \[3\], got \[3, 2\]"),
        (draws, (logits, ids, one, two.double(), double, 0, 20, 1.0), r"blocks must be \[3, 1\], got \[3, 2\]"),
        (draws, (logits, ids, one, double, two, 0, 20, 1.0), "targets must be float64, got float32"),
        (draws, (logits, ids, one, double, double[1:], 0, 20, 1.0), r"targets must be \[3, draws\], got \[2, 1\]"),
        (uniform, (1, ids, ids, 2), r"sample must be \[tokens\], got \[3, 2\]"),
        (uniform, (1, ids[:, 0], ids[1:, 0], 2), r"position must be \[3\], got \[2\]"),
        (uniform, (1, ids[:, 0], ids[:, 0], -1), "draws must be at least 0, got -1"),
    ]  # fmt: skip
    if place.device == "cpu":  # on a GPU nobody looks, and the loss is NaN
        rows.append((statistics, (logits, ids + 20, 0, 0, 20, 1.0), r"ids must be in \[0, 20\), got"))
    for operation, arguments, message in rows:
        with pytest.raises(RuntimeError, match=message):
            operation(*arguments)


def test_the_cpu_kernel_takes_more_of_the_top_than_there_are_columns() -> None:
    ready(CPU)
    logits = logits_of(2, 5, torch.float32, CPU)
    none = torch.empty(2, 0, dtype=torch.int64)
    *_, values, ids = CPU.ops.vocab_statistics(logits, none, 8, 0, 5, 1.0)
    assert (values[:, 5:] == -torch.inf).all() and (ids[:, 5:] == 0).all()
