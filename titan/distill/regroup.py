"""Samples of the label stream in order, regrouped into batches of a student's own size.

A batch may span several teacher steps, and a step may give several batches. Only the grouping changes: a sample keeps
its tokens, its labels and so its context.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from titan.distill.follow import Next
from titan.distill.log.ledger import Place
from titan.tasks.sample_labels import SampleLabels


@dataclass(frozen=True)
class Piece:
    """Consecutive samples of one teacher step."""

    step: int
    first: int
    """Position of the first in that step's batch."""
    step_samples: int
    """Of the whole step; so are the next two."""
    cross_entropy: float
    """The teacher's, nats a token."""
    size_bytes: int
    """Of labels."""
    lag: int
    """The teacher's newest step minus this one, when it was read."""
    tokens_BS1: np.ndarray
    sample_ids_B: np.ndarray
    labels: SampleLabels

    @property
    def samples(self) -> int:
        """How many."""
        return len(self.sample_ids_B)

    @property
    def end(self) -> Place:
        """The sample behind the last."""
        end = self.first + self.samples
        return Place(self.step, end) if end < self.step_samples else Place(self.step + 1, 0)

    def cut(self, start: int, end: int) -> "Piece":
        """Samples [start, end) of these."""
        if (start, end) == (0, self.samples):
            return self
        rows = slice(start, end)
        return replace(
            self,
            first=self.first + start,
            tokens_BS1=self.tokens_BS1[rows],
            sample_ids_B=self.sample_ids_B[rows],
            labels=self.labels.rows(start, end),
        )

    @property
    def own_bytes(self) -> int:
        """Their share of the step's bytes; over all pieces of a step they sum up to these."""
        return _share(self, self.first + self.samples) - _share(self, self.first)


def piece_of(found: Next, temperature: float) -> Piece:
    """A whole step as it was found in the log."""
    commit, blocks = found.commit, found.blocks
    return Piece(
        step=commit.step,
        first=0,
        step_samples=commit.samples,
        cross_entropy=commit.cross_entropy,
        size_bytes=found.size_bytes,
        lag=found.lag,
        tokens_BS1=np.concatenate([block.tokens_BS1 for block in blocks]),
        sample_ids_B=np.concatenate([block.sample_ids_B for block in blocks]),
        labels=SampleLabels.cat([block.labels.at(temperature) for block in blocks]),
    )


@dataclass(frozen=True)
class Batch:
    """What a student learns in one step of its own: samples that follow each other in the stream."""

    pieces: tuple[Piece, ...]

    @property
    def samples(self) -> int:
        """How many."""
        return sum(piece.samples for piece in self.pieces)

    @property
    def start(self) -> Place:
        """The first sample."""
        return Place(self.pieces[0].step, self.pieces[0].first)

    @property
    def end(self) -> Place:
        """The sample behind the last."""
        return self.pieces[-1].end

    @property
    def lag(self) -> int:
        """Of the newest sample."""
        return self.pieces[-1].lag

    @property
    def size_bytes(self) -> int:
        """Of the labels of these samples."""
        return sum(piece.own_bytes for piece in self.pieces)

    @property
    def cross_entropy(self) -> float:
        """The teacher's, nats a token: the mean over samples of that of their steps."""
        if len(self.pieces) == 1:
            return self.pieces[0].cross_entropy
        return sum(piece.cross_entropy * piece.samples for piece in self.pieces) / self.samples

    @property
    def sample_ids(self) -> np.ndarray:
        """int64 [samples]"""
        return np.concatenate([piece.sample_ids_B for piece in self.pieces])

    def filled(self, size: int) -> tuple[np.ndarray, SampleLabels, np.ndarray]:
        """Tokens, labels and weights of `size` samples: a short batch is filled up with its first one at weight 0."""
        tokens_BS1 = np.concatenate([piece.tokens_BS1 for piece in self.pieces])
        labels = SampleLabels.cat([piece.labels for piece in self.pieces])
        missing = size - len(tokens_BS1)
        if missing:
            tokens_BS1 = np.concatenate([tokens_BS1, np.repeat(tokens_BS1[:1], missing, axis=0)])
            labels = SampleLabels.cat([labels, *[labels.rows(0, 1)] * missing])
        weight_B = np.ones(size)
        weight_B[size - missing :] = 0.0
        return tokens_BS1, labels, weight_B


class Regrouper:
    """Takes in steps, whole or from a sample on, and gives batches."""

    def __init__(self, batch_size: int, place: Place):
        """place: the first sample to be taken in"""
        self.batch_size, self.place = batch_size, place
        self.pieces: list[Piece] = []
        """Taken in and not yet in a batch; they lie end to end up to `place`."""

    def put(self, piece: Piece) -> None:
        """Take in a whole step; of the first after a restart, the samples from `place` on."""
        assert piece.step == self.place.step, f"step {piece.step} where {self.place} comes next"
        self.pieces.append(piece.cut(self.place.sample, piece.samples))
        self.place = piece.end

    def jump(self, place: Place) -> None:
        """Go on at a later sample. A batch never spans a gap: what is in no batch yet is left out, too."""
        self.pieces.clear()
        self.place = place

    def batches(self, rest: bool) -> Iterator[Batch]:
        """Those that are full; and with `rest`, at the end of the stream, what is left as a smaller one."""
        while self.pieces and (rest or self._samples() >= self.batch_size):
            yield self._next()

    def _samples(self) -> int:
        return sum(piece.samples for piece in self.pieces)

    def _next(self) -> Batch:
        taken: list[Piece] = []
        wanted = self.batch_size
        while wanted and self.pieces:
            piece = self.pieces.pop(0)
            number = min(wanted, piece.samples)
            taken.append(piece.cut(0, number))
            if number < piece.samples:
                self.pieces.insert(0, piece.cut(number, piece.samples))
            wanted -= number
        return Batch(tuple(taken))


def _share(piece: Piece, samples: int) -> int:
    return piece.size_bytes * samples // piece.step_samples
