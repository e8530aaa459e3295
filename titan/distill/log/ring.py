"""A bounded ring of large feature labels (queries, keys, values, hidden states): fast, and gone when overwritten.

    FOLDER/part-000.ring    `slots` slots of equal size; step n lies in slot n modulo `slots`

Nothing here is durable: after a crash, or for a reader that is too slow, features of a step are simply not there, and
the student does without. A reader never takes a torn payload or that of another step: a slot's header names step, part
and checksum, is cleared before the payload changes and written after it, and is compared again after the copy.
"""

import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from titan.errors import LabelError

MAGIC = b"TLR1"
_FILE = struct.Struct("<4sIQI")  # magic slots slot_bytes part
_SLOT = struct.Struct("<QIQI")  # step part length crc32 of the payload
_CHECKSUM_BYTES = 4
FILE_HEADER_BYTES = 64
SLOT_HEADER_BYTES = 32
EMPTY = bytes(SLOT_HEADER_BYTES)
POLL_S = 0.001


def ring_path(folder: Path, part: int) -> Path:
    """The ring of a part."""
    return folder / f"part-{part:03d}.ring"


class FeatureRing:
    """One part's ring, for its writer (`create`) or for any number of readers (`open`) on the same machine."""

    def __init__(self, path: Path, memory: mmap.mmap, slots: int, slot_bytes: int, part: int):
        self.path, self.memory, self.slots, self.slot_bytes, self.part = path, memory, slots, slot_bytes, part

    @classmethod
    def create(cls, folder: Path, part: int, slots: int, slot_bytes: int) -> "FeatureRing":
        """A new, empty ring in place of one that may be there.

        slots: steps that are held;  slot_bytes: the largest payload
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = ring_path(folder, part)
        draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        head = _FILE.pack(MAGIC, slots, slot_bytes, part)
        size = FILE_HEADER_BYTES + slots * (SLOT_HEADER_BYTES + slot_bytes)
        try:
            with open(draft, "wb") as file:
                file.write(head + zlib.crc32(head).to_bytes(_CHECKSUM_BYTES, "little"))
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk says so now, not as SIGBUS later
            draft.replace(path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise LabelError(
                f"cannot make a ring of {size} bytes at {path}: {error.strerror}; make it smaller"
            ) from error
        return cls._map(path, mmap.ACCESS_WRITE)

    @classmethod
    def open(cls, folder: Path, part: int) -> "FeatureRing":
        """The ring of a part, to read. Raises LabelError if there is none."""
        return cls._map(ring_path(folder, part), mmap.ACCESS_READ)

    @classmethod
    def _map(cls, path: Path, access: int) -> "FeatureRing":
        try:
            with open(path, "r+b" if access == mmap.ACCESS_WRITE else "rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=access)
        except (FileNotFoundError, ValueError):
            raise LabelError(f"{path} is missing: nobody sends features; set them for the teacher too") from None
        head = memory[: _FILE.size]
        magic, slots, slot_bytes, part = _FILE.unpack(head)
        if magic != MAGIC or memory[_FILE.size : _FILE.size + _CHECKSUM_BYTES] != zlib.crc32(head).to_bytes(
            4, "little"
        ):
            raise LabelError(f"{path} is no ring of features that this titan reads; delete it")
        return cls(path, memory, slots, slot_bytes, part)

    def write(self, step: int, payload: bytes) -> None:
        """Put a step's features into its slot, over those of `slots` steps before. Raises LabelError if too large."""
        if len(payload) > self.slot_bytes:
            raise LabelError(
                f"features of step {step} take {len(payload)} bytes, {self.path} has slots of {self.slot_bytes}"
            )
        start = self._slot(step)
        body = start + SLOT_HEADER_BYTES
        self.memory[start:body] = EMPTY
        self.memory[body : body + len(payload)] = payload
        head = _SLOT.pack(step, self.part, len(payload), zlib.crc32(payload))
        whole = head + zlib.crc32(head).to_bytes(_CHECKSUM_BYTES, "little")
        self.memory[start:body] = whole.ljust(SLOT_HEADER_BYTES, b"\0")

    def read(self, step: int) -> bytes | None:
        """Features of a step; None if they are not there yet, no longer, or are being written."""
        start = self._slot(step)
        header = self.memory[start : start + SLOT_HEADER_BYTES]
        said = self._unpack(header)
        if said is None or said[0] != step or said[1] != self.part or said[2] > self.slot_bytes:
            return None
        payload = self.memory[start + SLOT_HEADER_BYTES : start + SLOT_HEADER_BYTES + said[2]]
        unchanged = self.memory[start : start + SLOT_HEADER_BYTES] == header
        return payload if unchanged and zlib.crc32(payload) == said[3] else None

    def gone(self, step: int) -> bool:
        """Whether the slot of a step has a later step: its features will never come."""
        start = self._slot(step)
        said = self._unpack(self.memory[start : start + SLOT_HEADER_BYTES])
        return said is not None and said[0] > step

    def wait(self, step: int, timeout_s: float, give_up: Callable[[], bool] = lambda: False) -> bytes | None:
        """`read`, waiting; None if they are gone, `give_up` says so, or nothing came for `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while (payload := self.read(step)) is None:
            if self.gone(step) or give_up() or time.monotonic() > deadline:
                return None
            time.sleep(POLL_S)
        return payload

    def close(self) -> None:
        """Unmap the ring; the file stays for others."""
        self.memory.close()

    def _slot(self, step: int) -> int:
        return FILE_HEADER_BYTES + step % self.slots * (SLOT_HEADER_BYTES + self.slot_bytes)

    @staticmethod
    def _unpack(header: bytes) -> tuple[int, int, int, int] | None:
        """Step, part, length and checksum; None for an empty or torn header."""
        head, checksum = header[: _SLOT.size], header[_SLOT.size : _SLOT.size + _CHECKSUM_BYTES]
        if zlib.crc32(head).to_bytes(_CHECKSUM_BYTES, "little") != checksum:
            return None
        step, part, length, crc = _SLOT.unpack(head)
        return step, part, length, crc
