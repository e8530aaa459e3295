"""Writing the log: a part's blocks into segments, and commit records that make a step readable.

The first write of a step wins: a teacher that was restarted and repeats steps appends nothing for those that have been
committed, so every student, live or late, sees the same labels. Following the end of the log is the live stream.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from titan.checkpoint.fence import Fence
from titan.distill.codec.block import HEADER_BYTES, BlockHeader, decode_block
from titan.distill.log.index import make_entry
from titan.distill.log.records import COMMITS, Commit, End, encode_record
from titan.distill.log.segment import Located, first_step_of, index_path, segment_path, segments_of
from titan.errors import LabelError
from titan.observe.files import write_all

SEGMENT_BYTES = 64 << 20
Write = Callable[[int, bytes], None]
"""Writes all bytes to a file descriptor or raises OSError; tests slow it down or fill the disk."""


class LabelWriter:
    """Appends the blocks of one part. Steps up to `committed` are dropped: their first write stands.

    segment_bytes: a new segment begins with the first step after the newest has this size
    fence:         asked before each write; None where nobody else can write
    """

    def __init__(
        self,
        folder: Path,
        part: int,
        committed: int,
        segment_bytes: int = SEGMENT_BYTES,
        write: Write = write_all,
        fence: Fence | None = None,
    ):
        self.folder, self.part, self.committed, self.fence = folder, part, committed, fence
        self.segment_bytes, self.write = segment_bytes, write
        self.step = committed
        """The step of the newest block."""
        self.path: Path | None = None
        """The newest segment."""
        self.size_bytes = self.index_bytes = 0
        self.segment = self.index = -1
        self.filled: list[int] = []
        """Descriptors of segments that are full and not yet known to be on the disk."""
        existing = segments_of(folder, part)
        if existing:
            self._open(first_step_of(existing[-1]))

    def append(self, step: int, block: bytes, sample_ids: Sequence[int] | None = None) -> int:
        """Append one block; returns its bytes, 0 if its step is committed. Raises LabelError on a failing disk.

        sample_ids: what the index says of the block; without them it is decoded
        """
        if step <= self.committed:
            return 0
        header = BlockHeader.unpack(block[:HEADER_BYTES])
        assert header.step == step >= self.step, f"a block of step {header.step} appended as {step} after {self.step}"
        if sample_ids is None:
            sample_ids = decode_block(header, block[HEADER_BYTES:]).sample_ids_B.tolist()
        try:
            if self.path is None or (step > self.step and self.size_bytes >= self.segment_bytes):
                self._check()
                self._open(step)
            assert self.path is not None
            self._check()  # with the files open, which whoever takes over makes anew
            entry = make_entry(Located(self.path, self.size_bytes, header), tuple(int(number) for number in sample_ids))
            self.write(self.segment, block)
            self.write(self.index, entry.pack())
        except OSError as error:
            self._take_back()
            where = self.path or segment_path(self.folder, self.part, step)
            raise LabelError(f"cannot append labels to {where}: {error.strerror}; free space and resume") from error
        self.step = step
        self.size_bytes += len(block)
        self.index_bytes += len(entry.pack())
        return len(block)

    def make_durable(self) -> None:
        """Force what was appended to disk; a checkpoint of the teacher may not be ahead of its labels."""
        for descriptor in self.filled:
            os.fsync(descriptor)
            os.close(descriptor)
        self.filled.clear()
        if self.path is not None:
            os.fsync(self.segment)
            _sync_folder(self.path.parent)
            _sync_folder(self.folder)

    def close(self) -> None:
        """Close all files."""
        open_files = (*self.filled, self.segment, self.index)
        for descriptor in open_files:
            if descriptor >= 0:
                os.close(descriptor)
        self.filled.clear()
        self.segment = self.index = -1

    def _check(self) -> None:
        if self.fence is not None:
            self.fence.check()

    def _open(self, first_step: int) -> None:
        """Go on in the segment that begins with a step."""
        path = segment_path(self.folder, self.part, first_step)
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        segment = os.open(path, flags, 0o644)
        index = os.open(index_path(path), flags, 0o644)
        if self.segment >= 0:
            self.filled.append(self.segment)
            os.close(self.index)
        self.path, self.segment, self.index = path, segment, index
        self.size_bytes, self.index_bytes = os.fstat(segment).st_size, os.fstat(index).st_size

    def _take_back(self) -> None:
        """Without the half of a block that fitted on the disk, others could follow it."""
        with suppress(OSError):
            os.ftruncate(self.segment, self.size_bytes)
            os.ftruncate(self.index, self.index_bytes)


class CommitWriter:
    """Writes commit records; one rank of the producer has it. The first step of a new log is `committed` + 1."""

    def __init__(self, folder: Path, committed: int, write: Write = write_all, fence: Fence | None = None):
        """fence: asked before each record; None where nobody else can write"""
        self.path, self.committed, self.write, self.fence = folder / COMMITS, committed, write, fence
        self.size_bytes = self.path.stat().st_size if self.path.exists() else 0
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def commit(self, commit: Commit) -> bool:
        """Make a step readable; False if it was already."""
        if commit.step <= self.committed:
            return False
        assert commit.step == self.committed + 1, f"step {commit.step} after {self.committed}"
        self._append(commit)
        self.committed = commit.step
        return True

    def end(self, reason: str) -> None:
        """Say that no more steps will come."""
        self._append(End(reason))

    def make_durable(self) -> None:
        """Force the records to disk."""
        os.fsync(self.descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)

    def _append(self, record: Commit | End) -> None:
        line = encode_record(record)
        if self.fence is not None:
            self.fence.check()
        try:
            self.write(self.descriptor, line)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self.descriptor, self.size_bytes)
            raise LabelError(f"cannot append to {self.path}: {error.strerror}; free space and resume") from error
        self.size_bytes += len(line)


def _sync_folder(folder: Path) -> None:
    """Make the names of new files durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
