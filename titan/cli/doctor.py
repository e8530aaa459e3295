"""`titan doctor`: what this machine has, which back ends a run would choose and why, and whether one can start."""

import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table

from titan.config.environment import cpu_count
from titan.config.settings import ClusterSettings

SHARED_MEMORY = Path("/dev/shm")
OBJECT_STORE_BYTES = 128 << 20
"""What titan.cluster.session has Ray reserve; importing it would import Ray, which takes seconds."""
NAMED_PACKAGES = ("torch", "megatron-core", "ray")
INSTALL = "pip install -e . in titan's folder"


@dataclass(frozen=True)
class Finding:
    """One line of the table. `problem` is what keeps a run from starting, with its remedy."""

    what: str
    found: str
    why: str = ""
    problem: str | None = None


def print_findings(console: Console, try_ray: bool) -> bool:
    """Print the table and a verdict; returns whether a run can start here. Reads everything, changes nothing."""
    findings = [*_software(), *_machine(), *_choices()]
    if try_ray:
        findings.append(_start_ray())
    table = Table(box=None, pad_edge=False)
    for title in ("", "found", "what it means"):
        table.add_column(title, overflow="fold")
    for finding in findings:
        style = "red" if finding.problem else None
        table.add_row(finding.what, finding.found, finding.why, style=style)
    console.print(table)
    problems = [finding.problem for finding in findings if finding.problem]
    console.print()
    console.print(verdict(findings), style="red" if problems else "green", soft_wrap=True)
    return not problems


def verdict(findings: list[Finding]) -> str:
    """One line: can a run start here, and if not, what to do first."""
    problems = [finding.problem for finding in findings if finding.problem]
    if problems:
        return f"A run cannot start here: {'; '.join(problems)}."
    known = {finding.what: finding.found for finding in findings}
    return f"A run can start here, with {known['rank slots']} and {known['collectives']}."


def _software() -> Iterator[Finding]:
    requirements = _requirements()
    yield _python()
    for name in NAMED_PACKAGES:
        yield _package(name, requirements.get(name, Requirement(name)))
    others = {name: wanted for name, wanted in requirements.items() if name not in NAMED_PACKAGES}
    yield _other_packages(list(others.values()))
    yield _apex()
    exporters = [f"{name} {_version(name) or 'absent'}" for name in ("transformers", "tokenizers")]
    yield Finding("Hugging Face", ", ".join(exporters), "only to use exported models; titan export needs neither")
    yield _compiler()


def _python() -> Finding:
    version = platform.python_version()
    try:
        wanted = metadata.metadata("titan")["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        return Finding("python", version, problem=f"titan is not installed as a package, {INSTALL}")
    fits = SpecifierSet(wanted).contains(version, prereleases=True)
    return Finding("python", version, problem=None if fits else f"python is {version}, titan needs {wanted}")


def _requirements() -> dict[str, Requirement]:
    """What titan itself needs, by package name, without the optional groups."""
    try:
        lines = metadata.requires("titan") or []
    except metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines]
    return {item.name: item for item in parsed if item.marker is None or item.marker.evaluate({"extra": ""})}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _satisfied(wanted: Requirement) -> bool:
    version = _version(wanted.name)
    return version is not None and wanted.specifier.contains(version, prereleases=True)


def _package(name: str, wanted: Requirement) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, "absent", problem=f"{name} is missing, {INSTALL}")
    problem = None if _satisfied(wanted) else f"{name} is {version}, titan needs {wanted.specifier}, {INSTALL}"
    return Finding(name, version, _cuda_of_torch() if name == "torch" else "", problem)


def _other_packages(wanted: list[Requirement]) -> Finding:
    """What is absent keeps a run from starting; another version only may."""
    fitting = sum(_satisfied(item) for item in wanted)
    absent = [item.name for item in wanted if _version(item.name) is None]
    unfit = [item for item in wanted if item.name not in absent and not _satisfied(item)]
    why = "; ".join(f"{item.name} is {_version(item.name)}, wanted {item.specifier}" for item in unfit)
    problem = f"{', '.join(absent)} missing, {INSTALL}" if absent else None
    return Finding("other packages", f"{fitting} of {len(wanted)} as required", why, problem)


def _cuda_of_torch() -> str:
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"cannot be imported: {error}"
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"


def _apex() -> Finding:
    """NVIDIA's apex is recognised by its parts, without importing: PyPI's package of that name is a web toolkit."""
    spec = util.find_spec("apex")
    if spec is None:
        return Finding("apex", "absent", "not needed; with CUDA, NVIDIA's makes the optimizer step faster")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    parts = all(any((folder / part).is_dir() for folder in folders) for part in ("multi_tensor_apply", "optimizers"))
    version = _version("apex") or "of unknown version"
    if not parts:
        return Finding(
            "apex",
            f"{version}, not NVIDIA's",
            "PyPI's `apex` is an unrelated web toolkit and not used; pip uninstall apex, NVIDIA's is on its GitHub",
        )
    if util.find_spec("amp_C") is None:
        return Finding("apex", f"{version}, NVIDIA's", "built without its CUDA extension amp_C, so of no use here")
    return Finding("apex", f"{version}, NVIDIA's", "with amp_C")


