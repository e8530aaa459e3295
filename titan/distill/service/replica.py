"""Writing a log on another node before a step is committed: a second copy, or at the run's home the log itself."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow.flight as flight

from titan.checkpoint.fence import Generation
from titan.distill.log.manifest import MANIFEST
from titan.distill.log.records import Commit, CommitCursor, End, encode_record
from titan.distill.log.retention import first_kept
from titan.distill.log.second_copy import committed_blocks
from titan.distill.service.connection import Connection, Unreachable, patiently
from titan.distill.service.protocol import (
    BLOCK_SCHEMA,
    PUT_MANIFEST_ACTION,
    REOPEN_ACTION,
    SYNC_ACTION,
    LabelTicket,
    Receipt,
    ReplicaTicket,
    block_batch,
    check_producer,
    pack,
    unpack,
)
from titan.errors import LabelError, OvertakenError


class ReplicaWriter:
    """Sends what one rank of a producer appends. Each call returns when the other node has written it.

    A call that lost its receipt is made again, for up to `timeout_s`; what arrives twice is written once.
    """

    def __init__(
        self,
        address: Path | str,
        token: str,
        producer: str,
        part: int,
        timeout_s: float,
        generation: Generation | None = None,
        segment_bytes: int | None = None,
    ):
        """address: the file with the service's address, or the address
        generation: of the producer, at the run's home, which writes for the newest alone
        """
        check_producer(producer)
        self.connection = Connection(address, token, "the label service" if generation is None else "the run's home")
        self.producer, self.part, self.timeout_s = producer, part, timeout_s
        self.generation, self.segment_bytes = generation or Generation(0, ""), segment_bytes
        self.what = "a second copy" if generation is None else "the labels"

    def last_committed(self) -> int:
        """The last step that is readable there; 0 while there is none."""

        def attempt(stall_s: float) -> int:
            last = 0
            for note, _ in self.connection.labels(LabelTicket(self.producer, 0, credits=0), stall_s):
                last = note.state.last_committed
            return last

        return patiently(attempt, self.timeout_s, f"the state of the labels of {self.producer}")

    def make_durable(self) -> None:
        """Have what was sent forced to disk."""
        wanted = f"{self.what} of {self.producer} to be on the disk"
        body = self.producer.encode()
        patiently(lambda stall_s: self.connection.act(SYNC_ACTION, body, stall_s), self.timeout_s, wanted)

    def reopen(self) -> int:
        """Have what was not committed cut off there; the last committed step. Before the producer writes (again)."""
        return patiently(
            lambda stall_s: int(self.connection.act(REOPEN_ACTION, self.producer.encode(), stall_s)),
            self.timeout_s,
            f"the second copy of the labels of {self.producer}",
        )

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
        self._send(self._ticket(None, durable), block, f"{self.what} of step {step} to be written")
        return len(block)

    def commit(self, commit: Commit, durable: bool = False) -> None:
        """Make a step readable there, once all its parts have been sent."""
        self._line(commit, f"{self.what} of step {commit.step} to be committed", durable)

    def end(self, reason: str) -> None:
        """Say that no more steps will come."""
        self._line(End(reason), f"{self.what} of {self.producer} to be ended", False)

    def close(self) -> None:
        """Close the connection."""
        self.connection.drop()

    def _line(self, record: Commit | End, wanted: str, durable: bool) -> None:
        self._send(self._ticket(encode_record(record).decode(), durable), None, wanted)

    def _ticket(self, line: str | None, durable: bool) -> ReplicaTicket:
        who = self.generation
        return ReplicaTicket(self.producer, self.part, line, durable, who.number, who.id, self.segment_bytes)

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
        if receipt.overtaken:
            raise OvertakenError(receipt.error)
        if receipt.error is not None:
            raise LabelError(f"{self.connection.describe()} does not take {wanted}: {receipt.error}")


def bring_up(folder: Path, address: Path | str, token: str, producer: str, timeout_s: float) -> int:
    """Make the second copy of a log that nobody writes what the log is; returns the steps that were copied.

    Call it before a producer starts or resumes, after the log itself was repaired (`reopen`).
    Raises LabelError if the copy has steps that the log lacks, or lacks some that the log has dropped.
    """
    writer = ReplicaWriter(address, token, producer, 0, timeout_s)
    try:
        there, cursor = writer.reopen(), CommitCursor(folder)
        writer.manifest((folder / MANIFEST).read_bytes())
        missing = _missing(cursor, there)
        cursor.close()
        where = writer.connection.describe()
        if there > cursor.last_step:
            raise LabelError(
                f"{folder} ends at step {cursor.last_step}, its second copy at {where} at step {there}: students may "
                "have learned what is missing; copy the second copy's folder here and resume"
            )
        if missing and there and missing[0].step < first_kept(folder):
            raise LabelError(
                f"the second copy of {folder} at {where} ends at step {there}, and the log has dropped what follows; "
                "copy the log's folder there"
            )
        kept = [commit for commit in missing if commit.step >= first_kept(folder)]
        if kept:
            _copy(folder, kept, writer)
        return len(kept)
    finally:
        writer.close()


def _missing(cursor: CommitCursor, last: int) -> list[Commit]:
    """Commits behind a step."""
    missing: list[Commit] = []
    while commits := cursor.next():
        missing += [commit for commit in commits if commit.step > last]
    return missing


def _copy(folder: Path, commits: Sequence[Commit], writer: ReplicaWriter) -> None:
    """Send committed steps, part by part."""
    for commit, blocks in committed_blocks(folder, commits):
        for part, block in blocks:
            writer.part = part
            writer.append(commit.step, block)
        writer.commit(commit)
