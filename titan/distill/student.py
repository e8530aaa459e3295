"""A student's loop: wait for the next committed step of labels, learn it in batches of its own, keep count.

Its step is the teacher's: the last whose samples it has taken in. Checkpoints, evaluations and lag go by that; learning
rate and weight of the labels by its own steps, of which a teacher step may bring several, or several bring one.
"""

import time
from functools import partial
from typing import Any

from titan.config.settings import TEACHER
from titan.distill.account import LabelAccount
from titan.distill.control import ControlTracker
from titan.distill.features.asked import student_auxiliary
from titan.distill.features.rank import FeatureLearner, open_learner
from titan.distill.follow import Follower, Next, Reader
from titan.distill.lead import LeadTracker, distillation_weight
from titan.distill.log.ledger import Ledger, Place
from titan.distill.log.reader import LabelReader
from titan.distill.log.records import FINISHED, STOPPED
from titan.distill.place import PlaceTeller
from titan.distill.publisher import LabelPublisher, TaughtBatch
from titan.distill.rank import RankSpec, RoleReport
from titan.distill.regroup import Batch, Regrouper, piece_of
from titan.distill.role import RoleRank
from titan.distill.service.client import FlightLabelReader
from titan.distill.start import start_reason, wait_for_log, wait_for_start
from titan.errors import LabelError
from titan.model.auxiliary import Auxiliary
from titan.ops.objective import Objective
from titan.platform.device import Platform


