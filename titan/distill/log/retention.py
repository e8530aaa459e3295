"""How much of a log is kept: readers say where they are, and the producer drops old segments at its checkpoints.

    labels/PRODUCER/readers/NAME.json   the last step that is in a checkpoint of this reader
    labels/PRODUCER/kept.json           the first step that is still there; absent while all are

Commit records are never dropped: a step takes about 100 bytes there, and the audit counts with them.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from titan.distill.log.records import decode_line, encode_line
from titan.distill.log.segment import first_step_of, index_path, parts_of, scan, segments_of
from titan.errors import ConfigError, LabelError
from titan.observe.files import write_whole

READERS, KEPT = "readers", "kept.json"
WAIT_S = 0.5


@dataclass(frozen=True)
class Retention:
    """What the settings say."""

    keep: Literal["all", "slowest"] = "all"
    """Everything, or what the slowest reader has not learned."""
    max_bytes: int | None = None
    """Of segments and their indexes."""
    when_full: Literal["drop", "wait", "stop"] = "stop"
    """Drop steps that some reader still needs, wait for the readers, or stop the run."""

    def __post_init__(self) -> None:
        if self.keep == "all" and self.max_bytes is not None and self.when_full == "wait":
            raise ConfigError(
                "labels.when_full is 'wait' and labels.keep is 'all', so no reader could ever make room; "
                "set labels.keep = 'slowest'"
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


def write_place(folder: Path, reader: str, step: int) -> None:
    """Say that a reader's checkpoint has everything up to a step; it will not ask for it again."""
    (folder / READERS).mkdir(parents=True, exist_ok=True)
    write_whole(folder / READERS / f"{reader}.json", encode_line({"step": step, "time_s": time.time()}))


def remove_place(folder: Path, reader: str) -> None:
    """Say that a reader has left and holds nothing back."""
    (folder / READERS / f"{reader}.json").unlink(missing_ok=True)


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


def retain(folder: Path, retention: Retention, expected: Collection[str] = ()) -> Kept:
    """Drop what need not be kept. The producer calls it between two steps, at a checkpoint.

    expected: readers that count even if they never said where they are: they need everything
    Raises LabelError if the log is full and the run is to stop.
    """
    places = dict.fromkeys(expected, 0) | read_places(folder)
    segments = _segments(folder)
    size = sum(segment.size_bytes for segment in segments)
    first, dropped = first_kept(folder), 0
    newest = max((segment.last_step for segment in segments), default=0)
    if retention.keep == "slowest" and places:
        first, dropped = _drop(folder, segments, min(min(places.values()) + 1, newest), first)
    over = 0 if retention.max_bytes is None else size - dropped - retention.max_bytes
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


def wait_for_room(
    folder: Path,
    retention: Retention,
    expected: Collection[str] = (),
    give_up: Callable[[], bool] = lambda: False,
    pause_s: float = WAIT_S,
) -> tuple[Kept, float]:
    """`retain`, and with `wait` again until readers made room or `give_up` says so; also the seconds that took."""
    begin = time.monotonic()
    while True:
        kept = retain(folder, retention, expected)
        if not kept.full or give_up():
            return kept, time.monotonic() - begin
        time.sleep(pause_s)


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
