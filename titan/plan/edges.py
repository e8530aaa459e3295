"""What crosses an edge between two stages: who sends which samples and positions to whom, as pure data.

Each rank owns a rectangle of a micro-batch's activations: its replica's samples, and all positions, or its slice of
them with sequence parallelism. A route is an intersection of two rectangles; unequal `dp` and `tp` need nothing more.
"""

from dataclasses import dataclass

from titan.plan.layout import Stage

Interval = tuple[int, int]
"""[start, end)"""


@dataclass(frozen=True)
class Region:
    """The part of a micro-batch that a rank owns."""

    samples: Interval
    positions: Interval

    @property
    def shape(self) -> tuple[int, int]:
        """(positions, samples): activations are [S, B, ...]."""
        return self.positions[1] - self.positions[0], self.samples[1] - self.samples[0]

    def slices_of(self, part: "Region") -> tuple[slice, slice]:
        """Where a part lies in a tensor of this region."""
        (s0, _), (p0, _) = self.samples, self.positions
        return (
            slice(part.positions[0] - p0, part.positions[1] - p0),
            slice(part.samples[0] - s0, part.samples[1] - s0),
        )


@dataclass(frozen=True)
class Route:
    """One message of an edge."""

    source: int
    """World rank."""
    target: int
    region: Region


def owned(stage: Stage, replica: int, tensor: int, samples: int, length: int, sequence_parallel: bool) -> Region:
    """What one rank of a stage owns of a micro-batch of `samples` of `length` tokens."""
    positions = (0, length)
    if sequence_parallel and stage.tp > 1:
        size = length // stage.tp
        positions = (tensor * size, (tensor + 1) * size)
    return Region(stage.samples(samples)[replica], positions)


def routes(source: Stage, target: Stage, samples: int, length: int, sequence_parallel: bool) -> tuple[Route, ...]:
    """All messages that give every rank of `target` what it owns, each element once.

    Where the tensor ranks of `source` hold copies of one another, they take turns.
    """
    found = []
    for replica in range(target.dp):
        for tensor in range(target.tp):
            wanted = owned(target, replica, tensor, samples, length, sequence_parallel)
            for from_replica in range(source.dp):
                copies = not (sequence_parallel and source.tp > 1)
                senders = [tensor * source.tp // target.tp] if copies else range(source.tp)
                for sender in senders:
                    held = owned(source, from_replica, sender, samples, length, sequence_parallel)
                    part = _intersection(held, wanted)
                    if part is not None:
                        found.append(Route(source.rank(from_replica, sender), target.rank(replica, tensor), part))
    return tuple(found)


def row_routes(source: Stage, target: Stage, rows: int) -> tuple[tuple[int, int, Interval], ...]:
    """(source rank, target rank, rows) that give every replica of `target` its rows of a matrix cut over tensor ranks.

    Replica r takes them from replica r modulo dp of `source`, whose replicas hold the same.
    """
    found = []
    for replica in range(target.dp):
        for tensor in range(target.tp):
            for sender in range(source.tp):
                start = max(tensor * rows // target.tp, sender * rows // source.tp)
                end = min((tensor + 1) * rows // target.tp, (sender + 1) * rows // source.tp)
                if start < end:
                    giver = source.rank(replica % source.dp, sender)
                    found.append((giver, target.rank(replica, tensor), (start, end)))
    return tuple(found)


def _intersection(a: Region, b: Region) -> Region | None:
    samples = max(a.samples[0], b.samples[0]), min(a.samples[1], b.samples[1])
    positions = max(a.positions[0], b.positions[0]), min(a.positions[1], b.positions[1])
    return Region(samples, positions) if samples[0] < samples[1] and positions[0] < positions[1] else None
