"""Which implementation an operation gets: our CUDA kernel, NVIDIA's apex, our CPU kernel, or plain torch.

The best that is really there wins; `TITAN_KERNELS` overrides it (`torch`, or `rms_norm=torch,attention=torch`).
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import titan_kernels
import torch
from torch import Tensor

from titan.config.environment import kernels_variable
from titan.errors import ConfigError

Backend = Literal["cuda", "apex", "cpu", "torch"]
BACKENDS: tuple[Backend, ...] = ("cuda", "apex", "cpu", "torch")
OPERATIONS = {
    "rms_norm": "rms_norm",
    "layer_norm": "layer_norm",
    "rope": "rope",
    "swiglu": "swiglu",
    "attention": "attention",
    "head": "vocab_statistics",
}
"""Operation to the kernel that must be there for it."""
KERNEL_TYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """The implementation an operation gets, and why not a better one."""

    backend: Backend
    reason: str = ""


def chosen(operation: str, x: Tensor) -> Backend:
    """The implementation for a tensor like x."""
    if x.is_floating_point() and x.dtype not in KERNEL_TYPES:
        return "torch"
    backend: Backend = _backend(operation, x.device.type)
    return backend


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile need not see how it is decided
def _backend(operation: str, device: str) -> Backend:
    return choose(operation, device).backend


@cache
def choose(operation: str, device: str) -> Choice:
    """The implementation for float32 and bfloat16 tensors on a kind of device. Raises ConfigError."""
    wanted = _wanted().get(operation)
    reasons: list[str] = []
    for backend in _candidates(operation, device):
        reason = _why_not(operation, backend, device)
        if reason is None and wanted in (None, backend):
            return Choice(backend, "TITAN_KERNELS asks for it" if wanted else "; ".join(reasons))
        if reason is not None:
            reasons.append(f"{backend}: {reason}")
            if wanted == backend:
                raise ConfigError(f"TITAN_KERNELS asks for {backend} for {operation}, but {reason}; unset it")
    raise ConfigError(f"TITAN_KERNELS asks for {wanted} for {operation}, which a {device} device has not; unset it")


def choices(device: str) -> dict[str, Choice]:
    """What every operation gets on a kind of device."""
    return {operation: choose(operation, device) for operation in OPERATIONS}


def _candidates(operation: str, device: str) -> tuple[Backend, ...]:
    if device == "cuda":
        return ("cuda", "apex", "torch") if operation in ("rms_norm", "layer_norm") else ("cuda", "torch")
    if device == "cpu" and operation != "attention":  # torch's own attention is the faster one there
        return ("cpu", "torch")
    return ("torch",)


def _why_not(operation: str, backend: Backend, device: str) -> str | None:
    """What keeps an implementation from being used, None if nothing."""
    if backend == "torch":
        return None
    if backend == "apex":
        return _apex_problem(operation)
    try:
        titan_kernels.load()
    except titan_kernels.KernelsMissingError as missing:
        return str(missing)
    if not titan_kernels.implemented(OPERATIONS[operation], device):
        return "titan's kernels were built without CUDA (TITAN_CUDA=1 builds them)"
    return None


@cache
def _apex_problem(operation: str) -> str | None:
    """Whether NVIDIA's apex is there and works, by calling it: PyPI's package of that name is a web toolkit."""
    from titan.ops.apex import probe

    return probe(operation)


@cache
def _wanted() -> dict[str, Backend]:
    """TITAN_KERNELS as operation to implementation; empty when it is unset or `auto`."""
    text = kernels_variable()
    if text in ("", "auto"):
        return {}
    if text == "torch":
        return dict.fromkeys(OPERATIONS, "torch")
    wanted: dict[str, Backend] = {}
    for part in text.split(","):
        operation, _, name = part.strip().partition("=")
        backend = next((known for known in BACKENDS if known == name), None)
        if operation not in OPERATIONS or backend is None:
            raise ConfigError(
                f"TITAN_KERNELS must be auto, torch or a list like rms_norm=torch,attention=cuda, got {part.strip()!r};"
                f" operations: {', '.join(OPERATIONS)}; implementations: {', '.join(BACKENDS)}"
            )
        wanted[operation] = backend
    return wanted
