"""Reading the log: steps in order, waiting at its end. Live, late and restarted students all do this."""

import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from titan.distill.codec.block import HEADER_BYTES, LabelBlock, decode_block
from titan.distill.log.index import offset_of_step
from titan.distill.log.records import Commit, CommitCursor, End
from titan.distill.log.retention import KEPT, first_kept
from titan.distill.log.segment import Located, first_step_of, part_folder, scan_open, segment_path, segments_of
from titan.errors import LabelError
from titan.observe.files import was_replaced

POLL_S = 0.005
WINDOW = 256
"""Commit records that are held for readers that go back a little."""
CHUNK_BYTES = 1 << 14
"""Of commit records that are taken in ahead of the reader: some 150."""


class DroppedError(LabelError):
    """The step was dropped by the producer's retention; ask `wait_commit` again for the first that is still there."""


class LabelReader:
    """Reads steps and waits at the end of the log. Each reader has its own files and place, and a bounded memory."""

    def __init__(self, folder: Path, timeout_s: float):
        self.folder, self.timeout_s = folder, timeout_s
        self.tail = CommitCursor(folder)
        """Always at the end: what has been committed."""
        self.cursor = CommitCursor(folder, CHUNK_BYTES)
        """Where the reader is."""
        self.commits: dict[int, Commit] = {}
        self.first_committed = 0
        self.parts: dict[int, _PartReader] = {}
        self.kept: tuple[int, int] = (0, 0)
        """When kept.json was last written, and the first step it names."""

    @property
    def last_committed(self) -> int:
        """The newest readable step; 0 if there is none."""
        return self.tail.last_step

    @property
    def ended(self) -> End | None:
        """Why no more steps will come; None while they may."""
        return self.tail.ended

    @property
    def first_step(self) -> int:
        """The first step that is still there; 0 until `poll` has found a commit, unless steps were dropped."""
        path = self.folder / KEPT
        try:
            written = path.stat().st_mtime_ns
        except FileNotFoundError:
            return self.first_committed
        if written != self.kept[0]:
            self.kept = (written, first_kept(self.folder))
        return max(self.kept[1], self.first_committed)

    def wait_commit(self, step: int, give_up: Callable[[], bool] = lambda: False) -> Commit | None:
        """The commit of a step, waiting for it; None if the log ended before it or `give_up` says so.

        For a step that was dropped, or lies before the log's first, the commit is that of the first step still there:
        who learns steps in order sees from its number what is skipped.
        Raises LabelError when nothing at all was committed for `timeout_s`.
        """
        deadline, seen = time.monotonic() + self.timeout_s, self.last_committed
        while True:
            self.poll()
            if self.last_committed >= max(step, self.first_step, 1):
                return self._commit(max(step, self.first_step))
            if self.ended is not None or give_up():
                return None
            if self.last_committed != seen:
                deadline, seen = time.monotonic() + self.timeout_s, self.last_committed
            if time.monotonic() > deadline:
                raise LabelError(
                    f"waited {self.timeout_s:.0f} s for labels of step {step}, the last committed is {seen} "
                    f"in {self.folder}; is the teacher alive? (cluster.step_timeout_s sets the wait)"
                )
            time.sleep(POLL_S)

    def read(self, commit: Commit, first: int = 0, end: int | None = None) -> tuple[list[LabelBlock], int]:
        """Blocks of a committed step in sample order, and their size in bytes.

        first, end: leaves out blocks that have no sample of this range of the step's batch
        Raises DroppedError if the step was dropped, LabelError naming file, byte and step if it is damaged.
        """
        found = self._locate(commit, first, end)
        blocks = []
        for located in found:
            try:
                blocks.append(decode_block(located.header, self._bytes(located)[HEADER_BYTES:]))
            except LabelError as error:
                raise LabelError(
                    f"{located.path}, block at byte {located.offset}: {error}; restore the file, or delete "
                    f"{self.folder} and start over"
                ) from None
        return blocks, sum(located.length for located in found)

    def read_raw(self, commit: Commit, first: int = 0, end: int | None = None) -> list[bytes]:
        """The same blocks as they are stored, header and payload; headers are checked, payloads are not."""
        return [self._bytes(located) for located in self._locate(commit, first, end)]

    def forget(self, step: int) -> None:
        """Let go of the commit records up to a step that was learned."""
        for known in [known for known in self.commits if known <= step]:
            del self.commits[known]

    def close(self) -> None:
        """Close all files."""
        for part in self.parts.values():
            part.close()
        self.parts.clear()
        self.tail.close()
        self.cursor.close()

    def poll(self) -> None:
        """Take in what was committed since the last look. Raises LabelError for a damaged record."""
        while commits := self.tail.next():
            self.first_committed = self.first_committed or commits[0].step

    def _commit(self, step: int) -> Commit:
        """The record of a committed step."""
        if step in self.commits:
            return self.commits[step]
        if step <= self.cursor.last_step:  # the reader goes back
            self.cursor.close()
            self.cursor = CommitCursor(self.folder, CHUNK_BYTES)
        while step not in self.commits:
            taken = self.cursor.next()
            assert taken, f"step {step} was committed and is gone from {self.cursor.path}"
            self.commits |= {commit.step: commit for commit in taken if commit.step > step - WINDOW}
        for known in [known for known in self.commits if known <= step - WINDOW]:
            del self.commits[known]
        return self.commits[step]

    def _locate(self, commit: Commit, first: int, end: int | None) -> list[Located]:
        """Where the blocks are, in sample order; the step is checked to be all there."""
        found: list[Located] = []
        for part in commit.parts:
            reader = self.parts.setdefault(part, _PartReader(self.folder, part))
            found += reader.locate(commit.step)
        found.sort(key=lambda located: located.header.first_sample)
        if not covers([spread(block) for block in found], commit.samples):
            if commit.step < self.first_step:
                raise DroppedError(
                    f"step {commit.step} was dropped from {self.folder}; {self.first_step} is the first there"
                )
            ends = {part: self.parts[part].end for part in commit.parts}
            raise incomplete(self.folder, commit, sum(block.header.samples for block in found), ends)
        last = commit.samples if end is None else end
        inside = [(located, located.header.first_sample) for located in found]
        return [located for located, start in inside if max(start, first) < min(start + located.header.samples, last)]

    def _bytes(self, located: Located) -> bytes:
        return self.parts[int(located.path.parent.name.removeprefix("part-"))].read(located)


