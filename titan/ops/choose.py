"""Which implementation an operation gets: our CUDA kernel, NVIDIA's apex, our CPU kernel, or plain torch.

The best that is really there wins; `TITAN_KERNELS` overrides it (`torch`, or `rms_norm=torch,attention=torch`).
"""

from dataclasses import dataclass
from functools import cache

import titan_kernels
import torch
from torch import Tensor

from titan.config.environment import KERNEL_OPERATIONS, KernelBackend, wanted_kernels
from titan.errors import ConfigError

KERNEL_OF = {"head": "vocab_statistics"}
"""The kernel that must be there for an operation, where it has another name."""
KERNEL_TYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """The implementation an operation gets, and why not a better one."""

    backend: KernelBackend
    reason: str = ""


def chosen(operation: str, x: Tensor) -> KernelBackend:
    """The implementation for a tensor like x."""
    if x.is_floating_point() and x.dtype not in KERNEL_TYPES:
        return "torch"
    backend: KernelBackend = _backend(operation, x.device.type)
    return backend


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile need not see how it is decided
def _backend(operation: str, device: str) -> KernelBackend:
    return choose(operation, device).backend


@cache
def choose(operation: str, device: str) -> Choice:
    """The implementation for float32 and bfloat16 tensors on a kind of device. Raises ConfigError."""
    wanted = wanted_kernels().get(operation)
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
    return {operation: choose(operation, device) for operation in KERNEL_OPERATIONS}


def _candidates(operation: str, device: str) -> tuple[KernelBackend, ...]:
    if device == "cuda":
        return ("cuda", "apex", "torch") if operation in ("rms_norm", "layer_norm") else ("cuda", "torch")
    if device == "cpu" and operation != "attention":  # torch's own attention is the faster one there
        return ("cpu", "torch")
    return ("torch",)


def _why_not(operation: str, backend: KernelBackend, device: str) -> str | None:
    """What keeps an implementation from being used, None if nothing."""
    if backend == "torch":
        return None
    if backend == "apex":
        return _apex_problem(operation)
    try:
        titan_kernels.load()
    except titan_kernels.KernelsMissingError as missing:
        return str(missing)
    if not titan_kernels.implemented(KERNEL_OF.get(operation, operation), device):
        return "titan's kernels were built without CUDA (TITAN_CUDA=1 builds them)"
    return None


@cache
def _apex_problem(operation: str) -> str | None:
    """Whether NVIDIA's apex is there and works, by calling it: PyPI's package of that name is a web toolkit."""
    from titan.ops.apex import probe

    return probe(operation)
