"""The grace that a scheduler gives after SIGTERM: what is left of it, and an end to the process when it is over."""

import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Self

from titan.errors import OutOfTimeError, StoppedError

LAST_S = 15.0
"""Kept for ending processes and leaving word: this much before the end of its grace a run stops waiting for roles."""
LARGEST_SHARE = 1 / 2
"""Of a short grace, at most this share is kept."""


class Grace:
    """Begins with SIGTERM. A context manager: the run inside it has to end in time, or the process does."""

    def __init__(self, seconds: float, remedy: str):
        """remedy: what to do afterwards, for the last word of a process that did not end in time"""
        self.seconds, self.remedy = seconds, remedy
        self._end_s: float | None = None
        self._timer = threading.Timer(seconds, self._leave)
        self._timer.daemon = True
        self._exit_code = OutOfTimeError.exit_code

    def begin(self) -> None:
        """From now on; a second call changes nothing."""
        if self._end_s is None:
            self._end_s = time.monotonic() + self.seconds
            self._timer.start()

    @property
    def is_nearly_over(self) -> bool:
        """Whether what is left is only enough to end."""
        kept_s = min(LAST_S, LARGEST_SHARE * self.seconds)
        return self._end_s is not None and time.monotonic() > self._end_s - kept_s

    def out_of_time(self, late: Sequence[str]) -> OutOfTimeError:
        """The error of a run whose roles `late` have not saved by now."""
        return OutOfTimeError(
            f"stopped at once: {', '.join(late)} had not saved when the {self.seconds:g} s after SIGTERM "
            f"(recovery.grace_s) were nearly over; {self.remedy}"
        )

    def saved(self) -> None:
        """All roles have their checkpoint: whatever happens now, the run stopped as it should."""
        self._exit_code = StoppedError.exit_code

    def _leave(self) -> None:
        """In a thread of its own, so that nothing the driver waits for can hold it up; Ray's processes end with it."""
        print(f"titan: recovery.grace_s: {self.seconds:g} s after SIGTERM; {self.remedy}", file=sys.stderr, flush=True)
        os._exit(self._exit_code)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()