class _PartReader:
    """One part's place: an open segment, and the offset of the first block of the step that was read last."""

    def __init__(self, folder: Path, part: int):
        self.folder, self.part = folder, part
        self.step = self.offset = 0
        self.path: Path | None = None
        self.descriptor = -1
        self.end: tuple[Path, int] = (part_folder(folder, part), 0)
        """The newest segment that was looked into, and how far it is intact."""

    def locate(self, step: int) -> list[Located]:
        """Blocks of a step; [] if there are none."""
        if self.path is None or not self._goes_on(step):
            self._find(step)
        if self.path is None:
            return []
        found = []
        for block in scan_open(self.path, self.descriptor, self.offset, until=step):
            self.end = (self.path, block.end)
            if block.header.step < step:
                self.offset = block.end
            else:
                found.append(block)
        self.step = step
        return found

    def read(self, block: Located) -> bytes:
        """Header and payload."""
        assert block.path == self.path
        data = os.pread(self.descriptor, block.length, block.offset)
        while len(data) < block.length and (
            more := os.pread(self.descriptor, block.length - len(data), block.offset + len(data))
        ):
            data += more
        return data

    def close(self) -> None:
        """Close the segment."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.path, self.descriptor = None, -1

    def _goes_on(self, step: int) -> bool:
        """Whether a step is in the open segment if it is anywhere."""
        assert self.path is not None
        if was_replaced(self.path, self.descriptor):
            return False
        same = step == self.step
        return same or (step == self.step + 1 and not segment_path(self.folder, self.part, step).exists())

    def _find(self, step: int) -> None:
        """Open the segment that has the step, if any has."""
        self.close()
        paths = segments_of(self.folder, self.part)
        place = bisect_right(paths, step, key=first_step_of)
        if place == 0:
            return
        path = paths[place - 1]
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # dropped meanwhile
            return
        self.path, self.offset = path, offset_of_step(path, step)
        self.end = (path, self.offset)


Spread = tuple[int, int]
"""First sample and number of samples of a block."""


def spread(block: Located) -> Spread:
    """Which samples a block has."""
    return block.header.first_sample, block.header.samples


def covers(blocks: Iterable[Spread], samples: int) -> bool:
    """Whether blocks have every sample of a step once."""
    expected = 0
    for first, count in sorted(blocks):
        if first != expected:
            return False
        expected += count
    return expected == samples


def incomplete(folder: Path, commit: Commit, found: int, ends: Mapping[int, tuple[Path, int]]) -> LabelError:
    """The error of a committed step of which `found` samples are there; `ends` says how far each part can be read."""
    where = ", ".join(f"{path} (intact up to byte {end})" for path, end in ends.values())
    return LabelError(
        f"step {commit.step} is committed with {commit.samples} samples, but {found} are intact in {where}; "
        f"restore the part files, or delete {folder} and start over"
    )
