"""The processes of ranks, ended by the system: one that hangs cannot be asked to."""

import os
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from titan.cluster.rank_actor import Whereabouts

KILL_WAIT_S = 10.0
LOOK_S = 0.25


def kill_processes(places: Sequence[Whereabouts], headless: bool = False) -> None:
    """SIGKILL, on every node that lives; returns when they are gone, or their node is, or KILL_WAIT_S later.

    headless: only on this host, as Ray's head is lost; elsewhere they end with their node
    """
    if headless:
        kill_pids([place.pid for place in places if place.host == socket.gethostname()])
        return
    alive = _alive()
    here = ray.get_runtime_context().get_node_id()
    by_node: dict[str, list[int]] = {}
    for place in places:
        by_node.setdefault(place.node_id, []).append(place.pid)
    calls: dict[Any, str] = {}
    for node, pids in by_node.items():
        if node == here and all(place.host == socket.gethostname() for place in places if place.node_id == node):
            kill_pids(pids)
        elif node in alive:
            affinity = NodeAffinitySchedulingStrategy(node, soft=False)
            calls[ray.remote(kill_pids).options(num_cpus=0, scheduling_strategy=affinity).remote(pids)] = node
    deadline = time.monotonic() + KILL_WAIT_S
    while calls and time.monotonic() < deadline:  # a host that was lost counts as alive for some seconds
        ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=LOOK_S)
        alive = _alive()
        calls = {call: node for call, node in calls.items() if call not in ready and node in alive}


def _alive() -> set[str]:
    """Nodes that Ray has not given up."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def kill_pids(pids: Sequence[int]) -> None:
    """SIGKILL processes of this machine and wait until they are gone."""
    deadline = time.monotonic() + KILL_WAIT_S
    for pid in pids:
        if not _is_rank(pid):
            continue
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        while time.monotonic() < deadline and _is_rank(pid):
            time.sleep(0.01)


def _is_rank(pid: int) -> bool:
    """Whether a process lives and is a rank's: its number may have gone to another."""
    try:
        return b"RankActor" in Path(f"/proc/{pid}/cmdline").read_bytes()  # empty once it is dead
    except OSError:
        return False