def _compiler() -> Finding:
    compiler = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    found = [f"{compiler} {_first_line(compiler, '-dumpversion')}" if compiler else "no C++ compiler"]
    found.append("nvcc" if shutil.which("nvcc") else "no nvcc")
    return Finding("compiler", ", ".join(found), "for building titan's kernels; a run compiles nothing")


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0]


def _machine() -> Iterator[Finding]:
    yield Finding("cores", f"{cpu_count()}", "that this process may use")
    memory = psutil.virtual_memory()
    yield Finding("memory", f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB")
    disk = shutil.disk_usage(Path.cwd())
    yield Finding("disk", f"{disk.free / 1e9:.1f} GB free", f"at {Path.cwd()}")
    if SHARED_MEMORY.is_dir():
        shared = shutil.disk_usage(SHARED_MEMORY)
        small = shared.free < OBJECT_STORE_BYTES
        why = f"Ray takes {OBJECT_STORE_BYTES >> 20} MB" + (" and will use slower files in /tmp" if small else "")
        yield Finding(str(SHARED_MEMORY), f"{shared.free / 1e9:.1f} GB free", why)
    else:
        yield Finding(str(SHARED_MEMORY), "absent", "Ray will use slower files in /tmp")


def _choices() -> Iterator[Finding]:
    """Devices and back ends, as the platform and ops floors choose them."""
    try:
        import torch

        from titan.platform.device import VENDORS, num_devices, select_platform
    except (ImportError, OSError) as error:
        reason = str(error).partition("\n")[0]
        yield Finding("devices", "unknown", problem=f"torch cannot be imported ({reason}), {INSTALL}")
        return
    device = select_platform("auto")
    count = num_devices(device.kind) if device.kind != "cpu" else 0
    if count:
        kind, library = device.kind.upper(), VENDORS[device.kind].collectives.upper()
        yield Finding("devices", f"{count} x {device.name}", f"torch sees {kind}, so cluster.device auto takes it")
        yield Finding("rank slots", f"{count} {kind} ranks", "one a device")
        collectives, why = f"{library} collectives", f"between {kind} ranks; gloo for what is on the host"
    else:
        ranks = ClusterSettings().cpu_ranks_per_core
        yield Finding("devices", "CPU only", "torch sees no CUDA device and no Ascend NPU")
        yield Finding("rank slots", f"{cpu_count() * ranks} CPU ranks", f"{ranks} a core (cluster.cpu_ranks_per_core)")
        collectives, why = "gloo collectives", "NCCL works between CUDA devices only"
    available = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    problem: str | None = None
    if not available:
        problem = "torch was built without gloo, install the wheel from pytorch.org"
    elif device.kind == "cuda" and not torch.distributed.is_nccl_available():
        problem = "torch was built without NCCL, install the CUDA wheel from pytorch.org"
    yield Finding("collectives", collectives, why, problem)
    yield _kernels(device.kind)
    yield _optimizer(device.kind == "cuda")


def _kernels(device: str) -> Finding:
    """What each operation of a model gets, and why nothing better."""
    from titan.errors import ConfigError
    from titan.ops.choose import choices

    try:
        chosen = choices(device)
    except ConfigError as error:
        return Finding("kernels", "unknown", problem=str(error))
    by_backend: dict[str, list[str]] = {}
    for operation, choice in chosen.items():
        by_backend.setdefault(choice.backend, []).append(operation)
    found = "; ".join(f"{backend}: {', '.join(operations)}" for backend, operations in by_backend.items())
    reasons = sorted({choice.reason for choice in chosen.values() if choice.reason})
    return Finding("kernels", found, "; ".join(reasons))


def _optimizer(on_cuda: bool) -> Finding:
    """megatron-core takes the first it can import of Transformer Engine's, apex's and torch's."""
    if util.find_spec("transformer_engine") is not None:
        return Finding("optimizer", "Transformer Engine FusedAdam", "megatron-core prefers it where it is installed")
    if _apex().why == "with amp_C":
        why = "megatron-core prefers it to torch's"
        problem = None if on_cuda else "apex's optimizer needs CUDA and there is none, pip uninstall apex"
        return Finding("optimizer", "apex FusedAdam", why, problem)
    return Finding("optimizer", "torch AdamW", "neither Transformer Engine nor NVIDIA's apex can be used")


def _start_ray() -> Finding:
    """Start a local Ray as a run does, and stop it."""
    from titan.cluster.session import discover, ray_session
    from titan.errors import PlatformError

    begin = time.monotonic()
    try:
        with ray_session(ClusterSettings()):
            slots = discover(ClusterSettings()).slots
    except PlatformError as error:
        return Finding("Ray starts", "no", str(error), "Ray does not start (see above)")
    return Finding("Ray starts", f"in {time.monotonic() - begin:.1f} s", f"and offers {slots} rank slots")
