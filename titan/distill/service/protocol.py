"""What travels between label service and reader: tickets, record batches with their notes, and the address file.

A ticket and a note are JSON; a label block is one row of a record batch, its bytes as the log stores them, so that
checksums written by the teacher are checked by the student. Nothing here touches the network.
"""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from titan.distill.log.records import Commit, decode_record
from titan.errors import LabelError
from titan.observe.files import write_whole

BLOCK_SCHEMA = pa.schema([("block", pa.large_binary())])
"""One column: header and payload of a block."""
DONE, REFUSED, OVERTAKEN, SYSTEM = b"+", b"-", b"^", b"/"
"""First byte of an action's answer. What follows is the answer, or a reason; of the system's: number, file, reason."""
HEALTH_ACTION, STATS_ACTION, MANIFEST_ACTION = "health", "stats", "manifest"
PUT_MANIFEST_ACTION, REOPEN_ACTION, SYNC_ACTION = "put_manifest", "reopen", "sync"
HOME_ACTION = "home"
RUN = "run"
"""What the run folder is called among the folders of its home."""
CHECKSUM = struct.Struct("<I")
"""CRC-32 in front of bytes of a file."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_Message = TypeVar("_Message", bound="LabelTicket | FeatureTicket | ReplicaTicket | Receipt")
_OFFSETS = struct.Struct("<qq")


@dataclass(frozen=True)
class Span:
    """Consecutive samples of a step's batch."""

    first: int = 0
    end: int | None = None
    """One behind the last; None: to the end of the batch."""

    def covers(self, other: "Span") -> bool:
        """Whether all samples of the other are among these."""
        return self.first <= other.first and (self.end is None or (other.end is not None and other.end <= self.end))

    def hull(self, other: "Span") -> "Span":
        """The least span that covers both."""
        end = None if self.end is None or other.end is None else max(self.end, other.end)
        return Span(min(self.first, other.first), end)


@dataclass(frozen=True)
class LabelTicket:
    """A window of steps that a reader asks for."""

    producer: str
    """Role whose log it is: a folder under RUN/labels."""
    from_step: int
    """First step wanted."""
    credits: int
    """Steps the reader has room for: the stream ends after so many."""
    first: int = 0
    """First sample of the step's batch that is wanted."""
    end: int | None = None
    """One behind the last sample; None: all of them."""
    wait_s: float = 0.0
    """How long the stream waits at the log's end."""
    blocks: bool = True
    """False: commits alone."""


@dataclass(frozen=True)
class FeatureTicket:
    """The payload of a step in a feature ring."""

    producer: str
    step: int
    part: int
    wait_s: float = 0.0
    """How long the stream waits for it; nothing comes if it is gone, or not there by then."""


@dataclass(frozen=True)
class ReplicaTicket:
    """Something to append to the second copy of a log."""

    producer: str
    part: int
    """Whose block it is; of no meaning for a line."""
    line: str | None = None
    """A line of commits.jsonl as it is, in place of a block."""
    durable: bool = False
    """Force it to the disk before the receipt, and with it what came before for this producer and part."""
    generation: int = 0
    generation_id: str = ""
    """Of the producer, where the copy is the log itself, at the run's home."""
    segment_bytes: int | None = None
    """Size of a segment there; None for the usual."""


@dataclass(frozen=True)
class Receipt:
    """The service has written what came, unless it says why not."""

    error: str | None = None
    overtaken: bool = False
    """Why not: another generation of the producer has taken over."""


@dataclass(frozen=True)
class LogState:
    """How far a log goes, as of one look."""

    first_step: int
    """First step still there; 0 while there is none."""
    last_committed: int
    ended: str | None
    """Why no more steps will come; None while they may."""


@dataclass(frozen=True)
class Note:
    """What accompanies a record batch of a label stream."""

    state: LogState
    commit: str | None = None
    """The commit of the blocks up to here: its line in the log, with its checksum."""
    error: str | None = None
    """Why the stream ends: one line for the reader's user."""


def pack(message: _Message) -> bytes:
    """JSON of a message, with its kind."""
    return json.dumps({"kind": type(message).__name__} | vars(message), separators=(",", ":")).encode()


def unpack(data: bytes, *kinds: type[_Message]) -> _Message:
    """Inverse of `pack` for a message of one of these kinds.

    Raises LabelError if it is something else, or its producer's name is no name.
    """
    names = {kind.__name__: kind for kind in kinds}
    try:
        fields = json.loads(data)
        message = names[fields.pop("kind")](**fields)
    except (ValueError, TypeError, KeyError, AttributeError):
        what = " or ".join(names)
        raise LabelError(f"a message of the label service is no {what}: {data[:80]!r}; do versions differ?") from None
    if not isinstance(message, Receipt):
        check_producer(message.producer)
    return message


def check_producer(producer: str) -> None:
    """Raise LabelError unless this is a plain name, that cannot lead out of the labels' folder."""
    if not isinstance(producer, str) or not _NAME.fullmatch(producer):
        raise LabelError(f"a producer of labels must be the name of a role, got {producer!r}; try teacher")


def pack_note(note: Note) -> bytes:
    """JSON of a note."""
    fields = {"state": vars(note.state), "commit": note.commit, "error": note.error}
    return json.dumps(fields, separators=(",", ":")).encode()


def unpack_note(data: bytes) -> Note:
    """Inverse of `pack_note`. Raises LabelError if it is something else."""
    try:
        fields = json.loads(data)
        return Note(LogState(**fields["state"]), fields["commit"], fields["error"])
    except (ValueError, TypeError, KeyError) as error:
        raise LabelError(
            f"the label service sent no note that this titan reads ({error}); do versions differ?"
        ) from None


def commit_of(note: Note) -> Commit | None:
    """The commit that a note brings. Raises LabelError if it is damaged."""
    if note.commit is None:
        return None
    record = decode_record(note.commit.encode())
    if not isinstance(record, Commit):
        raise LabelError(f"the label service sent a damaged commit: {note.commit[:200]!r}")
    return record


def block_batch(block: bytes) -> pa.RecordBatch:
    """A row that points at the block's own memory."""
    offsets = pa.py_buffer(_OFFSETS.pack(0, len(block)))
    column = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(block)])
    return pa.record_batch([column], schema=BLOCK_SCHEMA)


def empty_batch() -> pa.RecordBatch:
    """No row; it carries a note."""
    return pa.record_batch([pa.array([], pa.large_binary())], schema=BLOCK_SCHEMA)


def blocks_of(batch: pa.RecordBatch) -> list[memoryview]:
    """The blocks of a record batch, in its own memory."""
    return [memoryview(value.as_buffer()) for value in batch.column(0)]


def write_address(path: Path, host: str, port: int) -> None:
    """Say where the service listens. The file is there whole or not at all."""
    write_whole(path, json.dumps({"host": host, "port": port}).encode() + b"\n")


def location(host: str, port: int) -> str:
    """Flight location of a service."""
    return f"grpc+tcp://{host}:{port}"


def read_address(path: Path) -> str | None:
    """Flight location of the service; None while there is no such file. Raises LabelError if it is damaged."""
    try:
        fields: Mapping[str, Any] = json.loads(path.read_bytes())
        return location(fields["host"], int(fields["port"]))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        raise LabelError(
            f"{path} is not the address of a label service; delete it, the service writes it anew"
        ) from None
