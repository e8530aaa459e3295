"""A node of a label service for tests: a log that is being written, a service, and readers."""

import itertools
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from titan.distill.codec.block import HEADER_BYTES, BlockHeader, LabelBlock, encode_block
from titan.distill.codec.raw import RawLabels
from titan.distill.log.reader import LabelReader
from titan.distill.log.records import Commit
from titan.distill.log.writer import CommitWriter, LabelWriter
from titan.distill.service.client import FlightLabelReader
from titan.distill.service.process import ServiceProcess
from titan.distill.service.protocol import write_address
from titan.distill.service.server import LabelService, serve

TOKEN = "a-token-of-this-run"
VOCAB = 500


def encoded(step: int, first: int, samples: int, length: int = 5) -> bytes:
    """A block that decodes."""
    rng = np.random.default_rng([step, first, samples])
    ids = np.stack([rng.permutation(VOCAB)[:3] for _ in range(samples * length)]).reshape(samples, length, 3)
    log_prob = -np.sort(rng.uniform(1.0, 9.0, ids.shape)).astype(np.float32)
    tokens = rng.integers(0, VOCAB, (samples, length + 1)).astype(np.int32)
    raw = RawLabels("top_k", 1.0, ids.astype(np.int32), log_prob)
    return encode_block(LabelBlock(step, first, rng.integers(0, 2**40, samples), tokens, raw), VOCAB)


def opaque(step: int, size_bytes: int) -> bytes:
    """A block of one sample that is intact and says nothing: for tests of speed and memory."""
    payload = np.random.default_rng(step % 7).bytes(size_bytes)
    crc = zlib.crc32(payload)
    header = BlockHeader("full", VOCAB, step, 0, 1, 1, 1.0, 0, 0, 0, False, False, len(payload), crc)
    return header.pack() + payload


class Log:
    """A producer's log that is being written."""

    def __init__(self, labels: Path, producer: str = "teacher", start: int = 0, segment_bytes: int = 1 << 20):
        self.folder = labels / producer
        self.folder.mkdir(parents=True)
        self.step, self.segment_bytes = start, segment_bytes
        self.commits = CommitWriter(self.folder, start)
        self.parts: dict[int, LabelWriter] = {}

    def add(self, *cuts: int) -> int:
        """A step of which part i has samples [cuts[i], cuts[i + 1])."""
        step = self.step + 1
        for part, (first, end) in enumerate(itertools.pairwise(cuts)):
            self.append(part, encoded(step, first, end - first))
        return self.commit(range(len(cuts) - 1), cuts[-1])

    def append(self, part: int, block: bytes) -> None:
        if part not in self.parts:
            self.parts[part] = LabelWriter(self.folder, part, self.step, self.segment_bytes)
        self.parts[part].append(self.step + 1, block, [0] * BlockHeader.unpack(block[:HEADER_BYTES]).samples)

    def commit(self, parts: range, samples: int) -> int:
        self.step += 1
        self.commits.commit(Commit(self.step, tuple(parts), samples, 1.0 / 3 + self.step))
        return self.step


def same(one: list[LabelBlock], two: list[LabelBlock]) -> None:
    assert [(block.step, block.first_sample) for block in one] == [(block.step, block.first_sample) for block in two]
    for left, right in zip(one, two, strict=True):
        for name in ("sample_ids_B", "tokens_BS1"):
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
        assert left.labels.ids_BSK is not None and right.labels.ids_BSK is not None
        np.testing.assert_array_equal(left.labels.ids_BSK, right.labels.ids_BSK)
        np.testing.assert_array_equal(left.labels.log_prob_BSK, right.labels.log_prob_BSK)


class Node:
    """A folder of labels, its service, and readers that are closed at the end."""

    def __init__(self, folder: Path):
        self.labels, self.address = folder / "labels", folder / "label_service.json"
        self.labels.mkdir()
        self.service: LabelService | None = None
        self.cleanup: list[Callable[[], None]] = []

    def serve(self) -> LabelService:
        self.service = serve(self.labels, TOKEN)
        write_address(self.address, "127.0.0.1", self.service.port)
        self.cleanup.append(self.service.close)
        return self.service

    def spawn(self) -> ServiceProcess:
        process = ServiceProcess(self.labels, TOKEN, self.address)
        self.cleanup.append(process.kill)
        return process

    def reader(self, producer: str = "teacher", timeout_s: float = 20.0, credits: int = 4) -> FlightLabelReader:
        reader = FlightLabelReader(self.address, TOKEN, producer, timeout_s, credits)
        self.cleanup.append(reader.close)
        return reader


@contextmanager
def label_node(folder: Path) -> Iterator[Node]:
    """Everything is closed at the end, and no thread may be left."""
    threads, node = set(threading.enumerate()), Node(folder)
    try:
        yield node
    finally:
        for call in reversed(node.cleanup):
            call()
    left = [thread.name for thread in set(threading.enumerate()) - threads if thread.is_alive()]
    assert not left, f"threads left: {left}"


def learn(reader: FlightLabelReader | LabelReader, step: int, span: tuple[int, int | None] = (0, None)) -> list[int]:
    """Steps learned from a step on, to the log's end."""
    learned = []
    while (commit := reader.wait_commit(step)) is not None:
        blocks, size = reader.read(commit, *span)
        assert size > 0 and all(block.step == commit.step for block in blocks)
        learned.append(commit.step)
        reader.forget(commit.step)
        step = commit.step + 1
    return learned


def follow(node: Node, code: str) -> subprocess.Popen[str]:
    """A reader in its own process; `code` has `reader`."""
    head = (
        "import sys, os, time; from pathlib import Path\n"
        "from titan.distill.service.client import FlightLabelReader\n"
        f"reader = FlightLabelReader(Path({str(node.address)!r}), {TOKEN!r}, 'teacher', 60.0)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", head + code], stdout=subprocess.PIPE, text=True)
    node.cleanup.append(lambda: (process.kill(), process.wait(), process.stdout and process.stdout.close()))
    return process
