"""Faults planted in the CUDA sources, one at a time: the tests on the host shim must fail for each."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernels import CSRC, build_shim

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Fault:
    """One place of one file, changed."""

    what: str
    file: str
    original: str
    planted: str
    family: str


ATTENTION = "cuda/attention_mma.cuh"
SIMT = "cuda/attention_simt.cuh"
FAULTS = [
    Fault(
        "no barrier between a tile's arrival and its use", ATTENTION,
        "    __syncthreads();\n    float scores[TILE / 8][4];\n", "    float scores[TILE / 8][4];\n", "attention",
    ),
    Fault(
        "no wait for the asynchronous copy", ATTENTION,
        "    cp_async_wait<1>();\n    __syncthreads();\n    float scores[TILE / 8][4], toward",
        "    __syncthreads();\n    float scores[TILE / 8][4], toward", "attention",
    ),
    Fault(
        "a tile overwritten while others use it", ATTENTION,
        "    add_weighted_rows<D, TILE>(key_sums, changes, queries[stage]);\n    __syncthreads();",
        "    add_weighted_rows<D, TILE>(key_sums, changes, queries[stage]);", "attention",
    ),
    Fault(
        "wrong row of a fragment", ATTENTION, "threadIdx.x % 32 / 4 + (i >= 2 ? 8 : 0)",
        "threadIdx.x % 32 / 4 + (i >= 1 ? 8 : 0)", "attention",
    ),
    Fault(
        "wrong matrix of fragment A", ATTENTION, "tile.at(row + lane % 16, column + lane / 16 * 8)",
        "tile.at(row + lane % 8, column + lane / 16 * 8)", "attention",
    ),
    Fault(
        "fragment B not transposed", ATTENTION, "ldmatrix_x4_trans(b, tile", "ldmatrix_x4(b, tile", "attention",
    ),
    Fault(
        "uninitialised accumulator", ATTENTION, "  clear<D>(key_sums);\n", "", "attention",
    ),
    Fault(
        "wrong lanes of a shuffle", ATTENTION, "fmaxf(now[half], __shfl_xor_sync(kWholeWarp, now[half], 2))",
        "fmaxf(now[half], __shfl_xor_sync(kWholeWarp, now[half], 4))", "attention",
    ),
    Fault(
        "a shuffle's mask without some of its lanes", ATTENTION,
        "total[half] += __shfl_xor_sync(kWholeWarp, total[half], 1);",
        "total[half] += __shfl_xor_sync(0x0fffffffu, total[half], 1);", "attention",
    ),
    Fault(
        "the last tile left out", ATTENTION,
        "const int tiles_a_head = max(0, (shape.queries - begin + TILE - 1) / TILE)",
        "const int tiles_a_head = max(0, (shape.queries - begin) / TILE)", "attention",
    ),
    Fault(
        "rows of an unfinished tile not zeroed", ATTENTION,
        "cp_async_16(to.at(row, column), from.row(valid ? first + row : 0) + column, valid);",
        "if (valid) cp_async_16(to.at(row, column), from.row(first + row) + column, valid);", "attention",
    ),
    Fault(
        "causal by one too few", "cuda/attention_mask.cuh", "key <= query + offset", "key < query + offset",
        "attention",
    ),
    Fault(
        "only the first of a group's heads", SIMT, "head < (key_head + 1) * group; ++head",
        "head < key_head * group + 1; ++head", "attention",
    ),
    Fault(
        "no barrier within a warp", SIMT,
        "      weight[lane] = change;\n      __syncwarp();\n", "      weight[lane] = change;\n", "attention",
    ),
    Fault("half of a row's sum", SIMT, "column < shape.width; column += 32) sum +=",
          "column < shape.width; column += 64) sum +=", "attention"),
    Fault("a warp's sum of half its lanes", "cuda/reduce.cuh", "step = kLanes / 2; step > 0; step /= 2) value +=",
          "step = kLanes / 4; step > 0; step /= 2) value +=", "norm"),
    Fault("the gradient overwrites a logit that is still to be read", "cuda/vocab.cuh",
          "  __syncthreads();  // the logits at the ids have been read\n", "", "vocab"),
    Fault("sparse entries written before the row", "cuda/vocab.cuh",
          "  __syncthreads();  // and the whole row has been written\n", "", "vocab"),
    Fault("negative logits in the wrong order", "cuda/vocab_top.cuh", "bits >> 31 ? ~bits : bits | 0x80000000u",
          "bits | 0x80000000u", "vocab"),
    Fault("an entry of the top found twice", "cuda/vocab_top.cuh", "key < before && key > largest",
          "key <= before && key > largest", "vocab"),
    Fault("a prefix sum short of a step", "cuda/vocab_tail.cuh", "for (int step = 1; step < kLanes; step *= 2)",
          "for (int step = 1; step < kLanes / 2; step *= 2)", "vocab"),
    Fault("the head's equals drawn again", "cuda/vocab_tail.cuh", "if (head[i] == start + column) return false;", "",
          "vocab"),
    Fault("a place of one bit too many", "binding/turn.h", "int64_t(mask) + 1 < size", "int64_t(mask) + 1 <= size",
          "vocab"),
    Fault("ids counted from the part's own start", "cuda/vocab_tail.cuh", "turn.uniform(uint32_t(start + column))",
          "turn.uniform(uint32_t(column))", "vocab"),
    Fault("rows read in packs that do not fit", "cuda/pack.cuh", "return width % kPack<T> == 0 && (", "return (",
          "swiglu"),
]  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Fault, tuple[int, str]]:
    """Exit code and output of a family's tests, with each fault planted."""
    with ThreadPoolExecutor(2) as pool:
        folders = [tmp_path_factory.mktemp("fault") for _ in FAULTS]
        return dict(zip(FAULTS, pool.map(run_with, FAULTS, folders), strict=True))


def run_with(fault: Fault, folder: Path) -> tuple[int, str]:
    sources = folder / "csrc"
    shutil.copytree(CSRC, sources)
    for other in (sources / "cuda").glob("*.cu"):
        if other.stem != fault.family:
            other.unlink()
    text = (sources / fault.file).read_text()
    assert text.count(fault.original) == 1, f"{fault.file} has changed; plant '{fault.what}' anew"
    (sources / fault.file).write_text(text.replace(fault.original, fault.planted))
    build_shim(sources, [fault.family])  # it still compiles, or this raises
    tests = sorted(str(path) for path in Path(__file__).parent.glob(f"test_kernels_{fault.family}*.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *tests, "-k", "shim or order", "-x"],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TITAN_SHIM_SOURCES": str(sources)},
    )
    return done.returncode, done.stdout[-1500:]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.family}: {fault.what}")
def test_a_planted_fault_is_caught(fault: Fault, outcomes: dict[Fault, tuple[int, str]]) -> None:
    code, output = outcomes[fault]
    assert code == 1 and " failed, " in output, f"not caught: {output}"
