"""How tensors cross from one rank to another: by torch.distributed, or through host memory and TCP.

Both keep the order of messages with one peer on one channel; a channel is a small number that both ends know.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor


class Arrival(ABC):
    """A message that was asked for."""

    @abstractmethod
    def wait(self) -> Tensor:
        """The tensor, once it is here. Raises if the peer is gone or the deadline has passed."""


class Transport(ABC):
    """Point-to-point messages of one rank."""

    @abstractmethod
    def send(self, tensor: Tensor, peer: int, channel: int) -> None:
        """Send without waiting; the tensor must not change until `flush`."""

    @abstractmethod
    def expect(self, into: Tensor, peer: int, channel: int) -> Arrival:
        """Ask for the next message of a peer on a channel; it will be in `into`, which says shape and dtype."""

    @abstractmethod
    def flush(self) -> None:
        """Wait until everything sent has left."""

    @abstractmethod
    def close(self) -> None:
        """Give up sockets and threads."""


class _Receipt(Arrival):
    def __init__(self, work: dist.Work, into: Tensor):
        self.work, self.into = work, into

    def wait(self) -> Tensor:
        self.work.wait()
        return self.into


class DirectTransport(Transport):
    """torch.distributed between ranks whose devices speak one collective library.

    gloo tells channels apart by tags. NCCL has none and matches messages by their order, so there every channel has a
    group of its own: with two stages and an interleaved schedule several edges join one pair of ranks.
    """

    def __init__(self, group_of: Callable[[int], dist.ProcessGroup | None]):
        """group_of: the group of a channel, or None where tags will do."""
        self.group_of = group_of
        self.sent: list[tuple[dist.Work, Tensor]] = []

    def send(self, tensor: Tensor, peer: int, channel: int) -> None:
        """See Transport."""
        tensor = tensor.contiguous()
        group = self.group_of(channel)
        work = dist.isend(tensor, peer, group=group, tag=0 if group else channel)
        assert work is not None
        self.sent.append((work, tensor))  # the tensor must live until it has left

    def expect(self, into: Tensor, peer: int, channel: int) -> Arrival:
        """See Transport."""
        group = self.group_of(channel)
        work = dist.irecv(into, peer, group=group, tag=0 if group else channel)
        assert work is not None
        return _Receipt(work, into)

    def flush(self) -> None:
        """See Transport."""
        for work, _ in self.sent:
            work.wait()
        self.sent.clear()

    def close(self) -> None:
        """The groups belong to the world."""
