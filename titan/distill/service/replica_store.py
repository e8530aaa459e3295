"""A log that is written on another node, as the service keeps it: same files, same rules, the first write wins.

It is a second copy or, at the run's home, the log itself; there only the newest generation of a role may write.

What arrives twice, because its receipt was lost with the connection, is written once. What a kill tore is cut off when
the part is opened again, so a receipt means: this is here, whole, and stays.
"""

import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from titan.checkpoint.fence import Fence
from titan.distill.codec.block import HEADER_BYTES, BlockHeader
from titan.distill.log.index import repair_index
from titan.distill.log.manifest import MANIFEST
from titan.distill.log.records import Commit, CommitCursor, End, decode_record
from titan.distill.log.repair import reopen
from titan.distill.log.segment import Located, scan, segments_of
from titan.distill.log.writer import SEGMENT_BYTES, CommitWriter, LabelWriter
from titan.distill.service.protocol import ReplicaTicket
from titan.errors import LabelError
from titan.observe.files import write_whole


class ReplicaStore:
    """Replicated logs below a folder. Calls may come from several threads; those of one log wait for each other."""

    def __init__(
        self,
        labels_folder: Path,
        segment_bytes: int = SEGMENT_BYTES,
        fence_of: Callable[[str, int, str], Fence] | None = None,
    ):
        """fence_of: at the run's home: what a generation of a role has to show before it writes"""
        self.labels_folder, self.segment_bytes, self.fence_of = labels_folder, segment_bytes, fence_of
        self.lock = threading.Lock()
        self.logs: dict[str, _ReplicaLog] = {}

    def append(self, ticket: ReplicaTicket, block: bytes) -> None:
        """Write one message unless it is there already. Raises LabelError if it cannot be, or does not fit;
        OvertakenError of a generation that has been given up.
        """
        log = self._log(ticket.producer)
        with log.lock:
            if self.fence_of is not None:
                fence = self.fence_of(ticket.producer, ticket.generation, ticket.generation_id)
                fence.check()
                log.begin(fence.mine.id, ticket.segment_bytes or self.segment_bytes)
            if ticket.line is None:
                log.append_block(ticket.part, block, ticket.durable)
            else:
                log.append_line(ticket.line, ticket.durable)

    def reopen(self, producer: str) -> int:
        """Cut off what was not committed, before the producer writes again; the last committed step.

        Raises LabelError if something committed is damaged.
        """
        log = self._log(producer)
        with log.lock:
            log.close()
            return reopen(log.folder)

    def sync(self, producer: str) -> None:
        """Force what was written to disk."""
        log = self._log(producer)
        with log.lock:
            log.make_durable()

    def put_manifest(self, producer: str, data: bytes) -> None:
        """Write log.json. Raises LabelError if there is another."""
        folder = self.labels_folder / producer
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / MANIFEST
        if path.exists() and path.read_bytes() != data:
            raise LabelError(f"{path} is of another log than the one that is sent; give that a folder of its own")
        write_whole(path, data)

    def close(self) -> None:
        """Close all files."""
        for log in self.logs.values():
            with log.lock:
                log.close()

    def _log(self, producer: str) -> "_ReplicaLog":
        with self.lock:
            if producer not in self.logs:
                self.logs[producer] = _ReplicaLog(self.labels_folder / producer, self.segment_bytes)
            return self.logs[producer]


