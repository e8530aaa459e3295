"""A Ray node on each of several hosts."""

import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.hosts.namespaces import Host

RAY = Path(sys.executable).with_name("ray")
PORT = 6379
START_WAIT_S = 90.0
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_raylet_start_wait_time_s": "90",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""A node that does not answer is given up after four seconds instead of half a minute."""


@dataclass(frozen=True)
class RayHosts:
    """Where the head is, and what processes need that talk to the cluster."""

    address: str
    environment: dict[str, str]


def start_ray(hosts: Sequence[Host], options: Sequence[Sequence[str]]) -> RayHosts:
    """The head on the first host and a node on each of the others; `options` of `ray start`, host by host."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    cluster = RayHosts(f"{hosts[0].address}:{PORT}", token | SETTINGS)
    for number, (host, extra) in enumerate(zip(hosts, options, strict=True)):
        head = ("--head", f"--port={PORT}", "--include-dashboard=false")
        where = head if number == 0 else (f"--address={cluster.address}",)
        start_node(host, cluster, (*where, *extra))
        if number == 0:
            _wait_for_head(host)
    return cluster


def start_node(host: Host, cluster: RayHosts, options: Sequence[str]) -> None:
    """A Ray node on a host, with the host's name."""
    common = ("--block", "--disable-usage-stats", f"--node-ip-address={host.address}", f"--node-name={host.name}")
    memory = f"--object-store-memory={100 << 20}"
    log = host.folder / f"ray-{host.name}.log"
    host.start(RAY, "start", *common, memory, *options, log=log, environment=cluster.environment)


def _wait_for_head(host: Host) -> None:
    deadline = time.monotonic() + START_WAIT_S
    while host.run("bash", "-c", f"exec 3<>/dev/tcp/{host.address}/{PORT}").returncode:
        said = (host.folder / f"ray-{host.name}.log").read_text()
        assert time.monotonic() < deadline, f"no Ray head on {host.name} in {START_WAIT_S} s: {said}"
        time.sleep(0.2)
