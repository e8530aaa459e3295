"""A prepared corpus: two token streams, train and heldout, read from memory-mapped shards."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from titan.data.shards import (
    INDEX_FILE,
    REMEDY,
    SPLITS,
    TOKENIZER_FILE,
    Shard,
    Split,
    Tokens,
    checksum,
    damaged,
    read_shard,
)
from titan.data.tokenizer import Tokenizer
from titan.errors import DataError


class Corpus:
    """The corpus in a folder that `prepare_corpus` made. Cheap to open: a shard is mapped when it is first read.

    folder: where it is;  fingerprint: differs when tokens do;  vocab_size, eod_id: of its tokenizer
    counts: documents of each split, duplicates, empty documents and binary files that were left out
    Pickles as its folder.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.fingerprint: str = index["fingerprint"]
        self.counts: dict[str, int] = index["counts"]
        self.vocab_size: int = index["tokenizer"]["vocab_size"]
        self.eod_id: int = index["tokenizer"]["eod_id"]
        self._tokenizer_sha256: str = index["tokenizer"]["sha256"]
        self._shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        for split in SPLITS:
            for entry in index["shards"][split]:
                _check_size(folder / entry["name"], entry.pop("file_bytes"))
                self._shards[split].append(Shard(**entry))
        self._starts = {split: np.cumsum([0, *(s.tokens for s in shards)]) for split, shards in self._shards.items()}
        self._mapped: dict[tuple[str, int], Tokens] = {}

    @classmethod
    def open(cls, folder: Path, verify: bool = False) -> "Corpus":
        """Open a corpus. Raises DataError when a file is missing, cut short or, with verify, has another checksum."""
        path = folder / INDEX_FILE
        try:
            corpus = cls(folder, json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise DataError(f"{path} does not exist: the corpus was never finished; prepare it again") from None
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(path, str(error) or type(error).__name__) from None
        if verify:
            corpus._verify()
        return corpus

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Corpus.open, (self.folder,)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The corpus' tokenizer."""
        return Tokenizer(self.folder / TOKENIZER_FILE)

    def num_tokens(self, split: Split) -> int:
        """Tokens of a split, with one end-of-document id a document."""
        return int(self._starts[split][-1])

    def num_bytes(self, split: Split) -> int:
        """UTF-8 bytes of a split's text."""
        return sum(shard.bytes for shard in self._shards[split])

    def tokens(self, split: Split, start: int, count: int) -> npt.NDArray[np.int32]:
        """Tokens [start, start + count) of a split's stream, as [count] int32."""
        starts = self._starts[split]
        assert start >= 0 and count >= 0 and start + count <= starts[-1], (split, start, count, int(starts[-1]))
        result = np.empty(count, np.int32)
        number = int(np.searchsorted(starts, start, side="right")) - 1
        filled = 0
        while filled < count:
            first = start + filled - int(starts[number])
            piece = self._map(split, number)[first : first + count - filled]
            result[filled : filled + len(piece)] = piece
            filled += len(piece)
            number += 1
        return result

    def _map(self, split: str, number: int) -> Tokens:
        key = (split, number)
        if key not in self._mapped:
            expected = self._shards[split][number]
            shard, tokens = read_shard(self.folder / expected.name)
            if shard != expected:
                raise damaged(self.folder / expected.name, "it belongs to another corpus")
            self._mapped[key] = tokens
        return self._mapped[key]

    def _verify(self) -> None:
        model = self.folder / TOKENIZER_FILE
        if not model.is_file() or hashlib.sha256(model.read_bytes()).hexdigest() != self._tokenizer_sha256:
            raise damaged(model, "its checksum differs")
        for split, shards in self._shards.items():
            for number, shard in enumerate(shards):
                if checksum(self._map(split, number)) != shard.crc32:
                    raise damaged(self.folder / shard.name, "its checksum differs")


def _check_size(path: Path, expected_bytes: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {REMEDY}") from None
    if size != expected_bytes:
        raise damaged(path, f"it has {size} bytes instead of {expected_bytes}")
