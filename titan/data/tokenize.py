"""The second pass over a corpus: documents become ids, in several processes, and ids become shards, in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from titan.config.settings import DataSettings
from titan.data.shards import SPLITS, Shard, Split, Tokens, checksum, read_shard, shard_name, token_type, write_shard
from titan.data.sources import SourceFile, iter_documents
from titan.data.survey import LEFT_OUT, TRAIN, Survey
from titan.data.tokenizer import Tokenizer
from titan.errors import DataError

_BATCH_BYTES = 1 << 20
"""Text that a process encodes at a time: about 0.25 s of work, 0.6 MB of ids to send back."""
_PROCESS_BYTES = 4 << 20
"""Text that is worth a process of its own, which takes 0.4 s to start."""


def tokenize_documents(
    files: Sequence[SourceFile],
    settings: DataSettings,
    survey: Survey,
    tokenizer: Tokenizer,
    folder: Path,
    advance: Callable[[int], None],
) -> dict[str, list[Shard]]:
    """Write the shards of both splits that the folder does not have yet; return all, by split.

    advance: called with the bytes of text that are done
    The result does not depend on the number of processes, nor on how often the work was interrupted.
    """
    writers = {split: _ShardWriter(folder, split, settings.shard_tokens, tokenizer) for split in SPLITS}
    todo = np.flatnonzero(survey.fates)
    left_bytes = int(survey.lengths[todo[todo >= min(writer.document for writer in writers.values())]].sum())
    done = int(survey.lengths[todo].sum()) - left_bytes
    advance(done)
    batches = _batches(files, settings.text_field, survey, writers)
    num_processes = min(settings.workers or _cores(), 1 + left_bytes // _PROCESS_BYTES)
    for batch, documents in _encode_in_order(tokenizer, batches, num_processes):
        for (number, split, _), ids in zip(batch, documents, strict=True):
            writers[split].add(number, ids)
            done += int(survey.lengths[number])
        advance(done)
    return {split: writer.finish(len(survey.fates)) for split, writer in writers.items()}


_Batch = list[tuple[int, Split, str]]
"""Numbers, splits and texts of documents."""


class _ShardWriter:
    """Fills the shards of one split with ids, going on after the good shards that the folder has."""

    def __init__(self, folder: Path, split: Split, shard_tokens: int, tokenizer: Tokenizer) -> None:
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._type = token_type(tokenizer.vocab_size)
        self._bytes_of_id = tokenizer.piece_bytes()
        self._pending: list[Tokens] = []
        self._num_pending = 0
        self._shards = _finished_shards(folder, split)
        self.document = self._shards[-1].document if self._shards else 0
        """Number of the document whose ids are needed next."""
        self._offset = self._shards[-1].offset if self._shards else 0

    def add(self, document: int, ids: Tokens) -> None:
        """Append the ids of a document, numbered upwards; those that are in a finished shard are skipped."""
        if document < self.document:
            return
        start = self._offset if document == self.document else 0
        self.document = document
        while start < len(ids):
            taken = ids[start : start + self._shard_tokens - self._num_pending]
            self._pending.append(taken)
            self._num_pending += len(taken)
            start += len(taken)
            self._offset = start
            if self._num_pending == self._shard_tokens:
                self._write()

    def finish(self, num_documents: int) -> list[Shard]:
        """Write what is pending; the shards of the split."""
        if self._num_pending:
            self.document, self._offset = num_documents, 0
            self._write()
        return self._shards

    def _write(self) -> None:
        tokens = np.concatenate(self._pending, dtype=self._type)
        name = shard_name(self._split, len(self._shards))
        num_bytes = int(self._bytes_of_id[tokens].sum(dtype=np.int64))
        shard = Shard(name, len(tokens), num_bytes, checksum(tokens), self.document, self._offset)
        write_shard(self._folder, shard, tokens)
        self._shards.append(shard)
        self._pending, self._num_pending = [], 0


def _finished_shards(folder: Path, split: Split) -> list[Shard]:
    """The shards from the first on that an earlier attempt left whole."""
    shards: list[Shard] = []
    while (path := folder / shard_name(split, len(shards))).is_file():
        try:
            shard, tokens = read_shard(path)
        except DataError:
            break
        if checksum(tokens) != shard.crc32:
            break
        shards.append(shard)
    return shards


def _batches(
    files: Sequence[SourceFile], text_field: str, survey: Survey, writers: dict[Split, _ShardWriter]
) -> Iterator[_Batch]:
    """The documents that are kept and not yet in shards, about 1 MB at a time."""
    resume = {split: writer.document for split, writer in writers.items()}
    batch: _Batch = []
    size = 0
    number = -1
    for file in files:
        for document in iter_documents(file, text_field) or ():
            number += 1
            if number >= len(survey.fates):
                raise DataError(f"data.sources: {file.path} changed while it was read; run again")
            if survey.fates[number] == LEFT_OUT:
                continue
            split: Split = "train" if survey.fates[number] == TRAIN else "heldout"
            if number < resume[split]:
                continue
            batch.append((number, split, document.text))
            size += len(document.text)
            if size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _encode_in_order(
    tokenizer: Tokenizer, batches: Iterator[_Batch], num_processes: int
) -> Iterator[tuple[_Batch, list[Tokens]]]:
    """Each batch with its ids, in order, keeping no more batches in memory than the processes need."""
    if num_processes <= 1:
        for batch in batches:
            yield batch, _encode(tokenizer.path, [text for _, _, text in batch])
        return
    # Spawned, because forking a process that has threads (torch, Ray) may hang the child.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_processes, context, initializer=_start_process)
    waiting: deque[tuple[_Batch, Future[list[Tokens]]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, tokenizer.path, [text for _, _, text in batch])))
            if len(waiting) > 2 * num_processes:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise DataError(
            f"data.workers: one of {num_processes} processes died, perhaps for lack of memory, or because a script "
            "prepares data outside `if __name__ == '__main__':`; set fewer and run again (finished shards are kept)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(model: Path, texts: Sequence[str]) -> list[Tokens]:
    """Ids of each text, the end-of-document id last."""
    tokenizer = _tokenizer(model)
    kind = token_type(tokenizer.vocab_size)
    return [np.append(tokenizer.encode(text), tokenizer.eod_id).astype(kind) for text in texts]


@lru_cache(maxsize=1)
def _tokenizer(model: Path) -> Tokenizer:
    return Tokenizer(model)


def _start_process() -> None:
    """Leave Ctrl-C to the parent, and end with it even when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
