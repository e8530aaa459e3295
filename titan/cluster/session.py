"""Ray for one run: start a local one or join a cluster, say what is there, go away tidily."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from titan.config.environment import cpu_count, prepare_environment
from titan.config.settings import ClusterSettings
from titan.errors import PlatformError
from titan.plan.inventory import Inventory, Node

OBJECT_STORE_BYTES = 128 << 20
"""Ray's shared memory; labels and checkpoints do not pass through it."""


@contextmanager
def ray_session(settings: ClusterSettings) -> Iterator[None]:
    """Be connected to Ray inside the block; a local Ray ends with it. Raises PlatformError if that fails."""
    local = settings.address is None
    prepare_environment(local)
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
        raise PlatformError(f"cannot reach {where}: {first}") from error
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
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        if settings.device != "cpu" and gpus:
            nodes.append(Node(node["NodeName"], "cuda", gpus))
        elif settings.device != "cuda" and cpus:
            nodes.append(Node(node["NodeName"], "cpu", cpus * settings.cpu_ranks_per_core))
    if not nodes:
        raise PlatformError(f"no node of the cluster has a device for cluster.device {settings.device!r}")
    return Inventory(tuple(nodes))


def local_inventory(settings: ClusterSettings) -> Inventory:
    """What a local Ray will offer on this CPU machine, without starting it."""
    return Inventory((Node(os.uname().nodename, "cpu", cpu_count() * settings.cpu_ranks_per_core),))
