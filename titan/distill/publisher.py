"""A teacher's own label log: what its ranks append in a step, and the commit that makes the step readable.

The teacher of a run has one, and so has a student that teaches others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from titan.checkpoint.pretrained import fingerprint
from titan.config.check_log import log_segment_bytes
from titan.data.corpus import Corpus
from titan.distill.codec.block import LabelBlock, encode_block
from titan.distill.log.manifest import LogManifest, encode_manifest, log_manifest, sign_log
from titan.distill.log.reader import LabelReader
from titan.distill.log.records import Commit
from titan.distill.log.writer import CommitWriter, LabelWriter
from titan.distill.rank import RankSpec
from titan.distill.service.home import Home
from titan.distill.service.replica import ReplicaWriter
from titan.distill.storage import Storage
from titan.distill.tap import label_wish, raw_labels
from titan.parallel.world import World
from titan.tasks.causal_lm import LabelWish
from titan.train.trainer import LabelPart


@dataclass(frozen=True)
class TaughtBatch:
    """The samples of a step that labels are made for."""

    step: int
    tokens_BS1: np.ndarray
    sample_ids_B: np.ndarray


@dataclass(frozen=True)
class _Place:
    """One rank's share of the log on one disk."""

    labels: LabelWriter
    commits: CommitWriter | None
    """Only of replica 0."""

    def append(self, step: int, block: bytes, sample_ids: list[int]) -> None:
        self.labels.append(step, block, sample_ids)

    def commit(self, commit: Commit) -> None:
        if self.commits is not None:
            self.commits.commit(commit)

    def end(self, reason: str) -> None:
        if self.commits is not None:
            self.commits.end(reason)

    def make_durable(self) -> None:
        self.labels.make_durable()
        if self.commits is not None:
            self.commits.make_durable()


@dataclass(frozen=True)
class _Home:
    """The same at the run's home: what has been sent stands there."""

    writer: ReplicaWriter
    committed: int
    leads: bool
    """Whether it is replica 0."""

    def append(self, step: int, block: bytes, sample_ids: list[int]) -> None:
        if step > self.committed:
            self.writer.append(step, block)

    def commit(self, commit: Commit) -> None:
        if self.leads and commit.step > self.committed:
            self.writer.commit(commit)

    def end(self, reason: str) -> None:
        if self.leads:
            self.writer.end(reason)

    def make_durable(self) -> None:
        self.writer.make_durable()


class LabelPublisher:
    """One rank's share of a label log; only ranks with the head and tensor rank 0 write.

    The log was repaired before any rank started. Steps that were committed before are not written again.
    """

    def __init__(self, spec: RankSpec, storage: Storage, world: World, corpus: Corpus, start_step: int):
        """start_step: the log's first step is the one after this"""
        self.config, self.vocab_size, self.dp = spec.config, corpus.vocab_size, world.place.stage.dp
        self.log: _Place | _Home | None = None
        self.copy: _Place | None = None
        place = world.place
        if place.head_stage is None or place.tensor > 0:
            return
        settings = spec.config.labels
        self.segment_bytes = log_segment_bytes(settings, self.dp)
        manifest = None
        if place.replica == 0:
            weights = fingerprint(spec.init) if spec.settings.frozen and spec.init is not None else ""
            run = storage.files(spec.run_folder)
            manifest = log_manifest(spec.config, corpus, run, spec.role, start_step, weights)
        if storage.home is not None:
            self.log = _at_home(storage.home, place.replica, self.segment_bytes, manifest, start_step)
            return
        if spec.copy_folder is not None:
            self.copy = self._open(spec, spec.copy_folder, place.replica, manifest, start_step)
        self.log = self._open(spec, spec.own_label_folder, place.replica, manifest, start_step)

    def _open(
        self, spec: RankSpec, folder: Path, replica: int, manifest: LogManifest | None, start_step: int
    ) -> _Place:
        folder.mkdir(parents=True, exist_ok=True)
        reader = LabelReader(folder, timeout_s=0.0)
        reader.poll()
        committed = max(reader.last_committed, start_step)
        reader.close()
        labels = LabelWriter(folder, replica, committed, self.segment_bytes, fence=spec.fence)
        if manifest is None:
            return _Place(labels, None)
        sign_log(folder, manifest)
        return _Place(labels, CommitWriter(folder, committed, fence=spec.fence))

    def wish(self, step: int) -> LabelWish:
        """What the head is asked for."""
        return label_wish(self.config.labels, self.config.run.seed, step)

    def append(self, batch: TaughtBatch, parts: Sequence[LabelPart]) -> None:
        """Write this replica's labels of the step as one block a micro-batch, before the step's last exchange."""
        if self.log is None:
            return
        length = batch.tokens_BS1.shape[1] - 1
        for part in parts:
            samples = slice(part.start, part.start + part.samples)
            block = LabelBlock(
                step=batch.step,
                first_sample=part.start,
                sample_ids_B=batch.sample_ids_B[samples],
                tokens_BS1=batch.tokens_BS1[samples],
                labels=raw_labels(self.config.labels, part, length, batch.step),
            )
            data = encode_block(block, self.vocab_size, self.config.labels.bytes_per_token)
            for place in (self.copy, self.log):
                if place is not None:
                    place.append(batch.step, data, block.sample_ids_B.tolist())
        if self.copy is not None:
            self.copy.labels.make_durable()

    def commit(self, batch: TaughtBatch, cross_entropy: float) -> None:
        """Make the step readable, once every rank has appended its part; in the copy first: it never lacks a step."""
        commit = Commit(batch.step, tuple(range(self.dp)), len(batch.tokens_BS1), cross_entropy)
        if self.copy is not None and self.copy.commits is not None:
            self.copy.commits.commit(commit)
            self.copy.commits.make_durable()
        if self.log is not None:
            self.log.commit(commit)

    def make_durable(self) -> None:
        """A checkpoint may not be ahead of the log: what it would repeat must be there for students."""
        if self.log is not None:
            self.log.make_durable()

    def end(self, reason: str) -> None:
        """Say that no more steps will come."""
        for place in (self.copy, self.log):
            if place is not None:
                place.end(reason)


def _at_home(home: Home, part: int, segment_bytes: int, manifest: LogManifest | None, start_step: int) -> _Home:
    """One rank's share of the log at the run's home."""
    writer = ReplicaWriter(home.location, home.token, home.role, part, home.timeout_s, home.generation, segment_bytes)
    if manifest is not None:
        writer.manifest(encode_manifest(manifest))
    return _Home(writer, max(writer.last_committed(), start_step), leads=manifest is not None)
