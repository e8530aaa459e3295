"""Ray for one run: start a local one or join a cluster, say what is there, go away tidily."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from titan.config.environment import cpu_count, prepare_environment
from titan.config.settings import ClusterSettings
from titan.errors import PlatformError
from titan.plan.inventory import Inventory, Node

ACCELERATORS = {"cuda": "GPU", "npu": "NPU"}
"""What Ray calls one device of each kind."""
OBJECT_STORE_BYTES = 128 << 20
"""Ray's shared memory; labels and checkpoints do not pass through it."""


@contextmanager
def ray_session(settings: ClusterSettings) -> Iterator[None]:
    """Be connected to Ray inside the block; a local Ray ends with it. Raises PlatformError if that fails."""
    local = settings.address is None
    prepare_environment(local)
    logging.getLogger("ray").setLevel(logging.ERROR)  # what it has to say in between would tear the live display
    try:
        if local:
            ray.init(
                num_cpus=cpu_count(),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=settings.dashboard_port is not None,
                dashboard_port=settings.dashboard_port,
                log_to_driver=False,
                configure_logging=False,
                _node_ip_address="127.0.0.1",
            )
        else:
            ray.init(address=settings.address, log_to_driver=False, configure_logging=False)
    except Exception as error:  # Ray raises whatever went wrong below it
        where = "a local Ray" if local else f"Ray at cluster.address {settings.address}"
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        verb, remedy = ("start", "`titan doctor --ray` looks into it") if local else ("join", "is it up?")
        raise PlatformError(f"cannot {verb} {where}: {first}; {remedy}") from error
    try:
        yield
    finally:
        ray.shutdown()


def discover(settings: ClusterSettings) -> Inventory:
    """Machines of the connected cluster and the ranks each can take."""
    nodes = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        resources = node["Resources"]
        found = [(kind, int(resources.get(name, 0))) for kind, name in ACCELERATORS.items()]
        kind, count = next((one for one in found if one[1] and settings.device in ("auto", one[0])), ("cpu", 0))
        if count:
            nodes.append(Node(node["NodeName"], kind, count))
        elif settings.device in ("auto", "cpu") and (cpus := int(resources.get("CPU", 0))):
            nodes.append(Node(node["NodeName"], "cpu", cpus * settings.cpu_ranks_per_core))
    if not nodes:
        raise _no_device(settings)
    return Inventory(tuple(nodes))


def local_inventory(settings: ClusterSettings) -> Inventory:
    """What a local Ray will offer on this machine, without starting it. Raises PlatformError if that is nothing."""
    name = os.uname().nodename
    if settings.device != "cpu" and _may_have_accelerator():
        from titan.platform.device import VENDORS, num_devices  # torch: two seconds that a machine without saves

        for kind in VENDORS:
            if settings.device in ("auto", kind) and (count := num_devices(kind)):
                return Inventory((Node(name, kind, count),))
    if settings.device not in ("auto", "cpu"):
        raise _no_device(settings)
    return Inventory((Node(name, "cpu", cpu_count() * settings.cpu_ranks_per_core),))


def _may_have_accelerator() -> bool:
    return any(Path("/dev", name).exists() for name in ("nvidiactl", "dxg", "davinci_manager"))


def _no_device(settings: ClusterSettings) -> PlatformError:
    where = "this machine" if settings.address is None else f"the cluster at {settings.address}"
    return PlatformError(
        f"cluster.device is {settings.device!r}, but {where} has no such device; set cluster.device to 'auto' or 'cpu'"
    )
