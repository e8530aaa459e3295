"""A label reader over the network: what `LabelReader` is to a folder, this is to the label service.

Blocks are checked and decoded when they are read, by the code that reads a folder.
"""

import time
from collections.abc import Callable
from pathlib import Path

from titan.distill.codec.block import HEADER_BYTES, BlockHeader, LabelBlock, decode_block
from titan.distill.log.reader import DroppedError
from titan.distill.log.records import Commit, End
from titan.distill.service.connection import FIRST_STALL_S, Connection, Unreachable, WaitedError, patiently
from titan.distill.service.prefetch import Prefetcher
from titan.distill.service.protocol import MANIFEST_ACTION, FeatureTicket, LabelTicket, Span, check_producer, commit_of
from titan.errors import LabelError

LOOK_S = 0.02
"""How often a waiting reader asks whether to give up, and how fresh `poll` keeps the state of the log."""


class FlightLabelReader:
    """Reads steps in order and waits at the end of the log; its methods are those of `LabelReader`.

    address:   where the service writes its address, read again whenever it cannot be reached; or the address itself
    timeout_s: no wait without news is longer
    credits:   steps fetched ahead; memory is at most so many steps of labels
    """

    def __init__(self, address: Path | str, token: str, producer: str, timeout_s: float, credits: int = 4):
        check_producer(producer)
        assert credits > 0
        self.producer, self.timeout_s = producer, timeout_s
        self.connection = Connection(address, token)
        self.ahead = Prefetcher(self.connection, producer, timeout_s, credits)

    @property
    def first_step(self) -> int:
        """First step still in the log; 0 while there is none."""
        return self.ahead.state.first_step

    @property
    def last_committed(self) -> int:
        """Last step of the log as far as it was seen; 0 while there is none."""
        return self.ahead.state.last_committed

    @property
    def ended(self) -> End | None:
        """Why no more steps will come."""
        reason = self.ahead.state.ended
        return None if reason is None else End(reason)

    def wait_commit(self, step: int, give_up: Callable[[], bool] = lambda: False) -> Commit | None:
        """The commit of a step, waiting for it; None if the log ended before it or `give_up` says so.

        For a step that was dropped, or lies before the log's first, the commit is that of the first step still there.
        Raises LabelError when nothing new came for `timeout_s`, and for what a user has to know: a wrong token, a
        damaged log.
        """
        begin, ahead = time.monotonic(), self.ahead
        ahead.go_to(step)

        def over() -> bool:
            return ahead.state.ended is not None and ahead.state.last_committed < step and ahead.state_at > begin

        while True:
            with ahead.changed:
                ahead.changed.wait_for(lambda: ahead.find(step) or ahead.failure or over(), LOOK_S)
                if (commit := ahead.find(step)) is not None:
                    return commit
                if ahead.failure is not None:
                    raise ahead.failure
                if over():
                    return None
                since = max(begin, ahead.news_at)
            if give_up():
                return None
            if time.monotonic() > since + self.timeout_s:
                raise LabelError(self._late(step))

    def read(self, commit: Commit, first: int = 0, end: int | None = None) -> tuple[list[LabelBlock], int]:
        """Blocks of a committed step in sample order, and their size in bytes.

        first, end: leaves out blocks that have no sample of this range of the step's batch
        Raises DroppedError if the step was dropped, LabelError if it is damaged or does not come in `timeout_s`.
        """
        raw = self.read_raw(commit, first, end)
        blocks = []
        for data in raw:
            try:
                blocks.append(decode_block(BlockHeader.unpack(bytes(data[:HEADER_BYTES])), bytes(data[HEADER_BYTES:])))
            except LabelError as error:
                raise LabelError(
                    f"{self.connection.describe()} sent for step {commit.step} of {self.producer}: {error}"
                ) from None
        return blocks, sum(len(data) for data in raw)

    def read_raw(self, commit: Commit, first: int = 0, end: int | None = None) -> list[memoryview]:
        """The same blocks as they are stored, header and payload.

        Steps are read in rising order. What was not fetched ahead is fetched now, and ahead from the next window on.
        """
        span = Span(first, end)
        here = self.ahead.take(commit.step, span)
        if here is None:
            here = self._fetch(commit, span)
        return [data for data in here if _touches(data, span)]

    def forget(self, step: int) -> None:
        """Drop everything up to a step that was learned: room for more."""
        self.ahead.forget(step)

    def poll(self) -> None:
        """Have a look at the log, unless the last was just now.

        Raises LabelError if there was no answer ever, for `timeout_s`; a service that is away now is told by the wait.
        """
        if time.monotonic() < self.ahead.state_at + LOOK_S:
            return
        known = self.ahead.state_at > float("-inf")
        try:
            patiently(self._look, 0.0 if known else self.timeout_s, f"the state of the labels of {self.producer}")
        except WaitedError:
            if not known:
                raise

    def manifest(self) -> bytes:
        """log.json of the log as it is. Raises LabelError if there is none."""
        return patiently(self._manifest, self.timeout_s, f"the manifest of the labels of {self.producer}")

    def features(self, step: int, part: int, wait_s: float) -> memoryview | None:
        """Payload of a step in a part's feature ring, waiting for it; None if it is gone or does not come.

        Features are not durable: a service that cannot be reached has none. Raises LabelError if nobody sends any.
        """
        ticket = FeatureTicket(self.producer, step, part, wait_s)
        try:
            return self.connection.features(ticket, wait_s + FIRST_STALL_S)
        except Unreachable:
            return None

    def close(self) -> None:
        """End the thread and the connection."""
        self.ahead.close()
        self.connection.drop()

    def _look(self, stall_s: float) -> None:
        for note, _ in self.connection.labels(LabelTicket(self.producer, 0, credits=0), stall_s):
            self.ahead.note_state(note.state)

    def _manifest(self, stall_s: float) -> bytes:
        return self.connection.act(MANIFEST_ACTION, self.producer.encode(), stall_s)

    def _fetch(self, commit: Commit, span: Span) -> list[memoryview]:
        """Blocks of one step, now."""
        ticket = LabelTicket(self.producer, commit.step, 1, span.first, span.end)

        def attempt(stall_s: float) -> list[memoryview]:
            for note, blocks in self.connection.labels(ticket, stall_s):
                found = commit_of(note)
                if found is not None and found.step == commit.step:
                    return blocks
                first = note.state.first_step
                if commit.step < first:
                    raise DroppedError(f"step {commit.step} of {self.producer} was dropped; {first} is the first there")
            raise Unreachable(f"{self.connection.describe()} has step {commit.step} no more")

        return patiently(attempt, self.timeout_s, f"labels of step {commit.step} of {self.producer}")

    def _late(self, step: int) -> str:
        ahead, where = self.ahead, self.connection.describe()
        waited = f"waited {self.timeout_s:.0f} s for labels of step {step} of {self.producer}"
        remedy = "(cluster.step_timeout_s sets the wait)"
        if ahead.trouble or ahead.state_at == float("-inf"):
            return f"{waited}: {ahead.trouble or f'{where} does not answer'}; is its node alive? {remedy}"
        if ahead.state.last_committed < step:
            last = ahead.state.last_committed
            return f"{waited}, the last committed is {last} at {where}; is the teacher alive? {remedy}"
        return f"{waited}: they are committed, but {where} does not send them; is the network up? {remedy}"


def _touches(block: memoryview, span: Span) -> bool:
    """Whether a block has any of these samples; True for a damaged header, which whoever decodes it reports."""
    try:
        header = BlockHeader.unpack(bytes(block[:HEADER_BYTES]))
    except LabelError:
        return True
    return (span.end is None or header.first_sample < span.end) and header.first_sample + header.samples > span.first
