"""Label streams: a window of one log as record batches. Nothing is remembered of a reader once its stream has ended.

What is kept is a few open log readers, each at the step where some stream ended: the next window that begins there
takes it up, so that following a long log costs no search. Any of them may be dropped at any time.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from titan.distill.log.reader import DroppedError, LabelReader
from titan.distill.log.records import Commit, encode_record
from titan.distill.service.protocol import LabelTicket, LogState, Note, block_batch, empty_batch, pack_note
from titan.errors import LabelError

HEARTBEAT_S = 0.25
"""How often a waiting stream tells the state of the log and looks whether it is still wanted."""
IDLE_CURSORS = 64
IDLE_S = 30.0
"""Open readers that nobody took up for so long are closed: they hold files that may have been dropped."""
EMPTY = empty_batch()
Message = tuple[pa.RecordBatch, bytes]


@dataclass
class Traffic:
    """What went out since the service began. Streams add to it under `lock`."""

    steps: int = 0
    blocks: int = 0
    sent_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, steps: int, blocks: int, sent_bytes: int) -> None:
        """Count."""
        with self.lock:
            self.steps, self.blocks, self.sent_bytes = (
                self.steps + steps,
                self.blocks + blocks,
                self.sent_bytes + sent_bytes,
            )


@dataclass(frozen=True)
class _Idle:
    producer: str
    step: int
    reader: LabelReader
    since: float


class Cursors:
    """Open readers of the logs in a folder. A reader is used by one stream at a time."""

    def __init__(self, labels_folder: Path):
        self.labels_folder = labels_folder
        self.lock = threading.Lock()
        self.idle: list[_Idle] = []
        """Oldest first."""

    @contextmanager
    def borrow(self, producer: str, step: int) -> Iterator["Cursor"]:
        """A reader that is at a step, for one stream. What fails within closes it."""
        cursor = Cursor(self._take(producer, step), step)
        try:
            yield cursor
        except BaseException:
            cursor.reader.close()
            raise
        self._give(_Idle(producer, cursor.step, cursor.reader, time.monotonic()))

    def close_idle(self, older_than_s: float = IDLE_S) -> None:
        """Close what was not taken up for so long."""
        with self.lock:
            limit = time.monotonic() - older_than_s
            old = [idle for idle in self.idle if idle.since <= limit]
            self.idle = [idle for idle in self.idle if idle.since > limit]
        for idle in old:
            idle.reader.close()

    def _take(self, producer: str, step: int) -> LabelReader:
        with self.lock:
            for place, idle in enumerate(self.idle):
                if (idle.producer, idle.step) == (producer, step):
                    return self.idle.pop(place).reader
        return LabelReader(self.labels_folder / producer, timeout_s=float("inf"))

    def _give(self, idle: _Idle) -> None:
        with self.lock:
            self.idle.append(idle)
            old = self.idle[:-IDLE_CURSORS]
            self.idle = self.idle[-IDLE_CURSORS:]
        for evicted in old:
            evicted.reader.close()


@dataclass
class Cursor:
    """A reader, and the step it is at."""

    reader: LabelReader
    step: int

    def state(self) -> LogState:
        """How far the log goes."""
        reader = self.reader
        return LogState(reader.first_step, reader.last_committed, None if reader.ended is None else reader.ended.reason)


def label_stream(
    cursors: Cursors, ticket: LabelTicket, unwanted: Callable[[], bool], traffic: Traffic
) -> Iterator[Message]:
    """Blocks of up to `credits` steps, the last of each step with its commit; then the state of the log.

    The stream ends before its credits are used when the log ends, when nothing came for `wait_s`, or when it is
    `unwanted`. A log that cannot be read is told in the last note.
    """
    try:
        with cursors.borrow(ticket.producer, ticket.from_step) as cursor:
            cursor.reader.poll()
            sent = 0
            while sent < ticket.credits and (commit := (yield from _wait(cursor, ticket.wait_s, unwanted))) is not None:
                try:
                    blocks = cursor.reader.read_raw(commit, ticket.first, ticket.end) if ticket.blocks else []
                except DroppedError:
                    continue  # between commit and block; the wait now finds the first step that is there
                for block in blocks[:-1]:
                    yield block_batch(block), b""
                cursor.step, sent = commit.step + 1, sent + 1
                cursor.reader.forget(commit.step)
                traffic.add(1, len(blocks), sum(map(len, blocks)))
                yield block_batch(blocks[-1]) if blocks else EMPTY, _note(cursor, commit)
            if sent < ticket.credits or not sent:
                yield EMPTY, _note(cursor)
    except LabelError as error:
        yield EMPTY, pack_note(Note(LogState(0, 0, None), error=str(error)))


def _wait(cursor: Cursor, wait_s: float, unwanted: Callable[[], bool]) -> Generator[Message, None, Commit | None]:
    """The cursor's commit, with a note of the state whenever a while has passed without; None if none comes."""
    deadline = time.monotonic() + wait_s
    while True:
        beat = min(deadline, time.monotonic() + HEARTBEAT_S)
        commit = cursor.reader.wait_commit(cursor.step, lambda beat=beat: time.monotonic() >= beat)  # type: ignore[misc]
        if commit is not None or cursor.reader.ended is not None or time.monotonic() >= deadline or unwanted():
            return commit
        yield EMPTY, _note(cursor)


def _note(cursor: Cursor, commit: Commit | None = None) -> bytes:
    line = None if commit is None else encode_record(commit).decode()
    return pack_note(Note(cursor.state(), line))
