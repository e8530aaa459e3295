"""How a producer of labels keeps its log within bounds, and for which students it pauses between two steps.

Only a student with `backpressure = "wait"`, or a log or disk that is full where `labels.when_full` is "wait", pauses a
teacher.
The lead of its ranks sees that in files; its vote, passed along with a step, tells the others, and all pause together.
"""

import time
from collections.abc import Callable

from titan.distill.log.retention import Kept, Retention
from titan.distill.log.upkeep import LogUpkeep
from titan.distill.rank import RankSpec
from titan.errors import LabelError
from titan.parallel.world import World

LOOK_S = 0.02
"""How often a pause is looked at again."""
ROOM_S = 0.2
"""How often a paused producer tries to make room: that looks through all segments."""
HOLD = 1.0
"""Vote for a pause before the next step."""


class LogKeeper:
    """Of one role. Every rank has one, so that they pause alike; only the lead's looks at files."""

    def __init__(self, spec: RankSpec, world: World, log: LogUpkeep, tell_event: Callable[..., None], waited_s: float):
        """log:     that of the role
        tell_event: to tell the driver an event, by name and fields
        waited_s:   in pauses before this start of the role
        """
        labels = spec.config.labels
        self.world, self.log, self.tell_event = world, log, tell_event
        self.folder = spec.own_label_folder
        """For words."""
        self.keep, self.max_bytes, self.when_full = labels.keep, labels.max_bytes, labels.when_full
        self.wait_s = labels.wait_s
        students = [student for student in spec.config.students if student.teacher == spec.role]
        self.expected = {student.name: student.start.step or 0 for student in students}
        """Students, and the step before which they need nothing."""
        self.max_lag = {student.name: student.max_lag or 0 for student in students if student.backpressure == "wait"}
        """Students that are waited for, and how far behind they may be."""
        bounded = self.max_bytes is not None or spec.config.recovery.min_free_bytes > 0
        self.may_pause = bool(self.max_lag) or (bounded and self.when_full == "wait")
        self.disk_low = False
        """Whether the disk is nearly full, as the driver says."""
        self.overdue: set[str] = set()
        """Students that were waited for too long: that ends when they have caught up."""
        self.due = self.may_pause
        """Whether to look for a reason to pause before the next step; the same on all ranks."""
        self.waited_s, self.last_s = waited_s, 0.0
        """In all pauses, and before the step that is made now."""
        self._size = self._step_bytes = 0
        if self.max_bytes is not None and world.is_lead:
            self._size, self._step_bytes = log.size_bytes(), log.step_bytes()
        self._next_try = 0.0

    def vote(self, step: int) -> float:
        """To pass along with a step: whether there may be something to wait for after it."""
        if not self.may_pause or not self.world.is_lead:
            return 0.0
        for name in sorted(self.overdue):
            if self._lag(name, step) <= self.max_lag[name]:
                self.overdue.remove(name)
                self.tell_event("student_caught_up", student=name, step=step)
        return HOLD if self._behind(step + 1) or self._is_full(steps=2) else 0.0

    def hold(self, step: int, asked: Callable[[], float]) -> float:
        """Before a step: if it is due, pause as long as there is somebody or something to wait for. All ranks call it.

        asked: the lead's vote to stop, 0 for none; returns that vote
        Raises LabelError on the lead if there was no room for `labels.wait_s`.
        """
        begin = time.monotonic()
        self.last_s = 0.0
        while self.due:
            blocked = self.world.is_lead and self._blocked(step, time.monotonic() - begin)
            held, stop = self.world.sum_over_ranks([float(blocked), asked()])
            if stop or not held:
                self.last_s = time.monotonic() - begin
                self.waited_s += self.last_s
                return stop
            time.sleep(LOOK_S)
        return 0.0

    def tidy(self, checkpoint: bool) -> None:
        """After a step: drop what need not be kept, or has to go.

        checkpoint: whether one is made after this step
        Raises LabelError if the log is full and that ends the run.
        """
        if not self.world.is_lead:
            return
        if self.max_bytes is not None:
            before, self._size = self._size, self.log.size_bytes()
            self._step_bytes = max(self._step_bytes, self._size - before)
        if (checkpoint and self.keep == "needed") or (self.when_full != "wait" and self._is_full()):
            self._retain()

    def _blocked(self, step: int, waited_s: float) -> bool:
        """Whether a step has to wait still."""
        behind = self._behind(step)
        if behind and waited_s > self.wait_s:
            self.overdue.update(behind)
            for name in behind:
                lag = self._lag(name, step)
                self.tell_event("student_overdue", student=name, step=step, lag=lag, waited_s=round(waited_s, 1))
            behind = []
        return bool(behind) or self._lacks_room(waited_s)

    def _lacks_room(self, waited_s: float) -> bool:
        if self.when_full != "wait" or not self._is_full():
            return False
        if time.monotonic() < self._next_try:
            return True
        self._next_try = time.monotonic() + ROOM_S
        if not self._retain().full and not self.disk_low:
            return False
        if waited_s > self.wait_s and self.disk_low:
            raise LabelError(
                f"the disk of {self.folder} has less than recovery.min_free_bytes free, and nobody made room for "
                f"{self.wait_s:g} s (labels.wait_s); make room, then `titan resume` goes on"
            )
        if waited_s > self.wait_s:
            raise LabelError(
                f"the labels in {self.folder} take {self._size} of labels.max_bytes {self.max_bytes}, and no student "
                f"made room for {self.wait_s:g} s (labels.wait_s); allow more, or save students more often "
                "(checkpoint.every_steps)"
            )
        return True

    def _is_full(self, steps: int = 1) -> bool:
        """Whether there is no room for so many steps more."""
        return self.disk_low or (self.max_bytes is not None and self._size + steps * self._step_bytes > self.max_bytes)

    def _retain(self) -> Kept:
        rule = Retention(self.keep, self.max_bytes, self.when_full, self._step_bytes, free_bytes=int(self.disk_low))
        if self.when_full == "drop":
            self.disk_low = False  # one file has gone; the driver says whether more have to
        kept = self.log.retain(rule, self.expected)
        self._size = kept.size_bytes
        if kept.dropped_bytes:
            self.tell_event(
                "labels_dropped", first_step=kept.first_step, dropped_bytes=kept.dropped_bytes,
                size_bytes=kept.size_bytes, overtaken=list(kept.overtaken),
            )  # fmt: skip
        return kept

    def _behind(self, step: int) -> list[str]:
        """Students that would be too far behind when a step is made, and are waited for."""
        late = [name for name, most in self.max_lag.items() if self._lag(name, step) > most]
        return [name for name in late if name not in self.overdue]

    def _lag(self, name: str, step: int) -> int:
        """Steps from the next one that a student learns to the one that is to be made."""
        position = self.log.position(name)
        return step - 1 - (self.expected[name] if position is None else position)
