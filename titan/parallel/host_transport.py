"""Messages between ranks whose devices speak no common collective library: device, host memory, TCP, host, device.

A message is a header and raw bytes with dtype and shape, so the two ends may run different versions of anything. Large
tensors go in chunks through two pinned buffers: one is on the wire while the next leaves the device. A connection opens
with the world's secret; what does not know it is dropped.
"""

import contextlib
import hmac
import queue
import secrets
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from titan.errors import PeerLostError
from titan.parallel.transport import Arrival, Transport

MAGIC = b"TTN1"
SECRET_BYTES = 32
CHUNK_BYTES = 1 << 20
LARGEST_BYTES = 1 << 40
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8)
_HELLO = struct.Struct(f"<4sI{SECRET_BYTES}s")
"""magic, rank of the sender, secret"""
_HEADER = struct.Struct("<4sIBB4QQ")
"""magic, channel, dtype, dimensions, up to four sizes, bytes"""


@dataclass(frozen=True)
class Failure:
    """Why nothing more will come from a peer."""

    reason: str


class HostTransport(Transport):
    """One rank's connections. Every pair of ranks that exchanges anything has one socket a direction."""

    def __init__(self, rank: int, ranks: int, store: Store, address: str, device: torch.device, timeout_s: float):
        """Publish where this rank listens. Collective: every rank of the world calls it.

        store: where the world met;  address: this host's, as the others reach it
        """
        self.rank, self.store, self.device, self.timeout_s = rank, store, device, timeout_s
        self.listener = socket.create_server((address, 0), backlog=ranks)
        if rank == 0:
            store.set("host-transport/secret", secrets.token_bytes(SECRET_BYTES).hex())
        self.secret = bytes.fromhex(store.get("host-transport/secret").decode())
        store.set(f"host-transport/{rank}", f"{address} {self.listener.getsockname()[1]}")
        self.outgoing: dict[int, _Sender] = {}
        self.inbox: dict[tuple[int, int], queue.SimpleQueue[Tensor | Failure]] = {}
        self.failed: dict[int, Failure] = {}
        self.lock = threading.Lock()
        self.closing = False
        threading.Thread(target=self._accept, name="host-transport", daemon=True).start()

    def send(self, tensor: Tensor, peer: int, channel: int) -> None:
        """See Transport."""
        if peer not in self.outgoing:
            self.outgoing[peer] = _Sender(self._connect(peer), self.rank, peer, self.device)
        self.outgoing[peer].put(tensor.detach().contiguous(), channel)

    def expect(self, into: Tensor, peer: int, channel: int) -> Arrival:
        """See Transport."""
        return _FromPeer(self, into, peer, channel)

    def flush(self) -> None:
        """See Transport."""
        for sender in self.outgoing.values():
            sender.flush(self.timeout_s)

    def close(self) -> None:
        """See Transport."""
        self.closing = True
        for sender in self.outgoing.values():
            sender.close()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def box(self, peer: int, channel: int) -> "queue.SimpleQueue[Tensor | Failure]":
        """Messages of a peer on a channel that nobody took yet."""
        with self.lock:
            if (peer, channel) not in self.inbox:
                self.inbox[peer, channel] = queue.SimpleQueue()
                if peer in self.failed:
                    self.inbox[peer, channel].put(self.failed[peer])
            return self.inbox[peer, channel]

    def _connect(self, peer: int) -> socket.socket:
        host, port = self.store.get(f"host-transport/{peer}").decode().split()
        try:
            connection = socket.create_connection((host, int(port)), timeout=self.timeout_s)
        except OSError as error:
            raise PeerLostError(f"rank {self.rank} cannot reach rank {peer} at {host}:{port}: {error}") from None
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(self.timeout_s)
        connection.sendall(_HELLO.pack(MAGIC, self.rank, self.secret))
        return connection

    def _accept(self) -> None:
        while not self.closing:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        """Everything one peer sends, from its hello to its end."""
        with connection:
            connection.settimeout(self.timeout_s)
            try:
                magic, peer, secret = _HELLO.unpack(_receive(connection, _HELLO.size))
            except (OSError, EOFError):
                return
            if magic != MAGIC or not hmac.compare_digest(secret, self.secret):
                return
            connection.settimeout(None)  # a peer may have nothing to say for long; who waits has a deadline
            try:
                while True:
                    channel, tensor = self._read_message(connection)
                    self.box(peer, channel).put(tensor)
            except (OSError, EOFError, ValueError) as error:
                self._fail(peer, f"the connection ended ({error})" if str(error) else "the connection ended")

    def _read_message(self, connection: socket.socket) -> tuple[int, Tensor]:
        magic, channel, dtype, dimensions, *rest = _HEADER.unpack(_receive(connection, _HEADER.size))
        sizes, num_bytes = rest[:dimensions], rest[4]
        if magic != MAGIC or dimensions > 4 or dtype >= len(DTYPES) or num_bytes > LARGEST_BYTES:
            raise ValueError("no message of this protocol")
        pinned = self.device.type != "cpu"
        flat = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        view = _bytes_of(flat)
        target = torch.empty(num_bytes, dtype=torch.uint8, device=self.device) if pinned else flat
        for start in range(0, num_bytes, CHUNK_BYTES):
            part = slice(start, min(start + CHUNK_BYTES, num_bytes))
            _receive_into(connection, view[part])
            if pinned:  # the copy to the device runs while the next chunk comes in
                target[part].copy_(flat[part], non_blocking=True)
        if pinned:
            torch.accelerator.synchronize(self.device)
        return channel, target.view(DTYPES[dtype]).view(sizes)

    def _fail(self, peer: int, reason: str) -> None:
        with self.lock:
            self.failed[peer] = Failure(reason)
            for (sender, _), box in self.inbox.items():
                if sender == peer:
                    box.put(self.failed[peer])


