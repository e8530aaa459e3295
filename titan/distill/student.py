"""A student's loop: wait for the next committed step of labels, learn it, keep count."""

import time
from functools import partial
from typing import Any

import numpy as np

from titan.config.settings import TEACHER
from titan.distill.codec.block import LabelBlock
from titan.distill.control import ControlTracker
from titan.distill.features.asked import student_auxiliary
from titan.distill.features.rank import FeatureLearner, open_learner
from titan.distill.follow import Follower, Next
from titan.distill.lead import LeadTracker, distillation_weight
from titan.distill.log.ledger import Ledger, Place
from titan.distill.log.manifest import MANIFEST
from titan.distill.log.reader import LabelReader
from titan.distill.log.records import FINISHED, STOPPED, Commit
from titan.distill.place import PlaceTeller
from titan.distill.publisher import LabelPublisher, TaughtBatch
from titan.distill.rank import RankSpec, RoleReport
from titan.distill.role import RoleRank
from titan.distill.service.client import FlightLabelReader
from titan.errors import LabelError
from titan.model.auxiliary import Auxiliary
from titan.ops.head import Objective
from titan.platform.device import Platform
from titan.tasks.sample_labels import SampleLabels

LOOK_S = 0.1
COUNTS = ("consumed", "skipped", "repeated", "max_lag", "label_bytes", "label_tokens", "features_missed")
Reader = LabelReader | FlightLabelReader


