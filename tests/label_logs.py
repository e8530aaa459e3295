"""A teacher without a model, for tests of the label log: blocks that are a function of step and sample."""

import os
import time
from pathlib import Path

import numpy as np

from titan.distill.codec.block import LabelBlock, encode_block
from titan.distill.codec.raw import RawLabels
from titan.distill.log.manifest import LogManifest, write_manifest
from titan.distill.log.reader import LabelReader
from titan.distill.log.records import Commit
from titan.distill.log.repair import reopen
from titan.distill.log.segment import segments_of
from titan.distill.log.writer import SEGMENT_BYTES, CommitWriter, LabelWriter, Write
from titan.observe.files import write_all

VOCAB, LENGTH = 6, 3
MANIFEST = LogManifest("run-1", "teacher", "ab" * 32, VOCAB, LENGTH, 4, "full", 1.0, 7)


def make_block(step: int, first: int = 0, samples: int = 2, version: int = 0) -> LabelBlock:
    """Labels of a teacher that says something else in another `version`, by its sample ids."""
    rng = np.random.default_rng([step, first, samples])
    tokens = rng.integers(0, VOCAB, (samples, LENGTH + 1)).astype(np.int32)
    dense = np.log(rng.dirichlet(np.ones(VOCAB), (samples, LENGTH))).astype(np.float32)
    ids = np.arange(first, first + samples) + 100 * step + 1_000_000 * version
    return LabelBlock(step, first, ids, tokens, RawLabels("full", dense_BSV=dense))


def encoded(step: int, first: int = 0, samples: int = 2, version: int = 0) -> bytes:
    return encode_block(make_block(step, first, samples, version), VOCAB)


class Producer:
    """`dp` writers, each with two blocks a step, and a commit for every step."""

    def __init__(
        self,
        folder: Path,
        dp: int = 1,
        samples: int = 4,
        segment_bytes: int = SEGMENT_BYTES,
        write: Write = write_all,
        start: int = 0,
    ):
        self.folder, self.dp, self.samples = folder, dp, samples
        self.last = reopen(folder) or start
        self.writers = [LabelWriter(folder, part, self.last, segment_bytes, write) for part in range(dp)]
        self.commits = CommitWriter(folder, self.last, write)

    def append(self, step: int, version: int = 0) -> None:
        share = self.samples // self.dp
        for part, writer in enumerate(self.writers):
            for half in range(2):  # two micro-batches
                first = part * share // 2 + half * self.samples // 2
                writer.append(step, encoded(step, first, share // 2, version))

    def commit(self, step: int) -> bool:
        return self.commits.commit(Commit(step, tuple(range(self.dp)), self.samples, step / 10))

    def steps(self, first: int, last: int) -> "Producer":
        for step in range(first, last + 1):
            self.append(step)
            self.commit(step)
        return self

    def close(self) -> None:
        for writer in self.writers:
            writer.close()
        self.commits.close()


def whole_log(folder: Path, steps: int, dp: int = 2, segment_bytes: int = 400) -> Path:
    """A log of several segments with its manifest, ended; for tools."""
    write_manifest(folder, MANIFEST)
    producer = Producer(folder, dp, segment_bytes=segment_bytes).steps(1, steps)
    producer.commits.end("finished")
    producer.close()
    return folder


def read_all(folder: Path, last: int, timeout_s: float = 1.0, first: int = 1) -> dict[int, list[LabelBlock]]:
    reader = LabelReader(folder, timeout_s)
    found = {}
    try:
        for step in range(first, last + 1):
            commit = reader.wait_commit(step)
            assert commit is not None and commit.step == step and commit.cross_entropy == step / 10
            found[step], _ = reader.read(commit)
            reader.forget(step)
    finally:
        reader.close()
    return found


def assert_whole(blocks: list[LabelBlock], step: int, samples: int = 4) -> None:
    """Every sample of the step once, in order, with the tokens and labels that were written."""
    covered = [block.first_sample + index for block in blocks for index in range(len(block.sample_ids_B))]
    assert covered == list(range(samples))
    for block in blocks:
        want = make_block(step, block.first_sample, len(block.sample_ids_B))
        assert block.step == step
        np.testing.assert_array_equal(block.tokens_BS1, want.tokens_BS1)
        assert block.labels.dense_BSV is not None and want.labels.dense_BSV is not None
        np.testing.assert_allclose(block.labels.dense_BSV, want.labels.dense_BSV, atol=2.0**-11)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a log."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def restore(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def only_segment(folder: Path, part: int = 0) -> Path:
    """The segment of a part that has one."""
    (path,) = segments_of(folder, part)
    return path


def flip(path: Path, place: int, bit: int = 4) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def slow_write(descriptor: int, data: bytes) -> None:
    """In three pieces or so, with a pause before each, so that every torn state of a file is on show."""
    while data:
        time.sleep(0.0005)
        data = data[os.write(descriptor, data[: max(1, len(data) // 3)]) :]


class NearlyFull:
    """A disk with room for so many bytes: it takes what fits, and only then complains, as write(2) does."""

    def __init__(self, room: int):
        self.room = room

    def __call__(self, descriptor: int, data: bytes) -> None:
        piece = data[: self.room]
        self.room -= len(piece)
        write_all(descriptor, piece)
        if len(piece) < len(data):
            raise OSError(28, "No space left on device")