class _ReplicaLog:
    """One producer's."""

    def __init__(self, folder: Path, segment_bytes: int):
        self.folder, self.segment_bytes = folder, segment_bytes
        self.lock = threading.Lock()
        self.parts: dict[int, _ReplicaPart] = {}
        self.commits: CommitWriter | None = None
        self.has_ended = False
        self.generation = ""

    def begin(self, generation: str, segment_bytes: int) -> None:
        """Before each write: whatever is known of the files is out of date once another generation writes."""
        if generation != self.generation:
            self.close()
            self.generation, self.segment_bytes = generation, segment_bytes

    def append_block(self, part: int, block: bytes, durable: bool) -> None:
        place = self._part(part)
        header = BlockHeader.unpack(block[:HEADER_BYTES])
        if (
            len(block) != HEADER_BYTES + header.payload_bytes
            or zlib.crc32(block[HEADER_BYTES:]) != header.payload_crc32
        ):
            raise LabelError(f"the block of step {header.step} for part {part} came damaged")
        place.append(header, block)
        if durable:
            place.writer.make_durable()

    def append_line(self, line: str, durable: bool) -> None:
        record = decode_record(line.encode())
        if record is None:
            raise LabelError(f"a commit record came damaged: {line[:80]!r}")
        if self.commits is None or (self.has_ended and isinstance(record, Commit)):
            self._open_commits(record)
        assert self.commits is not None
        if isinstance(record, End):
            if not self.has_ended:
                self.commits.end(record.reason)
            self.has_ended = True
        elif record.step > self.commits.committed:
            self._check(record, self.commits.committed)
            self.commits.commit(record)
        if durable:
            self.commits.make_durable()

    def make_durable(self) -> None:
        for part in self.parts.values():
            part.writer.make_durable()
        if self.commits is not None:
            self.commits.make_durable()

    def close(self) -> None:
        for part in self.parts.values():
            part.writer.close()
        self.parts.clear()
        if self.commits is not None:
            self.commits.close()
        self.commits = None

    def _check(self, commit: Commit, last: int) -> None:
        """Raise LabelError for a commit that would make something readable which is not there."""
        if commit.step != last + 1:
            raise LabelError(
                f"a commit of step {commit.step} came to the replica {self.folder}, which ends at step {last}; "
                "copy the log's folder there, or give the replica an empty one"
            )
        missing = [part for part in commit.parts if self._part(part).newest[0] < commit.step]
        if missing:
            raise LabelError(f"step {commit.step} was committed before its parts {missing} came to {self.folder}")

    def _part(self, part: int) -> "_ReplicaPart":
        if part not in self.parts:
            self.parts[part] = _ReplicaPart(self.folder, part, self.segment_bytes)
        return self.parts[part]

    def _open_commits(self, record: Commit | End) -> None:
        """Go on behind the last whole commit: an end record and what is torn are cut off."""
        if self.commits is not None:
            self.commits.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        cursor = CommitCursor(self.folder)
        while cursor.next():
            pass
        cursor.close()
        if cursor.path.exists():
            os.truncate(cursor.path, cursor.offset)
        first = record.step - 1 if isinstance(record, Commit) else 0
        self.commits = CommitWriter(self.folder, cursor.last_step or first)
        self.has_ended = False


class _ReplicaPart:
    """One part's segments."""

    def __init__(self, folder: Path, part: int, segment_bytes: int):
        self.newest = (0, -1)
        """Step and first sample of the last block."""
        segments = segments_of(folder, part)
        if segments:
            self._repair(segments[-1])
        self.writer = LabelWriter(folder, part, 0, segment_bytes)
        self.writer.step = self.newest[0]

    def append(self, header: BlockHeader, block: bytes) -> None:
        if (header.step, header.first_sample) <= self.newest:
            return
        ids = np.frombuffer(block, "<i8", header.samples, HEADER_BYTES)  # every codec's payload begins with them
        self.writer.append(header.step, block, ids.tolist())
        self.newest = (header.step, header.first_sample)

    def _repair(self, segment: Path) -> None:
        """Cut off a torn block. A segment without any block is left to be filled by the step it is named after."""
        blocks = list(scan(segment))
        os.truncate(segment, blocks[-1].end if blocks else 0)
        repair_index(segment, blocks)
        if blocks:
            self.newest = _key(blocks[-1])
        else:
            self.newest = (int(segment.stem) - 1, 2**31)


def _key(block: Located) -> tuple[int, int]:
    return block.header.step, block.header.first_sample