class StudentRank(RoleRank):
    """One rank of a student. It owes the teacher nothing: it reads the log at its own pace."""

    def __init__(self, spec: RankSpec, platform: Platform):
        super().__init__(spec, platform)
        self.student = next(student for student in spec.config.students if student.name == spec.role)
        self.tracker = LeadTracker()
        self.control = ControlTracker()
        self.start_step: int | None = None
        """Teacher step after which the student started; None before."""
        self.consumed, self.skipped, self.repeated, self.max_lag = 0, 0, 0, 0
        self.label_bytes, self.label_tokens = 0, 0
        self.features_missed = 0
        """Steps learned without features that were asked for, because they were gone."""
        self.learner: FeatureLearner | None = None
        self.ledger: Ledger | None = None
        """Only the lead keeps it."""
        self.publisher: LabelPublisher | None = None
        """Of a student that teaches others."""
        self.teller: PlaceTeller | None = None
        """Only of the lead, where the log is of this run."""
        self.at = 0
        """The last step it has learned or, before its start, need not learn."""

    def own_state(self) -> dict[str, Any]:
        """Offset and counts are committed with the weights, so that nothing is lost or learned twice."""
        return {
            "producer": self.spec.teacher,
            "start_step": self.start_step,
            "place": None if self.start_step is None else [self.step + 1, 0],
            "lead": vars(self.tracker),
            "control": vars(self.control),
            "counts": {name: getattr(self, name) for name in COUNTS},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of `own_state`."""
        self.start_step = state["start_step"]
        self.tracker = LeadTracker(**state["lead"])
        self.control = ControlTracker(**state.get("control", {}))
        for name, value in state["counts"].items():
            setattr(self, name, value)

    def train(self) -> RoleReport:
        """Learn every step from the start to the end of the log."""
        reader = self._open_reader()
        self.learner = open_learner(self.config, self.student, self.trainer, reader, self.spec.label_folder)
        self._open_ledger()
        try:
            stopped = self._wait_for_log()
            if not stopped:
                log = self._follow(reader)
                stopped = self._wait_for_start(log)
                if not stopped and self.start_step is not None:
                    stopped = self._learn(log)
        finally:
            if self.learner is not None:
                self.learner.close()
            reader.close()
        self._end_own_log(stopped)
        report = self.finish(stopped, self._accounting())
        if self.teller is not None:
            self.teller.look()
        if self.ledger is not None:
            self.ledger.close()
        return report

    def _open_reader(self) -> Reader:
        timeout_s = self.config.cluster.step_timeout_s
        if self.spec.label_token:
            return FlightLabelReader(self.spec.label_address_file, self.spec.label_token, self.spec.teacher, timeout_s)
        return LabelReader(self.spec.label_folder, timeout_s)

    def _follow(self, reader: Reader) -> Follower:
        """The log as all ranks see it; from now on the teacher knows where the student is."""
        of_this_run = self.spec.teacher != TEACHER or self.config.teacher.log is None
        if self.world.is_lead and of_this_run:
            live = self.student.backpressure == "wait"
            self.teller = PlaceTeller(self.spec.label_folder, self.spec.role, self.spec.checkpoint_folder, live)
        labels = self.config.labels
        may_drop = not of_this_run or (labels.max_bytes is not None and labels.when_full == "drop")
        return Follower(reader, self.world, may_drop, self._give_up)

    def _give_up(self) -> bool:
        """Asked again and again while the next label has not come."""
        self._tell_place(self.at)
        return self._alone_and_stopping()

    def _tell_place(self, step: int) -> None:
        self.at = step
        if self.teller is not None:
            self.teller.tell(step)

    def _wait_for_log(self) -> bool:
        """Until a teacher that is itself a student has begun; True if the run stopped before."""
        if self.spec.teacher == TEACHER:
            return False
        first = LabelReader(self.spec.run_folder / "labels" / TEACHER, 0.0)
        try:
            while not (self.spec.label_folder / MANIFEST).exists():
                first.poll()
                if self._alone_and_stopping() or (first.ended is not None and first.ended.reason == STOPPED):
                    return True
                time.sleep(LOOK_S)
        finally:
            first.close()
        return False

    def _open_own_log(self, start_step: int) -> None:
        """If the student teaches others."""
        if self.config.teaches(self.spec.role):
            self.publisher = LabelPublisher(self.spec, self.world, self.corpus, start_step)
            self.keep_log()

    def _end_own_log(self, stopped: bool) -> None:
        """Tell those it teaches that no more will come; also where it never began."""
        if self.paused:
            return
        if self.publisher is None and not stopped:
            self._open_own_log(self.config.run.steps)
        if self.publisher is not None:
            self.publisher.make_durable()
            self.publisher.end(STOPPED if stopped else FINISHED)

    def _open_ledger(self) -> None:
        """On the lead: go on with the ledger where the checkpoint was made."""
        if self.world.is_lead:
            self.ledger = Ledger(self.spec.run_folder, self.spec.role, self.spec.fence)
            self.ledger.rewind(self.steps_made())

    def auxiliary(self) -> Auxiliary | None:
        """An extra layer, or the regressor of a hint."""
        return student_auxiliary(self.student, self.config.teacher.model)

    def save_checkpoint(self) -> None:
        """A checkpoint is never ahead of the ledger."""
        if self.ledger is not None:
            self.ledger.make_durable()
        if self.publisher is not None:
            self.publisher.make_durable()
        super().save_checkpoint()
        if self.teller is not None:
            self.teller.saving(self.step)

    def steps_made(self) -> int:
        """Steps since the student's start."""
        return 0 if self.start_step is None else self.step - self.start_step

    def samples_made(self) -> int:
        """Without steps that were skipped."""
        return self.consumed

    def _wait_for_start(self, log: Follower) -> bool:
        """Follow the teacher's commits until it is time; True if the run stopped before."""
        if self.start_step is not None:
            return False
        start = self.student.start
        if start.lead is None:
            first = log.newest_step() if start.now else start.step or 0
            self._tell_place(first)
            commit = log.wait_commit(first + 1)
            if commit is None and first > 0 and log.finished:
                raise LabelError(f"start is after step {first}, with which the log has ended; start earlier")
            if commit is None:
                return not log.finished
            self.start_step = self.step = commit.step - 1
            return False
        fresh, step = None, 0
        while True:
            self._tell_place(step)
            if fresh is None:
                found = log.next(step + 1)
                commit = None if found is None else found.commit
                fresh = None if found is None else self.trainer.evaluate(_tokens(found.blocks))
            else:
                commit = log.wait_commit(step + 1)
            if commit is None or fresh is None:  # a lead that was never reached is no stop
                return not log.finished
            step = commit.step
            self.tracker.add(commit.cross_entropy, fresh)
            if self.tracker.lead >= start.lead:
                self.start_step = self.step = step
                self.tracker = LeadTracker()
                return False

    def _learn(self, log: Follower) -> bool:
        assert self.start_step is not None
        self.tell_event("student_started", step=self.start_step, reason=self._start_reason())
        self._open_own_log(self.start_step)
        total, stopped = self.config.run.steps, False
        while self.step < total and not stopped:
            begin, before = time.perf_counter(), self.step
            self._tell_place(before)
            if (vote := self.pause()) > 0:
                return self.heed_vote(vote)
            asked = time.perf_counter()
            max_lag = self.student.max_lag if self.student.backpressure == "skip" else None
            found = log.next(self.step + 1, max_lag)
            if found is None:
                return True
            if self.publisher is not None and found.commit.step > self.step + 1:
                raise LabelError(
                    f"steps {self.step + 1} to {found.commit.step - 1} of {self.spec.teacher} are gone, and "
                    f"{self.spec.role}, which teaches others, cannot leave out any; give its teacher more room"
                )
            log.reader.forget(found.commit.step)
            stopped = self._learn_step(found, time.perf_counter() - asked)
            self.train_seconds += time.perf_counter() - begin
            saves = _passed(before, self.step, self.config.checkpoint.every_steps)
            if self.keeper is not None:
                self.keeper.tidy(saves)
            if _passed(before, self.step, self.config.eval.every_steps) and self.step < total:
                self.evaluate()
            if saves:
                self.save_checkpoint()
        self._tell_place(self.step)
        return self.step < total

    def asked(self) -> float:
        """Also tells where the student is, while it waits for its own students."""
        self._tell_place(self.at)
        return super().asked()

    def _learn_step(self, found: Next, waited_s: float) -> bool:
        """One step on the teacher's batch of that step; True if the role was asked to stop."""
        assert self.start_step is not None
        commit, blocks, size, lag = found.commit, found.blocks, found.size_bytes, found.lag
        before = self.step
        self._count(commit, blocks, size, lag)
        self.step = commit.step
        own_step, own_steps = self.step - self.start_step, self.config.run.steps - self.start_step
        weight = distillation_weight(self.student.distill, self.tracker.lead, own_step, own_steps)
        temperature = self.config.labels.temperature
        distill = self.student.distill
        labels = SampleLabels.cat([block.labels.at(temperature) for block in blocks])
        taught = TaughtBatch(self.step, _tokens(blocks), np.concatenate([block.sample_ids_B for block in blocks]))
        publisher, learner = self.publisher, self.learner
        features = learner.tap(self.step, commit.samples, weight) if learner is not None else None
        self.features_missed += learner is not None and features is None
        result = self.trainer.step(
            taught.tokens_BS1,
            self.trainer.learning_rate(own_step, own_steps),
            Objective(weight, temperature, loss=distill.loss, beta=distill.beta),
            labels=labels,
            wish=publisher.wish(self.step) if publisher is not None else None,
            sample_ids=taught.sample_ids_B if publisher is not None else None,
            on_labels=partial(publisher.append, taught) if publisher is not None else None,
            shrink=distill.shrink,
            control=self.control.control,
            votes=self.votes(self.step),
            features=features,
        )
        if publisher is not None:
            publisher.commit(taught, result.cross_entropy)
        self._note(own_step, before, found)
        self.watch_pace(result)
        self.tracker.add(commit.cross_entropy, result.cross_entropy)
        self.control.add(*result.tail_fit)
        loss = (1 - weight) * result.cross_entropy + weight * temperature**2 * result.divergence
        loss += weight * sum(distill.features.weights[name] * value for name, value in result.features.items())
        self.tell(
            self.step_metric(
                result,
                loss,
                distill_loss=result.divergence,
                distill_weight=weight,
                lag=lag,
                lead=self.tracker.lead,
                label_bytes=size,
                label_wait_s=waited_s,
                **{f"{name}_loss": value for name, value in result.features.items()},
            )
        )
        return self.heed(result)

    def _note(self, own_step: int, before: int, found: Next) -> None:
        """What became of the steps behind `before`, up to the one that was learned."""
        step = found.commit.step
        for first, end, reason in found.skipped(before + 1):
            if self.ledger is not None:
                self.ledger.note(own_step, Place(first, 0), Place(end, 0), "skipped", reason)
            self.tell_event("steps_skipped", first_step=first, steps=end - first, reason=reason)
        if self.ledger is not None:
            self.ledger.note(own_step, Place(step, 0), Place(step + 1, 0), "consumed")

    def _count(self, commit: Commit, blocks: list[LabelBlock], size: int, lag: int) -> None:
        """Count what is learned, and what the order of steps shows to be missing or repeated."""
        samples = sum(len(block.sample_ids_B) for block in blocks)
        self.consumed += samples
        self.skipped += max(0, commit.step - self.step - 1) * samples
        self.repeated += samples if commit.step <= self.step else 0
        self.max_lag = max(self.max_lag, lag)
        self.label_bytes += size
        self.label_tokens += sum(block.tokens_BS1.shape[0] * (block.tokens_BS1.shape[1] - 1) for block in blocks)

    def _accounting(self) -> dict[str, float]:
        return {
            "labels_consumed": self.consumed,
            "labels_missed": self.skipped,
            "labels_repeated": self.repeated,
            "max_lag_steps": self.max_lag,
            "label_bytes_per_token": self.label_bytes / max(1, self.label_tokens),
        } | ({} if self.learner is None else {"features_missed": self.features_missed})

    def _alone_and_stopping(self) -> bool:
        """A role of one rank may stop while it waits; one of many stops with a step, or when the log ends."""
        return self.layout.num_ranks == 1 and self.stopping.is_set()

    def _start_reason(self) -> str:
        start = self.student.start
        if start.lead is not None:
            return f"the teacher leads by {start.lead} nats"
        if start.now:
            return "from now on"
        return f"start.step is {start.step}" if start.step else "with the teacher"


def _passed(before: int, step: int, every: int) -> bool:
    """Whether a multiple of `every` was reached, or jumped over; never if that is 0."""
    return every > 0 and step // every > before // every


def _tokens(blocks: list[LabelBlock]) -> np.ndarray:
    return np.concatenate([block.tokens_BS1 for block in blocks])
