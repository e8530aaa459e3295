"""The first pass over a corpus: which documents are kept, which are held out, and what the tokenizer learns from."""

import hashlib
import heapq
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from titan.data.shards import SPLITS, write_atomically
from titan.data.sources import Document, SourceFile, iter_documents
from titan.errors import DataError

SAMPLE_BYTES = 20_000_000
"""Most text that a tokenizer is trained on."""
LEFT_OUT, TRAIN, HELDOUT = 0, 1, 2
"""What becomes of a document."""


@dataclass(frozen=True)
class Survey:
    """What becomes of each document, and counts. Takes 16 bytes of memory a document."""

    fates: npt.NDArray[np.uint8]
    """[documents] LEFT_OUT, TRAIN or HELDOUT, in the order of the sources."""
    lengths: npt.NDArray[np.uint64]
    """[documents] UTF-8 bytes."""
    duplicates: int
    empty: int
    binary_files: int
    """Files inside folders that are not UTF-8 text."""

    def counts(self) -> dict[str, int]:
        """Figures for the index."""
        kept = {f"{split}_documents": int((self.fates == TRAIN + number).sum()) for number, split in enumerate(SPLITS)}
        return {
            **kept,
            "duplicates": self.duplicates,
            "empty": self.empty,
            "binary_files": self.binary_files,
        }

    def save(self, path: Path) -> None:
        """Write it, so that a restart need not survey again."""
        numbers = np.array([self.duplicates, self.empty, self.binary_files], np.int64)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as stream:
                np.savez(stream, fates=self.fates, lengths=self.lengths, numbers=numbers)

        write_atomically(path, write)

    @classmethod
    def load(cls, path: Path) -> "Survey":
        """Read it back."""
        with np.load(path) as arrays:
            duplicates, empty, binary_files = arrays["numbers"].tolist()
            return cls(arrays["fates"], arrays["lengths"], duplicates, empty, binary_files)


def survey_documents(
    files: Sequence[SourceFile], text_field: str, heldout_fraction: float, advance: Callable[[int], None]
) -> tuple[Survey, list[str]]:
    """Read all documents once; return the survey and the tokenizer's texts (train only, highest hash first).

    advance: called with the bytes of the source files that are done
    Raises DataError for an empty corpus and for one that cannot give both splits a document.
    """
    hashes, lengths = array("Q"), array("Q")
    sample = _HighestHashes(SAMPLE_BYTES)
    binary_files = 0
    done = 0
    for file in files:
        documents = iter_documents(file, text_field)
        if documents is None:
            binary_files += 1
        else:
            for document, inside in _with_position(documents, file.size):
                content = document.text.encode()
                digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
                hashes.append(digest)
                lengths.append(len(content))
                sample.add(digest, document.text, len(content))
                advance(done + inside)
        done += file.size
        advance(done)
    survey, cut = _decide(np.asarray(hashes, np.uint64), np.asarray(lengths, np.uint64), heldout_fraction, binary_files)
    return survey, sample.texts_from(cut)


def _decide(
    hashes: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint64], heldout_fraction: float, binary_files: int
) -> tuple[Survey, int]:
    """Fates of the documents, and the hash below which they are held out. A fate does not depend on the order.

    Two documents share a 64-bit hash by chance once in 37 million corpora of a million documents.
    """
    filled = np.flatnonzero(lengths)
    distinct, first = np.unique(hashes[filled], return_index=True)
    if len(distinct) < 2:
        what = "is empty" if len(distinct) == 0 else "has one document, and one of at least two is held out"
        raise DataError(
            f"data.sources: the corpus {what} ({len(lengths)} read, {len(lengths) - len(filled)} of them empty, "
            f"{binary_files} binary files); add sources, or cut the text into several files or .jsonl lines"
        )
    cut = int(heldout_fraction * 2**64)
    cut = min(max(cut, int(distinct[0]) + 1), int(distinct[-1]))
    fates = np.full(len(lengths), LEFT_OUT, np.uint8)
    fates[filled[first]] = np.where(distinct < np.uint64(cut), HELDOUT, TRAIN)
    duplicates = len(filled) - len(distinct)
    return Survey(fates, lengths, duplicates, len(lengths) - len(filled), binary_files), cut


class _HighestHashes:
    """Keeps the documents of the highest hashes whose texts fit a budget, in whatever order they come.

    Held-out documents have the lowest hashes, so a corpus above the budget never offers one.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._room_bytes = budget_bytes
        self._floor = -1
        self._heap: list[tuple[int, int, str]] = []
        self._kept: set[int] = set()

    def add(self, digest: int, text: str, num_bytes: int) -> None:
        if digest <= self._floor or digest in self._kept:
            return
        heapq.heappush(self._heap, (digest, num_bytes, text))
        self._kept.add(digest)
        self._room_bytes -= num_bytes
        while self._room_bytes < 0 and len(self._heap) > 1:
            self._floor, freed, _ = heapq.heappop(self._heap)
            self._kept.remove(self._floor)
            self._room_bytes += freed

    def texts_from(self, cut: int) -> list[str]:
        return [text for digest, _, text in sorted(self._heap, reverse=True) if digest >= cut]


def _with_position(documents: Iterator[Document], size: int) -> Iterator[tuple[Document, int]]:
    """Each document with about the bytes of its file that are read by then."""
    position = 0
    for document in documents:
        position += len(document.text)
        yield document, min(position, size)