class _FromPeer(Arrival):
    """A message on its way from a peer."""

    def __init__(self, transport: HostTransport, into: Tensor, peer: int, channel: int):
        self.transport, self.into, self.peer, self.channel = transport, into, peer, channel

    def wait(self) -> Tensor:
        """See Arrival."""
        transport = self.transport
        try:
            got = transport.box(self.peer, self.channel).get(timeout=transport.timeout_s)
        except queue.Empty:
            raise PeerLostError(
                f"rank {transport.rank} waited {transport.timeout_s:.0f} s for a message of rank {self.peer} on "
                f"channel {self.channel}; is it alive? (cluster.step_timeout_s sets the wait)"
            ) from None
        if isinstance(got, Failure):
            raise PeerLostError(f"rank {transport.rank} lost rank {self.peer}: {got.reason}")
        assert got.shape == self.into.shape and got.dtype == self.into.dtype, (
            f"rank {self.peer} sent {got.dtype} {list(got.shape)} on channel {self.channel}, "
            f"rank {transport.rank} wants {self.into.dtype} {list(self.into.shape)}"
        )
        self.into.copy_(got)
        return self.into


class _Sender:
    """A thread that writes one peer's messages in order."""

    def __init__(self, connection: socket.socket, rank: int, peer: int, device: torch.device):
        self.connection, self.rank, self.peer, self.device = connection, rank, peer, device
        self.waiting: queue.SimpleQueue[tuple[Tensor, int, Any] | None] = queue.SimpleQueue()
        self.idle = threading.Condition()
        self.queued = 0
        self.error: OSError | None = None
        self.buffers: list[Tensor] = []
        self.thread = threading.Thread(target=self._run, name=f"to-rank-{peer}", daemon=True)
        self.thread.start()

    def put(self, tensor: Tensor, channel: int) -> None:
        """Queue a message; a failure before it is raised here."""
        self._check()
        ready = None
        if tensor.device.type != "cpu":  # what computed the tensor is queued on this thread's stream
            ready = torch.Event(tensor.device.type)
            ready.record()
        with self.idle:
            self.queued += 1
        self.waiting.put((tensor, channel, ready))

    def flush(self, timeout_s: float) -> None:
        """Wait until the queue is empty."""
        deadline = time.monotonic() + timeout_s
        with self.idle:
            while self.queued and self.error is None:
                if not self.idle.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                    raise PeerLostError(
                        f"rank {self.rank} could not send to rank {self.peer} for {timeout_s:.0f} s; is it alive?"
                    )
        self._check()

    def close(self) -> None:
        """End the thread and the connection."""
        self.waiting.put(None)
        self.thread.join(timeout=5.0)
        self.connection.close()

    def _check(self) -> None:
        if self.error is not None:
            raise PeerLostError(f"rank {self.rank} cannot send to rank {self.peer}: {self.error}")

    def _run(self) -> None:
        while (item := self.waiting.get()) is not None:
            tensor, channel, ready = item
            try:
                if self.error is None:
                    if ready is not None:
                        ready.synchronize()
                    self._write(tensor, channel)
            except OSError as error:
                self.error = error
            with self.idle:
                self.queued -= 1
                self.idle.notify_all()

    def _write(self, tensor: Tensor, channel: int) -> None:
        raw = tensor.reshape(-1).view(torch.uint8)
        sizes = [*tensor.shape, *(0,) * (4 - tensor.dim())]
        header = _HEADER.pack(MAGIC, channel, DTYPES.index(tensor.dtype), tensor.dim(), *sizes, raw.numel())
        self.connection.sendall(header)
        if tensor.device.type == "cpu":
            view = _bytes_of(raw)
            for start in range(0, raw.numel(), CHUNK_BYTES):
                self.connection.sendall(view[start : start + CHUNK_BYTES])
            return
        if not self.buffers:
            self.buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        starts = list(range(0, raw.numel(), CHUNK_BYTES))
        copies = [self._copy_out(raw, start, turn) for turn, start in enumerate(starts[:1])]
        for turn in range(len(starts)):
            if turn + 1 < len(starts):
                copies.append(self._copy_out(raw, starts[turn + 1], turn + 1))
            buffer, copied = copies[turn]
            copied.synchronize()
            self.connection.sendall(_bytes_of(buffer))

    def _copy_out(self, raw: Tensor, start: int, turn: int) -> tuple[Tensor, Any]:
        """Start copying a chunk to pinned memory; the buffer's chunk before the last has been sent."""
        part = raw[start : start + CHUNK_BYTES]
        buffer = self.buffers[turn % 2][: part.numel()]
        buffer.copy_(part, non_blocking=True)
        copied = torch.Event(raw.device.type)
        copied.record()
        return buffer, copied


def _bytes_of(flat: Tensor) -> memoryview:
    """The memory of a uint8 tensor on the host."""
    array: Any = flat.numpy()
    return memoryview(array)


def _receive(connection: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    _receive_into(connection, memoryview(data))
    return bytes(data)


def _receive_into(connection: socket.socket, view: memoryview) -> None:
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise EOFError
        view = view[count:]


def own_address(towards: str) -> str:
    """This host's address on the network that leads to another host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))
        address: str = probe.getsockname()[0]
        return address
