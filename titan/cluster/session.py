"""Ray for one run: start a local one or join a cluster, say what is there, go away tidily."""

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray

from titan.cluster.head import HeadWatch
from titan.cluster.token import joining_token, local_token
from titan.config.environment import cpu_count, prepare_environment, ray_address
from titan.config.settings import ClusterSettings
from titan.errors import PlatformError
from titan.plan.inventory import Inventory, Node

ACCELERATORS = {"cuda": "GPU", "npu": "NPU"}
"""What Ray calls one device of each kind."""
NODE_POLL_S = 0.25
OBJECT_STORE_BYTES = 128 << 20
"""Ray's shared memory; labels and checkpoints do not pass through it."""


@contextmanager
def ray_session(settings: ClusterSettings) -> Iterator[None]:
    """Be connected to Ray inside the block; a local Ray ends with it. Raises PlatformError if that fails."""
    local = settings.address is None
    variables = prepare_environment(local)
    logging.getLogger("ray").setLevel(logging.ERROR)  # what it has to say in between would tear the live display
    ray._private.worker.print_to_stdstream = lambda *_, **__: None  # what raylets say of dead workers is an event
    with local_token() if settings.address is None else joining_token(ray_address(settings.address)):
        heed = signal.getsignal(signal.SIGTERM)
        try:
            with no_signal_lost():
                if settings.address is None:
                    _start(settings)
                else:
                    with _watched(ray_address(settings.address)):
                        _join(ray_address(settings.address), variables)
        except SystemExit:  # what Ray makes of a SIGTERM
            raise KeyboardInterrupt from None
        except Exception as error:  # Ray raises whatever went wrong below it
            where = "a local Ray" if local else f"Ray at cluster.address {settings.address}"
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            verb, remedy = ("start", "`titan doctor --ray` looks into it") if local else ("join", "is it up?")
            raise PlatformError(f"cannot {verb} {where}: {first}; {remedy}") from error
        signal.signal(signal.SIGTERM, heed)  # Ray has put a handler of its own in its place
        try:
            if settings.address is not None:
                with _watched(ray_address(settings.address)):
                    _wait_for_nodes(settings)
            yield
        finally:
            ray.shutdown()


@contextmanager
def no_signal_lost() -> Iterator[None]:
    """Raise KeyboardInterrupt at the block's end if SIGTERM came and nothing was raised there by its handler.

    Python drops what a handler raises while it cleans up an object or holds a lock of its own, and Ray's handler only
    raises.
    """
    told, tell = os.pipe()
    for end in (told, tell):
        os.set_blocking(end, False)
    before, print_dropped = signal.set_wakeup_fd(tell, warn_on_full_buffer=False), sys.unraisablehook
    sys.unraisablehook = lambda dropped: None if dropped.exc_type is SystemExit else print_dropped(dropped)
    try:
        yield
        with suppress(BlockingIOError):
            if signal.SIGTERM in os.read(told, 64):
                raise KeyboardInterrupt
    finally:
        sys.unraisablehook = print_dropped
        signal.set_wakeup_fd(before)
        os.close(told)
        os.close(tell)


def _start(settings: ClusterSettings) -> None:
    ray.init(
        address="local",  # without it, Ray joins whatever cluster was last started on this host
        num_cpus=cpu_count(),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=settings.dashboard_port is not None,
        dashboard_port=settings.dashboard_port,
        log_to_driver=False,
        configure_logging=False,
        _node_ip_address="127.0.0.1",
    )


def _join(address: str, variables: dict[str, str]) -> None:
    ray.init(address=address, log_to_driver=False, configure_logging=False, runtime_env={"env_vars": variables})


@contextmanager
def _watched(address: str) -> Iterator[None]:
    """While Ray is waited for: if its head was there and then is not, the process ends with a word on it."""

    def leave() -> None:
        print(
            f"titan: Ray's head at {address} was there and then could not be reached for {watch.silent_s:.0f} s; start "
            "Ray again, then `titan resume` the run",
            file=sys.stderr,
            flush=True,
        )
        os._exit(PlatformError.exit_code)

    watch = HeadWatch(leave, address)
    if not watch.look():  # Ray says what is wrong
        yield
        return
    with watch:
        yield


def _wait_for_nodes(settings: ClusterSettings) -> None:
    """Nodes join one after the other. Raises PlatformError if too few are there in time."""
    deadline = time.monotonic() + settings.start_timeout_s
    while len(names := sorted(node["NodeName"] for node in ray.nodes() if node["Alive"])) < settings.nodes:
        if time.monotonic() > deadline:
            raise PlatformError(
                f"cluster.nodes is {settings.nodes}, but after {settings.start_timeout_s:.0f} s "
                f"(cluster.start_timeout_s) {len(names)} are there: {', '.join(names)}; start the others with `ray "
                "start --address`, or lower cluster.nodes"
            )
        time.sleep(NODE_POLL_S)


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
