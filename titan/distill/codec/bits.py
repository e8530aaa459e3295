"""Whole numbers packed at any width of bits, and read back.

Eight numbers take `width` bytes. They are not neighbours: numbers are laid out as eight rows, and a byte of the result
holds bits of the same column, so that every step of the work runs over contiguous memory.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from titan.errors import LabelError


def width_of(count: int) -> int:
    """Bits that tell `count` things apart; 0 for a single one."""
    return max(0, count - 1).bit_length()


def packed_bytes(count: int, width: int) -> int:
    """Size of `count` numbers of `width` bits."""
    return -(-count // 8) * width


def pack(values: np.ndarray, width: int) -> bytes:
    """values: whole numbers in [0, 2^width), any shape. Raises ValueError for a number that does not fit."""
    flat = values.ravel()
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >> width):
        raise ValueError(f"numbers of {width} bits must be in [0, {1 << width}), got {flat.min()} to {flat.max()}")
    columns = -(-flat.size // 8)
    rows = np.zeros((8, columns), _word(width))
    rows.reshape(-1)[: flat.size] = flat
    out = np.zeros((width, columns), np.uint8)
    for row, byte, shift in _places(width):
        piece = rows[row] << -shift if shift < 0 else rows[row] >> shift
        out[byte] |= piece.astype(np.uint8)  # keeps the low eight bits
    return out.tobytes()


def unpack(data: memoryview, count: int, width: int) -> np.ndarray:
    """uint32 [count]: inverse of `pack`. Raises LabelError if there are too few bytes."""
    size = packed_bytes(count, width)
    if len(data) < size:
        raise LabelError(f"label data is damaged: {count} numbers of {width} bits take {size} bytes, got {len(data)}")
    columns = -(-count // 8)
    packed = np.frombuffer(data, np.uint8, size).reshape(width, columns)
    rows = np.zeros((8, columns), _word(width))
    for row, byte, shift in _places(width):
        piece = packed[byte].astype(rows.dtype)
        rows[row] |= piece >> -shift if shift < 0 else piece << shift
    rows &= (1 << width) - 1
    flat: np.ndarray = rows.reshape(-1)[:count].astype(np.uint32)
    return flat


def _word(width: int) -> type[np.unsignedinteger[Any]]:
    """Wide enough for a number and the up to seven bits of the next that its bytes hold."""
    return np.uint32 if width <= 25 else np.uint64


def _places(width: int) -> Iterator[tuple[int, int, int]]:
    """Row, byte, and by how many bits the row's number is shifted right to be in that byte."""
    for row in range(8):
        for byte in range(row * width // 8, -(-(row + 1) * width // 8)):
            yield row, byte, 8 * byte - row * width


class BitWriter:
    """Fields one after the other, each starting at a byte."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def add(self, values: np.ndarray, width: int) -> None:
        """A field of whole numbers of `width` bits."""
        self.parts.append(pack(values, width))

    def add_array(self, array: np.ndarray, kind: str) -> None:
        """A field of numbers as numpy stores them."""
        self.parts.append(np.ascontiguousarray(array, np.dtype(kind)).tobytes())

    def payload(self) -> bytes:
        """Everything so far."""
        return b"".join(self.parts)


class BitReader:
    """The fields of a payload in the order in which they were written."""

    def __init__(self, payload: bytes):
        self.rest = memoryview(payload)

    def take(self, count: int, width: int) -> np.ndarray:
        """uint32 [count]."""
        values = unpack(self.rest, count, width)
        self.rest = self.rest[packed_bytes(count, width) :]
        return values

    def take_array(self, shape: tuple[int, ...], kind: str) -> np.ndarray:
        """An array of this shape and dtype."""
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        if len(self.rest) < size:
            raise LabelError(f"label data is damaged: an array of {size} bytes is cut to {len(self.rest)}")
        array = np.frombuffer(self.rest[:size], kind).reshape(shape)
        self.rest = self.rest[size:]
        return array
