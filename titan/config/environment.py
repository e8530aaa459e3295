"""The only place that reads or writes environment variables."""

import os
from typing import Literal

from titan.errors import ConfigError

KernelBackend = Literal["cuda", "apex", "cpu", "torch"]
KERNEL_BACKENDS: tuple[KernelBackend, ...] = ("cuda", "apex", "cpu", "torch")
KERNEL_OPERATIONS = ("rms_norm", "layer_norm", "rope", "swiglu", "attention", "head")


def prepare_environment(local: bool) -> None:
    """Set what libraries read from the environment, before they start threads or processes; children inherit it.

    local: all ranks are on this machine, so that their traffic stays on the loopback interface
    """
    defaults = {
        "OMP_NUM_THREADS": "1",  # ranks share cores; and a fixed number keeps sums the same bit for bit
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DEDUP_LOGS": "0",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # megatron-core orders its overlapped transfers by it
        "PYTHONWARNINGS": "ignore",  # of libraries, in rank processes; ours are events
    }
    if local:
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def user_cache_variable() -> str | None:
    """Folder for prepared corpora that `TITAN_CACHE` names, if it is set."""
    return os.environ.get("TITAN_CACHE")


def wanted_kernels() -> dict[str, KernelBackend]:
    """What `TITAN_KERNELS` says: operation to implementation; empty when it is unset or `auto`. Raises ConfigError."""
    text = os.environ.get("TITAN_KERNELS", "")
    if text in ("", "auto"):
        return {}
    if text == "torch":
        return dict.fromkeys(KERNEL_OPERATIONS, "torch")
    wanted: dict[str, KernelBackend] = {}
    for part in text.split(","):
        operation, _, name = part.strip().partition("=")
        backend = next((known for known in KERNEL_BACKENDS if known == name), None)
        if operation not in KERNEL_OPERATIONS or backend is None:
            raise ConfigError(
                f"TITAN_KERNELS must be auto, torch or a list like rms_norm=torch,attention=cuda, got {part.strip()!r};"
                f" operations: {', '.join(KERNEL_OPERATIONS)}; implementations: {', '.join(KERNEL_BACKENDS)}"
            )
        wanted[operation] = backend
    return wanted
