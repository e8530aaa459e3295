"""Writing the second copy of a log, on another node, before a step is committed."""

from pathlib import Path

import pyarrow.flight as flight

from titan.distill.log.records import Commit, End, encode_record
from titan.distill.service.connection import Connection, Unreachable, patiently
from titan.distill.service.protocol import (
    BLOCK_SCHEMA,
    PUT_MANIFEST_ACTION,
    Receipt,
    ReplicaTicket,
    block_batch,
    check_producer,
    pack,
    unpack,
)
from titan.errors import LabelError


class ReplicaWriter:
    """Sends what one rank of a producer appends. Each call returns when the other node has written it.

    A call that lost its receipt is made again, for up to `timeout_s`; what arrives twice is written once.
    """

    def __init__(self, address_file: Path, token: str, producer: str, part: int, timeout_s: float):
        check_producer(producer)
        self.connection = Connection(address_file, token)
        self.producer, self.part, self.timeout_s = producer, part, timeout_s

    def manifest(self, data: bytes) -> None:
        """Send log.json, before anything else. Raises LabelError if the other node has another log there."""
        body = f"{self.producer}\n".encode() + data
        patiently(
            lambda stall_s: self.connection.act(PUT_MANIFEST_ACTION, body, stall_s),
            self.timeout_s,
            f"a second copy of the manifest of {self.producer}",
        )

    def append(self, step: int, block: bytes, durable: bool = False) -> int:
        """Send a block of a step; returns its bytes.

        durable: have it forced to disk there
        Raises LabelError on a full or failing disk there, or when there was no receipt for `timeout_s`.
        """
        self._send(ReplicaTicket(self.producer, self.part, durable=durable), block, f"a second copy of step {step}")
        return len(block)

    def commit(self, commit: Commit, durable: bool = False) -> None:
        """Make a step readable there, once all its parts have been sent."""
        self._line(commit, f"a second copy of the commit of step {commit.step}", durable)

    def end(self, reason: str) -> None:
        """Say that no more steps will come."""
        self._line(End(reason), "a second copy of the log's end", False)

    def close(self) -> None:
        """Close the connection."""
        self.connection.drop()

    def _line(self, record: Commit | End, wanted: str, durable: bool) -> None:
        self._send(ReplicaTicket(self.producer, self.part, encode_record(record).decode(), durable), None, wanted)

    def _send(self, ticket: ReplicaTicket, block: bytes | None, wanted: str) -> None:
        def attempt(stall_s: float) -> Receipt:
            with self.connection.call(stall_s) as (client, options):
                descriptor = flight.FlightDescriptor.for_command(pack(ticket))
                writer, receipts = client.do_put(descriptor, BLOCK_SCHEMA, options)
                with writer:
                    if block is not None:
                        writer.write_batch(block_batch(block))
                    writer.done_writing()
                    answer = receipts.read()
                if answer is None:
                    raise Unreachable(f"{self.connection.describe()} sent no receipt")
                return unpack(answer.to_pybytes(), Receipt)

        receipt = patiently(attempt, self.timeout_s, wanted)
        if receipt.error is not None:
            raise LabelError(f"{self.connection.describe()} keeps no second copy: {receipt.error}")
