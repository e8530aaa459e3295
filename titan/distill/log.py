"""The label log: append-only files of blocks, and commit records that make a step readable.

    labels/teacher/part-000.labels   blocks of replica 0 of the teacher's last stage, one a step
    labels/teacher/commits.jsonl     one line a step, written when every part of the step is in its file

The first write of a step wins: a teacher that was restarted and repeats steps appends nothing for those that have been
committed, so every student, live or late, sees the same labels. Following the end of the log is the live stream.
"""

import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from titan.distill.codec import HEADER_BYTES, BlockHeader, LabelBlock, decode_block
from titan.errors import LabelError

COMMITS = "commits.jsonl"
STOPPED, FINISHED = "stopped", "finished"
"""Why a log ends."""
POLL_S = 0.005


@dataclass(frozen=True)
class Commit:
    """A step whose labels are complete."""

    step: int
    parts: tuple[int, ...]
    """Which part files hold its blocks."""
    samples: int
    cross_entropy: float
    """The teacher's own training loss at that step, nats a token: how far it leads is measured from this."""


@dataclass(frozen=True)
class End:
    """No more steps will come in this start of the run."""

    reason: str


def part_path(folder: Path, part: int) -> Path:
    """File of one producer."""
    return folder / f"part-{part:03d}.labels"


def _encode_record(record: dict[str, Any]) -> bytes:
    body = json.dumps(record, separators=(",", ":"))
    return f'{{"crc32":{zlib.crc32(body.encode())},"record":{body}}}\n'.encode()


