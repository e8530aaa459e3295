"""How much of a log is kept: readers say where they are, and the producer drops old segments at its checkpoints.

    labels/PRODUCER/readers/NAME.json   the last step that is in a checkpoint of this reader
    labels/PRODUCER/readers/NAME.at     the last step that it has learned; only of readers that are waited for
    labels/PRODUCER/kept.json           the first step that is still there; absent while all are

Commit records are never dropped: a step takes about 100 bytes there, and the audit counts with them.
"""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from titan.checkpoint.files import Files, files_of
from titan.distill.log.index import read_index
from titan.distill.log.records import decode_line, encode_line
from titan.distill.log.segment import first_step_of, index_path, part_folder, parts_of, scan, segments_of
from titan.errors import ConfigError, LabelError
from titan.observe.files import write_whole

READERS, KEPT = "readers", "kept.json"
NOBODY: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Retention:
    """What the settings say."""

    keep: Literal["all", "needed"] = "all"
    """Everything, or what the slowest reader needs: what its newest checkpoint has not learned."""
    max_bytes: int | None = None
    """Of segments and their indexes."""
    when_full: Literal["drop", "wait", "stop"] = "stop"
    """Drop steps that some reader still needs, wait for the readers, or stop the run."""
    room_bytes: int = 0
    """To be left free of `max_bytes`: what the next step will take."""
    free_bytes: int = 0
    """To be dropped whatever the size, as the disk is full."""

    def __post_init__(self) -> None:
        if self.keep == "all" and self.max_bytes is not None and self.when_full == "wait":
            raise ConfigError(
                "labels.when_full is 'wait' and labels.keep is 'all', so no reader could ever make room; "
                "set labels.keep = 'needed'"
            )


@dataclass(frozen=True)
class Kept:
    """What a log holds after a look at it."""

    first_step: int
    """First step that is still there; 0 if nothing was ever dropped."""
    size_bytes: int
    dropped_bytes: int
    full: bool
    """Larger than allowed, so the producer has to wait."""
    overtaken: tuple[str, ...] = ()
    """Readers that had not learned what was dropped now: they skip it."""


@dataclass(frozen=True)
class _Segment:
    path: Path
    last_step: int
    size_bytes: int


def write_place(folder: Path | Files, reader: str, step: int) -> None:
    """Say that a reader's checkpoint has everything up to a step; it will not ask for it again."""
    files_of(folder).write(f"{READERS}/{reader}.json", encode_line({"step": step, "time_s": time.time()}))


def remove_place(folder: Path | Files, reader: str) -> None:
    """Say that a reader has left and holds nothing back."""
    files_of(folder).remove(f"{READERS}/{reader}.json")


def read_places(folder: Path) -> dict[str, int]:
    """The last step of each reader. Raises LabelError for a damaged file."""
    places = {}
    for path in sorted((folder / READERS).glob("*.json")):
        if path.name.startswith("."):
            continue  # a draft of somebody who writes now
        places[path.stem] = int(_read_line(path)["step"])
    return places


def first_kept(folder: Path) -> int:
    """The first step that was not dropped; 0 if none ever was. Raises LabelError for a damaged file."""
    path = folder / KEPT
    return int(_read_line(path)["first_step"]) if path.exists() else 0


def write_position(folder: Path | Files, reader: str, step: int) -> None:
    """Say that a reader has learned a step, in a checkpoint or not. Nothing is lost with it, so it is not durable."""
    files_of(folder).write(f"{READERS}/{reader}.at", b"%d\n" % step, durable=False)


def read_position(folder: Path, reader: str) -> int | None:
    """The last step that a reader said to have learned; None if it said nothing."""
    with suppress(FileNotFoundError, ValueError):
        return int((folder / READERS / f"{reader}.at").read_bytes())
    return None


def log_bytes(folder: Path) -> int:
    """What all segments and indexes take."""
    size = 0
    for part in parts_of(folder):
        for entry in os.scandir(part_folder(folder, part)):
            with suppress(FileNotFoundError):
                size += entry.stat().st_size
    return size


def largest_step_bytes(folder: Path) -> int:
    """What a step takes at most, by the newest segments; 0 for an empty log."""
    total = 0
    for part in parts_of(folder):
        sizes: dict[int, int] = {}
        for entry in read_index(paths[-1]) if (paths := segments_of(folder, part)) else ():
            sizes[entry.step] = sizes.get(entry.step, 0) + entry.length + len(entry.pack())
        total += max(sizes.values(), default=0)
    return total