class StudentRank(RoleRank):
    """One rank of a student. It owes the teacher nothing: it reads the log at its own pace."""

    def __init__(self, spec: RankSpec, platform: Platform):
        super().__init__(spec, platform)
        self.student = next(student for student in spec.config.students if student.name == spec.role)
        self.tracker = LeadTracker()
        self.control = ControlTracker()
        self.account = LabelAccount(spec.settings.batch_size, spec.config.data.batch_size)
        self.regrouper = Regrouper(spec.settings.batch_size, self.account.place)
        self.waited_s = 0.0
        """For labels, since the last own step."""
        self.learner: FeatureLearner | None = None
        self.publisher: LabelPublisher | None = None
        """Of a student that teaches others."""
        self.teller: PlaceTeller | None = None
        """Only of the lead, where the log is of this run."""
        self.at = 0
        """The last step it has taken in or, before its start, need not learn."""

    def own_state(self) -> dict[str, Any]:
        """Offset and counts are committed with the weights, so that nothing is lost or learned twice."""
        account = self.account.state()
        return {
            "producer": self.spec.teacher,
            "start_step": account["start_step"],
            "place": account["place"],
            "lead": vars(self.tracker),
            "control": vars(self.control),
            "counts": account["counts"],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of `own_state`."""
        self.account.load(state)
        self.tracker = LeadTracker(**state["lead"])
        self.control = ControlTracker(**state.get("control", {}))

    def train(self) -> RoleReport:
        """Learn every step from the start to the end of the log."""
        reader = self._open_reader()
        self.learner = open_learner(self.config, self.student, self.trainer, reader, self.spec.label_folder)
        self._open_ledger()
        try:
            stopped = wait_for_log(self.spec, self.storage, self._alone_and_stopping)
            if not stopped:
                log = self._follow(reader)
                stopped = self._learn(log) if self._begin(log) else not log.finished
        finally:
            if self.learner is not None:
                self.learner.close()
            reader.close()
        self._end_own_log(stopped)
        report = self.finish(stopped, self._accounting())
        if self.teller is not None:
            self.teller.look()
        return report

    def _open_reader(self) -> Reader:
        timeout_s = self.config.cluster.step_timeout_s
        if self.spec.label_token:
            return FlightLabelReader(self.spec.label_address, self.spec.label_token, self.spec.teacher, timeout_s)
        return LabelReader(self.spec.label_folder, timeout_s)

    def _follow(self, reader: Reader) -> Follower:
        """The log as all ranks see it; from now on the teacher knows where the student is."""
        of_this_run = self.spec.teacher != TEACHER or self.config.teacher.log is None
        if self.world.is_lead and of_this_run:
            live = self.student.backpressure == "wait"
            held = self.config.steps_in_hand(self.student)
            log, checkpoints = map(self.storage.files, (self.spec.label_folder, self.spec.checkpoint_folder))
            self.teller = PlaceTeller(log, self.spec.role, checkpoints, live, held)
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

    def _open_own_log(self, start_step: int) -> None:
        """If the student teaches others."""
        if self.config.teaches(self.spec.role):
            self.publisher = LabelPublisher(self.spec, self.storage, self.world, self.corpus, start_step)
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
            self.account.ledger = Ledger(self.storage.files(self.spec.run_folder), self.spec.role)
            self.account.ledger.rewind(self.account.own_step, self.account.place)

    def auxiliary(self) -> Auxiliary | None:
        """An extra layer, or the regressor of a hint."""
        return student_auxiliary(self.student, self.config.teacher.model)

    def save_checkpoint(self) -> None:
        """A checkpoint is never ahead of the ledger."""
        if self.account.ledger is not None:
            self.account.ledger.make_durable()
        if self.publisher is not None:
            self.publisher.make_durable()
        super().save_checkpoint()
        if self.teller is not None:
            self.teller.saving(self.step)

    def samples_made(self) -> int:
        """Without those that were skipped."""
        return self.account.consumed

    def _begin(self, log: Follower) -> bool:
        """Wait for the start, unless it was before; False if it does not come."""
        if self.account.start_step is None:
            start = wait_for_start(self.student.start, log, self._tell_place, self.trainer.evaluate)
            if start is None:
                return False
            self.account.begin(start)
            self.step = start
        return True

    def _learn(self, log: Follower) -> bool:
        start_step = self.account.start_step
        assert start_step is not None
        self.tell_event("student_started", step=start_step, reason=start_reason(self.student.start))
        self._open_own_log(start_step)
        self.regrouper = Regrouper(self.spec.settings.batch_size, self.account.place)
        total, stopped = self.config.run.steps, False
        while self.step < total and not stopped:
            begin, before = time.perf_counter(), self.step
            self._tell_place(before)
            if (vote := self.pause()) > 0:
                return self.heed_vote(vote)
            asked = time.perf_counter()
            wanted = self.regrouper.place.step
            max_lag = self.student.max_lag if self.student.backpressure == "skip" else None
            found = log.next(wanted, max_lag)
            if found is None:
                return True
            if self.publisher is not None and found.commit.step > wanted:
                raise LabelError(
                    f"steps {wanted} to {found.commit.step - 1} of {self.spec.teacher} are gone, and "
                    f"{self.spec.role}, which teaches others, cannot leave out any; give its teacher more room"
                )
            log.reader.forget(found.commit.step)
            self.waited_s += time.perf_counter() - asked
            stopped = self._take_in(found)
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

    def _take_in(self, found: Next) -> bool:
        """A teacher step, and the batches that are full with it; True if the role was asked to stop."""
        step = found.commit.step
        for first, end, reason in found.skipped(self.regrouper.place.step):
            self.account.skip(Place(end, 0), reason)
            self.tell_event("steps_skipped", first_step=first, steps=end - first, reason=reason)
        if step > self.regrouper.place.step:
            self.regrouper.jump(Place(step, 0))
        self.regrouper.put(piece_of(found, self.config.labels.temperature))
        self.step = max(self.step, step)  # after a restart a batch may want samples of steps that were taken in before
        votes = [self._learn_batch(batch) for batch in self.regrouper.batches(rest=step >= self.config.run.steps)]
        return any(votes)

    def _learn_batch(self, batch: Batch) -> bool:
        """One step of its own; True if the role was asked to stop, which it does at the end of a teacher step."""
        own_step, own_steps = self.account.step_of(batch), self.account.own_steps(self.config.run.steps)
        weight = distillation_weight(self.student.distill, self.tracker.lead, own_step, own_steps)
        temperature = self.config.labels.temperature
        distill = self.student.distill
        tokens_BS1, labels, weight_B = batch.filled(self.spec.settings.batch_size)
        taught = TaughtBatch(self.step, tokens_BS1, batch.sample_ids)
        publisher, learner = self.publisher, self.learner
        features = learner.tap(self.step, batch.samples, weight) if learner is not None else None
        self.account.features_missed += learner is not None and features is None
        result = self.trainer.step(
            tokens_BS1,
            self.trainer.learning_rate(own_step, own_steps),
            Objective(weight, temperature, loss=distill.loss, beta=distill.beta),
            labels=labels,
            weight_B=weight_B,
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
        self.account.consume(batch)
        self.watch_pace(result)
        self.tracker.add(batch.cross_entropy, result.cross_entropy)
        self.control.add(*result.tail_fit)
        loss = (1 - weight) * result.cross_entropy + weight * temperature**2 * result.divergence
        loss += weight * sum(distill.features.weights[name] * value for name, value in result.features.items())
        waited_s, self.waited_s = self.waited_s, 0.0
        self.tell(
            self.step_metric(
                result,
                loss,
                own_step=own_step,
                distill_loss=result.divergence,
                distill_weight=weight,
                lag=batch.lag,
                lead=self.tracker.lead,
                label_bytes=batch.size_bytes,
                label_wait_s=waited_s,
                **{f"{name}_loss": value for name, value in result.features.items()},
            )
        )
        return self.heed(result)

    def _accounting(self) -> dict[str, float]:
        missed = {} if self.learner is None else {"features_missed": self.account.features_missed}
        return self.account.report() | missed

    def _alone_and_stopping(self) -> bool:
        """A role of one rank may stop while it waits; one of many stops with a step, or when the log ends."""
        return self.layout.num_ranks == 1 and self.stopping.is_set()


def _passed(before: int, step: int, every: int) -> bool:
    """Whether a multiple of `every` was reached, or jumped over; never if that is 0."""
    return every > 0 and step // every > before // every
