"""What a device can do, behind one small type; the rest of titan never asks torch which device it runs on."""

import importlib
import importlib.util
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from titan.errors import PlatformError

DeviceKind = Literal["cpu", "cuda", "npu"]


@dataclass(frozen=True)
class Vendor:
    """A kind of accelerator, by the names its software has."""

    kind: DeviceKind
    collectives: str
    """Its torch.distributed backend."""
    package: str | None
    """What must be imported before torch knows the device; None for what torch knows itself."""
    missing: str
    """Why there may be none, for a message."""


CUDA = Vendor("cuda", "nccl", None, "torch sees no CUDA device")
NPU = Vendor("npu", "hccl", "torch_npu", "there is no Ascend device, or no torch_npu to reach it with")
VENDORS = {vendor.kind: vendor for vendor in (CUDA, NPU)}
"""In the order in which `auto` looks for them."""


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
        if self.kind != "cpu":
            _runtime(VENDORS[self.kind]).synchronize(self.device)


def select_platform(wanted: Literal["auto", "cpu", "cuda", "npu"]) -> Platform:
    """The device of this process; `auto` takes an accelerator where there is one.

    Raises PlatformError if an accelerator is asked for by name and there is none.
    """
    for kind, vendor in VENDORS.items():
        if wanted in ("auto", kind) and num_devices(kind):
            backend = f"cpu:gloo,{kind}:{vendor.collectives}"
            return Platform(kind, _runtime(vendor).get_device_name(0), torch.device(kind, 0), backend)
        if wanted == kind:
            raise PlatformError(
                f"cluster.device is {wanted!r}, but {vendor.missing} (torch {torch.__version__}) on "
                f"{socket.gethostname()}; set cluster.device to 'auto' or 'cpu'"
            )
    return Platform("cpu", "cpu", torch.device("cpu"), "gloo")


def num_devices(kind: DeviceKind) -> int:
    """Accelerators of a kind that this process sees; none of them is touched."""
    vendor = VENDORS[kind]
    if vendor.package is not None:
        if importlib.util.find_spec(vendor.package) is None:
            return 0
        importlib.import_module(vendor.package)  # registers the device with torch
    runtime = _runtime(vendor)
    return int(runtime.device_count()) if runtime is not None and runtime.is_available() else 0


def prepare_process(platform: Platform, threads: int = 1) -> None:
    """Set this process up for training on `platform`; call before anything of megatron-core is imported."""
    torch.set_num_threads(threads)
    if platform.kind == "cpu":
        from titan.platform import megatron_on_cpu

        megatron_on_cpu.install()
        return
    if platform.kind == "npu":  # the vendor's own way to lead calls of torch.cuda, as megatron-core makes them, to NPUs
        importlib.import_module("torch_npu.contrib.transfer_to_npu")
    _runtime(VENDORS[platform.kind]).set_device(platform.device)


def join_process_group(platform: Platform, store: Store, rank: int, ranks: int, timeout_s: float) -> None:
    """Make this process `rank` of a world of `ranks` that meet in `store`."""
    dist.init_process_group(
        platform.backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout_s)
    )


def _runtime(vendor: Vendor) -> Any:
    """torch.cuda, torch.npu; None where torch does not know the device."""
    return getattr(torch, vendor.kind, None)
