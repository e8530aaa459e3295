"""What a student did with its labels: its place in the stream, counts, and on its lead rank the ledger.

Place and counts are committed with the weights. The student's own steps are a function of the place: samples dealt with
over the samples of a batch, rounded up. With the teacher's batch size they are the teacher's steps since the start.
"""

from typing import Any

from titan.distill.log.ledger import Ledger, Place
from titan.distill.regroup import Batch

COUNTS = ("consumed", "skipped", "repeated", "max_lag", "label_bytes", "label_tokens", "features_missed")


class LabelAccount:
    """One rank's; the same on all ranks of a student."""

    def __init__(self, batch_size: int, step_samples: int):
        """batch_size: of the student;  step_samples: of a teacher step"""
        self.batch_size, self.step_samples = batch_size, step_samples
        self.start_step: int | None = None
        """Teacher step after which the student started; None before."""
        self.place = Place(1, 0)
        """The first sample that is neither learned nor skipped; of no meaning before the start."""
        self.consumed, self.skipped, self.repeated, self.max_lag = 0, 0, 0, 0
        self.label_bytes, self.label_tokens = 0, 0
        self.features_missed = 0
        """Steps learned without features that were asked for, because they were gone."""
        self.ledger: Ledger | None = None
        """Only the lead keeps it."""

    def state(self) -> dict[str, Any]:
        """As JSON, for the checkpoint."""
        return {
            "start_step": self.start_step,
            "place": None if self.start_step is None else list(self.place),
            "counts": {name: getattr(self, name) for name in COUNTS},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        self.start_step = state["start_step"]
        self.place = Place(*state["place"]) if state["place"] is not None else Place(1, 0)
        for name, value in state["counts"].items():
            setattr(self, name, value)

    def begin(self, step: int) -> None:
        """The student starts after a teacher step."""
        self.start_step, self.place = step, Place(step + 1, 0)

    @property
    def own_step(self) -> int:
        """Steps of the student up to its place; those that a jump left out count."""
        return self._steps(self.place)

    def step_of(self, batch: Batch) -> int:
        """The own step in which a batch is learned."""
        return self._steps(batch.end)

    def own_steps(self, total_steps: int) -> int:
        """Steps of the student up to the end of a stream of so many teacher steps."""
        return self._steps(Place(total_steps + 1, 0))

    def consume(self, batch: Batch) -> None:
        """A batch was learned."""
        self.repeated += batch.samples if batch.start < self.place else 0
        self.consumed += batch.samples
        self.max_lag = max(self.max_lag, batch.lag)
        self.label_bytes += batch.size_bytes
        self.label_tokens += sum(piece.samples * (piece.tokens_BS1.shape[1] - 1) for piece in batch.pieces)
        if self.ledger is not None:
            self.ledger.note(self.step_of(batch), batch.start, batch.end, "consumed")
        self.place = batch.end

    def skip(self, end: Place, reason: str) -> None:
        """Everything up to a sample is left out."""
        before, start = self._samples(self.place), self.place
        self.place = end
        self.skipped += self._samples(end) - before
        if self.ledger is not None:
            self.ledger.note(self.own_step, start, end, "skipped", reason)

    def report(self) -> dict[str, float]:
        """For summary.json."""
        return {
            "labels_consumed": self.consumed,
            "labels_missed": self.skipped,
            "labels_repeated": self.repeated,
            "max_lag_steps": self.max_lag,
            "label_bytes_per_token": self.label_bytes / max(1, self.label_tokens),
        }

    def _samples(self, place: Place) -> int:
        """From the start up to a place."""
        return 0 if self.start_step is None else (place.step - self.start_step - 1) * self.step_samples + place.sample

    def _steps(self, place: Place) -> int:
        return -(-self._samples(place) // self.batch_size)