def retain(folder: Path, retention: Retention, expected: Mapping[str, int] = NOBODY) -> Kept:
    """Drop what need not be kept. The producer calls it between two steps.

    expected: readers that count even if they never said where they are, and the step they need nothing before
    Raises LabelError if the log is full and the run is to stop.
    """
    places = dict(expected) | read_places(folder)
    segments = _segments(folder)
    size = sum(segment.size_bytes for segment in segments)
    first, dropped = first_kept(folder), 0
    newest = max((segment.last_step for segment in segments), default=0)
    if retention.keep == "needed" and places:
        first, dropped = _drop(folder, segments, min(min(places.values()) + 1, newest), first)
    over = 0 if retention.max_bytes is None else size - dropped + retention.room_bytes - retention.max_bytes
    over = max(over, retention.free_bytes - dropped)
    rest = [segment for segment in segments if segment.path.exists()]
    if over <= 0 or retention.when_full == "wait":
        could_shrink = any(segment.last_step < newest for segment in rest)
        return Kept(first, size - dropped, dropped, full=over > 0 and could_shrink)
    if retention.when_full == "stop":
        raise LabelError(
            f"the labels in {folder} take {size - dropped} bytes, labels.max_bytes is {retention.max_bytes} and "
            f"labels.when_full is 'stop'; {_slowest(places)}allow more, or set labels.when_full to 'drop' or 'wait'"
        )
    first, more = _drop(folder, rest, _first_that_fits(rest, over, newest), first)
    behind = tuple(sorted(name for name, step in places.items() if step + 1 < first))
    return Kept(first, size - dropped - more, dropped + more, full=False, overtaken=behind if more else ())


def drop_before(folder: Path, first: int) -> None:
    """Drop the steps before one, as far as they are in segments of their own."""
    before = first_kept(folder)
    if first > before:
        write_whole(folder / KEPT, encode_line({"first_step": first}))
    _drop(folder, _segments(folder), max(first, before), max(first, before))


def delete_dropped(folder: Path) -> None:
    """Delete segments of dropped steps that a crash left."""
    _drop(folder, _segments(folder), first_kept(folder), first_kept(folder))


def _segments(folder: Path) -> list[_Segment]:
    """All segments; the last step of one is that before the next of its part."""
    found = []
    for part in parts_of(folder):
        paths = segments_of(folder, part)
        for path, following in zip(paths, [*paths[1:], None], strict=False):
            size = path.stat().st_size
            size += index_path(path).stat().st_size if index_path(path).exists() else 0
            found.append(_Segment(path, first_step_of(following) - 1 if following else _last_step(path), size))
    return found


def _last_step(path: Path) -> int:
    return max((block.header.step for block in scan(path)), default=first_step_of(path))


def _first_that_fits(segments: list[_Segment], over_bytes: int, newest: int) -> int:
    """The smallest first step that frees so many bytes; at most the newest step."""
    freed = first = 0
    for segment in sorted(segments, key=lambda segment: segment.last_step):
        if freed >= over_bytes or segment.last_step >= newest:
            break
        freed += segment.size_bytes
        first = segment.last_step + 1
    return min(first, newest)


def _drop(folder: Path, segments: list[_Segment], bound: int, before: int) -> tuple[int, int]:
    """Delete segments all of whose steps are below `bound`; the first step then, and the bytes that were freed."""
    doomed = [segment for segment in segments if segment.last_step < bound]
    if not doomed:
        return before, 0
    first = max(before, 1 + max(segment.last_step for segment in doomed))
    # said before it is done: a reader must never take a deleted file for a lost one
    write_whole(folder / KEPT, encode_line({"first_step": first}))
    for segment in doomed:
        index_path(segment.path).unlink(missing_ok=True)
        segment.path.unlink(missing_ok=True)
    return first, sum(segment.size_bytes for segment in doomed)


def _slowest(places: dict[str, int]) -> str:
    if not places:
        return ""
    name = min(places, key=lambda name: places[name])
    return f"the slowest reader is {name} at step {places[name]}; "


def _read_line(path: Path) -> dict[str, Any]:
    record = decode_line(path.read_bytes())
    if record is None:
        raise LabelError(f"{path} is damaged; restore it from a copy of the log")
    return record
