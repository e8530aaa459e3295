"""titan's fused operations: C++ for the CPU, CUDA for NVIDIA devices, as `torch.ops.titan.*`.

Nothing happens on import. `load()` opens the compiled library and tells torch how its operations differentiate and what
shapes they return; `titan.ops` is the only caller. docs/kernels.md shows how one kernel is made.
"""

from functools import cache
from pathlib import Path

import torch
from titan_kernels import attention, norm, rope, swiglu, vocab

FAMILIES = (attention, norm, rope, swiglu, vocab)


class KernelsMissingError(Exception):
    """The compiled library is not there or does not load; the message says why."""


@cache
def load() -> None:
    """Open the compiled library, once a process. Raises KernelsMissingError."""
    library = next(Path(__file__).parent.glob("_C*.so"), None)
    if library is None:
        raise KernelsMissingError("titan was built without kernels (there was no C++ compiler or no torch)")
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise KernelsMissingError(f"{library.name} does not load: {error}") from error
    register("titan")


def register(library: str) -> None:
    """Give the operations of one loaded library (`titan`, or the tests' `titan_shim`) their shapes and gradients."""
    for family in FAMILIES:
        family.register(library)


def implemented(operation: str, device_type: str) -> bool:
    """Whether the loaded library has a kernel for this kind of device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"titan::{operation}", device_type.upper())
