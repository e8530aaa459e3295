"""A rank's part in features: those of a teacher send them, those of a student learn from them."""

from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from titan.config.settings import RunConfig, StudentSettings
from titan.distill.features.asked import feature_objective, sent_features, student_layer
from titan.distill.features.codec import FeatureLabels, bytes_per_token, rows, step_bytes
from titan.distill.features.collect import collect_features, feature_labels
from titan.distill.features.losses import FeatureObjective, feature_loss
from titan.distill.features.stream import FeatureClient, FeatureReader, FeatureWriter
from titan.distill.log.reader import LabelReader
from titan.distill.service.client import FlightLabelReader
from titan.model.capture import Capture, Features
from titan.parallel.world import World
from titan.plan.layout import Place
from titan.train.features import FeatureTap
from titan.train.trainer import Trainer


class FeatureSender:
    """One rank of a teacher. Every rank has one; those with the layer collect, and tensor rank 0 of them writes."""

    def __init__(self, config: RunConfig, capture: Capture, world: World, folder: Path):
        """folder: of the teacher's label log"""
        self.world, self.capture, self.wire = world, capture, config.labels.features.precision
        self.tap = FeatureTap(capture, self._collect)
        self.parts: list[tuple[int, Features]] = []
        self.writer: FeatureWriter | None = None
        place, micro_batches, model = world.place, world.layout.micro_batches, config.teacher.model
        if not holds_layer(place, capture.layer) or place.tensor > 0:
            return
        assert model is not None, "who sends features trains"
        start, end = place.stage.samples(config.data.batch_size // micro_batches)[place.replica]
        size = step_bytes(
            micro_batches,
            micro_batches * (end - start),
            config.data.sequence_length,
            bytes_per_token(model, capture.names),
        )
        slots = config.labels.features.slots
        self.writer = FeatureWriter(folder, place.replica, place.stage.dp, slots, size, self.wire)

    def write(self, step: int, sample_ids: np.ndarray) -> None:
        """Put a step's features into the ring, before the step is committed.

        sample_ids: int64, of the whole batch
        """
        parts, self.parts = self.parts, []
        if self.writer is not None:
            self.writer.write(step, feature_labels(step, self.capture.layer, parts, sample_ids))

    def close(self) -> None:
        """The ring stays for its readers."""
        if self.writer is not None:
            self.writer.close()

    def _collect(self, first_sample: int, features: Features) -> None:
        whole = collect_features(features, self.wire, self.world.groups.tp, self.world.layout.sequence_parallel)
        if whole is not None:
            self.parts.append((first_sample, whole))


class FeatureSource(Protocol):
    """Where a student's rank gets features from."""

    def read(self, step: int, samples: int) -> FeatureLabels | None:
        """Of all samples of a committed step; None if they are gone."""

    def close(self) -> None:
        """Nothing is read any more."""


class FeatureLearner:
    """One rank of a student. Every rank has one; those with the layer read and learn."""

    def __init__(
        self, objective: FeatureObjective, layer: int, taught: Capture, trainer: Trainer, source: FeatureSource
    ):
        """layer: of the student;  taught: what its teacher sends"""
        self.objective, self.taught, self.trainer, self.source = objective, taught, trainer, source
        self.capture = Capture(layer, objective.names())
        self.has_layer = holds_layer(trainer.world.place, layer)

    def tap(self, step: int, samples: int, weight: float) -> FeatureTap | None:
        """What to do in a step, the same on all ranks; None if features of the step are gone for any of them.

        weight: of the losses together
        """
        labels = self.source.read(step, samples) if self.has_layer else None
        if labels is not None and (
            labels.layer != self.taught.layer or not self.capture.names <= labels.tensors.keys()
        ):
            labels = None  # of a time when the teacher was asked for others
        ready = labels is not None or not self.has_layer
        # ranks read at unlike times, so one may find what was overwritten when another looked
        if self.trainer.world.sum_over_ranks([float(ready)])[0] < self.trainer.world.layout.num_ranks:
            return None
        return FeatureTap(self.capture, partial(self._learn, labels, weight), tuple(self.objective.weights()))

    def close(self) -> None:
        """Let go of where features come from."""
        self.source.close()

    def _learn(
        self, labels: FeatureLabels | None, weight: float, first_sample: int, features: Features
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert labels is not None, "ranks with the layer have read"
        world, module = self.trainer.world, self.trainer.stage.module
        end = first_sample + next(iter(features.values())).shape[1]
        result = feature_loss(
            self.objective,
            features,
            rows(labels, first_sample, end, world.platform.device),
            group=world.groups.tp,
            sequence_parallel=world.layout.sequence_parallel,
            projection_TD=module.projection,
        )
        return weight * result.loss, result.parts


def open_learner(
    config: RunConfig, student: StudentSettings, trainer: Trainer, labels: LabelReader | FlightLabelReader, folder: Path
) -> FeatureLearner | None:
    """Of a rank of a student; None if it learns nothing from features. They come where labels come from.

    folder: of the teacher's label log, where it is read from files
    """
    teacher, taught = config.teacher.model, sent_features(config)
    objective = None if teacher is None else feature_objective(student, teacher)
    if objective is None or taught is None:
        return None
    source = FeatureClient(labels) if isinstance(labels, FlightLabelReader) else FeatureReader(folder)
    return FeatureLearner(objective, student_layer(student), taught, trainer, source)


def holds_layer(place: Place, layer: int) -> bool:
    """Whether a rank has a layer; the auxiliary layer is one past the last, on the ranks with the head."""
    head = place.head_stage
    return any(s.first_layer <= layer < s.end_layer for s in place.stages) or (
        head is not None and layer == head.end_layer
    )
