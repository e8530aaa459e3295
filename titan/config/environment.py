"""The only place that reads or writes environment variables."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from titan.errors import ConfigError

KernelBackend = Literal["cuda", "apex", "cpu", "torch"]
KERNEL_BACKENDS: tuple[KernelBackend, ...] = ("cuda", "apex", "cpu", "torch")
KERNEL_OPERATIONS = ("rms_norm", "layer_norm", "rope", "swiglu", "attention", "head")


RANK_VARIABLES = {
    "OMP_NUM_THREADS": "1",  # ranks share cores; and a fixed number keeps sums the same bit for bit
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # megatron-core orders its overlapped transfers by it
    "PYTHONWARNINGS": "ignore",  # of libraries, in rank processes; ours are events
}
"""What libraries in rank processes read."""


def prepare_environment(local: bool) -> dict[str, str]:
    """Set what libraries read from the environment, before they start threads or processes; children inherit it.

    local:   all ranks are on this machine, so that their traffic stays on the loopback interface
    returns: what ranks on other machines, which inherit nothing from here, are to be given
    """
    defaults = RANK_VARIABLES | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    }
    if local:
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    return {name: os.environ[name] for name in RANK_VARIABLES}


def ray_address(address: str) -> str:
    """`host:port` of a Ray to join; for `auto`, what RAY_ADDRESS says, and `auto` again if it is unset."""
    return (os.environ.get("RAY_ADDRESS") or address) if address == "auto" else address


def ray_auth_mode() -> str | None:
    """What the user chose for Ray's authentication: `token` or `disabled`; None without RAY_AUTH_MODE."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() or None


def ray_token() -> str | None:
    """The secret of the Ray cluster to join, where Ray looks for it. Raises ConfigError for a file without one."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        token = Path(path or Path.home() / ".ray" / "auth_token").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        if path is None:
            return None
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(
            f"RAY_AUTH_TOKEN_PATH is {path}, which cannot be read ({reason}); name the file with the cluster's token"
        ) from None
    if path is not None and not token:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH is {path}, which is empty; name the file with the cluster's token")
    return token or None


def set_ray_auth(mode: str, token_file: str | None = None) -> dict[str, str | None]:
    """Set Ray's authentication for this process and its children.

    token_file: the only source of the token; None leaves it where the user put it
    returns:    the variables before, for `restore_variables`
    """
    wanted: dict[str, str | None] = {"RAY_AUTH_MODE": mode}
    if token_file is not None:
        wanted |= {"RAY_AUTH_TOKEN_PATH": token_file, "RAY_AUTH_TOKEN": None}
    before = {name: os.environ.get(name) for name in wanted}
    restore_variables(wanted)
    return before


def restore_variables(values: Mapping[str, str | None]) -> None:
    """Set variables; None unsets one."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


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
