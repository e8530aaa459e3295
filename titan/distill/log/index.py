"""The index of a segment: which block is where, so that nobody reads headers one by one, nor payloads for sample ids.

It is made from the segment and can be made again: whoever finds it missing, torn or damaged does without.
"""

import os
import struct
import zlib
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

from titan.distill.codec.block import HEADER_BYTES, decode_block
from titan.distill.log.segment import Located, first_step_of, index_path
from titan.observe.files import write_whole

_FIXED = struct.Struct("<QIIQII")  # step, first sample, samples, offset, length, crc32 of the payload
_CHECKSUM_BYTES = 4


@dataclass(frozen=True)
class IndexEntry:
    """One block."""

    step: int
    first_sample: int
    samples: int
    offset: int
    length: int
    """Bytes of header and payload."""
    crc32: int
    """Of the payload."""
    sample_ids: tuple[int, ...]

    @property
    def end(self) -> int:
        """Offset behind the block."""
        return self.offset + self.length

    def describes(self, block: Located) -> bool:
        """Whether this is the entry of that block, sample ids aside."""
        header = block.header
        want = (header.step, header.first_sample, header.samples, block.offset, block.length, header.payload_crc32)
        return (self.step, self.first_sample, self.samples, self.offset, self.length, self.crc32) == want

    def pack(self) -> bytes:
        """The entry as it is in the file, with its checksum."""
        fixed = _FIXED.pack(self.step, self.first_sample, self.samples, self.offset, self.length, self.crc32)
        body = fixed + struct.pack(f"<{self.samples}q", *self.sample_ids)
        return body + zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "little")


def make_entry(block: Located, sample_ids: tuple[int, ...]) -> IndexEntry:
    """The entry of a block."""
    header = block.header
    assert len(sample_ids) == header.samples
    return IndexEntry(
        header.step, header.first_sample, header.samples, block.offset, block.length, header.payload_crc32, sample_ids
    )


def unpack_entries(data: bytes) -> tuple[list[IndexEntry], int]:
    """Entries up to the first that is torn or damaged, and how many bytes they take."""
    entries: list[IndexEntry] = []
    offset = 0
    while len(data) - offset >= _FIXED.size:
        step, first, samples, place, length, crc = _FIXED.unpack_from(data, offset)
        end = offset + _FIXED.size + 8 * samples
        if end + _CHECKSUM_BYTES > len(data):
            break
        if zlib.crc32(data[offset:end]).to_bytes(_CHECKSUM_BYTES, "little") != data[end : end + _CHECKSUM_BYTES]:
            break
        ids = struct.unpack_from(f"<{samples}q", data, offset + _FIXED.size)
        entries.append(IndexEntry(step, first, samples, place, length, crc, ids))
        offset = end + _CHECKSUM_BYTES
    return entries, offset


def read_index(segment: Path) -> list[IndexEntry]:
    """Entries of a segment's index as far as they are intact; [] if there is none, or it is another segment's."""
    try:
        entries, _ = unpack_entries(index_path(segment).read_bytes())
    except FileNotFoundError:
        return []
    return entries if entries and entries[0].step == first_step_of(segment) else []


def index_is_whole(segment: Path) -> bool:
    """Whether the index is undamaged and describes the segment to its end."""
    path = index_path(segment)
    if not path.exists():
        return False
    data = path.read_bytes()
    entries, good_bytes = unpack_entries(data)
    if not entries or entries[0].step != first_step_of(segment):
        return False
    reach = 0
    for entry in entries:
        if entry.offset != reach:
            return False
        reach = entry.end
    return good_bytes == len(data) and reach == segment.stat().st_size


def offset_of_step(segment: Path, step: int) -> int:
    """Where to begin looking for a step: at its first block, or before it where the index does not go so far."""
    entries = read_index(segment)
    place = bisect_left(entries, step, key=lambda entry: entry.step)
    if place < len(entries):
        return entries[place].offset
    return entries[-1].end if entries else 0


def read_sample_ids(block: Located) -> tuple[int, ...]:
    """Sample ids of a block, from the block. Raises LabelError if it is damaged."""
    descriptor = os.open(block.path, os.O_RDONLY)
    try:
        payload = os.pread(descriptor, block.header.payload_bytes, block.offset + HEADER_BYTES)
    finally:
        os.close(descriptor)
    return tuple(int(number) for number in decode_block(block.header, payload).sample_ids_B)


def repair_index(segment: Path, blocks: list[Located]) -> bool:
    """Make the index that of these blocks, which are all the segment has; whether anything had to be done."""
    path = index_path(segment)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    entries, _ = unpack_entries(data)
    kept: list[IndexEntry] = []
    for entry, block in zip(entries, blocks, strict=False):
        if not entry.describes(block):
            break
        kept.append(entry)
    made = [make_entry(block, read_sample_ids(block)) for block in blocks[len(kept) :]]
    whole = b"".join(entry.pack() for entry in (*kept, *made))
    if whole == data and path.exists():
        return False
    write_whole(path, whole)
    return True
