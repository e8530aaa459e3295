"""SwiGLU against float64."""

import pytest
import torch

from tests.kernels import PLACES, Place, assert_near, ready
from titan.ops.swiglu import swiglu_twin

SHAPES = [(1, 2), (3, 14), (5, 7, 2 * 64), (2, 3, 2 * 257), (0, 8), (4, 0)]
DTYPES = [torch.float32, torch.bfloat16]


def check(place: Place, x: torch.Tensor) -> None:
    """Value and gradient against the twin in float64."""
    x = x.to(place.device).requires_grad_()
    exact = x.detach().double().requires_grad_()
    got, expected = place.ops.swiglu(x), swiglu_twin(exact)
    assert_near(got, expected, x.dtype)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(place.device, x.dtype)
    got.backward(grad)
    expected.backward(grad.double())
    assert_near(x.grad, exact.grad, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_swiglu_is_its_float64_twin_at_every_size(place: Place, dtype: torch.dtype) -> None:
    ready(place)
    torch.manual_seed(0)
    for shape in SHAPES:
        check(place, torch.randn(shape, dtype=dtype))
        check(place, (torch.randn(shape) * 30).to(dtype))
    check(place, torch.randn(16, 12, dtype=dtype).t())  # not contiguous
    check(place, torch.tensor([[1e4, -1e4, 0.0, 1e-20, 2.0, 3.0, 4.0, 5.0]], dtype=dtype))


@pytest.mark.parametrize("place", PLACES)
def test_swiglu_passes_opcheck_and_compiles_whole(place: Place) -> None:
    ready(place)
    x = torch.randn(3, 10, device=place.device, requires_grad=True)
    torch.library.opcheck(place.ops.swiglu.default, (x,))
    compiled = torch.compile(lambda x: place.ops.swiglu(x) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), swiglu_twin(x) * 2)


def test_swiglu_twin_passes_gradcheck() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu_twin, (x,))


@pytest.mark.parametrize("place", PLACES)
def test_bad_input_is_named(place: Place) -> None:
    ready(place)
    for x, message in [
        (torch.randn(3, 5), r"x must be \[..., gate and up\], an even number, got \[3, 5\]"),
        (torch.tensor(1.0), "x must be"),
        (torch.randn(3, 4, dtype=torch.float64), "x must be float32 or bfloat16, got float64"),
    ]:
        with pytest.raises(RuntimeError, match=f"swiglu: {message}"):
            place.ops.swiglu(x.to(place.device))
    with pytest.raises(RuntimeError, match=r"swiglu_backward: grad must be \[3, 2\], got \[3, 4\]"):
        place.ops.swiglu_backward(torch.randn(3, 4, device=place.device), torch.randn(3, 4, device=place.device))
