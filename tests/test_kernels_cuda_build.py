"""The CUDA sources, compiled for A100, H100 and B200: no spills, and tensor cores where they are meant to be."""

import importlib
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from tests.kernels import CSRC

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
FAMILIES = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))
ON_TENSOR_CORES = ("attention_forward_mma", "attention_grad_query_mma", "attention_grad_key_value_mma")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: CUDA sources not compiled"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Object file and ptxas's report of every family."""
    folder = tmp_path_factory.mktemp("cuda")

    def compile_family(family: str) -> tuple[Path, str]:
        target = folder / f"{family}.o"
        command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC", f"-I{CSRC}"]
        command += [f"-I{path}" for path in include_paths()] + ["-DTORCH_TARGET_VERSION=0x020d000000000000"]
        for name in ARCHITECTURES:
            command += ["-gencode", f"arch={name.replace('sm', 'compute')},code={name}"]
        command += ["-c", str(CSRC / "cuda" / f"{family}.cu"), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        return target, done.stderr

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FAMILIES, pool.map(compile_family, FAMILIES), strict=True))


def test_every_kernel_compiles_for_every_architecture_without_spills(built: dict[str, tuple[Path, str]]) -> None:
    spill = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
    for family, (_, report) in built.items():
        found = spill.findall(report)
        compiled = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", report)
        assert len(found) >= len(compiled) >= len(ARCHITECTURES), f"{family}: {report[:500]}"
        assert {arch for _, arch in compiled} == set(ARCHITECTURES)
        assert all(numbers == ("0", "0", "0") for numbers in found), f"{family} spills"


def test_attention_of_bfloat16_uses_tensor_cores_forward_and_backward(built: dict[str, tuple[Path, str]]) -> None:
    tools = Path(next(iter(importlib.import_module("nvidia.cu13").__path__))) / "bin"
    for arch in ARCHITECTURES:
        done = subprocess.run(
            [str(tools / "cuobjdump"), "-sass", "-arch", arch, str(built["attention"][0])],
            capture_output=True, text=True, timeout=120, env={"NVDISASM_PATH": str(tools), "PATH": str(tools)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        functions = done.stdout.split("Function : ")[1:]
        for name in ON_TENSOR_CORES:
            bodies = [body for body in functions if name in body.partition("\n")[0]]
            assert len(bodies) == 2, f"{name} on {arch}: widths 64 and 128"
            assert all(body.count("HMMA.16816.F32.BF16") >= 32 for body in bodies), f"{name} on {arch}"
        assert all("HMMA" not in body for body in functions if "simt" in body.partition("\n")[0])
