"""Reads one file: text told from binary, large text cut into pieces, JSON lines and Parquet row by row."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from titan.errors import DataError

LARGE_FILE_BYTES = 256 * 1024
"""A plain-text file above this size becomes several documents."""
PIECE_BYTES = 64 * 1024
"""Size of such a document at most. Small enough that a 1 MB file still has a held-out part of a few per cent."""

_BLOCK_BYTES = 1 << 20
_SNIFFED_BYTES = 8192
_PARQUET_ROWS = 256
"""Rows decoded at once: 16 MB of text for web pages of 64 kB."""


def is_text(content: bytes) -> bool:
    """Valid UTF-8 without a NUL near its beginning."""
    if 0 in content[:_SNIFFED_BYTES]:
        return False
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def is_text_file(path: Path) -> bool:
    """`is_text` for a file of any size."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as stream:
        block = stream.read(_BLOCK_BYTES)
        if 0 in block[:_SNIFFED_BYTES]:
            return False
        try:
            while block:
                decoder.decode(block)
                block = stream.read(_BLOCK_BYTES)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def cut_file(path: Path, piece_bytes: int = PIECE_BYTES) -> Iterator[str]:
    """Pieces of at most `piece_bytes` that add up to the file, each as long as can be.

    A cut is after the last blank line in the second half of a piece, else after its last line, else between characters.
    """
    with path.open("rb") as stream:
        rest = b""
        while True:
            rest += stream.read(piece_bytes - len(rest))
            if len(rest) < piece_bytes:
                break
            cut = _cut(rest)
            yield rest[:cut].decode("utf-8")
            rest = rest[cut:]
        if rest:
            yield rest.decode("utf-8")


def read_jsonl(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """(line number from 1, text) of each line that is not blank. A name that ends in .gz is decompressed on the way."""
    compressed = path.name.lower().endswith(".gz")
    with cast(BinaryIO, gzip.open(path, "rb")) if compressed else path.open("rb") as stream:
        number = 0
        try:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield str(number), _line_text(path, number, line, field)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"data.sources: {path} is damaged after line {number}: {error}; replace it") from None


def read_parquet(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """(row number from 0, text) of each row; other columns are not read."""
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise DataError(f"data.text_field: {path} has no column {field!r}; its columns are {names}")
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                for scalar in batch.column(0):
                    yield str(row), _checked(path, f"row {row}", scalar.as_py(), field)
                    row += 1
    except UnicodeDecodeError:
        raise DataError(f"data.sources: {path} row {row}: {field!r} is not UTF-8; correct or remove the row") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise DataError(
            f"data.sources: {path} cannot be read as Parquet from row {row}: {reason}; replace it"
        ) from None


def _cut(block: bytes) -> int:
    half = len(block) // 2
    for mark in (b"\n\n", b"\n"):
        at = block.rfind(mark, half)
        if at >= 0:
            return at + len(mark)
    at = len(block)
    while at > 1 and len(block) - at < 4 and block[at - 1] & 0xC0 == 0x80:
        at -= 1
    return at - 1 if at > 1 and block[at - 1] >= 0xC0 else len(block)


def _line_text(path: Path, number: int, line: bytes, field: str) -> str:
    place = f"line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"data.sources: {path} {place} is not JSON: {error}; correct or remove the line") from None
    if not isinstance(record, dict):
        raise DataError(f"data.sources: {path} {place} is not a JSON object; correct or remove the line")
    if field not in record:
        names = ", ".join(map(str, list(record)[:8])) or "none"
        raise DataError(f"data.text_field: {path} {place} has no field {field!r}; its fields are {names}")
    return _checked(path, place, record[field], field)


def _checked(path: Path, place: str, value: Any, field: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"data.text_field: {path} {place}: {field!r} is {kind}, not a string; correct or remove it")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(
                f"data.sources: {path} {place}: {field!r} has half a surrogate pair; correct or remove the row"
            ) from None
    return value
