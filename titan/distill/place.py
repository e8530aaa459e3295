"""Where a student is in its teacher's log, told to the teacher: old labels go, and it pauses, by that."""

import time
from pathlib import Path

from titan.checkpoint.files import Files
from titan.checkpoint.folder import newest_step
from titan.distill.log.retention import remove_place, write_place, write_position

LOOK_S = 0.1
"""How often it is looked whether a checkpoint is there."""


class PlaceTeller:
    """Of a student's lead. A checkpoint counts once it is whole on disk, however long that takes."""

    def __init__(self, log: Path | Files, name: str, checkpoints: Path | Files, live: bool, held: int = 0):
        """log: of its teacher;  live: also tell every step that it learns, because the teacher may wait for it
        held: steps up to that of a checkpoint that it may want to read again
        """
        self.log, self.name, self.checkpoints, self.live, self.held = log, name, checkpoints, live, held
        self.saved = newest_step(checkpoints)
        self.awaited = 0
        """Step of the checkpoint on its way."""
        self._position: int | None = None
        self._next_look = 0.0
        if self.saved is None:
            remove_place(log, name)
        else:
            write_place(log, name, max(0, self.saved - held))

    def saving(self, step: int) -> None:
        """A checkpoint of a step is on its way."""
        self.awaited = step

    def tell(self, step: int) -> None:
        """The student has learned a step, or still has; call it after each, and while it waits for the next."""
        if self.live and step != self._position:
            write_position(self.log, self.name, step)
            self._position = step
        if self.awaited > (self.saved or 0) and time.monotonic() >= self._next_look:
            self.look()

    def look(self) -> None:
        """See whether there is a newer checkpoint."""
        self._next_look = time.monotonic() + LOOK_S
        newest = newest_step(self.checkpoints)
        if newest is not None and newest > (self.saved or 0):
            write_place(self.log, self.name, max(0, newest - self.held))
            self.saved = newest
