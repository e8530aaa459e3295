"""Whether Ray's head is there, asked by a thread of its own.

Without its head, Ray answers some calls only after a minute, and then ends this process. What needs no head goes on:
calls to actors that are up. So a run that notices in time lets every role save, and says what happened.
"""

import socket
import threading
import time
from collections.abc import Callable
from typing import Self

import ray

LOOK_EVERY_S = LOOK_S = 1.0
"""Between two looks, and for one."""
GONE_S = 7.0
"""A head that could not be reached for so long is lost: with two looks that wait, it is noticed within ten seconds."""
REFUSED_S = 4.0
"""The same where its host answers that nobody listens: the head has ended, no link is down."""
HEED_S = 5.0
"""Who has not heeded a lost head for so long waits for it, in a call to Ray."""


class HeadWatch:
    """Looks while its block runs, once Ray is connected."""

    def __init__(
        self,
        stuck: Callable[[], None],
        address: str | None = None,
        every_s: float = LOOK_EVERY_S,
        gone_s: float = GONE_S,
        refused_s: float = REFUSED_S,
        heed_s: float = HEED_S,
    ):
        """stuck:   called in the watch's thread if the head is lost and nobody heeds that
        address: HOST:PORT of the head; that of the connected Ray if None
        """
        self.stuck, self.every_s, self.heed_s = stuck, every_s, heed_s
        self.gone_s, self.refused_s = gone_s, min(refused_s, gone_s)
        self.address = address or str(ray.get_runtime_context().gcs_address)
        self.lost = False
        self.heeded = threading.Event()
        """To be set by who has seen that it is lost."""
        self.answers = True
        """Whether it was there at the last look."""
        self.refuses = False
        """Whether its host said at the last look that nobody listens."""
        self.heard_s = time.monotonic()
        """When it was there last."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="head-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.heeded.set()
        self._thread.join(2 * LOOK_S)

    def look(self) -> bool:
        """Whether it is there now; LOOK_S at most."""
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), LOOK_S).close()
            self.answers, self.refuses = True, False
        except (OSError, ValueError) as error:  # an address may also be a word that only Ray understands
            self.answers, self.refuses = False, isinstance(error, ConnectionRefusedError)
        return self.answers

    @property
    def silent_s(self) -> float:
        """Since it was there last."""
        return time.monotonic() - self.heard_s

    def _run(self) -> None:
        self.heard_s = time.monotonic()
        while not self._over.wait(self.every_s):
            begin = time.monotonic()
            if self.look():
                self.heard_s = begin
            elif begin - self.heard_s > (self.refused_s if self.refuses else self.gone_s):
                self.lost = True
                if not self.heeded.wait(self.heed_s):
                    self.stuck()
                return
