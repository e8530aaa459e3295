"""Which implementation an operation gets, and who may change that."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import titan_kernels
import torch
import torch.nn.functional as F

from tests.runs import titan, write_tiny_config
from titan.config.environment import KERNEL_OPERATIONS
from titan.errors import ConfigError
from titan.ops import apex, choose, norm


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Choices are made once a process."""
    yield
    choose.choose.cache_clear()
    titan_kernels.load()


def backends(monkeypatch: pytest.MonkeyPatch, wanted: str | None, device: str = "cpu") -> dict[str, str]:
    monkeypatch.delenv("TITAN_KERNELS", raising=False)
    if wanted is not None:
        monkeypatch.setenv("TITAN_KERNELS", wanted)
    choose.choose.cache_clear()
    return {operation: choice.backend for operation, choice in choose.choices(device).items()}


def test_the_best_that_is_there_is_chosen_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = dict.fromkeys(KERNEL_OPERATIONS, "cpu") | {"attention": "torch"}
    assert backends(monkeypatch, None) == backends(monkeypatch, "auto") == usual
    assert backends(monkeypatch, "torch") == dict.fromkeys(KERNEL_OPERATIONS, "torch")
    assert backends(monkeypatch, "rope=torch, head=cpu") == usual | {"rope": "torch"}
    assert choose.chosen("rms_norm", torch.ones(1, dtype=torch.float16)) == "torch", "a type that kernels do not take"
    assert choose.chosen("rms_norm", torch.ones(1, dtype=torch.bfloat16)) == "cpu"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("fast", "TITAN_KERNELS must be auto, torch or a list like .*, got 'fast'; operations: rms_norm, .*"),
        ("rms_norm=best", "got 'rms_norm=best'; .* implementations: cuda, apex, cpu, torch"),
        ("norm=torch", "got 'norm=torch'"),
        ("rope=torch,", "got ''"),
        ("rope=cuda", "TITAN_KERNELS asks for cuda for rope, which a cpu device has not; unset it"),
        ("attention=cpu", "TITAN_KERNELS asks for cpu for attention, which a cpu device has not"),
    ],
)
def test_a_wish_that_cannot_be_met_is_an_error(monkeypatch: pytest.MonkeyPatch, wanted: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backends(monkeypatch, wanted)


def test_a_run_says_so_before_it_starts_anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TITAN_KERNELS", "fast")
    result = titan("run", str(write_tiny_config(tmp_path)), cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("titan: TITAN_KERNELS must be") and "Ray" not in result.stderr


def test_without_the_library_there_is_plain_torch_and_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(titan_kernels, "__file__", str(tmp_path / "__init__.py"))
    titan_kernels.load.cache_clear()
    assert backends(monkeypatch, None) == dict.fromkeys(KERNEL_OPERATIONS, "torch")
    assert "built without kernels" in choose.choose("rms_norm", "cpu").reason
    with pytest.raises(ConfigError, match="asks for cpu for rope, but titan was built without kernels"):
        backends(monkeypatch, "rope=cpu")
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    titan_kernels.load.cache_clear()
    assert backends(monkeypatch, None) == dict.fromkeys(KERNEL_OPERATIONS, "torch")
    assert "_C.abi3.so does not load" in choose.choose("rms_norm", "cpu").reason
    monkeypatch.undo()


def test_a_library_without_cuda_leaves_a_gpu_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    if titan_kernels.implemented("rms_norm", "cuda"):
        pytest.skip("built with CUDA")
    assert backends(monkeypatch, None, "cuda") == dict.fromkeys(KERNEL_OPERATIONS, "torch")
    assert "apex is not there" in choose.choose("rms_norm", "cuda").reason
    assert "TITAN_CUDA=1" in choose.choose("rope", "cuda").reason


@pytest.fixture
def fake_apex(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with apex's names and signatures that computes with torch."""
    fake = ModuleType("apex.normalization.fused_layer_norm")
    fake.fused_rms_norm_affine = lambda x, weight, shape, eps: F.rms_norm(x, shape, weight, eps)  # type: ignore[attr-defined]
    fake.fused_layer_norm_affine = lambda x, weight, bias, shape, eps: F.layer_norm(x, shape, weight, bias, eps)  # type: ignore[attr-defined]
    for name in ("apex", "apex.normalization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return fake


@pytest.mark.parametrize("operation", ["rms_norm", "layer_norm"])
def test_apex_is_used_if_its_numbers_are_those_of_torch(fake_apex: ModuleType, operation: str) -> None:
    assert apex.probe(operation, "cpu") is None
    good = getattr(fake_apex, f"fused_{operation}_affine")
    setattr(fake_apex, f"fused_{operation}_affine", lambda *arguments: 1.01 * good(*arguments))
    assert apex.probe(operation, "cpu") == "apex gives other numbers than torch"
    delattr(fake_apex, f"fused_{operation}_affine")
    assert "does not work" in (apex.probe(operation, "cpu") or "")


def test_norms_by_apex_are_those_of_torch(fake_apex: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(3, 5, 16), torch.randn(16), torch.randn(16)
    branch = torch.randn(3, 5, 16)
    for by in ("apex", "torch"):
        monkeypatch.setattr(norm, "chosen", lambda operation, x, by=by: by)
        results = [
            norm.rms_norm(x, weight, 1e-5),
            *norm.residual_rms_norm(x, branch, weight, 1e-5),
            *norm.residual_layer_norm(x, branch, weight, bias, 1e-5),
        ]
        if by == "apex":
            from_apex = results
    assert all(torch.equal(a, b) for a, b in zip(from_apex, results, strict=True))
