"""The teacher's loop: its own training pass gives the labels, and they go to the log; a frozen one makes only them."""

import time
from functools import partial

from titan.distill.features.asked import sent_features
from titan.distill.features.rank import FeatureSender
from titan.distill.log.records import FINISHED, STOPPED
from titan.distill.publisher import LabelPublisher, TaughtBatch
from titan.distill.rank import RankSpec, RoleReport
from titan.distill.role import RoleRank
from titan.ops.objective import Objective
from titan.platform.device import Platform
from titan.train.trainer import LabelPart


class TeacherRank(RoleRank):
    """One rank of the teacher. A plain class; only titan.cluster makes it an actor."""

    def __init__(self, spec: RankSpec, platform: Platform):
        super().__init__(spec, platform)
        self.publisher: LabelPublisher | None = None
        self.sender: FeatureSender | None = None

    def train(self) -> RoleReport:
        """Train to the last step; labels of a step are committed once every rank has finished it.

        A frozen teacher goes the same way and learns nothing.
        """
        if self.config.makes_labels:
            self.publisher = LabelPublisher(self.spec, self.storage, self.world, self.corpus, start_step=0)
            self.keep_log()
        if (capture := sent_features(self.config)) is not None:
            self.sender = FeatureSender(self.config, capture, self.world, self.spec.own_label_folder)
        config = self.config
        total, stopped = config.run.steps, False
        while self.step < total and not stopped:
            begin = time.perf_counter()
            if (vote := self.pause()) > 0:
                stopped = self.heed_vote(vote)
                break
            self.step += 1
            batch = self.sampler.batch(self.step - 1)
            taught = TaughtBatch(self.step, batch.tokens, batch.sample_ids)
            result = self.trainer.step(
                batch.tokens,
                0.0 if self.spec.settings.frozen else self.trainer.learning_rate(self.step, total),
                Objective(temperature=config.labels.temperature),
                wish=self.publisher.wish(self.step) if self.publisher is not None else None,
                sample_ids=batch.sample_ids,
                votes=self.votes(self.step),
                on_labels=partial(self._append, taught) if self.publisher is not None else None,
                features=self.sender.tap if self.sender is not None else None,
            )
            if self.publisher is not None:
                self.publisher.commit(taught, result.cross_entropy)
            self.train_seconds += time.perf_counter() - begin
            self.watch_pace(result)
            self.tell(self.step_metric(result, result.cross_entropy))
            stopped = self.heed(result)
            saves = self.step % config.checkpoint.every_steps == 0
            if self.keeper is not None:
                self.keeper.tidy(saves)
            every = config.eval.every_steps
            if every and self.step % every == 0 and self.step < total:
                self.evaluate()
            if saves:  # after all that is to be known of the step
                self.save_checkpoint()
        if self.publisher is not None and not (self.paused and self.step < total):
            self.publisher.end(STOPPED if self.step < total else FINISHED)
        return self.finish(self.step < total, {})

    def _append(self, taught: TaughtBatch, parts: list[LabelPart]) -> None:
        """Before the step's last exchange, and so before its commit; features of a step may sit on any stage."""
        if self.publisher is not None:
            self.publisher.append(taught, parts)
        if self.sender is not None:
            self.sender.write(taught.step, taught.sample_ids_B)

    def save_checkpoint(self) -> None:
        """A checkpoint is never ahead of the labels: what a restart would repeat must be there for students."""
        if self.publisher is not None:
            self.publisher.make_durable()
        super().save_checkpoint()
