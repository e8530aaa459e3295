"""Messages through host memory and TCP arrive whole and in order, and what goes wrong says who and what."""

import errno
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from titan.errors import PeerLostError
from titan.parallel.host_transport import _HELLO, CHUNK_BYTES, DTYPES, MAGIC, HostTransport, own_address

TIMEOUT_S = 1.0


class Pair:
    """Two ranks in one process."""

    def __init__(self) -> None:
        store = dist.HashStore()
        cpu = torch.device("cpu")
        self.store = store
        self.zero, self.one = (HostTransport(rank, 2, store, "127.0.0.1", cpu, TIMEOUT_S) for rank in range(2))

    def receive(self, like: Tensor, channel: int) -> Tensor:
        return self.one.expect(torch.empty_like(like), 0, channel).wait()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.zero.close()
    made.one.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_sent_arrives_bit_for_bit_on_its_channel_in_order(pair: Pair, dtype: torch.dtype) -> None:
    shapes = [(), (1,), (3, 5, 7), (2, 1, 3, 4), (CHUNK_BYTES // 8 * 3 + 5,)]
    sent = [(index % 2, (torch.randn(shape) * 50).to(dtype)) for index, shape in enumerate(shapes * 2)]
    for channel, tensor in sent:
        pair.zero.send(tensor, 1, channel)
    pair.zero.flush()
    for wanted in (1, 0):  # the channel that was sent last is read first
        for channel, tensor in sent:
            if channel == wanted:
                assert torch.equal(pair.receive(tensor, channel), tensor)


def test_a_slice_that_is_not_contiguous_arrives_too(pair: Pair) -> None:
    whole = torch.arange(60.0).view(3, 4, 5)
    pair.zero.send(whole[:, 1:3], 1, 0)
    assert torch.equal(pair.receive(torch.empty(3, 2, 5), 0), whole[:, 1:3])


def test_who_waits_for_a_peer_that_says_nothing_gives_up_at_the_deadline(pair: Pair) -> None:
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match="rank 1 waited 1 s for a message of rank 0 on channel 3; is it alive"):
        pair.receive(torch.empty(1), 3)
    assert TIMEOUT_S <= time.monotonic() - begin < TIMEOUT_S + 2


def test_who_waits_for_a_peer_that_dies_hears_of_it_at_once(pair: Pair) -> None:
    pair.zero.send(torch.ones(1), 1, 0)
    assert pair.receive(torch.empty(1), 0) == 1
    threading.Timer(0.2, lambda: pair.zero.outgoing[1].connection.shutdown(socket.SHUT_RDWR)).start()
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match="rank 1 lost rank 0: the connection ended"):
        pair.receive(torch.empty(1), 0)
    assert time.monotonic() - begin < TIMEOUT_S


def test_sending_to_a_peer_that_is_gone_is_an_error_not_a_hang(pair: Pair) -> None:
    pair.zero.send(torch.ones(1), 1, 0)
    pair.zero.flush()
    pair.zero.outgoing[1].connection.shutdown(socket.SHUT_RDWR)
    with pytest.raises(PeerLostError, match="rank 0 cannot send to rank 1"):
        for _ in range(3):
            pair.zero.send(torch.ones(1 << 20), 1, 0)
            pair.zero.flush()


def test_sending_to_a_peer_that_does_not_read_gives_up_at_the_deadline() -> None:
    """A peer that hangs with its socket open."""
    store = dist.HashStore()
    deaf = socket.create_server(("127.0.0.1", 0))
    store.set("host-transport/1", f"127.0.0.1 {deaf.getsockname()[1]}")
    zero = HostTransport(0, 2, store, "127.0.0.1", torch.device("cpu"), TIMEOUT_S)
    zero.send(torch.ones(1 << 24), 1, 0)
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match="rank 0 c"):
        zero.flush()
    assert time.monotonic() - begin < TIMEOUT_S + 2
    deaf.close()
    zero.close()


@pytest.mark.parametrize(
    "hello",
    [b"GET / HTTP/1.1\r\n\r\n" + bytes(40), _HELLO.pack(MAGIC, 0, bytes(32)), b"TT"],
    ids=["http", "wrong secret", "too short"],
)
def test_a_stranger_is_dropped_and_disturbs_nobody(pair: Pair, hello: bytes) -> None:
    host, port = pair.store.get("host-transport/1").decode().split()
    with socket.create_connection((host, int(port)), timeout=5.0) as stranger:
        stranger.sendall(hello)
        try:
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
        except OSError as error:  # hung up on, at whichever of the two calls the news arrives
            assert error.errno in (errno.ECONNRESET, errno.ENOTCONN)
    pair.zero.send(torch.ones(2), 1, 0)
    assert torch.equal(pair.receive(torch.empty(2), 0), torch.ones(2))


def test_own_address_towards_this_host_is_the_loopback() -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"
