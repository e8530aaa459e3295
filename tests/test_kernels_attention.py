"""Attention on the host shim (and on a GPU where there is one) against float64."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.kernels import CUDA_PLACES, SHIM, Place, assert_near, in_both_orders, ready
from titan.ops.attention import Visibility, attention, attention_twin


@dataclass(frozen=True)
class Case:
    """Sizes of one attention, and who sees whom."""

    queries: int
    keys: int
    width: int
    heads: int = 2
    key_heads: int = 1
    batch: int = 1
    causal: bool = True
    segments: bool = False


SIMT = [
    Case(1, 1, 4), Case(7, 7, 16, heads=4, key_heads=2, batch=2), Case(33, 33, 36), Case(17, 40, 20, causal=False),
    Case(5, 38, 32), Case(40, 17, 12), Case(35, 35, 24, segments=True, batch=2), Case(3, 2, 256, causal=False),
]  # fmt: skip
"""Widths without tensor cores: one key, odd sizes, memory before the queries, queries that see nothing, segments."""
MMA = [
    Case(1, 1, 64), Case(64, 64, 64, heads=1), Case(65, 65, 64), Case(63, 130, 64, causal=False), Case(7, 71, 64),
    Case(70, 9, 64, heads=1), Case(66, 66, 64, segments=True, batch=2, heads=4, key_heads=2), Case(67, 67, 128),
    Case(33, 97, 128, heads=1), Case(31, 31, 128, causal=False, segments=True, batch=2),
]  # fmt: skip


def inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Visibility, Tensor]:
    """Query, key, value, who sees whom, and a gradient; the value is not contiguous."""
    generator = torch.Generator().manual_seed(case.queries * 1000 + case.keys)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    query = random(case.queries, case.batch, case.heads, case.width)
    key = random(case.keys, case.batch, case.key_heads, case.width)
    value = random(case.keys, case.key_heads, case.batch, case.width).transpose(1, 2)
    visibility = Visibility(case.causal)
    if case.segments:
        keys = torch.randint(0, 3, (case.batch, case.keys), generator=generator).sort(dim=1).values
        queries = keys[:, -case.queries :].clone()
        queries[:, case.queries // 2] = 9  # sees nothing
        visibility = Visibility(case.causal, queries.to(device, torch.int32), keys.to(device, torch.int32))
    return [query, key, value], visibility, random(case.queries, case.batch, case.heads, case.width)


def check(place: Place, case: Case, dtype: torch.dtype, magnitude: float = 1.0) -> None:
    tensors, visibility, grad = inputs(case, dtype, place.device)
    tensors[0] = tensors[0] * magnitude
    tensors = [x.requires_grad_() for x in tensors]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    segments = visibility.query_segments, visibility.key_segments
    out, log_sum_exp = place.ops.attention(*tensors, *segments, visibility.causal, case.width**-0.5)
    wanted, wanted_sum = attention_twin(*exact, visibility)
    assert_near(out, wanted, dtype)
    assert_near(log_sum_exp, wanted_sum, torch.float32)
    gradients = torch.autograd.grad(out, tensors, grad)
    wanted_gradients = torch.autograd.grad(wanted, exact, grad.double())
    scale = max(gradient.abs().max() for gradient in wanted_gradients)  # of one token alone the query's is 0
    for got, expected in zip(gradients, wanted_gradients, strict=True):
        assert got.shape == expected.shape
        error = (got.double() - expected).abs().max() / max(expected.abs().max(), scale * 1e-2, 1e-30)
        assert error <= {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype], error


@pytest.mark.parametrize("case", SIMT, ids=str)
@pytest.mark.parametrize("place", CUDA_PLACES)
def test_any_width_and_dtype_is_the_float64_twin_forward_and_backward(place: Place, case: Case) -> None:
    ready(place)
    check(place, case, torch.float32)
    check(place, case, torch.bfloat16)


@pytest.mark.parametrize("case", MMA, ids=str)
@pytest.mark.parametrize("place", CUDA_PLACES)
def test_tensor_cores_give_the_float64_twin_forward_and_backward(place: Place, case: Case) -> None:
    ready(place)
    check(place, case, torch.bfloat16)


@pytest.mark.parametrize("place", CUDA_PLACES)
def test_huge_and_tiny_scores_stay_right(place: Place) -> None:
    ready(place)
    check(place, Case(9, 9, 16), torch.float32, magnitude=1e-20)
    check(place, Case(20, 20, 64), torch.bfloat16, magnitude=1e-10)
    tensors, _, _ = inputs(Case(40, 40, 64, causal=False), torch.bfloat16, place.device)
    out, log_sum_exp = place.ops.attention(tensors[0] * 1e4, *tensors[1:], None, None, False, 1.0)
    wanted, wanted_sum = attention_twin(
        tensors[0].double() * 1e4 * 8, *(x.double() for x in tensors[1:]), Visibility(False)
    )
    assert_near(out, wanted, torch.bfloat16)
    assert_near(log_sum_exp, wanted_sum, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_order_of_threads_changes_nothing(dtype: torch.dtype) -> None:
    """A missing barrier shows when the threads run from last to first, or when copies arrive early."""
    ready(SHIM)
    tensors, _, grad = inputs(Case(140, 140, 64), dtype, "cpu")
    tensors = [x.requires_grad_() for x in tensors]

    def run() -> list[Tensor]:
        out, log_sum_exp = SHIM.ops.attention(*tensors, None, None, True, 0.125)
        return [out, log_sum_exp, *torch.autograd.grad(out, tensors, grad)]

    for forward, backward in zip(*in_both_orders(run), strict=True):
        assert torch.equal(forward, backward)


@pytest.mark.parametrize("place", CUDA_PLACES)
def test_attention_passes_opcheck_and_compiles_whole(place: Place) -> None:
    ready(place)
    tensors, _, _ = inputs(Case(5, 5, 8), torch.float32, place.device)
    tensors = [x.contiguous().requires_grad_() for x in tensors]
    arguments = (*tensors, None, None, True, 0.5)
    torch.library.opcheck(place.ops.attention.default, arguments)
    compiled = torch.compile(lambda *x: place.ops.attention(*x)[0] * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), place.ops.attention(*arguments)[0] * 2)


def test_twin_passes_gradcheck() -> None:
    tensors, visibility, _ = inputs(Case(5, 7, 4, segments=True), torch.float64, "cpu")
    tensors = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(lambda *x: attention_twin(*x, visibility)[0], tensors)


@pytest.mark.parametrize("case", SIMT + MMA[:5], ids=str)
def test_what_the_cpu_uses_is_the_twin_too(case: Case) -> None:
    tensors, visibility, grad = inputs(case, torch.float32, "cpu")
    tensors = [x.requires_grad_() for x in tensors]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    out, wanted = attention(*tensors, visibility), attention_twin(*exact, visibility)[0].flatten(2)
    assert_near(out, wanted, torch.float32)
    for got, expected in zip(
        torch.autograd.grad(out, tensors, grad.flatten(2)),
        torch.autograd.grad(wanted, exact, grad.flatten(2).double()),
        strict=True,
    ):
        assert (got - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("place", CUDA_PLACES)
def test_bad_input_is_named(place: Place) -> None:
    ready(place)
    query, key = torch.randn(4, 2, 4, 8, device=place.device), torch.randn(4, 2, 2, 8, device=place.device)
    segments = torch.zeros(2, 4, dtype=torch.int32, device=place.device)

    def call(message: str, *arguments: object) -> None:
        with pytest.raises(RuntimeError, match=f"attention: {message}"):
            place.ops.attention(*arguments, True, 1.0)

    call(r"query must be \[S, B, heads, D\], got \[4, 2, 32\]", query.flatten(2), key, key, None, None)
    call(r"value must be \[4, 2, 2, 8\], got \[3, 2, 2, 8\]", query, key, key[1:], None, None)
    call("key must be float32, got bfloat16", query, key.bfloat16(), key, None, None)
    call("query must be float32 or bfloat16, got float64", query.double(), key, key, None, None)
    call("query must have a multiple of the key's 2 heads, got 3", query[:, :, :3], key, key, None, None)
    call("query must have heads of a width", query[..., :6], key[..., :6], key[..., :6], None, None)
    call("query_segments and key_segments belong together", query, key, key, segments, None)
    call(r"key_segments must be \[2, 4\], got \[2, 3\]", query, key, key, segments, segments[:, 1:])
    call("query_segments must be int32, got int64", query, key, key, segments.long(), segments)


@pytest.mark.parametrize("place", CUDA_PLACES)
def test_nothing_to_look_at_gives_zeros(place: Place) -> None:
    ready(place)
    query = torch.randn(3, 1, 1, 64, device=place.device, dtype=torch.bfloat16, requires_grad=True)
    nothing = torch.randn(0, 1, 1, 64, device=place.device, dtype=torch.bfloat16)
    out, log_sum_exp = place.ops.attention(query, nothing, nothing, None, None, False, 1.0)
    assert (out == 0).all() and (log_sum_exp == -torch.inf).all()
    out.sum().backward()
    assert query.grad is not None and (query.grad == 0).all()
    empty = torch.randn(0, 1, 1, 64, device=place.device)
    assert place.ops.attention(empty, query.float(), query.float(), None, None, True, 1.0)[0].shape == (0, 1, 1, 64)