def _decode_record(line: bytes) -> Commit | End | None:
    """A commit or end; None for a torn or damaged line."""
    try:
        outer = json.loads(line)
        body = json.dumps(outer["record"], separators=(",", ":"))
        if zlib.crc32(body.encode()) != outer["crc32"]:
            return None
        record = outer["record"]
        if "end" in record:
            return End(record["end"])
        return Commit(record["step"], tuple(record["parts"]), record["samples"], record["cross_entropy"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None


def reopen(folder: Path, needed: int = 0) -> int:
    """Repair a log after a stop of any kind and return the last committed step (0 if none).

    Drops what was not committed: a torn commit line, an end record, blocks of steps without a commit. Call it while
    nobody writes or reads. Raises LabelError, naming file and place, if something committed is damaged, or if steps up
    to `needed`, that of the teacher's checkpoint, are not there; the log is then left as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / COMMITS
    path.touch()
    commits: list[Commit] = []
    good = 0
    with open(path, "rb") as file:
        for line in file:
            record = _decode_record(line)
            if not line.endswith(b"\n") or isinstance(record, End):
                break
            if record is None:
                raise LabelError(f"{path} is damaged at byte {good}; restore it, or delete {folder} and start over")
            commits.append(record)
            good += len(line)
    last = commits[-1].step if commits else 0
    if last < needed:
        raise LabelError(
            f"{path} ends at step {last}, before the teacher's checkpoint of step {needed}: labels are missing; "
            "restore it, or start a new run"
        )
    ends = _check_blocks(folder, commits, last)
    os.truncate(path, good)
    for part in folder.glob("part-*.labels"):
        os.truncate(part, ends.get(part, 0))
    return last


def _check_blocks(folder: Path, commits: Sequence[Commit], last: int) -> dict[Path, int]:
    """Where the committed blocks of each part file end. Raises LabelError for a step that is not all there."""
    intact: Counter[int] = Counter()
    ends: dict[Path, int] = {}
    for path in sorted(folder.glob("part-*.labels")):
        with open(path, "rb") as file:
            for offset, header in _headers(file, 0, until=last):
                intact[header.step] += header.samples
                ends[path] = offset + HEADER_BYTES + header.payload_bytes
    for commit in commits:
        if intact[commit.step] != commit.samples:
            raise _incomplete(folder, commit, intact[commit.step], ends)
    return ends


def _incomplete(folder: Path, commit: Commit, found: int, ends: Mapping[Path, int]) -> LabelError:
    """The error of a committed step that is not all there; `ends` says how far each part file could be read."""
    paths = [part_path(folder, part) for part in commit.parts]
    where = ", ".join(f"{path} (intact up to byte {ends.get(path, 0)})" for path in paths)
    return LabelError(
        f"step {commit.step} is committed with {commit.samples} samples, but {found} are intact in {where}; "
        f"restore the part files, or delete {folder} and start over"
    )


def _headers(file: BinaryIO, start: int, until: int) -> Iterator[tuple[int, BlockHeader]]:
    """Headers with their offsets from byte `start` on, up to step `until`; what follows may be torn."""
    offset, size = start, os.fstat(file.fileno()).st_size
    while True:
        file.seek(offset)
        data = file.read(HEADER_BYTES)
        try:
            header = BlockHeader.unpack(data)
        except LabelError:
            return
        if header.step > until or offset + HEADER_BYTES + header.payload_bytes > size:
            return
        yield offset, header
        offset += HEADER_BYTES + header.payload_bytes


def _write_all(file: BinaryIO, data: bytes) -> None:
    """A nearly full disk takes a part of a write without an error; only the next write says why."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


class LabelWriter:
    """Appends the blocks of one producer. Steps up to `committed` are dropped: their first write stands."""

    def __init__(self, folder: Path, part: int, committed: int):
        self.path, self.committed = part_path(folder, part), committed
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115  (open as long as the role lives)

    def append(self, step: int, block: bytes) -> int:
        """Append one block; returns the bytes written. Raises LabelError on a full or failing disk."""
        if step <= self.committed:
            return 0
        try:
            _write_all(self.file, block)
        except OSError as error:
            raise LabelError(f"cannot append labels to {self.path}: {error.strerror}; free space and resume") from error
        return len(block)

    def make_durable(self) -> None:
        """Force what was appended to disk; a checkpoint of the teacher may not be ahead of its labels."""
        os.fsync(self.file.fileno())


class CommitWriter:
    """Writes commit records; one rank of the teacher has it."""

    def __init__(self, folder: Path, committed: int):
        self.path, self.committed = folder / COMMITS, committed
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def commit(self, commit: Commit) -> bool:
        """Make a step readable; False if it was already."""
        if commit.step <= self.committed:
            return False
        assert commit.step == self.committed + 1, f"step {commit.step} after {self.committed}"
        self._write(asdict(commit))
        self.committed = commit.step
        return True

    def end(self, reason: str) -> None:
        """Say that no more steps will come."""
        self._write({"end": reason})

    def make_durable(self) -> None:
        """Force the records to disk."""
        os.fsync(self.file.fileno())

    def _write(self, record: dict[str, Any]) -> None:
        try:
            _write_all(self.file, _encode_record(record))
        except OSError as error:
            raise LabelError(f"cannot append to {self.path}: {error.strerror}; free space and resume") from error


class LabelReader:
    """Reads steps in order and waits at the end of the log. Each reader has its own files and place."""

    def __init__(self, folder: Path, timeout_s: float):
        self.folder, self.timeout_s = folder, timeout_s
        self.commits: dict[int, Commit] = {}
        self.last_committed = 0
        self.ended: End | None = None
        self.commit_file: BinaryIO | None = None
        self.partial_line = b""
        self.parts: dict[int, tuple[BinaryIO, int]] = {}  # file and offset of the next block

    def wait_commit(self, step: int, give_up: Callable[[], bool] = lambda: False) -> Commit | None:
        """The commit of a step, waiting for it; None if the log ended before it or `give_up` says so.

        Raises LabelError when nothing at all was committed for `timeout_s`.
        """
        deadline, seen = time.monotonic() + self.timeout_s, self.last_committed
        while step not in self.commits:
            self.poll()
            if step in self.commits:
                break
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
        return self.commits[step]

    def read(self, commit: Commit) -> tuple[list[LabelBlock], int]:
        """All blocks of a committed step in sample order, and their size in bytes. Steps are read in rising order."""
        blocks: list[LabelBlock] = []
        size = 0
        for part in commit.parts:
            path = part_path(self.folder, part)
            try:
                file, next_offset = self.parts.get(part) or (open(path, "rb"), 0)  # noqa: SIM115
                for offset, header in list(_headers(file, next_offset, until=commit.step)):
                    next_offset = offset + HEADER_BYTES + header.payload_bytes
                    if header.step == commit.step:
                        file.seek(offset + HEADER_BYTES)
                        blocks.append(decode_block(header, file.read(header.payload_bytes)))
                        size += HEADER_BYTES + header.payload_bytes
            except (LabelError, FileNotFoundError) as error:
                raise LabelError(f"{path}: {error}; restore the file, or delete {self.folder} and start over") from None
            self.parts[part] = (file, next_offset)
        found = sum(block.ids_BSK.shape[0] for block in blocks)
        if found != commit.samples:
            ends = {part_path(self.folder, part): end for part, (_, end) in self.parts.items()}
            raise _incomplete(self.folder, commit, found, ends)
        return sorted(blocks, key=lambda block: block.first_sample), size

    def forget(self, step: int) -> None:
        """Drop the commit records up to a step that was learned."""
        for known in [known for known in self.commits if known <= step]:
            del self.commits[known]

    def close(self) -> None:
        """Close all files."""
        for file, _ in self.parts.values():
            file.close()
        if self.commit_file is not None:
            self.commit_file.close()

    def poll(self) -> None:
        """Take in the records that were appended since the last look."""
        if self.commit_file is None:
            path = self.folder / COMMITS
            if not path.exists():
                return
            self.commit_file = open(path, "rb")  # noqa: SIM115
        data = self.partial_line + self.commit_file.read()
        *lines, self.partial_line = data.split(b"\n")
        for line in lines:
            record = _decode_record(line)
            if isinstance(record, End):
                self.ended = record
            elif isinstance(record, Commit):
                self.commits[record.step] = record
                self.last_committed, self.ended = record.step, None
            else:
                raise LabelError(f"{self.folder / COMMITS} is damaged after step {self.last_committed}")
