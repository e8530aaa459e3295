"""What the keeper of a log asks of the disk that it is on: its size, where readers are, old steps to be dropped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from titan.checkpoint.fence import Fence
from titan.distill.log.retention import (
    Kept,
    Retention,
    drop_before,
    largest_step_bytes,
    log_bytes,
    read_position,
    retain,
)


class LogUpkeep(Protocol):
    """Of the log of one role."""

    def size_bytes(self) -> int:
        """What the log takes."""

    def step_bytes(self) -> int:
        """What a step takes at most."""

    def retain(self, rule: Retention, expected: Mapping[str, int]) -> Kept:
        """Drop what need not be kept, as `retention.retain` does."""

    def position(self, reader: str) -> int | None:
        """The last step that a reader said to have learned."""


class LocalUpkeep:
    """Of a log that this process sees, and its second copy."""

    def __init__(self, folder: Path, copy: Path | None = None, fence: Fence | None = None):
        self.folder, self.copy, self.fence = folder, copy, fence

    def size_bytes(self) -> int:
        """What the log takes."""
        return log_bytes(self.folder)

    def step_bytes(self) -> int:
        """What a step takes at most."""
        return largest_step_bytes(self.folder)

    def retain(self, rule: Retention, expected: Mapping[str, int]) -> Kept:
        """Drop what need not be kept. Raises OvertakenError if another generation was started since."""
        if self.fence is not None:
            self.fence.check()
        kept = retain(self.folder, rule, expected)
        if kept.dropped_bytes and self.copy is not None:
            drop_before(self.copy, kept.first_step)
        return kept

    def position(self, reader: str) -> int | None:
        """The last step that a reader said to have learned."""
        return read_position(self.folder, reader)
