"""The second copy of a log, on another disk: same files, same rules. When a producer starts, each gets what it lacks.

Blocks stand in the copy before their step is committed, and commits in the copy before those in the log: whatever is
lost with the log's disk is in the copy.
"""

import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from titan.config.settings import RunConfig
from titan.distill.log.index import offset_of_step
from titan.distill.log.manifest import MANIFEST, read_manifest
from titan.distill.log.records import Commit, CommitCursor
from titan.distill.log.repair import reopen
from titan.distill.log.retention import drop_before, first_kept
from titan.distill.log.segment import Located, first_step_of, scan, segments_of
from titan.distill.log.writer import CommitWriter, LabelWriter
from titan.errors import LabelError, RunError
from titan.observe.files import write_whole


def copy_folder(config: RunConfig, role: str) -> Path | None:
    """Where the second copy of a role's log is; None without one."""
    place = copies_of_run(config)
    return None if place is None else place / "labels" / role


def copies_of_run(config: RunConfig) -> Path | None:
    """Where all second copies of a run are, with its settings, so that it is looked into as a run is."""
    return None if config.labels.copy_to is None else Path(config.labels.copy_to).absolute() / config.run.name


def vacate_copies(config: RunConfig, run_folder: Path, overwrite: bool) -> None:
    """Before a new run: see that its copies get a folder of their own. Raises RunError if they cannot."""
    place = copies_of_run(config)
    if place is None:
        return
    if place.resolve().is_relative_to(run_folder.resolve()) or run_folder.resolve().is_relative_to(place.resolve()):
        raise RunError(
            f"labels.copy_to is {config.labels.copy_to!r}, so that the second copy would lie in {run_folder} itself; "
            "choose a folder on another disk"
        )
    if not place.exists() or not any(place.iterdir()):
        return
    if not overwrite:
        raise RunError(
            f"{place} (labels.copy_to) has the labels of an earlier run; choose another --set run.name=..., or start "
            "over with --overwrite"
        )
    if not (place / "config.toml").is_file():
        raise RunError(f"{place} (labels.copy_to) was not made by titan, so --overwrite leaves it alone; empty it")
    shutil.rmtree(place)


def bring_together(log: Path, copy: Path, run_id: str, durable: int = 0) -> int:
    """Repair a log and its copy, and give each what the other has; returns the steps that were copied.

    run_id:  of the run that goes on
    durable: step of the producer's checkpoint, as for `reopen`
    Raises LabelError if one of them is damaged, or of another run.
    """
    for folder in (log, copy):
        if (folder / MANIFEST).exists() and read_manifest(folder).run_id != run_id:
            raise LabelError(f"{folder} is the log of another run; give labels.copy_to a folder of its own")
    last = {folder: reopen(folder, durable=durable) for folder in (log, copy)}
    source, target = (copy, log) if last[copy] > last[log] else (log, copy)
    if (source / MANIFEST).exists() and not (target / MANIFEST).exists():
        write_whole(target / MANIFEST, (source / MANIFEST).read_bytes())
    kept = first_kept(source)
    if kept > last[target] + 1:
        drop_before(target, kept)  # between them there is nothing left to copy
    missing = [commit for commit in _commits(source) if commit.step > last[target]]
    if missing:
        _append(source, missing, target, kept)
    for folder in (log, copy):  # a crash may have come between the two
        drop_before(folder, max(first_kept(log), first_kept(copy)))
    return len(missing)


def committed_blocks(folder: Path, commits: Sequence[Commit]) -> Iterator[tuple[Commit, list[tuple[int, bytes]]]]:
    """Steps of a log that nobody writes, in a row: each with its blocks and the part of each."""
    parts = {part for commit in commits for part in commit.parts}
    blocks = {part: groupby(_blocks(folder, part, commits[0].step), lambda found: found.header.step) for part in parts}
    for commit in commits:
        found: list[tuple[int, bytes]] = []
        for part in commit.parts:
            step, located = next(blocks[part])
            assert step == commit.step, f"part {part} of {folder} has step {step}, the log {commit.step}"
            found += [(part, _read(block)) for block in located]
        yield commit, found


def _append(source: Path, commits: Sequence[Commit], target: Path, kept: int) -> None:
    """Copy committed steps; of those that the source has dropped the records alone."""
    before = commits[0].step - 1
    writers: dict[int, LabelWriter] = {}
    records = CommitWriter(target, before)
    for commit in commits:
        if commit.step < kept:
            records.commit(commit)
    there = [commit for commit in commits if commit.step >= kept]
    for commit, blocks in committed_blocks(source, there) if there else ():
        for part, block in blocks:
            writer = writers.setdefault(part, LabelWriter(target, part, before))
            writer.append(commit.step, block)
        records.commit(commit)
    for writer in writers.values():
        writer.make_durable()
        writer.close()
    records.make_durable()
    records.close()


def _commits(folder: Path) -> Iterator[Commit]:
    cursor = CommitCursor(folder)
    try:
        while commits := cursor.next():
            yield from commits
    finally:
        cursor.close()


def _blocks(folder: Path, part: int, first_step: int) -> Iterator[Located]:
    """Blocks of a part from a step on."""
    paths = segments_of(folder, part)
    for path, following in zip(paths, [*paths[1:], None], strict=True):
        if following is None or first_step_of(following) > first_step:
            yield from scan(path, offset_of_step(path, first_step))


def _read(block: Located) -> bytes:
    with open(block.path, "rb") as file:
        file.seek(block.offset)
        return file.read(block.length)
