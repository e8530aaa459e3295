"""One node of a Ray cluster as a child process: started, watched and ended, with nothing else of this machine touched.

`ray stop` would end every Ray on the machine, other users' jobs included; here only the node's own processes are.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

UP = b"Ray runtime started"
"""What `ray start` says once the node is there."""
START_TRIES = 3
"""On a busy host Ray's own wait for a node, 30 s, can be too short."""
START_WAIT_S = 180.0
"""Longest wait for a head, all tries together."""
STOP_WAIT_S = 5.0
"""From SIGTERM to SIGKILL; nothing of value is left in a node when the run has ended."""
POLL_S = 0.2


class LaunchError(Exception):
    """What went wrong, in one line with a remedy."""


@dataclass(frozen=True)
class RayNode:
    """A running `ray start --block` and where it writes."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def running(self) -> bool:
        """False once the node is gone, for whatever reason."""
        return self.process.poll() is None

    @property
    def is_up(self) -> bool:
        """True once the node has said so."""
        return UP in self.log.read_bytes()

    def stop(self) -> None:
        """End the node and all its processes."""
        for number, wait_s in ((signal.SIGTERM, STOP_WAIT_S), (signal.SIGKILL, 10.0)):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            deadline = time.monotonic() + wait_s
            while time.monotonic() < deadline and _group_lives(self.process.pid):
                self.process.poll()
                time.sleep(POLL_S)
        self.process.poll()

    def last_words(self) -> str:
        """The last line that the node wrote."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"


def start_head(folder: Path, port: int, token: str, options: tuple[str, ...] = ()) -> RayNode:
    """A head on this host, up. Raises LaunchError if none is after START_TRIES or START_WAIT_S."""
    deadline = time.monotonic() + START_WAIT_S
    for _ in range(START_TRIES):
        node = _start(folder, token, ("--head", f"--port={port}", "--include-dashboard=false", *options))
        while node.running and not node.is_up and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if node.is_up and node.running:
            return node
        words = node.last_words()
        node.stop()
        if time.monotonic() > deadline:
            break
    raise LaunchError(
        f"Ray's head on {own_address()}:{port} does not come up ({words}); `titan doctor --ray` looks into it"
    )


def start_worker(folder: Path, address: str, token: str, options: tuple[str, ...] = ()) -> RayNode:
    """A node that joins the head at `host:port`."""
    return _start(folder, token, (f"--address={address}", *options))


def ray_environment(token: str) -> Mapping[str, str]:
    """What processes need that talk to the cluster: the token by environment, which only this user can read."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    return kept | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # Ray would wait for 30 s when it is asked to end
    }


def own_address() -> str:
    """This host's address as other hosts reach it: that of the way out, else that of its name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: only the way there is looked up
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostbyname(socket.gethostname())


def free_port() -> int:
    """A port of this host that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _start(folder: Path, token: str, options: tuple[str, ...]) -> RayNode:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "ray_node.log"
    command = [Path(sys.executable).with_name("ray"), "start", "--block", "--disable-usage-stats"]
    command += [f"--node-name={socket.gethostname()}", *options]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env=ray_environment(token),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return RayNode(process, log)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
