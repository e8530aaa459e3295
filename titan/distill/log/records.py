"""Lines of the log's text files: JSON objects with a checksum, and the records of steps among them."""

import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titan.errors import LabelError
from titan.observe.files import was_replaced

COMMITS = "commits.jsonl"
STOPPED, FINISHED = "stopped", "finished"
"""Why a log ends."""
CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class Commit:
    """A step whose labels are complete."""

    step: int
    parts: tuple[int, ...]
    """Which parts hold its blocks."""
    samples: int
    cross_entropy: float
    """The teacher's own training loss at that step, nats a token: how far it leads is measured from this."""


@dataclass(frozen=True)
class End:
    """No more steps will come in this start of the run."""

    reason: str


def encode_line(record: dict[str, Any]) -> bytes:
    """A record as one line with its checksum."""
    body = json.dumps(record, separators=(",", ":"))
    return f'{{"crc32":{zlib.crc32(body.encode())},"record":{body}}}\n'.encode()


def decode_line(line: bytes) -> dict[str, Any] | None:
    """Inverse of `encode_line`; None for a line that is torn or differs in any bit from what was written.

    The record is written again and compared: a checksum of what was parsed would let `1e-05` pass for `1E-05`.
    """
    try:
        record = json.loads(line)["record"]
        return record if isinstance(record, dict) and encode_line(record) == line else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def encode_record(record: Commit | End) -> bytes:
    """One line of commits.jsonl."""
    return encode_line(asdict(record) if isinstance(record, Commit) else {"end": record.reason})


def decode_record(line: bytes) -> Commit | End | None:
    """Inverse of `encode_record`; None for a torn or damaged line."""
    record = decode_line(line)
    try:
        if record is None or "end" in record:
            return None if record is None else End(record["end"])
        return Commit(record["step"], tuple(record["parts"]), record["samples"], record["cross_entropy"])
    except (KeyError, TypeError):
        return None


class CommitCursor:
    """Reads commits.jsonl from its start, as far as it goes, and later goes on; holds a chunk, never the file.

    It stays in front of an end record and of a torn last line, so a repair that cuts those off goes unnoticed: what it
    has returned is in the new file as it was in the old.
    """

    def __init__(self, folder: Path, chunk_bytes: int = CHUNK_BYTES):
        self.path, self.chunk_bytes = folder / COMMITS, chunk_bytes
        self.offset = 0
        """Bytes of whole commit records that were returned."""
        self.last_step = 0
        self.ended: End | None = None
        """The end record in front of which the cursor stands."""
        self.torn_bytes = 0
        """Bytes behind the last line end."""
        self.descriptor: int | None = None

    def next(self) -> list[Commit]:
        """Some more commits; [] at the end of the file. Raises LabelError for a damaged record or a gap of steps."""
        if self.descriptor is not None and was_replaced(self.path, self.descriptor):
            self.close()
        if self.descriptor is None:
            try:
                self.descriptor = os.open(self.path, os.O_RDONLY)
            except FileNotFoundError:
                return []
        data = os.pread(self.descriptor, self.chunk_bytes, self.offset)
        commits: list[Commit] = []
        self.ended = None
        *lines, rest = data.split(b"\n")
        if not lines and len(data) == self.chunk_bytes:  # a record of thousands of parts
            self.chunk_bytes *= 2
            return self.next()
        self.torn_bytes = len(rest)
        for line in lines:
            record = decode_record(line + b"\n")
            if isinstance(record, End):
                self.ended = record
                break
            if record is None or (self.last_step and record.step != self.last_step + 1):
                if commits:
                    break  # they are good; the next call comes here at once
                raise LabelError(
                    f"{self.path} is damaged at byte {self.offset}, after step {self.last_step}; restore it, or delete "
                    f"{self.path.parent} and start over"
                )
            commits.append(record)
            self.last_step = record.step
            self.offset += len(line) + 1
        return commits

    def close(self) -> None:
        """Close the file."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
