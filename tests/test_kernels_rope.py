"""The rotary embedding against float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import PLACES, Place, assert_near, ready
from titan.ops.rope import rope_twin

DTYPES = [torch.float32, torch.bfloat16]
# Halves around the packs of 4 and 8; the last has more pairs than a small grid has threads.
SHAPES = [(1, 1, 1, 2), (5, 2, 3, 6), (7, 1, 2, 64), (3, 2, 5, 16), (2, 3, 1, 24), (0, 2, 2, 4), (2, 0, 1, 8)]
SHAPES += [(3, 2, 0, 4), (2, 2, 2, 0), (257, 2, 2, 34)]


def angles(length: int, half: int, place: Place) -> Tensor:
    """[2, S, D / 2] as titan.model.stage.rope_table makes it."""
    generator = torch.Generator().manual_seed(2)
    table = torch.rand(length, half, generator=generator) * 100
    return torch.stack([table.cos(), table.sin()]).to(place.device)


def check(place: Place, x: Tensor, table: Tensor | None = None) -> None:
    """Value, gradient and way back."""
    if table is None:
        table = angles(x.shape[0], x.shape[3] // 2, place)
    leaf, exact = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    got, expected = place.ops.rope(leaf, table[0], table[1], False), rope_twin(exact, table.double())
    assert got.is_contiguous() and got.dtype == x.dtype
    assert_near(got, expected, x.dtype)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(place.device, x.dtype)
    got.backward(grad)
    expected.backward(grad.double())
    assert leaf.grad is not None and exact.grad is not None
    assert_near(leaf.grad, exact.grad, x.dtype)
    assert_near(place.ops.rope(got.detach(), table[0], table[1], True), x.double(), x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_rope_is_its_float64_twin_at_every_size(place: Place, dtype: torch.dtype) -> None:
    ready(place)
    torch.manual_seed(0)
    for shape in SHAPES:
        check(place, torch.randn(shape).to(place.device, dtype))
        check(place, (torch.randn(shape) * 1e4).to(place.device, dtype))
        check(place, (torch.randn(shape) * 1e-20).to(place.device, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_queries_and_keys_are_read_where_the_projection_left_them(place: Place, dtype: torch.dtype) -> None:
    ready(place)
    torch.manual_seed(0)
    for heads, width in [(3, 16), (3, 6), (2, 36)]:
        projected = torch.randn(5, 2, (2 * heads + 1) * width + 1).to(place.device, dtype)
        for start in (0, 1):  # the second is not aligned
            fused = projected[..., start : start + (2 * heads + 1) * width]
            query, key, _ = fused.split([heads * width, heads * width, width], dim=-1)
            check(place, query.unflatten(-1, (heads, width)))
            check(place, key.unflatten(-1, (heads, width)))
    check(place, torch.randn(4, 2, 3, 8).to(place.device, dtype).transpose(0, 1))
    check(place, torch.randn(4, 16, 3, 2).to(place.device, dtype).transpose(1, 3))
    check(place, torch.randn(4, 1, 1, 16).to(place.device, dtype).expand(4, 3, 2, 16))
    table = angles(8, 8, place)
    check(place, torch.randn(4, 2, 3, 16).to(place.device, dtype), table[:, ::2])
    check(place, torch.randn(4, 2, 3, 16).to(place.device, dtype), table.transpose(1, 2)[:, :4])


@pytest.mark.parametrize("place", PLACES)
def test_the_grid_strides_over_more_pairs_than_it_has_threads(place: Place) -> None:
    ready(place)
    x = torch.randn(4096 * 256 + 3, 1, 1, 2, device=place.device)  # 4096 blocks of 256 threads, a pair each
    table = angles(x.shape[0], 1, place)
    assert_near(place.ops.rope(x, table[0], table[1], False), rope_twin(x.double(), table.double()), x.dtype)


@pytest.mark.parametrize("place", PLACES)
def test_rope_passes_opcheck_and_compiles_whole(place: Place) -> None:
    ready(place)
    x = torch.randn(3, 2, 2, 10, device=place.device, requires_grad=True)
    table = angles(3, 5, place)
    torch.library.opcheck(place.ops.rope.default, (x, table[0], table[1], False))
    torch.library.opcheck(place.ops.rope.default, (x.transpose(1, 2), table[0], table[1], True))
    compiled = torch.compile(
        lambda x: place.ops.rope(x, table[0], table[1], False) * 2, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), rope_twin(x, table) * 2)
    (mine,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (right,) = torch.autograd.grad((rope_twin(x, table) * 2).square().sum(), x)
    torch.testing.assert_close(mine, right)


def test_rope_twin_passes_gradcheck() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 2, 6, dtype=torch.float64, requires_grad=True)
    table = torch.randn(2, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rope_twin(x, table), (x,))


@pytest.mark.parametrize("place", PLACES)
def test_bad_input_is_named(place: Place) -> None:
    ready(place)
    x = torch.randn(3, 2, 2, 8, device=place.device)
    c, s = angles(3, 4, place)
    cases: dict[str, tuple[Any, ...]] = {
        "x must be float32 or bfloat16, got float64": (x.double(), c, s),
        r"x must be \[sequence, batch, heads, an even number\], got \[3, 2, 2, 7\]": (x[..., :7], c, s),
        r"x must be \[sequence, batch, heads, an even number\], got \[2, 2, 8\]": (x[0], c, s),
        r"cos must be \[3, 4\], got \[2, 4\]": (x, c[:2], s),
        r"sin must be \[3, 4\], got \[3, 3\]": (x, c, s[:, :3]),
        "cos must be float32, got bfloat16": (x, c.bfloat16(), s),
        "cos and sin have no gradient": (x.requires_grad_(), c.clone().requires_grad_(), s),
    }
    for message, arguments in cases.items():
        with pytest.raises(RuntimeError, match=f"rope: {message}"):
            place.ops.rope(*arguments, False)
