"""One rank of `mpirun`: rank 0 is the head of a Ray cluster and runs titan; one rank a host more is a node of it.

    mpirun ... python launch/mpi_cluster.py RUN.toml [options of `titan run`]

Address and token travel by MPI; ranks that share a host with another only wait. The exit code is titan's.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mpi4py import MPI
from ray_node import START_TRIES, START_WAIT_S, LaunchError, RayNode, free_port, own_address, ray_environment
from ray_node import start_head as start_ray_head
from ray_node import start_worker as start_ray_worker

POLL_S = 0.2
"""MPI's own waits keep a core busy, so all long ones are polls."""
JOIN_WAIT_S = START_WAIT_S + 60.0
LEAVE_WAIT_S = 60.0
"""For the other ranks to say that they have ended their nodes."""


@dataclass(frozen=True)
class Cluster:
    """What rank 0 tells the others."""

    address: str
    token: str
    error: str = ""


def main(arguments: Sequence[str]) -> int:
    """Exit code of this rank."""
    world = MPI.COMM_WORLD
    hosts: list[str] = world.allgather(socket.gethostname())
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # rank 0 takes it for all: the others leave when it says so
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder = Path(tempfile.mkdtemp(prefix="titan-mpi-"))
    try:
        if world.rank == 0:
            return lead(world, hosts, folder, arguments)
        follow(world, hosts, folder)
        return 0
    except LaunchError as error:
        print(f"mpi_cluster: rank {world.rank} on {hosts[world.rank]}: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def lead(world: Any, hosts: Sequence[str], folder: Path, arguments: Sequence[str]) -> int:
    """Rank 0: the head, titan, and the end for all."""
    port, token = free_port(), secrets.token_hex(32)
    head, error = None, ""
    try:
        head = start_ray_head(folder, port, token, _node_options())
    except LaunchError as caught:
        error = str(caught)
    cluster = Cluster(f"{own_address()}:{port}", token, error)
    for other in range(1, world.size):
        world.send(cluster, dest=other)
    if head is None:
        raise LaunchError(error)
    try:
        return run_titan(cluster, len(set(hosts)), arguments)
    finally:
        try:
            _say_goodbye(world, hosts)
        finally:
            head.stop()


def run_titan(cluster: Cluster, num_hosts: int, arguments: Sequence[str]) -> int:
    """`titan run` to its end, with our signals passed on; a shell's exit code for one that a signal ended."""
    command = [sys.executable, "-m", "titan.cli.main", "run", *arguments, "--resume"]
    command += ["--address", cluster.address, "--set", f"cluster.nodes={num_hosts}"]
    process = subprocess.Popen(command, env=ray_environment(cluster.token), start_new_session=True)

    def pass_on(number: int, _: FrameType | None) -> None:
        process.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    code = process.wait()
    return 128 - code if code < 0 else code


def follow(world: Any, hosts: Sequence[str], folder: Path) -> None:
    """Any other rank: a node of the cluster if it is the first of its host, until rank 0 says that all is over.

    A node that ends is started again, as often as START_TRIES allows.
    """
    cluster: Cluster = _receive(world, JOIN_WAIT_S, "rank 0 to start the head of the cluster")
    if cluster.error:
        return  # rank 0 says so itself
    request = world.irecv(source=0)
    node: RayNode | None = None
    tries = START_TRIES if hosts.index(hosts[world.rank]) == world.rank else 0
    try:
        while not request.test()[0]:
            if tries and (node is None or not node.running):
                if node is not None:
                    words = node.last_words()
                    node.stop()
                    print(
                        f"mpi_cluster: Ray's node on {hosts[world.rank]} ended ({words})", file=sys.stderr, flush=True
                    )
                node = start_ray_worker(folder, cluster.address, cluster.token, _node_options())
                tries -= 1
            time.sleep(POLL_S)
    finally:
        if node is not None:
            node.stop()
    world.send(None, dest=0)


def _say_goodbye(world: Any, hosts: Sequence[str]) -> None:
    """Tell the others that the run is over, and hear from each that its node has ended."""
    others = range(1, world.size)
    for other in others:
        world.send(None, dest=other)
    requests = {other: world.irecv(source=other) for other in others}
    deadline = time.monotonic() + LEAVE_WAIT_S
    while requests and time.monotonic() < deadline:
        requests = {other: request for other, request in requests.items() if not request.test()[0]}
        time.sleep(POLL_S)
    if requests:
        names = ", ".join(f"rank {other} on {hosts[other]}" for other in requests)
        print(f"mpi_cluster: {names} did not end within {LEAVE_WAIT_S:.0f} s", file=sys.stderr, flush=True)
        world.Abort(1)


def _receive(world: Any, wait_s: float, what: str) -> Any:
    request = world.irecv(source=0)
    deadline = time.monotonic() + wait_s
    while True:
        done, value = request.test()
        if done:
            return value
        if time.monotonic() > deadline:
            raise LaunchError(f"waited {wait_s:.0f} s for {what}; see what rank 0 says")
        time.sleep(POLL_S)


def _node_options() -> tuple[str, ...]:
    """Options of `ray start` that TITAN_RAY_OPTIONS gives, such as --num-cpus=4 --resources={"fast":4}."""
    return tuple(os.environ.get("TITAN_RAY_OPTIONS", "").split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
