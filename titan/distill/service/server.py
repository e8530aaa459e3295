"""The label service of a node: an Arrow Flight server over the logs of a run.

    python -m titan.distill.service.server --labels RUN/labels --address-file RUN/label_service.json < TOKEN

It serves windows of any producer's log (`streams.py`), features out of a ring, keeps logs that other nodes write
(`replica_store.py`), and may be the home of a run, whose folder other hosts do not see (`home_store.py`). It knows
nothing of its readers: one that hangs holds a thread and one block until the deadline that came with its call, and
costs the others nothing.
"""

import argparse
import hmac
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as flight

from titan.distill.log.manifest import MANIFEST
from titan.distill.log.ring import FeatureRing
from titan.distill.service.connection import AUTHORIZATION
from titan.distill.service.home_store import HomeStore
from titan.distill.service.protocol import (
    BLOCK_SCHEMA,
    DONE,
    HEALTH_ACTION,
    HOME_ACTION,
    MANIFEST_ACTION,
    OVERTAKEN,
    PUT_MANIFEST_ACTION,
    REFUSED,
    REOPEN_ACTION,
    RUN,
    STATS_ACTION,
    SYNC_ACTION,
    SYSTEM,
    FeatureTicket,
    LabelTicket,
    LogState,
    Note,
    Receipt,
    ReplicaTicket,
    block_batch,
    blocks_of,
    check_producer,
    empty_batch,
    pack,
    pack_note,
    unpack,
    write_address,
)
from titan.distill.service.replica_store import ReplicaStore
from titan.distill.service.streams import Cursors, Message, Traffic, label_stream
from titan.errors import LabelError, OvertakenError, RunError, TitanError

NOTHING = LogState(0, 0, None)
LOCALHOST = "127.0.0.1"
MAX_STREAMS = 256
"""Calls at a time, a thread each; more are told to come again."""
LOOK_S = 0.25
"""How often the process looks for its parent."""
GRACE_S = 3.0
"""How long streams may take to end when the service does."""


class _Door(flight.ServerMiddlewareFactory):  # type: ignore[misc]  # pyarrow has no types
    """Lets nobody in without the run's token."""

    def __init__(self, token: str):
        self.expected = f"Bearer {token}".encode()

    def start_call(self, info: flight.CallInfo, headers: dict[str, list[str]]) -> None:
        """Raise unless the call shows the token; it takes the same time however much of it is right."""
        shown = [value for name, values in headers.items() if name.lower() == AUTHORIZATION for value in values]
        if len(shown) != 1 or not hmac.compare_digest(shown[0].encode(), self.expected):
            raise flight.FlightUnauthenticatedError("wrong token")


