"""Before a container ends: ask its drivers to stop, and wait for them and for its ranks.

    python -m titan.cluster.drain SECONDS

Kubernetes calls it (launch/k8s, `preStop`): it ends a pod's first process, which is Ray, and would kill a driver that
Ray started along with it. It looks at every process it can see: in a container those of the container, elsewhere
those of the whole machine.
"""

import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise

import psutil

POLL_S = 0.5


def drain(processes: Iterable[psutil.Process], timeout_s: float) -> bool:
    """SIGTERM to every driver among them; whether drivers and ranks among them were gone in time."""
    deadline = time.monotonic() + timeout_s
    waited_for = []
    for process in processes:
        with suppress(psutil.Error):
            words = process.cmdline()
            if is_driver(words):
                process.terminate()
            if is_driver(words) or is_rank(words):
                waited_for.append(process)
    while any(_lives(process) for process in waited_for) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return not any(_lives(process) for process in waited_for)


def is_driver(words: list[str]) -> bool:
    """Whether a command line is that of `titan run` or `titan resume`; a shell that calls it is not."""
    for program, command in pairwise(words):
        if command in ("run", "resume"):
            return program.endswith(("/titan", "titan.cli.main", "/titan/cli/main.py")) or program == "titan"
    return False


def is_rank(words: list[str]) -> bool:
    """Whether a command line is that of a rank or a spare process."""
    return bool(words) and words[0].startswith("ray::") and "RankActor" in words[0]


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def main() -> int:
    """All processes there are."""
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        print("titan.cluster.drain: how long to wait at most? python -m titan.cluster.drain SECONDS", file=sys.stderr)
        return 2
    return 0 if drain(psutil.process_iter(), float(sys.argv[1])) else 1


if __name__ == "__main__":
    sys.exit(main())
