"""Whether the disks that a run writes to are nearly full, looked at by the driver, and what is done about it."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

from titan.cluster.role_group import Phase, RoleGroup
from titan.config.settings import RunConfig
from titan.errors import RunError
from titan.observe.events import EventLog

LOOK_EVERY_S = 1.0


class DiskWatch:
    """Of the run folder and the folder of second copies of labels."""

    def __init__(self, config: RunConfig, run_folder: Path, events: EventLog):
        self.config, self.run_folder, self.events = config, run_folder, events
        self.least_bytes = config.recovery.min_free_bytes
        copies = config.labels.copy_to
        self.folders = [run_folder, *([Path(copies)] if copies is not None else [])]
        self.low = False
        """Whether one of them has less than `recovery.min_free_bytes` free."""
        self.must_stop = False
        """Whether the run is to save and end while there is room for that."""
        self._next_look = 0.0
        self._free_bytes, self._where = 0, run_folder

    def look(self, groups: Iterable[RoleGroup]) -> None:
        """Call it often. Roles that make labels hear of a disk that is nearly full, and drop some, or pause."""
        if not self.least_bytes or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_EVERY_S
        self._free_bytes, self._where = min((free_bytes(folder), folder) for folder in self.folders)
        before, self.low = (self.low, self.must_stop), self._free_bytes < self.least_bytes
        act = self.config.labels.when_full if self.config.makes_labels else "stop"
        if self.low and (act == "stop" or self._free_bytes < self.least_bytes // 2):
            self.must_stop = True
        if (self.low, self.must_stop) != before:
            does = "stop" if self.must_stop else act if self.low else "go on"
            self.events.emit(
                "disk_low" if self.low else "disk_has_room", folder=str(self._where), free_bytes=self._free_bytes,
                least_bytes=self.least_bytes, does=does,
            )  # fmt: skip
        if act != "stop" and (self.low or before[0]):
            for group in groups:
                if self.config.teaches(group.role) and group.phase is Phase.TRAIN:
                    group.heed_disk(self.low)

    def error(self) -> RunError:
        """What the run says that ended for it."""
        return RunError(
            f"{self._where} has {self._free_bytes >> 20} MiB free (recovery.min_free_bytes is {self.least_bytes}, "
            f"labels.when_full is {self.config.labels.when_full!r}): every role has saved; make room, then "
            f"`titan resume {self.run_folder}` goes on from there"
        )


def free_bytes(folder: Path) -> int:
    """What may be written to the disk of a folder. Raises RunError if it is gone."""
    try:
        found = os.statvfs(folder)
    except OSError as error:
        raise RunError(
            f"cannot look at {folder}, which the run writes to: {error.strerror}; bring it back, then `titan resume`"
        ) from None
    return found.f_bavail * found.f_frsize
