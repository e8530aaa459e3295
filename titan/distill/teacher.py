"""The teacher's loop: its own training pass gives the labels, and they go to the log."""

import time

from titan.data.sampler import SampleBatch
from titan.distill.codec.block import LabelBlock, encode_block
from titan.distill.log.reader import LabelReader
from titan.distill.log.records import FINISHED, STOPPED, Commit
from titan.distill.log.writer import CommitWriter, LabelWriter
from titan.distill.rank import RankSpec, RoleReport
from titan.distill.role import RoleRank
from titan.distill.tap import label_wish, raw_labels
from titan.ops.head import Objective
from titan.platform.device import Platform
from titan.train.trainer import LabelPart


class TeacherRank(RoleRank):
    """One rank of the teacher. A plain class; only titan.cluster makes it an actor."""

    def __init__(self, spec: RankSpec, platform: Platform):
        super().__init__(spec, platform)
        self.writes_labels = spec.config.makes_labels

    def train(self) -> RoleReport:
        """Train to the last step; labels of a step are committed once every rank has finished it."""
        self._open_log()
        config = self.config
        total, stopped = config.run.steps, False
        while self.step < total and not stopped:
            self.step += 1
            batch = self.sampler.batch(self.step - 1)
            begin = time.perf_counter()
            result = self.trainer.step(
                batch.tokens,
                self.trainer.learning_rate(self.step, total),
                Objective(temperature=config.labels.temperature),
                wish=label_wish(config.labels, config.run.seed, self.step) if self.writes_labels else None,
                sample_ids=batch.sample_ids,
                votes=self.stop_vote(),
                on_labels=lambda parts, batch=batch: self._append(batch, parts),  # type: ignore[misc]
            )
            self._commit(len(batch.tokens), result.cross_entropy)
            self.train_seconds += time.perf_counter() - begin
            self.watch_pace(result)
            self.tell(self.step_metric(result, result.cross_entropy))
            stopped = self.heed(result)
            every = config.eval.every_steps
            if self.step % config.checkpoint.every_steps == 0:
                self._make_labels_durable()
                self.save_checkpoint()
            if every and self.step % every == 0 and self.step < total:
                self.evaluate()
        self._make_labels_durable()
        if self.commits is not None and not (self.paused and self.step < total):
            self.commits.end(STOPPED if self.step < total else FINISHED)
        return self.finish(self.step < total, {})

    def _open_log(self) -> None:
        """On the ranks that make labels; the log was repaired before any rank started."""
        place = self.world.place
        self.labels: LabelWriter | None = None
        self.commits: CommitWriter | None = None
        if self.writes_labels and place.head_stage is not None and place.tensor == 0:
            self.spec.label_folder.mkdir(parents=True, exist_ok=True)
            reader = LabelReader(self.spec.label_folder, timeout_s=0.0)
            reader.poll()
            committed = reader.last_committed
            reader.close()
            self.labels = LabelWriter(self.spec.label_folder, place.replica, committed)
            if place.replica == 0:
                self.commits = CommitWriter(self.spec.label_folder, committed)

    def _append(self, batch: SampleBatch, parts: list[LabelPart]) -> None:
        """Write this replica's labels of the step as one block a micro-batch, before the step's last exchange."""
        if self.labels is None:
            return
        length = batch.tokens.shape[1] - 1
        for part in parts:
            samples = slice(part.start, part.start + part.samples)
            block = LabelBlock(
                step=self.step,
                first_sample=part.start,
                sample_ids_B=batch.sample_ids[samples],
                tokens_BS1=batch.tokens[samples],
                labels=raw_labels(self.config.labels, part, length),
            )
            data = encode_block(block, self.corpus.vocab_size, self.config.labels.bytes_per_token)
            self.labels.append(self.step, data, block.sample_ids_B.tolist())

    def _commit(self, samples: int, cross_entropy: float) -> None:
        if self.commits is not None:
            parts = tuple(range(self.world.place.stage.dp))
            self.commits.commit(Commit(self.step, parts, samples, cross_entropy))

    def _make_labels_durable(self) -> None:
        """A checkpoint may not be ahead of the log: what it would repeat must be there for students."""
        if self.labels is not None:
            self.labels.make_durable()
        if self.commits is not None:
            self.commits.make_durable()
