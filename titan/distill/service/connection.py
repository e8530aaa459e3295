"""One connection to a label service: finds it by its address file, shows the run's token, sorts out what goes wrong.

A call fails in one of two ways: with `Unreachable`, when trying again may help (the service died, hangs, has moved or
is busy), or with `LabelError`, when a user has to act.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.flight as flight

from titan.distill.service.protocol import (
    DONE,
    OVERTAKEN,
    SYSTEM,
    FeatureTicket,
    LabelTicket,
    Note,
    blocks_of,
    pack,
    read_address,
    unpack_note,
)
from titan.errors import LabelError, OvertakenError

FIRST_STALL_S = 2.0
"""What a call gets at first; twice as much after each try that brought nothing."""
FIRST_PAUSE_S, LAST_PAUSE_S = 0.02, 0.5
"""Between tries to reach a service."""
AUTHORIZATION = "authorization"
_Answer = TypeVar("_Answer")
_PASSING = (
    flight.FlightUnavailableError,
    flight.FlightTimedOutError,
    flight.FlightCancelledError,
    flight.FlightInternalError,
)
"""What a service that dies, hangs or is cut off looks like."""
_CHANNEL = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
"""A connection of its own, whose failures are seen at once: other readers in the process neither share nor delay it."""


class Unreachable(Exception):  # noqa: N818  (it never leaves this package)
    """The service did not answer; its message says what was seen."""


class WaitedError(LabelError):
    """The service could not be reached in time."""


class Connection:
    """Calls of one client; they may come from several threads."""

    def __init__(self, address: Path | str, token: str, name: str = "the label service"):
        """address: the file that the service writes its address to, or the address, `grpc+tcp://HOST:PORT`
        name:    for words
        """
        self.address, self.authorization, self.name = address, f"Bearer {token}", name
        self.lock = threading.Lock()
        self.location: str | None = None
        """Where it is connected to."""
        self.client: flight.FlightClient | None = None
        self.accepted = False
        """Whether a service took the token before."""

    @contextmanager
    def call(self, timeout_s: float) -> Iterator[tuple[flight.FlightClient, flight.FlightCallOptions]]:
        """Client and options of one call, which ends after `timeout_s` on both sides.

        Raises Unreachable or LabelError for what goes wrong within; after Unreachable the address is read anew.
        """
        client = self._connect()
        headers = [(AUTHORIZATION.encode(), self.authorization.encode())]
        try:
            yield client, flight.FlightCallOptions(timeout=timeout_s, headers=headers)
            self.accepted = True
        except flight.FlightUnauthenticatedError:
            where = self.describe()
            self.drop(client)
            if self.accepted:  # an old address: another run's service may have got the port
                raise Unreachable(f"{where} does not know this run") from None
            raise LabelError(
                f"{where} refuses the token of this run; is {self.address} this run's, and the token the one "
                "that its service was started with?"
            ) from None
        except _PASSING as error:
            where = self.describe()
            self.drop(client)
            raise Unreachable(f"{where}: {_one_line(error)}") from None
        except (flight.FlightError, pa.ArrowException) as error:
            raise LabelError(f"{self.describe()} failed: {_one_line(error)}") from None

    def features(self, ticket: FeatureTicket, timeout_s: float) -> memoryview | None:
        """Features of a step; None if they are not there. Raises as `labels` does."""
        found = None
        for _, blocks in self._stream(pack(ticket), timeout_s):
            found = blocks[0] if blocks else found
        return found

    def labels(
        self, ticket: LabelTicket, timeout_s: float, hold: Callable[[flight.FlightStreamReader], None] = lambda _: None
    ) -> Iterator[tuple[Note, list[memoryview]]]:
        """Notes of one label stream, each with the blocks sent before it. Raises as `call` does, and what a note says.

        hold: gets the stream, to cancel it from elsewhere
        """
        return self._stream(pack(ticket), timeout_s, hold)

    def _stream(
        self, ticket: bytes, timeout_s: float, hold: Callable[[flight.FlightStreamReader], None] = lambda _: None
    ) -> Iterator[tuple[Note, list[memoryview]]]:
        with self.call(timeout_s) as (client, options):
            stream = client.do_get(flight.Ticket(ticket), options)
            hold(stream)
            blocks: list[memoryview] = []
            for chunk in stream:
                blocks += blocks_of(chunk.data)
                if chunk.app_metadata is None:
                    continue
                note = unpack_note(chunk.app_metadata.to_pybytes())
                if note.error is not None:
                    raise LabelError(note.error)
                yield note, blocks
                blocks = []

    def act(self, name: str, body: bytes, timeout_s: float) -> bytes:
        """The answer to one action. Raises as `call` does, and LabelError if the service says that it cannot; from a
        run's home also OvertakenError, and what its system says as OSError.
        """
        with self.call(timeout_s) as (client, options):
            results = list(client.do_action(flight.Action(name, body), options))
        answer = b"".join(result.body.to_pybytes() for result in results)
        kind, rest = answer[:1], answer[1:]
        if kind == DONE:
            return rest
        if kind == OVERTAKEN:
            raise OvertakenError(rest.decode())
        if kind == SYSTEM:
            number, file, reason = rest.decode().split("\n", 2)
            raise OSError(int(number), f"{reason} (on {self.location})", file)
        raise LabelError(rest.decode())

    def describe(self) -> str:
        """The service in words."""
        return f"{self.name} at {self.location}" if self.location else f"{self.name} of {self.address}"

    def drop(self, client: flight.FlightClient | None = None) -> None:
        """Close the connection, if it is still this one; the next call makes another."""
        with self.lock:
            if self.client is None or (client is not None and client is not self.client):
                return
            self.client.close()
            self.client = None

    def _connect(self) -> flight.FlightClient:
        with self.lock:
            if self.client is None:
                self.location = self.address if isinstance(self.address, str) else read_address(self.address)
                if self.location is None:
                    raise Unreachable(f"there is no address of a label service in {self.address}")
                self.client = flight.FlightClient(self.location, generic_options=_CHANNEL)
            return self.client


def patiently(attempt: Callable[[float], _Answer], timeout_s: float, wanted: str) -> _Answer:
    """Try until it works: `attempt` gets the seconds it may take. Raises WaitedError after about `timeout_s`.

    timeout_s: 0 for a single try
    """
    deadline, pause_s, stall_s = time.monotonic() + timeout_s, FIRST_PAUSE_S, FIRST_STALL_S
    while True:
        left_s = deadline - time.monotonic()
        try:
            return attempt(min(stall_s, left_s) if left_s > 0 else FIRST_STALL_S)
        except Unreachable as trouble:
            if time.monotonic() + pause_s > deadline:
                raise WaitedError(
                    f"waited {timeout_s:.0f} s for {wanted}: {trouble}; is its node alive? "
                    "(cluster.step_timeout_s sets the wait)"
                ) from None
        time.sleep(pause_s)
        pause_s, stall_s = min(2 * pause_s, LAST_PAUSE_S), 2 * stall_s


def _one_line(error: Exception) -> str:
    """The message without what gRPC adds for its own developers."""
    first = str(error).partition("\n")[0]
    return first.partition(". gRPC client debug context")[0].partition(". Detail:")[0][:300]
