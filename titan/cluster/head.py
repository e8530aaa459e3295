"""Whether Ray's head is there, asked by a thread of its own, and how roles save without it.

Without its head, Ray answers some calls only after a minute, and then ends this process. What needs no head goes on:
calls to actors that are up. So a run that notices in time lets every role save, and says what happened.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Self

import ray

from titan.cluster.failure import error_of
from titan.cluster.role_group import Phase, RoleGroup

LOOK_EVERY_S = LOOK_S = 1.0
"""Between two looks, and for one."""
GONE_S = 8.0
"""A head that could not be reached for so long is lost."""
HEED_S = 5.0
"""Who has not heeded a lost head for so long waits for it, in a call to Ray."""
SAVE_S = 20.0
"""For roles to save once the head is lost: a minute after that, Ray ends this process."""


class HeadWatch:
    """Looks while its block runs, once Ray is connected."""

    def __init__(
        self,
        stuck: Callable[[], None],
        address: str | None = None,
        every_s: float = LOOK_EVERY_S,
        gone_s: float = GONE_S,
        heed_s: float = HEED_S,
    ):
        """stuck:   called in the watch's thread if the head is lost and nobody heeds that
        address: HOST:PORT of the head; that of the connected Ray if None
        """
        self.stuck, self.every_s, self.gone_s, self.heed_s = stuck, every_s, gone_s, heed_s
        self.address = address or str(ray.get_runtime_context().gcs_address)
        self.lost = False
        self.heeded = threading.Event()
        """To be set by who has seen that it is lost."""
        self.answers = True
        """Whether it was there at the last look."""
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
            self.answers = True
        except OSError:
            self.answers = False
        return self.answers

    def _run(self) -> None:
        heard = time.monotonic()
        while not self._over.wait(self.every_s):
            begin = time.monotonic()
            if self.look():
                heard = begin
            elif begin - heard > self.gone_s:
                self.lost = True
                if not self.heeded.wait(self.heed_s):
                    self.stuck()
                return


def save_without_head(groups: Iterable[RoleGroup]) -> list[str]:
    """Let the roles that train save and end; returns those that could not, also those that were just starting."""
    groups = list(groups)
    training = [group for group in groups if group.phase is Phase.TRAIN]
    for group in training:
        group.request_stop()
    pending = [ref for group in training for ref in group.pending]
    done = set(ray.wait(pending, num_returns=len(pending), timeout=SAVE_S)[0]) if pending else set()
    saved = [one for one in training if all(ref in done and error_of(ref) is None for ref in one.pending)]
    return [group.role for group in groups if group.phase is not Phase.DONE and group not in saved]
