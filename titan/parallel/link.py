"""What a message between two ranks takes: one goes there and back, small and large, as edges of a run send theirs."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from titan.parallel.transport import Transport

SIZES = (1 << 10, 1 << 20, 1 << 24)
"""Bytes of messages; the first tells the latency, the largest that is sent the bandwidth."""
SLOW_S = 0.05
"""A message that takes so long is not followed by larger ones: at 20 MB/s and less that would take minutes."""
WARM_UP, LEAST_REPEATS, MOST_REPEATS, MEASURE_S = 3, 5, 50, 0.4
AGAIN, LARGER, DONE = range(3)
"""What the first byte of a message says of the next one."""


@dataclass(frozen=True)
class LinkTime:
    """Seconds before the first byte arrives, and how fast the others follow."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        """Of a message of so many bytes."""
        return self.latency_s + num_bytes / self.bytes_per_s


def measure_transport(transport: Transport, rank: int, device: torch.device) -> LinkTime:
    """Both ranks 0 and 1 of a world of two call it; what rank 0 returns counts. Raises what the transport does."""
    found = list[tuple[int, float]]()
    for size in SIZES:
        seconds, then = _ping_pong(transport, rank, device, size)
        found.append((size, seconds))
        if then == DONE:
            break
    return link_time(found)


def link_time(found: Sequence[tuple[int, float]]) -> LinkTime:
    """found: (bytes, seconds one way) of messages, the smallest first and the largest last."""
    (small, small_s), (large, large_s) = found[0], found[-1]
    bytes_per_s = (large - small) / max(large_s - small_s, 1e-9)
    return LinkTime(max(0.0, small_s - small / bytes_per_s), bytes_per_s)


def _ping_pong(transport: Transport, rank: int, device: torch.device, size: int) -> tuple[float, int]:
    """(median seconds one way, whether a larger message follows); rank 0 decides and tells rank 1 in the message."""
    peer = 1 - rank
    message, into = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    seconds, since, then = list[float](), time.perf_counter(), AGAIN
    while then == AGAIN:
        if rank == 0:
            then = _next(seconds, time.perf_counter() - since, size)
            message[0] = then
        begin = time.perf_counter()
        if rank == 0:
            transport.send(message, peer, 0)
        transport.expect(into, peer, 0).wait()
        if rank == 1:
            then = int(into[0])
            transport.send(message, peer, 0)
        transport.flush()
        seconds.append((time.perf_counter() - begin) / 2)
    return statistics.median(seconds[WARM_UP:]), then


def _next(seconds: Sequence[float], passed_s: float, size: int) -> int:
    """What comes after the message that is about to be sent."""
    counted = len(seconds) + 1 - WARM_UP
    if counted < LEAST_REPEATS or (counted < MOST_REPEATS and passed_s < MEASURE_S):
        return AGAIN
    slow = statistics.median(seconds[WARM_UP:]) >= SLOW_S
    return DONE if slow or size == SIZES[-1] else LARGER
