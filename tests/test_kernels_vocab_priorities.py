"""Draws from the tail by priority, on every place, against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import PLACES, SHIM, Place, in_both_orders, ready
from titan.ops import vocab

DTYPES = [torch.float32, torch.bfloat16]
PARTS = [(1, 0, 1), (7, 0, 7), (64, 0, 50), (65, 0, 65), (128, 0, 128), (300, 0, 290), (4099, 0, 4099),
         (4800, 0, 4800), (520, 1000, 1400), (5001, 70_000, 74_000), (48, 990, 1000), (33, 2000, 1000)]  # fmt: skip
"""Columns here, the first one's id, size of the vocabulary: odd, padded, a rank's part, a part of padding alone."""
TWIN = Place("twin", "cpu")
PLACES_AND_TWIN = [*PLACES, pytest.param(TWIN, id="twin")]


def operation_of(place: Place) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    if place is TWIN:
        return vocab.vocab_tail_priorities_twin
    operation: Callable[..., tuple[Tensor, Tensor, Tensor]] = ready(place).ops.vocab_tail_priorities
    return operation


def logits_of(tokens: int, columns: int, dtype: torch.dtype, place: Place, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, columns, generator=generator) * 3).to(place.device, dtype)


def turns_of(tokens: int, place: Place, seed: int = 0) -> Tensor:
    turns = torch.randint(0, 1 << 32, (tokens, 4), generator=torch.Generator().manual_seed(seed))
    turns[:, 0] |= 1
    turns[:, 2] |= 1
    return turns.to(place.device)


def head_and_threshold(logits: Tensor, top_k: int, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Ids of the `top_k` largest, the smaller of equals, and the largest logit that is not among them."""
    real = logits[:, : max(0, size - start)].float()
    if not real.shape[1]:
        return torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device), logits.new_zeros(
            len(logits)
        ).float()
    top = real.sort(dim=1, descending=True, stable=True)
    top_k = min(top_k, real.shape[1] - 1)
    return top.indices[:, :top_k] + start, top.values[:, top_k].contiguous()