class LabelService(flight.FlightServerBase):  # type: ignore[misc]
    """The running server; it listens from its construction to `close`.

    port: 0 for any that is free; the attribute `port` says which
    home: folders of the run, by name, that ranks on hosts without shared storage read and write (`home.py`)
    """

    def __init__(
        self,
        labels_folder: Path,
        token: str,
        host: str = LOCALHOST,
        port: int = 0,
        max_streams: int = MAX_STREAMS,
        home: Mapping[str, Path] | None = None,
    ):
        if not token:
            raise LabelError("the label service needs a token, got an empty one; use the run's")
        self.labels_folder = labels_folder
        self.home = None if home is None else HomeStore(home[RUN], home)
        self.cursors, self.traffic = Cursors(labels_folder), Traffic()
        self.replicas = ReplicaStore(labels_folder, fence_of=None if self.home is None else self.home.fence)
        self.begun = time.monotonic()
        self.stopping = threading.Event()
        self.places, self.max_streams, self.num_streams = threading.Lock(), max_streams, 0
        super().__init__(f"grpc+tcp://{host}:{port}", middleware={"door": _Door(token)})

    def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.GeneratorStream:
        """Labels or features, as the ticket says."""
        try:
            wanted = unpack(ticket.ticket, LabelTicket, FeatureTicket)
            assert isinstance(wanted, LabelTicket | FeatureTicket)
        except LabelError as error:
            raise flight.FlightServerError(str(error)) from None

        def unwanted() -> bool:
            return self.stopping.is_set() or bool(context.is_cancelled())

        def messages() -> Iterator[Message]:
            with self._place():
                if isinstance(wanted, LabelTicket):
                    yield from label_stream(self.cursors, wanted, unwanted, self.traffic)
                else:
                    yield from self._features(wanted, unwanted)

        return flight.GeneratorStream(BLOCK_SCHEMA, messages())

    def do_put(
        self,
        context: flight.ServerCallContext,
        descriptor: flight.FlightDescriptor,
        reader: flight.MetadataRecordBatchReader,
        writer: flight.FlightMetadataWriter,
    ) -> None:
        """Append one message to a second copy; the receipt is sent when it has been written."""
        with self._place():
            try:
                ticket = unpack(descriptor.command, ReplicaTicket)
                blocks = [block for chunk in reader for block in blocks_of(chunk.data)]
                self.replicas.append(ticket, bytes(blocks[0]) if blocks else b"")
                receipt = Receipt()
            except (LabelError, OvertakenError) as error:
                receipt = Receipt(str(error), isinstance(error, OvertakenError))
            writer.write(pack(receipt))

    def do_action(self, context: flight.ServerCallContext, action: flight.Action) -> list[bytes]:
        """`health`, `stats`, `manifest`, `reopen` and `sync` (body: producer), `put_manifest` (producer, newline,
        log.json), `home` (a call of `home.py`).
        """
        body = b"" if action.body is None else action.body.to_pybytes()
        try:
            return [DONE + self._act(action.type, body)]
        except OvertakenError as error:
            return [OVERTAKEN + str(error).encode()]
        except (LabelError, RunError) as error:
            return [REFUSED + str(error).encode()]
        except OSError as error:
            return [SYSTEM + f"{error.errno or 0}\n{error.filename or ''}\n{error.strerror or error}".encode()]

    def stats(self) -> dict[str, object]:
        """What the service did and does, and how far each log is."""
        with self.places:
            num_streams = self.num_streams
        return {
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self.begun, 3),
            "streams": num_streams,
            "threads": threading.active_count(),
            "open_logs": len(self.cursors.idle),
            "steps": self.traffic.steps,
            "blocks": self.traffic.blocks,
            "sent_bytes": self.traffic.sent_bytes,
            "producers": sorted(path.name for path in self.labels_folder.glob("*") if path.is_dir()),
        }

    def close(self) -> None:
        """Stop listening and end all streams; one that hangs in the network is waited for to its deadline."""
        self.stopping.set()
        self.shutdown()
        self.cursors.close_idle(0.0)
        self.replicas.close()

    def _act(self, name: str, body: bytes) -> bytes:
        if name == HEALTH_ACTION:
            return b"ok"
        if name == STATS_ACTION:
            return json.dumps(self.stats()).encode()
        if name == MANIFEST_ACTION:
            check_producer(body.decode())
            path = self.labels_folder / body.decode() / MANIFEST
            if not path.exists():
                raise LabelError(
                    f"{path} is missing: {body.decode()} has no log here; start the run, or name another role"
                )
            return path.read_bytes()
        if name == PUT_MANIFEST_ACTION:
            producer, _, data = body.partition(b"\n")
            check_producer(producer.decode())
            self.replicas.put_manifest(producer.decode(), data)
            return b""
        if name == REOPEN_ACTION:
            check_producer(body.decode())
            return str(self.replicas.reopen(body.decode())).encode()
        if name == SYNC_ACTION:
            check_producer(body.decode())
            self.replicas.sync(body.decode())
            return b""
        if name == HOME_ACTION and self.home is not None:
            return self.home.answer(body)
        raise LabelError(f"the label service has no action {name!r}; do versions differ?")

    def _features(self, ticket: FeatureTicket, unwanted: Callable[[], bool]) -> Iterator[Message]:
        """The payload of a step as one block, or nothing."""
        try:
            ring = FeatureRing.open(self.labels_folder / ticket.producer, ticket.part)
            try:
                payload = ring.wait(ticket.step, ticket.wait_s, unwanted)
            finally:
                ring.close()
        except LabelError as error:
            yield empty_batch(), pack_note(Note(NOTHING, error=str(error)))
            return
        if payload is not None:
            yield block_batch(payload), pack_note(Note(NOTHING))

    @contextmanager
    def _place(self) -> Iterator[None]:
        """One of the calls that may be under way. Raises FlightUnavailableError if there are too many."""
        with self.places:
            if self.num_streams >= self.max_streams:
                raise flight.FlightUnavailableError(f"{self.num_streams} calls are under way")
            self.num_streams += 1
        try:
            yield
        finally:
            with self.places:
                self.num_streams -= 1


def serve(
    labels_folder: Path, token: str, host: str = LOCALHOST, port: int = 0, home: Mapping[str, Path] | None = None
) -> LabelService:
    """A running service; `port` says where it listens. Raises LabelError if it cannot."""
    try:
        return LabelService(labels_folder, token, host, port, home=home)
    except (OSError, flight.FlightError, pa.ArrowException) as error:
        raise LabelError(
            f"the label service cannot listen on {host}:{port} ({str(error).partition(chr(10))[0]}); set a host of "
            "this machine and a free port"
        ) from None


def main() -> int:
    """Serve until SIGTERM, SIGINT or the parent's death."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--labels", type=Path, required=True, help="folder of a run's logs")
    parser.add_argument("--address-file", type=Path, required=True, help="where readers find host and port")
    parser.add_argument("--host", default=LOCALHOST, help="address to listen on")
    parser.add_argument("--advertise", help="name of this host for readers elsewhere; by default --host")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--home", action="append", metavar="NAME=FOLDER", help="folders of the run, if it is its home")
    parser.add_argument("--parent", type=int, help="end when this process is no longer the parent")
    asked = parser.parse_args()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        home = {name: Path(folder) for name, _, folder in (one.partition("=") for one in asked.home or ())} or None
        service = serve(asked.labels, sys.stdin.readline().strip(), asked.host, asked.port, home)
        write_address(asked.address_file, asked.advertise or asked.host, service.port)
    except TitanError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    while not ended.wait(LOOK_S) and asked.parent in (None, os.getppid()):
        service.cursors.close_idle()
    # A stream into a hung reader ends with its deadline only; the process does not wait for it.
    closing = threading.Thread(target=service.close, daemon=True)
    closing.start()
    closing.join(GRACE_S)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
