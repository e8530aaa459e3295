"""The three places where an operation of titan_kernels runs: CPU kernels, CUDA kernels on the host shim, CUDA kernels.

The host shim is the .cu files compiled by g++; it registers them for CPU tensors as `torch.ops.titan_shim.*`, with the
same gradients and shapes, so that one test serves all three.
"""

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import titan_kernels
import torch
from torch.utils.cpp_extension import include_paths

T = TypeVar("T")
CSRC = Path(titan_kernels.__file__).parent / "csrc"
FLAGS = ["-std=c++17", "-O1", "-g0", "-fPIC", "-x", "c++", "-DTITAN_LIBRARY=titan_shim", "-ffp-contract=off"]
FLAGS += ["-ftrivial-auto-var-init=pattern"]  # what a kernel does not initialise is not 0 by luck
FLAGS += ["-DTORCH_TARGET_VERSION=0x020d000000000000"]
COMPILE_S = 240


@dataclass(frozen=True)
class Place:
    """Where a test runs an operation."""

    library: str
    device: str

    @property
    def ops(self) -> Any:
        """`place.ops.rms_norm(...)`."""
        return getattr(torch.ops, self.library)


CPU, SHIM, CUDA = Place("titan", "cpu"), Place("titan_shim", "cpu"), Place("titan", "cuda")
PLACES = [
    pytest.param(CPU, id="cpu"),
    pytest.param(SHIM, id="shim"),
    pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu),
]
CUDA_PLACES = PLACES[1:]
"""For operations that have no kernel of ours on the CPU."""


def ready(place: Place) -> Place:
    """Load what a place needs. Without a GPU its tests are reported as not run."""
    if place.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: not run")
    titan_kernels.load()
    if place.device == "cuda" and not titan_kernels.implemented("swiglu", "cuda"):
        pytest.skip("built without CUDA (TITAN_CUDA=1): not run")
    if place is SHIM:
        load_shim()
    return place


@cache
def load_shim() -> Path:
    """Build the shim if a source has changed, and open it, once a process."""
    csrc = Path(os.environ.get("TITAN_SHIM_SOURCES", CSRC))  # tests/test_kernels_faults.py sets it
    library = build_shim(csrc, sorted(path.stem for path in (csrc / "cuda").glob("*.cu")))
    torch.ops.load_library(library)
    titan_kernels.register("titan_shim")
    return library


def build_shim(csrc: Path, families: list[str]) -> Path:
    """Compile the schema and some .cu files into one library; unchanged files are not compiled again."""
    cache_folder = Path(__file__).parent.parent / "build" / "shim"
    cache_folder.mkdir(parents=True, exist_ok=True)
    sources = [
        csrc / "schema.cpp",
        csrc / "host_shim" / "control.cpp",
        *(csrc / "cuda" / f"{family}.cu" for family in families),
    ]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _object(csrc, source, cache_folder), sources))
    library = cache_folder / f"{_digest([path.name.encode() for path in objects])}.so"
    if not library.exists():
        folders = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run(["g++", "-shared", "-o", str(library), *map(str, objects), *folders])
    return library


def _object(csrc: Path, source: Path, cache_folder: Path) -> Path:
    """One object file, named by what it was made from."""
    include = [f"-I{csrc}", *(f"-I{folder}" for folder in include_paths())]
    listed = subprocess.run(
        ["g++", *FLAGS, f"-I{csrc}", *(f"-isystem{folder}" for folder in include_paths()), "-MM", str(source)],
        capture_output=True,
        text=True,
        timeout=COMPILE_S,
    )
    assert listed.returncode == 0, listed.stderr[-3000:]
    files = [Path(word) for word in listed.stdout.replace("\\\n", " ").split()[1:]]
    made = cache_folder / f"{source.stem}-{_digest([str(FLAGS).encode(), *(path.read_bytes() for path in files)])}.o"
    if not made.exists():
        _run(["g++", *FLAGS, *include, "-c", str(source), "-o", str(made)])
    return made


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S)
    assert done.returncode == 0, done.stderr[-3000:]


def _digest(parts: list[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def in_both_orders(run: Callable[[], T]) -> tuple[T, T]:
    """What the shim gives with threads from first to last; and from last to first, with copies that happen at once."""
    order = ctypes.CDLL(str(load_shim())).titan_shim_reverse_order
    first = run()
    order(1)
    try:
        return first, run()
    finally:
        order(0)


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Relative error of an operation, per dtype of its inputs."""


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest expected value. NaN and infinities must sit at the same places."""
    assert got.shape == expected.shape, f"{tuple(got.shape)} is not {tuple(expected.shape)}"
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    finite = expected.isfinite()
    assert torch.equal(got.isfinite(), finite)
    assert torch.equal(got[~finite].nan_to_num(7.0), expected[~finite].nan_to_num(7.0))
    if not finite.any():
        return 0.0
    difference = (got[finite] - expected[finite]).abs().max().item()
    return difference / max(expected[finite].abs().max().item(), 1e-30)


def assert_near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """`got` was computed from inputs of `dtype`, `expected` from the same inputs in float64."""
    error = relative_error(got, expected)
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}, allowed {TOLERANCE[dtype]:.0e}"
