"""Segments: the files that blocks stand in, one after the other.

    labels/PRODUCER/part-000/0000000001.segment   blocks of part 0 from step 1 on, until the next segment's first step

A part is one replica of the producer's last stage. A step never spans two segments of a part.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from titan.distill.codec.block import HEADER_BYTES, BlockHeader, VersionError
from titan.errors import LabelError

SEGMENT, INDEX = ".segment", ".index"


@dataclass(frozen=True)
class Located:
    """A block and where it stands."""

    path: Path
    offset: int
    header: BlockHeader

    @property
    def length(self) -> int:
        """Bytes of header and payload."""
        return HEADER_BYTES + int(self.header.payload_bytes)

    @property
    def end(self) -> int:
        """Offset behind the block."""
        return self.offset + self.length


def part_folder(folder: Path, part: int) -> Path:
    """Where the segments of a part are."""
    return folder / f"part-{part:03d}"


def segment_path(folder: Path, part: int, first_step: int) -> Path:
    """The segment of a part that begins with a step."""
    return part_folder(folder, part) / f"{first_step:010d}{SEGMENT}"


def index_path(segment: Path) -> Path:
    """The index of a segment."""
    return segment.with_suffix(INDEX)


def first_step_of(segment: Path) -> int:
    """The step that a segment begins with."""
    return int(segment.stem)


def parts_of(folder: Path) -> list[int]:
    """Parts that a log has, of all layouts it was written in."""
    return sorted(int(path.name.removeprefix("part-")) for path in folder.glob("part-*") if path.is_dir())


def segments_of(folder: Path, part: int) -> list[Path]:
    """Segments of a part, oldest first."""
    place = part_folder(folder, part)
    if not place.is_dir():
        return []
    names = [name for name in os.listdir(place) if name.endswith(SEGMENT) and name.removesuffix(SEGMENT).isdigit()]
    return [place / name for name in sorted(names)]


def scan(path: Path, start: int = 0, until: int | None = None) -> Iterator[Located]:
    """Blocks of a segment from byte `start` on, those up to step `until`, as far as headers are intact.

    Raises VersionError, naming file and place, for a block of another version of the format.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield from scan_open(path, descriptor, start, until)
    finally:
        os.close(descriptor)


def scan_open(path: Path, descriptor: int, start: int = 0, until: int | None = None) -> Iterator[Located]:
    """`scan` of an open file."""
    offset, size = start, os.fstat(descriptor).st_size
    while True:
        try:
            header = BlockHeader.unpack(os.pread(descriptor, HEADER_BYTES, offset))
        except VersionError as error:
            raise VersionError(f"{path}, block at byte {offset}: {error}") from None
        except LabelError:
            return
        located = Located(path, offset, header)
        if located.end > size or (until is not None and header.step > until):
            return
        yield located
        offset = located.end
