"""A student's ledger: one line a step of what it learned or skipped, so that files alone prove what became of labels.

    RUN/ledger/STUDENT.jsonl

Lines lie end to end: each begins where the one before ended. A checkpoint is never ahead of the ledger; after a crash
the ledger goes back to the checkpoint.
"""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from titan.checkpoint.fence import Fence
from titan.checkpoint.files import Files, files_of
from titan.distill.log.records import decode_line, encode_line
from titan.errors import LabelError

LEDGER = "ledger"
Kind = Literal["consumed", "skipped"]


class Place(NamedTuple):
    """A sample of the label stream. As a student's place it is the first sample that is not yet dealt with."""

    step: int
    """Of the producer."""
    sample: int
    """Position in the batch of that step."""


@dataclass(frozen=True)
class Entry:
    """Samples from `start` up to but without `end`, and what became of them."""

    own_step: int
    """Step of the student in which, or before which, this happened."""
    start: Place
    end: Place
    kind: Kind
    reason: str = ""
    """Why they were skipped."""


def ledger_path(run_folder: Path, name: str) -> Path:
    """The ledger of a student."""
    return run_folder / LEDGER / f"{name}.jsonl"


class Ledger:
    """Appends to a student's ledger; the student's lead rank has it. A torn last line is cut off on opening."""

    def __init__(self, run: Path | Files, name: str, fence: Fence | None = None):
        """run:  the run folder
        fence: of a run given as a folder: asked before the file is changed; None where nobody else can write
        """
        self.files, self.name = files_of(run, fence), f"{LEDGER}/{name}.jsonl"
        self.path = self.files.path / self.name
        self.size_bytes = 0
        self.last: Entry | None = None
        data = self._read()
        for entry, end in _entries(io.BytesIO(data), self.path):
            self.last, self.size_bytes = entry, end
        self.files.truncate(self.name, len(data), self.size_bytes)

    def note(self, own_step: int, start: Place, end: Place, kind: Kind, reason: str = "") -> None:
        """Append one line. `start` is where the line before ended. Raises LabelError on a full or failing disk."""
        assert start < end, f"{kind} from {start} to {end}"
        assert self.last is None or (self.last.end == start and self.last.own_step <= own_step), f"after {self.last}"
        entry = Entry(own_step, start, end, kind, reason)
        line = encode_line(_encode(entry))
        try:
            self.files.append(self.name, self.size_bytes, line)
        except OSError as error:
            raise LabelError(f"cannot append to {self.path}: {error.strerror}; free space and resume") from error
        self.last = entry
        self.size_bytes += len(line)

    def rewind(self, own_step: int, place: Place | None = None) -> None:
        """Forget what came after the checkpoint of an own step; 0 is the student's start.

        place: the checkpoint's, where steps alone do not tell: what a jump skips may be less than a step
        Raises LabelError if the ledger does not reach the checkpoint.
        """
        kept_bytes, last = 0, None
        for entry, end in _entries(io.BytesIO(self._read()), self.path):
            if entry.own_step > own_step or (place is not None and entry.end > place):
                break
            kept_bytes, last = end, entry
        reached = last.own_step if last else 0
        if reached < own_step:
            raise LabelError(
                f"{self.path} ends at step {reached} of the student, before its checkpoint of step {own_step}; restore "
                "it, or delete the student's checkpoints so that it begins again"
            )
        self.files.truncate(self.name, self.size_bytes, kept_bytes)
        self.size_bytes, self.last = kept_bytes, last

    def make_durable(self) -> None:
        """Force what was noted to disk; the student calls it before a checkpoint."""
        self.files.sync(self.name)

    def _read(self) -> bytes:
        return self.files.read(self.name) or b""


def read_ledger(path: Path) -> Iterator[Entry]:
    """All entries; a torn last line, which is being written or was when the student died, is left out.

    Raises LabelError for a damaged line.
    """
    with open(path, "rb") as file:
        for entry, _ in _entries(file, path):
            yield entry


def _entries(lines: Iterable[bytes], path: Path) -> Iterator[tuple[Entry, int]]:
    """Entries with the offset behind each."""
    offset = 0
    for line in lines:
        if not line.endswith(b"\n"):
            return
        record = decode_line(line)
        if record is None:
            raise LabelError(f"{path} is damaged at byte {offset}; restore it from a copy of the run")
        offset += len(line)
        yield _decode(record), offset


def _encode(entry: Entry) -> dict[str, Any]:
    record: dict[str, Any] = {"own": entry.own_step, "from": entry.start, "to": entry.end, "kind": entry.kind}
    return record | ({"reason": entry.reason} if entry.reason else {})


def _decode(record: dict[str, Any]) -> Entry:
    return Entry(record["own"], Place(*record["from"]), Place(*record["to"]), record["kind"], record.get("reason", ""))
