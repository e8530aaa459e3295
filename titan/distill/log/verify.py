"""Every bit of a log looked at, nothing changed: damage is named by file, byte and step."""

import mmap
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from titan.distill.codec.block import HEADER_BYTES, MAGIC, BlockHeader
from titan.distill.log.index import IndexEntry, unpack_entries
from titan.distill.log.ledger import LEDGER, read_ledger
from titan.distill.log.manifest import read_manifest
from titan.distill.log.reader import Spread, covers, spread
from titan.distill.log.records import COMMITS, Commit, decode_record
from titan.distill.log.retention import first_kept, read_places
from titan.distill.log.segment import Located, index_path, parts_of, segments_of
from titan.errors import LabelError

GROWING_S = 0.3
"""How long the torn end of a file is watched before it is said that nobody writes it."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong."""

    path: Path
    offset: int | None
    """Byte in the file."""
    step: int | None
    problem: str

    def __str__(self) -> str:
        where = "" if self.offset is None else f", byte {self.offset}"
        what = "" if self.step is None else f", step {self.step}"
        return f"{self.path}{where}{what}: {self.problem}"


@dataclass(frozen=True)
class Verified:
    """What was looked at."""

    findings: tuple[Finding, ...]
    steps: int
    blocks: int
    size_bytes: int
    """Of segments."""


@dataclass
class _Look:
    """Filled while segments are read."""

    last: int
    """Newest committed step."""
    findings: list[Finding] = field(default_factory=list)
    spreads: dict[int, list[Spread]] = field(default_factory=dict)
    blocks: int = 0
    size_bytes: int = 0


def verify_log(folder: Path) -> Verified:
    """Check one log: every checksum, every index, and that committed steps are all there, each sample once."""
    look = _Look(0)
    commits = _verify_commits(folder, look)
    look.last = commits[-1].step if commits else 0
    kept = _verify_small(folder, look)
    for part in parts_of(folder):
        for path in segments_of(folder, part):
            _verify_segment(path, look)
    named = {finding.step for finding in look.findings}
    for commit in commits:
        blocks = look.spreads.get(commit.step, [])
        if commit.step >= kept and commit.step not in named and not covers(blocks, commit.samples):
            there = sum(samples for _, samples in blocks)
            problem = f"committed with {commit.samples} samples, {there} are intact; restore the segments of parts "
            look.findings.append(Finding(folder, None, commit.step, problem + ", ".join(map(str, commit.parts))))
    return Verified(tuple(look.findings), len(commits), look.blocks, look.size_bytes)


def verify_ledgers(run_folder: Path) -> list[Finding]:
    """Check every line of the students' ledgers."""
    findings = []
    for path in sorted((run_folder / LEDGER).glob("*.jsonl")):
        try:
            for _ in read_ledger(path):
                pass
        except LabelError as error:
            findings.append(Finding(path, None, None, _without(error, path)))
        if path.stat().st_size and not path.read_bytes().endswith(b"\n") and not _grows(path):
            findings.append(Finding(path, None, None, "the last line is torn; `titan resume` cuts it off"))
    return findings


def _verify_small(folder: Path, look: _Look) -> int:
    """log.json, kept.json and readers' places; the first step that should be there."""
    for check in (read_manifest, read_places):
        try:
            check(folder)
        except LabelError as error:
            look.findings.append(Finding(folder, None, None, str(error)))
    try:
        return first_kept(folder)
    except LabelError as error:
        look.findings.append(Finding(folder, None, None, str(error)))
        return 0


def _verify_commits(folder: Path, look: _Look) -> list[Commit]:
    """Intact commit records; each damaged line, gap and line behind the end is a finding."""
    path = folder / COMMITS
    commits: list[Commit] = []
    offset, ended = 0, False
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        record = decode_record(line)
        step = commits[-1].step + 1 if commits else None
        if not line.endswith(b"\n"):
            if not _grows(path):
                look.findings.append(Finding(path, offset, step, "the last record is torn; `titan resume` cuts it off"))
        elif record is None:
            look.findings.append(Finding(path, offset, step, "the record is damaged; restore the file"))
        elif ended:
            look.findings.append(Finding(path, offset, step, "a record stands behind the log's end"))
        elif isinstance(record, Commit):
            if step is not None and record.step != step and not _damaged_before(look, path):
                look.findings.append(Finding(path, offset, step, f"step {record.step} follows step {step - 1}"))
            commits.append(record)
        ended = ended or (record is not None and not isinstance(record, Commit))
        offset += len(line)
    return commits


