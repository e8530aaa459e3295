"""A sign of life in the run folder: the driver renews it every few seconds, whatever else it waits for.

On the driver's own machine the system knows whether the driver lives; from any other, and from another container, only
this tells. Clocks of the two must agree within LATE_S.
"""

import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from titan.observe.files import read_json, to_json, write_whole

FILE = "heartbeat.json"
BEAT_S = 5.0
LATE_S = 60.0
"""A driver that gave no sign for so long counts as gone."""


@dataclass(frozen=True)
class Beat:
    """One sign of life."""

    time_s: float
    """Unix time."""
    host: str
    machine: str
    """As `this_machine` names it."""
    pid: int


class Heartbeat:
    """Gives signs while its block runs, in a thread of its own."""

    def __init__(self, folder: Path, every_s: float = BEAT_S):
        self._path, self._every_s = folder / FILE, every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(self._every_s)

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            self._beat()

    def _beat(self) -> None:
        beat = Beat(time.time(), socket.gethostname(), this_machine(), os.getpid())
        with suppress(OSError):  # a full disk is told of by those who have something to lose
            write_whole(self._path, to_json(asdict(beat)).encode())


def read_beat(folder: Path) -> Beat | None:
    """The newest sign of life; None if there is none, or it is one of another version."""
    record = read_json(folder / FILE)
    try:
        return None if record is None else Beat(**record)
    except TypeError:
        return None


def this_machine() -> str:
    """A name for where process ids mean the same: this boot of this kernel, and the container this process is in."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts) or socket.gethostname()