def brute_force(
    logits: Tensor, head: Tensor, threshold: Tensor, turns: Tensor, start: int, size: int, temperature: float
) -> list[dict[int, float]]:
    """Priorities above 0 of each token's ids, one by one in Python's numbers."""
    bits = len(bin(size - 1)) - 2 if size > 1 else 0
    rows = zip(logits.tolist(), head.tolist(), threshold.tolist(), turns.tolist(), strict=True)
    found = []
    for row, taken, top, (a, b, c, d) in rows:
        powers = ((torch.tensor(row, dtype=torch.float64) - top) / temperature).exp().tolist()
        priorities = {}
        for column, logit in enumerate(row):
            v = start + column
            if v >= size or logit > top or v in taken:
                continue
            place = (a * v + b) % 2**bits
            place = c * (place ^ place >> (bits + 1) // 2) % 2**bits
            place ^= place >> (bits + 1) // 2
            uniform = (place + (((c * v + d) % 2**32) // 2**8 + 0.5) / 2**24) / 2**bits
            if powers[column] > 0:
                priorities[v] = powers[column] / uniform
        found.append(priorities)
    return found


def assert_are_the_largest(got: tuple[Tensor, Tensor, Tensor], logits: Tensor, start: int, wanted: list[Any]) -> None:
    """Ids as those of the brute force unless their priorities are within 1e-5 of each other."""
    for ids, drawn, values, row, exact in zip(*(item.tolist() for item in (*got, logits)), wanted, strict=True):
        here = min(len(ids), len(exact))
        assert len(set(ids[:here])) == here
        assert (ids[here:], drawn[here:], values[here:]) == (
            [0] * (len(ids) - here), [-float("inf")] * (len(ids) - here), [0.0] * (len(ids) - here),
        )  # fmt: skip
        best = sorted(exact.values(), reverse=True)
        for place in range(here):
            assert drawn[place] == row[ids[place] - start]
            assert values[place] == pytest.approx(exact[ids[place]], rel=1e-5)
            assert values[place] == pytest.approx(best[place], rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES_AND_TWIN)
def test_the_largest_priorities_are_those_of_the_brute_force(
    place: Place, dtype: torch.dtype, temperature: float
) -> None:
    """Also where fewer entries are left than asked for, and of none."""
    operation = operation_of(place)
    for columns, start, size in PARTS:
        logits, turns = logits_of(3, columns, dtype, place), turns_of(3, place)
        head, threshold = head_and_threshold(logits, 4, start, size)
        wanted = brute_force(logits, head, threshold, turns, start, size, temperature)
        for count in (0, 1, 20):
            arguments = (logits, head, threshold, turns, count, start, size, temperature)
            got = operation(*arguments)
            assert [item.dtype for item in got] == [torch.int64, torch.float32, torch.float32]
            assert_are_the_largest(got, logits, start, wanted)


@pytest.mark.parametrize("place", PLACES_AND_TWIN)
def test_equal_logits_at_the_threshold_are_told_apart_by_the_heads_ids(place: Place) -> None:
    operation = operation_of(place)
    logits, turns = torch.zeros(2, 600, device=place.device), turns_of(2, place)
    head = torch.tensor([[0, 7, 300, 301, 599], [1, 2, 3, 4, 5]], device=place.device)
    threshold = torch.zeros(2, device=place.device)
    got = operation(logits, head, threshold, turns, 600, 0, 600, 1.0)
    assert_are_the_largest(got, logits, 0, brute_force(logits, head, threshold, turns, 0, 600, 1.0))
    for ids, taken in zip(got[0].tolist(), head.tolist(), strict=True):
        assert sorted(ids[:595]) == sorted(set(range(600)) - set(taken))


@pytest.mark.parametrize("place", PLACES_AND_TWIN)
def test_the_least_number_is_half_a_step_and_the_largest_below_one(place: Place) -> None:
    """Places and fractions of 0, 1 and the most."""
    operation = operation_of(place)
    most = (1 << 32) - 1
    turns = torch.tensor([[1, 0, 1, 0], [1, most - 4, 256, 0], [1, 63, 1, most], [most] * 4], device=place.device)
    logits = logits_of(4, 64, torch.float32, place)
    head, threshold = head_and_threshold(logits, 0, 0, 64)
    got = operation(logits, head, threshold, turns, 64, 0, 64, 1.0)
    assert_are_the_largest(got, logits, 0, brute_force(logits, head, threshold, turns, 0, 64, 1.0))
    assert got[2].isfinite().all()


@pytest.mark.parametrize("place", PLACES_AND_TWIN)
def test_equal_priorities_go_by_smaller_id(place: Place) -> None:
    """a and c of 0 give every id the same number."""
    operation = operation_of(place)
    logits = torch.zeros(1, 500, device=place.device)
    logits[0, 250:] = 1.0
    turns = torch.tensor([[0, 77, 0, 99]], device=place.device)
    head, threshold = head_and_threshold(logits, 2, 0, 500)
    ids, *_ = operation(logits, head, threshold, turns, 300, 0, 500, 1.0)
    assert ids[0].tolist() == [*range(252, 500), *range(52)]


@pytest.mark.parametrize("place", PLACES_AND_TWIN)
def test_logits_far_below_and_missing_ones_are_never_drawn(place: Place) -> None:
    operation = operation_of(place)
    logits = torch.tensor([[5.0, 2.0, -1e4, -torch.inf, torch.nan, 1.0, -110.0, -80.0]], device=place.device)
    turns, threshold = turns_of(1, place), torch.tensor([2.0], device=place.device)
    head = torch.tensor([[0]], device=place.device)
    ids, drawn, values = operation(logits, head, threshold, turns, 6, 0, 8, 1.0)
    assert sorted(ids[0].tolist()) == [0, 0, 0, 1, 5, 7]
    assert drawn[0, 2:].tolist() == [-80.0, *[-torch.inf] * 3] and values[0, 3:].tolist() == [0.0] * 3
    for lost in (-torch.inf, torch.nan):
        threshold.fill_(lost)
        ids, drawn, values = operation(logits, head, threshold, turns, 3, 0, 8, 1.0)
        assert not ids.any() and not values.any() and (drawn == -torch.inf).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES_AND_TWIN)
def test_cutting_the_vocabulary_changes_no_bit(place: Place, dtype: torch.dtype, temperature: float) -> None:
    operation = operation_of(place)
    logits, turns, size = logits_of(4, 4500, dtype, place), turns_of(4, place), 4417
    head, threshold = head_and_threshold(logits, 4, 0, size)
    whole = operation(logits, head, threshold, turns, 30, 0, size, temperature)
    assert (whole[0] < size).all()
    for cuts in ([2250, 2250], [1, 63, 999, 3437], [4000, 417, 83], [2111, 2389]):
        start, parts = 0, []
        for part in logits.split(cuts, dim=1):
            arguments = (part, head, threshold, turns, 30, start, size, temperature)
            parts.append(operation(*arguments))
            start += part.shape[1]
        ids, drawn, values = (torch.cat(items, dim=1) for items in zip(*parts, strict=True))
        order = values.sort(dim=1, descending=True, stable=True).indices[:, :30]
        assert torch.equal(ids.gather(1, order), whole[0])
        assert torch.equal(drawn.gather(1, order), whole[1])
        assert torch.equal(values.gather(1, order), whole[2])


@pytest.mark.parametrize("place", PLACES_AND_TWIN)
def test_an_entry_is_drawn_as_often_as_its_probability_says(place: Place) -> None:
    """Priority above L has probability p / L, also where that is far below 2^-w: of that many turns, within 5 sigma.

    Twelve entries and w = 6: the least one's share is 1 / 40 of 2^-w. Its upper bits r must be 0, and f small.
    """
    operation = operation_of(place)
    turns_each, size, level = 40_000, 64, 4.0
    logits = torch.full((1, size), -torch.inf)
    logits[0, 3:15] = torch.linspace(0.0, -6.3, 12)
    shares = (logits[0].double().exp() / level).clamp_max(1.0)
    turns = torch.randint(0, 1 << 32, (turns_each, 4), generator=torch.Generator().manual_seed(5))
    turns[:, 0], turns[:, 2] = 0x9E3779B1, 0x85EBCA6B
    rows = logits.expand(turns_each, size).to(place.device)
    none = torch.empty(turns_each, 0, dtype=torch.int64, device=place.device)
    threshold = torch.zeros(turns_each, device=place.device)
    if place is SHIM:  # slow
        turns_each = 2_000
        rows, none, threshold, turns = rows[:turns_each], none[:turns_each], threshold[:turns_each], turns[:turns_each]
    ids, _, values = operation(rows, none, threshold, turns.to(place.device), 12, 0, size, 1.0)
    counts = torch.bincount(ids[values > level].cpu(), minlength=size).double()
    sigma = (turns_each * shares * (1 - shares)).sqrt()
    assert shares[14] < 2.0**-6 / 30
    assert counts.sum() > 0 and ((counts - turns_each * shares).abs() <= 5 * sigma + 1e-9).all()


@pytest.mark.parametrize("place", PLACES_AND_TWIN)
def test_nothing_gives_nothing_and_strides_are_read(place: Place) -> None:
    operation = operation_of(place)
    none = torch.empty(0, 2, dtype=torch.int64, device=place.device)
    logits = torch.empty(0, 8, device=place.device)
    nothing = operation(logits, none, logits[:, 0], turns_of(0, place), 3, 0, 8, 1.0)
    assert [item.shape for item in nothing] == [(0, 3)] * 3
    empty = torch.empty(2, 0, device=place.device)
    threshold = torch.zeros(2, device=place.device)
    ids, drawn, values = operation(empty, none.new_empty(2, 0), threshold, turns_of(2, place), 3, 0, 8, 1.0)
    assert not ids.any() and not values.any() and (drawn == -torch.inf).all()
    strided, turns = logits_of(20, 9, torch.float32, place).t(), turns_of(9, place)
    head, threshold = head_and_threshold(strided, 2, 0, 20)
    wanted = operation(strided.contiguous(), head, threshold, turns, 5, 0, 20, 1.0)
    turns = turns.t().contiguous().t()
    for got, item in zip(operation(strided, head, threshold, turns, 5, 0, 20, 1.0), wanted, strict=True):
        assert torch.equal(got, item)


def test_the_order_of_threads_changes_nothing() -> None:
    ready(SHIM)
    logits, turns = logits_of(2, 1100, torch.float32, SHIM), turns_of(2, SHIM)
    head, threshold = head_and_threshold(logits, 3, 0, 1100)
    run: Callable[[], list[Tensor]] = lambda: list(  # noqa: E731
        SHIM.ops.vocab_tail_priorities(logits, head, threshold, turns, 9, 0, 1100, 2.0)
    )
    for forward, backward in zip(*in_both_orders(run), strict=True):
        assert torch.equal(forward, backward)


@pytest.mark.parametrize("place", PLACES)
def test_it_passes_opcheck_and_compiles_whole(place: Place) -> None:
    ready(place)
    logits, turns = logits_of(3, 20, torch.float32, place), turns_of(3, place)
    head, threshold = head_and_threshold(logits, 2, 0, 20)
    operation = place.ops.vocab_tail_priorities
    torch.library.opcheck(operation.default, (logits, head, threshold, turns, 4, 0, 20, 1.0))

    def drawn(logits: Tensor) -> Tensor:
        ids, values, priorities = operation(logits, head, threshold, turns, 4, 0, 20, 1.0)
        return ids + values + priorities

    compiled = torch.compile(drawn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), drawn(logits))


@pytest.mark.parametrize("place", PLACES)
def test_bad_input_is_named(place: Place) -> None:
    ready(place)
    logits, turns = logits_of(3, 20, torch.float32, place), turns_of(3, place)
    ids, one = turns[:, :2] % 20, torch.ones(3, device=place.device)
    rows = [
        ((logits.double(), ids, one, turns, 2, 0, 20, 1.0), "logits must be float32 or bfloat16, got float64"),
        ((logits, ids.int(), one, turns, 2, 0, 20, 1.0), "head_ids must be int64, got int32"),
        ((logits, ids[1:], one, turns, 2, 0, 20, 1.0), r"head_ids must be \[3, any\], got \[2, 2\]"),
        ((logits, ids, one.double(), turns, 2, 0, 20, 1.0), "threshold must be float32, got float64"),
        ((logits, ids, one[1:], turns, 2, 0, 20, 1.0), r"threshold must be \[3\], got \[2\]"),
        ((logits, ids, one, turns.int(), 2, 0, 20, 1.0), "turns must be int64, got int32"),
        ((logits, ids, one, turns[:, :3], 2, 0, 20, 1.0), r"turns must be \[3, 4\], got \[3, 3\]"),
        ((logits, ids, one, turns, -1, 0, 20, 1.0), "count must be from 0 to"),
        ((logits, ids, one, turns, 2**21, 0, 20, 1.0), "count must be from 0 to"),
        ((logits, ids, one, turns, 2, -1, 20, 1.0), "start must be at least 0, got -1"),
        ((logits, ids, one, turns, 2, 0, 0, 1.0), "size must be at least 1, got 0"),
        ((logits, ids, one, turns, 2, 0, 2**31, 1.0), r"size must be below 2\^31, got 2147483648"),
        ((logits, ids, one, turns, 2, 0, 20, 0.0), "temperature must be above 0"),
    ]
    if place.device == "cpu":
        rows.append(((logits, ids + 20, one, turns, 2, 0, 20, 1.0), r"head_ids must be in \[0, 20\), got"))
    for arguments, message in rows:
        with pytest.raises(RuntimeError, match=f"vocab_tail_priorities: {message}"):
            place.ops.vocab_tail_priorities(*arguments)
