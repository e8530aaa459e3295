"""Whether Ray's head is there, asked by a thread of its own.

Without its head, Ray answers some calls only after a minute, and then ends this process. What needs no head goes on:
calls to actors that are up. So a run that notices in time lets every role save, and says what happened.
"""

import socket
import threading
import time
from typing import Self

import ray

LOOK_EVERY_S = 1.0
GONE_S = 8.0
"""A head that could not be reached for so long is lost."""


class HeadWatch:
    """Looks while its block runs, once Ray is connected."""

    def __init__(self, address: str | None = None, gone_s: float = GONE_S):
        """address: HOST:PORT of the head; that of the connected Ray if None"""
        self.address = address or str(ray.get_runtime_context().gcs_address)
        self.gone_s = gone_s
        self.lost = False
        self.answers = True
        """Whether it was there at the last look."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="head-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(2 * LOOK_EVERY_S)

    def look(self) -> bool:
        """Whether it is there now; a second at most."""
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), LOOK_EVERY_S).close()
            self.answers = True
        except OSError:
            self.answers = False
        return self.answers

    def _run(self) -> None:
        heard = time.monotonic()
        while not self._over.wait(LOOK_EVERY_S):
            begin = time.monotonic()
            if self.look():
                heard = begin
            elif begin - heard > self.gone_s:
                self.lost = True
                return
