"""What a device can do, behind one small type; the rest of titan never asks torch which device it runs on."""

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from titan.errors import PlatformError

DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Platform:
    """One device of this process."""

    kind: DeviceKind
    name: str
    device: torch.device
    backend: str
    """torch.distributed backend string of collectives inside a world."""

    @property
    def has_tags(self) -> bool:
        """Whether point-to-point messages between this device's ranks can be told apart by tags."""
        return self.kind == "cpu"

    def synchronize(self) -> None:
        """Wait for all work queued on the device."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.device)


def select_platform(wanted: Literal["auto", "cpu", "cuda"]) -> Platform:
    """The device of this process; `auto` takes CUDA where torch sees one.

    Raises PlatformError if `cuda` is asked for and torch sees no CUDA device.
    """
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise PlatformError(
            f"cluster.device is 'cuda', but torch {torch.__version__} sees no CUDA device on {socket.gethostname()}; "
            "set cluster.device to 'auto' or 'cpu'"
        )
    if wanted == "cpu" or not has_cuda:
        return Platform("cpu", "cpu", torch.device("cpu"), "gloo")
    return Platform("cuda", torch.cuda.get_device_name(), torch.device("cuda", 0), "cpu:gloo,cuda:nccl")


def num_cuda_devices() -> int:
    """CUDA devices that torch sees in this process; none of them is touched."""
    return torch.cuda.device_count()


def prepare_process(platform: Platform, threads: int = 1) -> None:
    """Set this process up for training on `platform`; call before anything of megatron-core is imported."""
    torch.set_num_threads(threads)
    if platform.kind == "cpu":
        from titan.platform import megatron_on_cpu

        megatron_on_cpu.install()
    else:
        torch.cuda.set_device(platform.device)


def join_process_group(platform: Platform, store: Store, rank: int, ranks: int, timeout_s: float) -> None:
    """Make this process `rank` of a world of `ranks` that meet in `store`."""
    dist.init_process_group(
        platform.backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout_s)
    )
