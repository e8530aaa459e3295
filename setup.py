"""Builds titan and its kernels; names, versions and dependencies stand in pyproject.toml.

The extension is one library of the stable ABI: it works with the Python and torch it was built for and later ones.
TITAN_CUDA=1 builds the CUDA kernels and fails without nvcc, TITAN_CUDA=0 never does; unset, they are built where nvcc
is and torch has CUDA. Without torch or a C++ compiler at build time titan installs all the same and uses plain torch.
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("kernels/csrc")
TORCH_ABI = "0x020d000000000000"
"""Oldest torch the library loads in: 2.13."""
CUDA_ARCHITECTURES = ("80", "90", "100")
"""A100, H100, B200; newer ones compile the last one's PTX when they load it."""
COMPILE = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fvisibility=hidden",
]
"""Contraction is off so that every instruction set computes the same bits of e^x, and draws the same tokens."""


class BuildKernels(build_ext):
    """Compiles the CUDA files with nvcc first and links their objects with the C++ ones."""

    def build_extension(self, extension: Extension) -> None:
        """Build one extension."""
        for source in [item for item in extension.sources if item.endswith(".cu")]:
            target = Path(self.build_temp, source).with_suffix(".cu.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            self._nvcc(extension, source, target)
            extension.sources.remove(source)
            extension.extra_objects.append(str(target))
        super().build_extension(extension)

    def _nvcc(self, extension: Extension, source: str, target: Path) -> None:
        command = ["nvcc", "-std=c++17", "-O3", "--threads", "2", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        for arch in CUDA_ARCHITECTURES:
            command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        command += ["-gencode", f"arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}"]
        command += [f"-I{folder}" for folder in extension.include_dirs]
        command += [f"-D{name}={value}" for name, value in extension.define_macros]
        if subprocess.call([*command, "-c", source, "-o", str(target)]):
            raise CompileError(f"nvcc could not compile {source}")


def kernels() -> list[Extension]:
    """The extension, or nothing where torch is not there to build against."""
    try:
        from torch import version
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        print("torch is not installed: titan's kernels are not built (pip install --no-build-isolation builds them)")
        return []
    cuda = os.environ.get("TITAN_CUDA", "auto")
    nvcc = shutil.which("nvcc")
    if cuda not in ("auto", "0", "1"):
        raise SystemExit(f"TITAN_CUDA must be 0, 1 or unset, got {cuda}")
    if cuda == "1" and not nvcc:
        raise SystemExit(
            "TITAN_CUDA=1 asks for the CUDA kernels, but nvcc is not on the PATH; install CUDA or unset it"
        )
    with_cuda = cuda == "1" or (cuda == "auto" and nvcc is not None and version.cuda is not None)
    sources = [SOURCES / "schema.cpp", *sorted((SOURCES / "cpu").glob("*.cpp"))]
    libraries, folders = ["c10", "torch_cpu"], library_paths()
    if with_cuda:
        sources += sorted((SOURCES / "cuda").glob("*.cu"))
        libraries.append("cudart_static")
        folders.append(cuda_library_folder(nvcc or ""))
    return [
        Extension(
            "titan_kernels._C",
            [str(source) for source in sources],
            include_dirs=[str(SOURCES), *include_paths()],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_ABI), ("Py_LIMITED_API", "0x030b0000")],
            extra_compile_args=COMPILE,
            depends=[str(path) for path in sorted(SOURCES.rglob("*.*h"))],
            libraries=libraries,
            library_dirs=folders,
            py_limited_api=True,
            optional=cuda != "1",
        )
    ]


def cuda_library_folder(nvcc: str) -> str:
    """Where the CUDA runtime is that the library links: beside nvcc, or where CUDA is usually installed."""
    roots = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path(nvcc).resolve().parent.parent]
    roots += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    for root in roots:
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib"):
            if (root / folder / "libcudart_static.a").is_file():
                return str(root / folder)
    raise SystemExit("the CUDA kernels need libcudart_static.a, which is not under CUDA_HOME; set it or TITAN_CUDA=0")


setup(
    packages=[*find_packages(include=["titan", "titan.*"]), "titan_kernels"],
    package_dir={"titan_kernels": "kernels"},
    ext_modules=kernels(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