def _damaged_before(look: _Look, path: Path) -> bool:
    return any(finding.path == path for finding in look.findings)


def _verify_segment(path: Path, look: _Look) -> None:
    """Every block of a segment, and its index."""
    size = path.stat().st_size
    look.size_bytes += size
    index_file = index_path(path)
    data = index_file.read_bytes() if index_file.exists() else b""
    entries, intact_bytes = unpack_entries(data)
    if not index_file.exists():
        look.findings.append(Finding(index_file, None, None, "the index is missing; `titan resume` makes it again"))
    elif intact_bytes < len(data) and not _grows(index_file):
        problem = "the index is damaged; `titan resume` makes it again"
        look.findings.append(Finding(index_file, intact_bytes, None, problem))
    if size == 0:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        blocks = list(_verify_blocks(path, memory, entries, look))
    look.blocks += len(blocks)
    described = {entry.offset: entry for entry in entries}
    for block in blocks:
        look.spreads.setdefault(block.header.step, []).append(spread(block))
        entry = described.get(block.offset)
        missing = entry is None and index_file.exists() and intact_bytes == len(data) and block.header.step <= look.last
        if missing or (entry is not None and not entry.describes(block)):
            problem = f"the index does not describe the block at byte {block.offset}; `titan resume` makes it again"
            look.findings.append(Finding(index_file, None, block.header.step, problem))


def _verify_blocks(path: Path, memory: mmap.mmap, entries: list[IndexEntry], look: _Look) -> Iterator[Located]:
    """Intact blocks; each damaged one is a finding, and the next one behind it is looked for."""
    steps = {entry.offset: entry.step for entry in entries}
    offset, step = 0, None
    while offset < len(memory):
        block = _header_at(path, memory, offset)
        if block is None or block.end > len(memory):
            following = _next_header(path, memory, offset)
            step = steps.get(offset, step if block is None else block.header.step)
            if following < len(memory) or (step is not None and offset in steps and step <= look.last):
                what = "the header is damaged" if block is None else "the block is cut short"
                problem = f"{what}; restore the file, or delete {path.parent.parent} and start over"
                look.findings.append(Finding(path, offset, step, problem))
            elif not _grows(path):
                problem = "a block that was never committed is torn; `titan resume` cuts it off"
                look.findings.append(Finding(path, offset, None, problem))
            offset = following
            continue
        step = block.header.step
        if zlib.crc32(memory[offset + HEADER_BYTES : block.end]) == block.header.payload_crc32:
            yield block
        else:
            problem = f"labels of samples from {block.header.first_sample} are damaged; restore the file"
            look.findings.append(Finding(path, offset, step, problem))
        offset = block.end


def _header_at(path: Path, memory: mmap.mmap, offset: int) -> Located | None:
    try:
        return Located(path, offset, BlockHeader.unpack(memory[offset : offset + HEADER_BYTES]))
    except LabelError:
        return None


def _next_header(path: Path, memory: mmap.mmap, offset: int) -> int:
    """Where the next intact header is behind a damaged block; the end of the file if there is none."""
    place = memory.find(MAGIC, offset + 1)
    while place >= 0:
        if _header_at(path, memory, place) is not None:
            return place
        place = memory.find(MAGIC, place + 1)
    return len(memory)


def _grows(path: Path) -> bool:
    """Whether somebody is writing a file now."""
    before = path.stat().st_size
    deadline = time.monotonic() + GROWING_S
    while time.monotonic() < deadline:
        time.sleep(0.02)
        if path.stat().st_size != before:
            return True
    return False


def _without(error: LabelError, path: Path) -> str:
    """The message without the path, which the finding has already."""
    return str(error).removeprefix(f"{path} ")
