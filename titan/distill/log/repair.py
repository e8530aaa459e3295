"""After a stop of any kind: what was not committed is cut off, what was committed is checked."""

import zlib
from collections.abc import Mapping
from pathlib import Path

from titan.distill.codec.block import HEADER_BYTES
from titan.distill.log.index import index_is_whole, repair_index
from titan.distill.log.manifest import MANIFEST, read_manifest
from titan.distill.log.reader import Spread, covers, incomplete, spread
from titan.distill.log.records import COMMITS, Commit, CommitCursor
from titan.distill.log.retention import delete_dropped, first_kept
from titan.distill.log.segment import (
    INDEX,
    SEGMENT,
    Located,
    first_step_of,
    index_path,
    part_folder,
    parts_of,
    scan,
    segments_of,
)
from titan.errors import LabelError
from titan.observe.files import cut_anew


def reopen(folder: Path, needed: int = 0, durable: int = 0) -> int:
    """Repair a log after a stop of any kind and return the last committed step.

    Drops what was not committed: a torn commit line, an end record, blocks of steps without a commit; makes indexes
    again that are missing or torn. Call it while nobody writes; readers may go on. An empty log's last step is the
    manifest's `start_step`, or 0.
    Raises LabelError, naming file and place, if something committed is damaged, or if steps up to `needed`, that of
    the producer's checkpoint, are not there; the log is then left as it is. Payloads are checked behind `needed` or
    `durable`, as a checkpoint makes those before it durable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    old = next(folder.glob("part-*.labels"), None)
    if old is not None:
        raise LabelError(f"{old} is of a label log of format 1, which this titan no longer reads; start a new run")
    start = read_manifest(folder).start_step if (folder / MANIFEST).exists() else None
    commits, good_bytes = _read_commits(folder, start)
    last = commits[-1].step if commits else start or 0
    if last < needed:
        raise LabelError(
            f"{folder / COMMITS} ends at step {last}, before the producer's checkpoint of step {needed}: labels "
            "are missing; restore it, or start a new run"
        )
    kept = first_kept(folder)
    ends, found = _scan_all(folder, last, payloads_from=max(needed + 1, durable + 1, kept))
    for commit in commits:
        blocks = found.get(commit.step, [])
        if commit.step >= kept and not covers(blocks, commit.samples):
            where = {part: _intact(folder, part, ends, commit.step) for part in commit.parts}
            raise incomplete(folder, commit, sum(samples for _, samples in blocks), where)
    _cut(folder, good_bytes, ends)
    delete_dropped(folder)
    return last


def _read_commits(folder: Path, start: int | None) -> tuple[list[Commit], int]:
    """All commit records, and the bytes they take. Raises LabelError for a damaged one."""
    cursor = CommitCursor(folder)
    commits: list[Commit] = []
    try:
        while more := cursor.next():
            commits += more
    finally:
        cursor.close()
    if commits and start is not None and commits[0].step != start + 1:
        raise LabelError(
            f"{cursor.path} begins with step {commits[0].step}, {MANIFEST} says {start + 1}: records are missing; "
            f"restore it, or delete {folder} and start over"
        )
    return commits, cursor.offset


def _scan_all(folder: Path, last: int, payloads_from: int) -> tuple[dict[Path, int], dict[int, list[Spread]]]:
    """Where the blocks up to step `last` end in each segment, and which samples of each step are there."""
    ends: dict[Path, int] = {}
    found: dict[int, list[Spread]] = {}
    for part in parts_of(folder):
        for path in segments_of(folder, part):
            ends[path] = 0
            for block in scan(path, until=last):
                ends[path] = block.end
                found.setdefault(block.header.step, []).append(spread(block))
                if block.header.step >= payloads_from:
                    _check_payload(folder, block)
    return ends, found


def _check_payload(folder: Path, block: Located) -> None:
    with open(block.path, "rb") as file:
        file.seek(block.offset + HEADER_BYTES)
        payload = file.read(block.header.payload_bytes)
    if zlib.crc32(payload) != block.header.payload_crc32:
        header = block.header
        raise LabelError(
            f"{block.path}, block at byte {block.offset}: the labels of step {header.step}, samples from "
            f"{header.first_sample}, are damaged; restore the file, or delete {folder} and start over"
        )


def _intact(folder: Path, part: int, ends: Mapping[Path, int], step: int) -> tuple[Path, int]:
    """The segment of a part that a step should be in, and how far it is intact."""
    paths = [path for path in segments_of(folder, part) if first_step_of(path) <= step]
    return (paths[-1], ends[paths[-1]]) if paths else (part_folder(folder, part), 0)


def _cut(folder: Path, good_bytes: int, ends: Mapping[Path, int]) -> None:
    """Cut commit records first: if this is interrupted, the rest is cut by the next repair.

    What was last written to is made anew: a rank that was given up may have it open, and may have been stopped in the
    moment between its look at the fence (titan.checkpoint.fence) and its write.
    """
    for draft in folder.rglob(".*.tmp"):
        draft.unlink()  # of a repair that was itself interrupted
    path = folder / COMMITS
    path.touch()
    cut_anew(path, good_bytes)
    newest = {segment.parent: segment for segment, end in ends.items() if end}
    for segment, end in ends.items():
        index = index_path(segment)
        if end == 0:
            segment.unlink()
            index.unlink(missing_ok=True)
            continue
        is_newest = newest[segment.parent] == segment
        if is_newest or segment.stat().st_size != end:
            cut_anew(segment, end)
        if not index_is_whole(segment):
            repair_index(segment, list(scan(segment)))
        elif is_newest:
            cut_anew(index, index.stat().st_size)
    for index in folder.glob(f"part-*/*{INDEX}"):
        if not index.with_suffix(SEGMENT).exists():
            index.unlink()
