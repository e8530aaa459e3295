"""RMSNorm and LayerNorm against float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import CPU, PLACES, SHIM, Place, assert_near, in_both_orders, ready
from titan.ops.norm import layer_norm_twin, rms_norm_twin

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16]
OPERATIONS = ["rms_norm", "layer_norm"]
# Widths around the packs of 4 and 8, around the longest row of a single warp (1024), and too wide to be kept in the
# shared memory of a block.
SHAPES = [(1, 1), (3, 3), (2, 3, 8), (5, 12), (7, 257), (130, 64), (0, 8), (2, 0, 3), (3, 1024), (3, 1032), (2, 1031)]
SHAPES += [(1, 24600), (4,)]
MANY_ROWS = [(2051, 8), (515, 1028)]  # more than the grid has warps, and than it has blocks


def random(generator: torch.Generator, shape: tuple[int, ...], place: Place, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator).to(place.device, dtype)


def parameters(operation: str, width: int, place: Place, dtype: torch.dtype, seed: int = 3) -> list[Tensor]:
    """Weight, and bias where there is one."""
    generator = torch.Generator().manual_seed(seed)
    count = 1 if operation == "rms_norm" else 2
    return [random(generator, (width,), place, dtype) for _ in range(count)]


def ours(place: Place, operation: str, x: Tensor, residual: Tensor | None, weights: list[Tensor]) -> tuple[Tensor, ...]:
    y, hidden, *_ = getattr(place.ops, operation)(x, residual, *weights, EPS)
    return (y,) if residual is None else (y, hidden)


def twin(operation: str, x: Tensor, residual: Tensor | None, weights: list[Tensor]) -> tuple[Tensor, ...]:
    function: Callable[..., Tensor] = rms_norm_twin if operation == "rms_norm" else layer_norm_twin
    hidden = x if residual is None else x + residual
    return (function(hidden, *weights, EPS),) if residual is None else (function(hidden, *weights, EPS), hidden)


def check(
    place: Place, operation: str, x: Tensor, residual: Tensor | None = None, used: tuple[int, ...] = (0, 1)
) -> None:
    """Values, and gradients of a loss that uses some of the outputs (y, hidden), against the twin in float64."""
    weights = parameters(operation, x.shape[-1], place, x.dtype)
    inputs = [x, *([] if residual is None else [residual]), *weights]
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    first = 1 if residual is None else 2

    def arguments(tensors: list[Tensor]) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        return tensors[0], None if residual is None else tensors[1], tensors[first:]

    got, expected = ours(place, operation, *arguments(leaves)), twin(operation, *arguments(exact))
    for mine, right in zip(got, expected, strict=True):
        assert mine.dtype == x.dtype and mine.is_contiguous()
        assert_near(mine, right, x.dtype)
    generator = torch.Generator().manual_seed(1)
    grads = [random(generator, tuple(y.shape), place, x.dtype) for y in got]
    used = tuple(i for i in used if i < len(got))
    torch.autograd.backward([got[i] for i in used], [grads[i] for i in used])
    torch.autograd.backward([expected[i] for i in used], [grads[i].double() for i in used])
    for leaf, right in zip(leaves, exact, strict=True):
        assert (leaf.grad is None) == (right.grad is None)
        if leaf.grad is not None and right.grad is not None:
            assert leaf.grad.dtype == x.dtype
            assert_near(leaf.grad, right.grad, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_a_norm_is_its_float64_twin_at_every_size(place: Place, operation: str, dtype: torch.dtype) -> None:
    ready(place)
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        x, residual = (random(generator, shape, place, dtype) for _ in range(2))
        if operation == "layer_norm" and shape[-1] == 1:  # nothing but the bias is left, and gradients are exactly 0
            weight, bias = parameters(operation, 1, place, dtype)
            assert torch.equal(ours(place, operation, x, None, [weight, bias])[0], bias.expand(shape))
            continue
        check(place, operation, x, residual)
        if shape[-1] > 3:  # of a shorter row the gradient cancels, and what float32 leaves of it is rounding
            check(place, operation, x)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_a_grid_strides_over_more_rows_than_it_has_teams(place: Place, operation: str) -> None:
    ready(place)
    generator = torch.Generator().manual_seed(0)
    for shape in MANY_ROWS:
        check(place, operation, *(random(generator, shape, place, torch.float32) for _ in range(2)))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_order_of_a_blocks_threads_changes_nothing(operation: str) -> None:
    ready(SHIM)
    generator = torch.Generator().manual_seed(0)
    for shape in [(600, 1028), (9, 20)]:  # the first has blocks with two rows
        x, residual, grad = (random(generator, shape, SHIM, torch.float32) for _ in range(3))
        weights = parameters(operation, shape[-1], SHIM, torch.float32)

        def run(
            x: Tensor = x, residual: Tensor = residual, grad: Tensor = grad, weights: list[Tensor] = weights
        ) -> tuple[Tensor, ...]:
            leaf, *leaves = (tensor.detach().requires_grad_() for tensor in (x, *weights))
            outputs = ours(SHIM, operation, leaf, residual, leaves)
            return (*outputs, *torch.autograd.grad(outputs, [leaf, *leaves], [grad, grad]))

        forward, backward = in_both_orders(run)
        assert all(torch.equal(one, other) for one, other in zip(forward, backward, strict=True))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_any_one_output_may_go_unused(place: Place, operation: str) -> None:
    ready(place)
    generator = torch.Generator().manual_seed(0)
    x, residual = (random(generator, (5, 24), place, torch.float32) for _ in range(2))
    check(place, operation, x, residual, used=(0,))
    check(place, operation, x, residual, used=(1,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_huge_tiny_and_zero_rows_and_a_large_mean(place: Place, operation: str, dtype: torch.dtype) -> None:
    ready(place)
    generator = torch.Generator().manual_seed(0)
    x, residual = (random(generator, (6, 1040), place, dtype) for _ in range(2))
    for scale in (1e4, 1e9, 1e-5, 1e-20, 0.0):
        check(place, operation, x * scale, residual * scale)
    check(place, operation, x + 300)
    wild = x[0].clone()
    wild[7] = 1e4
    check(place, operation, wild[None])


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_a_nan_stays_in_its_row(place: Place, operation: str) -> None:
    ready(place)
    for dtype in DTYPES:
        x = torch.ones(5, 20, dtype=dtype, device=place.device)
        x[2, 3] = float("nan")
        (y,) = ours(place, operation, x, None, parameters(operation, 20, place, dtype))
        assert y[2].isnan().all()
        assert y[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_strided_tensors_and_unaligned_views(place: Place, operation: str) -> None:
    ready(place)
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        x = random(generator, (16, 24), place, dtype)
        check(place, operation, x.t(), x.t())
        check(place, operation, x[:, 8:], x[:, :16])
        check(place, operation, x.flatten()[1:369].view(23, 16), x.flatten()[3:371].view(23, 16))
        weights = [weight.repeat_interleave(2)[::2] for weight in parameters(operation, 24, place, dtype)]
        y, _ = ours(place, operation, x, x, weights)
        assert torch.equal(y, ours(place, operation, x, x, [weight.contiguous() for weight in weights])[0])
        leaf = x.clone().requires_grad_()
        ours(place, operation, leaf, None, weights)[0].sum().backward()  # a gradient whose strides are all 0
        exact = x.double().requires_grad_()
        twin(operation, exact, None, [weight.double() for weight in weights])[0].sum().backward()
        assert_near(leaf.grad, exact.grad, dtype)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_the_weights_gradient_adds_many_rows_exactly_and_the_same_each_time(place: Place, operation: str) -> None:
    ready(place)
    generator = torch.Generator().manual_seed(0)
    x = random(generator, (9001, 20), place, torch.float32)
    grad = random(generator, (9001, 20), place, torch.float32) + 1  # a sum that grows, so that late rows could be lost
    weights = parameters(operation, 20, place, torch.float32)

    def gradients(tensors: list[Tensor], run: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(run(leaves[0], None, leaves[1:])[0], leaves, grad.to(leaves[0].dtype))

    got = gradients([x, *weights], partial(ours, place, operation))
    expected = gradients([x.double(), *(weight.double() for weight in weights)], partial(twin, operation))
    for mine, right in zip(got, expected, strict=True):
        assert_near(mine, right, torch.float32)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2) if place is CPU else (threads,):
            torch.set_num_threads(count)
            again = gradients([x, *weights], partial(ours, place, operation))
            assert all(torch.equal(mine, other) for mine, other in zip(got, again, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_a_norm_passes_opcheck_and_compiles_whole(place: Place, operation: str) -> None:
    ready(place)
    generator = torch.Generator().manual_seed(0)
    x, residual = (random(generator, (2, 3, 10), place, torch.float32).requires_grad_() for _ in range(2))
    weights = [weight.requires_grad_() for weight in parameters(operation, 10, place, torch.float32)]
    op = getattr(place.ops, operation).default
    torch.library.opcheck(op, (x, residual, *weights, EPS))
    torch.library.opcheck(op, (x, None, *weights, EPS))
    compiled = torch.compile(partial(ours, place, operation), fullgraph=True, backend="aot_eager")
    for other in (residual, None):
        got, expected = compiled(x, other, weights), twin(operation, x, other, weights)
        torch.testing.assert_close(got, expected)
        inputs = [x, *weights]
        mine = torch.autograd.grad(sum(y.square().sum() for y in got), inputs)
        right = torch.autograd.grad(sum(y.square().sum() for y in expected), inputs)
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_norms_twin_passes_gradcheck(operation: str) -> None:
    torch.manual_seed(0)
    tensors = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(2, 3, 5), (2, 3, 5), (5,), (5,)]
    ]
    weights = tensors[2:3] if operation == "rms_norm" else tensors[2:]
    assert torch.autograd.gradcheck(lambda x, r, *w: twin(operation, x, r, list(w)), (*tensors[:2], *weights))


@pytest.mark.parametrize("place", PLACES)
def test_bad_input_is_named(place: Place) -> None:
    ready(place)
    x, w = torch.randn(3, 4, device=place.device), torch.randn(4, device=place.device)
    r = torch.randn(3, device=place.device)
    half = x.bfloat16()
    rms: dict[str, tuple[Any, ...]] = {
        "x must be float32 or bfloat16, got float64": (x.double(), None, w, EPS),
        r"x must be \[..., width\] with a width of at least 1, got \[3, 0\]": (x[:, :0], None, w[:0], EPS),
        r"x must be \[..., width\] with a width of at least 1, got \[\]": (x[0, 0], None, w, EPS),
        r"residual must be \[3, 4\], got \[1, 4\]": (x, x[:1], w, EPS),
        "residual must be float32, got bfloat16": (x, half, w, EPS),
        r"weight must be \[4\], got \[3\]": (x, None, w[:3], EPS),
        "weight must be bfloat16, got float32": (half, None, w, EPS),
        "eps must be at least 0, got -1": (x, None, w, -1.0),
        "eps must be at least 0, got nan": (x, None, w, float("nan")),
    }
    backward: dict[str, tuple[Any, ...]] = {
        r"grad must be \[3, 4\], got \[4\]": (w, None, x, w, r),
        "grad must be float32, got bfloat16": (half, None, x, w, r),
        r"grad_hidden must be \[3, 4\], got \[3\]": (x, r, x, w, r),
        "hidden must be float32 or bfloat16, got int64": (x, None, x.long(), w, r),
        r"weight must be \[4\], got \[3\]": (x, None, x, w[:3], r),
        r"rstd must be \[3\], got \[4\]": (x, None, x, w, w),
        "rstd must be float32, got bfloat16": (x, None, x, w, r.bfloat16()),
    }
    for message, arguments in rms.items():
        with pytest.raises(RuntimeError, match=f"rms_norm: {message}"):
            place.ops.rms_norm(*arguments)
    for message, arguments in backward.items():
        with pytest.raises(RuntimeError, match=f"rms_norm_backward: {message}"):
            place.ops.rms_norm_backward(*arguments)
    with pytest.raises(RuntimeError, match=r"layer_norm: bias must be \[4\], got \[3\]"):
        place.ops.layer_norm(x, None, w, w[:3], EPS)
    with pytest.raises(RuntimeError, match=r"layer_norm_backward: mean must be \[3\], got \[2\]"):
        place.ops.layer_norm_backward(x, None, x, w, r[:2], r)
