"""Fetching ahead: a thread that keeps a few steps of labels at hand, from wherever the label service is just now.

A window of steps is one call. The service keeps nothing between calls, so after any failure the next window asks for
what is lacking. A window has little time at first and twice as much after each try that brought nothing: a service that
hangs is left soon, and a slow network is given what it needs.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow.flight as flight

from titan.distill.log.records import Commit
from titan.distill.service.connection import FIRST_PAUSE_S, FIRST_STALL_S, LAST_PAUSE_S, Connection, Unreachable
from titan.distill.service.protocol import LabelTicket, LogState, Note, Span, commit_of
from titan.errors import LabelError

WINDOW_WAIT_S = 2.0
"""How long a window waits at the log's end before it is asked for again."""
REFRESH_S = 0.5
"""How old the state of the log gets while there is no room for more steps, or when the log has ended."""


@dataclass
class Fetched:
    """A step that is here."""

    asked: int
    """The step that was asked for: `commit` is that of a later one where the log no longer has it."""
    commit: Commit
    span: Span | None
    """Which samples were fetched; None: the commit alone."""
    blocks: list[memoryview]
    was_read: bool = False


@dataclass(frozen=True)
class Window:
    """What the thread asks for."""

    ticket: LabelTicket
    epoch: int


class Prefetcher:
    """At most `credits` steps of one producer. Everything is guarded by `changed`, which says when something came."""

    def __init__(self, connection: Connection, producer: str, timeout_s: float, credits: int):
        self.connection, self.producer, self.timeout_s, self.credits = connection, producer, timeout_s, credits
        self.changed = threading.Condition()
        self._steps: dict[int, Fetched] = {}
        """In rising order; without gaps, but for steps that the log no longer has."""
        self.state = LogState(0, 0, None)
        self.state_at = self.news_at = float("-inf")
        """When the state came, and when something new did; monotonic seconds."""
        self.failure: LabelError | None = None
        self.trouble = ""
        """Why the service cannot be reached just now."""
        self._next_step: int | None = None
        self._wanted: Span | None = None
        """Samples to fetch: all that were read so far; None: commits alone."""
        self._unread = 0
        """Steps that were passed without being read, in a row."""
        self._epoch = 0
        """Grows when the reader goes to another step; what arrives for an older one is dropped."""
        self._closed = False
        self._stream: flight.FlightStreamReader | None = None
        self._thread: threading.Thread | None = None

    def go_to(self, step: int) -> None:
        """See that a step is fetched: the next in a row, or wherever a reader jumps to."""
        with self.changed:
            if self.find(step) is not None or (self.failure is not None and step == self._next_step):
                return
            if step == self._next_step:  # where nobody forgets, what is older makes room
                self._drop(list(self._steps)[: max(0, len(self._steps) + self._least_room() - self.credits)])
            else:
                self._drop(list(self._steps))
                self._next_step, self.failure, self._epoch = step, None, self._epoch + 1
                self._leave()
            self.changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"labels of {self.producer}", daemon=True)
                self._thread.start()

    def find(self, step: int) -> Commit | None:
        """The commit of a step, or of the first after it that the log still has; None if it is not here."""
        return next((here.commit for here in self._steps.values() if here.asked <= step <= here.commit.step), None)

    def take(self, step: int, span: Span) -> list[memoryview] | None:
        """Blocks of a step, if these samples are here; they are fetched ahead from the next window on."""
        with self.changed:
            fetched, self._unread = self._steps.get(step), 0
            self._wanted = span if self._wanted is None else self._wanted.hull(span)
            if fetched is None:
                return None
            fetched.was_read = True
            return fetched.blocks if fetched.span is not None and fetched.span.covers(span) else None

    def forget(self, step: int) -> None:
        """Drop everything up to a step: room for more."""
        with self.changed:
            self._drop([known for known in self._steps if known <= step])
            self.changed.notify_all()

    def close(self) -> None:
        """End the thread. A call that hangs in the network ends with its window, which bounds the wait."""
        with self.changed:
            self._closed = True
            self._leave()
            self.changed.notify_all()
        if self._thread is not None:
            self._thread.join(WINDOW_WAIT_S + self.timeout_s)

    def note_state(self, state: LogState) -> None:
        """How far the log goes, as of now."""
        with self.changed:
            self.state_at, self.trouble = time.monotonic(), ""
            if state != self.state:
                self.state, self.news_at = state, self.state_at
                self.changed.notify_all()

    def _least_room(self) -> int:
        """Steps that are worth a call: half of what fits, so that one window is read while the next comes."""
        return max(1, self.credits // 2)

    def _drop(self, steps: Sequence[int]) -> None:
        """Give their room back; who passes as many steps as fit without reading gets commits alone."""
        for step in steps:
            self._unread = 0 if self._steps.pop(step).was_read else self._unread + 1
        if self._unread >= self.credits:
            self._wanted = None

    def _leave(self) -> None:
        """End the window under way."""
        if self._stream is not None:
            self._stream.cancel()

    def _run(self) -> None:
        pause_s, stall_s = FIRST_PAUSE_S, min(FIRST_STALL_S, self.timeout_s)
        while (window := self._next_window()) is not None:
            before = self.news_at
            try:
                self._pull(window, stall_s)
                came = True
            except Unreachable as trouble:
                came = self._met(window, str(trouble)) or self.news_at != before
            except LabelError as failure:
                came = True
                with self.changed:
                    if window.epoch == self._epoch:
                        self.failure = failure
                        self.changed.notify_all()
            if came:
                pause_s, stall_s = FIRST_PAUSE_S, min(FIRST_STALL_S, self.timeout_s)
                continue
            self._sleep(pause_s)
            pause_s, stall_s = min(2 * pause_s, LAST_PAUSE_S), min(2 * stall_s, self.timeout_s)

    def _met(self, window: Window, trouble: str) -> bool:
        """Keep what went wrong for the reader's message; whether it was only that the reader went elsewhere."""
        with self.changed:
            if window.epoch != self._epoch:
                return True
            self.trouble = trouble
            return False

    def _sleep(self, pause_s: float) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self._closed, pause_s)

    def _next_window(self) -> Window | None:
        """What to ask for, as soon as there is room for it; None once closed."""
        with self.changed:
            while not self._closed:
                step, room = self._next_step, self.credits - len(self._steps)
                if step is None or self.failure is not None:
                    self.changed.wait()
                elif room < self._least_room():
                    if not self.changed.wait(REFRESH_S):
                        return Window(LabelTicket(self.producer, step, credits=0), self._epoch)
                elif self._at_the_end(step) and time.monotonic() < self.state_at + REFRESH_S:
                    self.changed.wait(REFRESH_S)
                else:
                    span = self._wanted or Span()
                    wait_s, blocks = min(WINDOW_WAIT_S, self.timeout_s), self._wanted is not None
                    ticket = LabelTicket(self.producer, step, room, span.first, span.end, wait_s, blocks)
                    return Window(ticket, self._epoch)
            return None

    def _at_the_end(self, step: int) -> bool:
        return self.state.ended is not None and self.state.last_committed < step

    def _pull(self, window: Window, stall_s: float) -> None:
        """One window. Raises Unreachable or LabelError."""
        try:
            for note, blocks in self.connection.labels(window.ticket, window.ticket.wait_s + stall_s, self._hold):
                if not self._keep(window, note, blocks):
                    self._leave()
                    return
        finally:
            self._stream = None

    def _hold(self, stream: flight.FlightStreamReader) -> None:
        self._stream = stream

    def _keep(self, window: Window, note: Note, blocks: list[memoryview]) -> bool:
        """Take in a step; False if the reader has gone elsewhere."""
        ticket = window.ticket
        with self.changed:
            if self._closed or window.epoch != self._epoch:
                return False
            self.note_state(note.state)
            commit = commit_of(note)
            if commit is not None:
                assert self._next_step is not None and commit.step >= self._next_step
                span = Span(ticket.first, ticket.end) if ticket.blocks else None
                self._steps[commit.step] = Fetched(self._next_step, commit, span, blocks)
                self._next_step, self.news_at = commit.step + 1, self.state_at
                self.changed.notify_all()
            return True
