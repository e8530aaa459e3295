"""Token shards on disk: one Arrow IPC file each, written whole or not at all, and the index of a finished corpus."""

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from titan.errors import DataError

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")

INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.model"
REMEDY = "delete the folder and run again"

Tokens = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of consecutive tokens of a split, and where the next one goes on."""

    name: str
    tokens: int
    bytes: int
    """UTF-8 bytes the tokens decode to."""
    crc32: int
    """Of the tokens, little-endian."""
    document: int
    """Number, among all documents of the sources, of the one with the token after this shard's last."""
    offset: int
    """Tokens of that document up to and in this shard."""


def token_type(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The narrowest type that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def shard_name(split: Split, number: int) -> str:
    """File name of a split's shard, numbered from 0."""
    return f"{split}-{number:05d}.arrow"


def checksum(tokens: Tokens) -> int:
    """CRC-32 of the tokens."""
    return zlib.crc32(np.ascontiguousarray(tokens).view(np.uint8).data)


def write_shard(folder: Path, shard: Shard, tokens: Tokens) -> None:
    """Write a shard with its description inside, so that a later process can go on after it."""
    described = {b"titan": json.dumps(asdict(shard)).encode()}
    schema = pa.schema([pa.field("tokens", pa.from_numpy_dtype(tokens.dtype), nullable=False)], metadata=described)

    def write(path: Path) -> None:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch([pa.array(tokens)], schema=schema))

    write_atomically(folder / shard.name, write)


def read_shard(path: Path) -> tuple[Shard, Tokens]:
    """A shard's description and its tokens, memory-mapped. Raises DataError for a damaged file."""
    try:
        with pa.memory_map(str(path), "r") as mapped:  # the map outlives its file handle, of which a process has few
            reader = pa.ipc.open_file(mapped)
            shard = Shard(**json.loads(reader.schema.metadata[b"titan"]))
            tokens: Tokens = reader.get_batch(0).column(0).to_numpy(zero_copy_only=True)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise damaged(path, str(error).splitlines()[0][:200]) from None
    if len(tokens) != shard.tokens:
        raise damaged(path, f"it has {len(tokens)} tokens instead of {shard.tokens}")
    return shard, tokens


def damaged(path: Path, reason: str) -> DataError:
    """The error for a file of a corpus that is not as it was written."""
    return DataError(f"{path} is damaged: {reason}; {REMEDY}")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1), encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then give it its name; survives a crash of the process or the machine."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
