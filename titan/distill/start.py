"""When a student begins: it waits for its teacher's log, and follows the commits in it until it is time."""

import time
from collections.abc import Callable

import numpy as np

from titan.config.distillation import StartSettings
from titan.config.settings import TEACHER
from titan.distill.follow import Follower
from titan.distill.lead import LeadTracker
from titan.distill.log.manifest import MANIFEST
from titan.distill.log.reader import LabelReader
from titan.distill.log.records import STOPPED
from titan.distill.rank import RankSpec
from titan.distill.service.client import FlightLabelReader
from titan.distill.storage import Storage
from titan.errors import LabelError

LOOK_S = 0.1


def wait_for_log(spec: RankSpec, storage: Storage, give_up: Callable[[], bool]) -> bool:
    """Until a teacher that is itself a student has begun; True if the run stopped before."""
    if spec.teacher == TEACHER:
        return False
    first: LabelReader | FlightLabelReader = LabelReader(spec.run_folder / "labels" / TEACHER, 0.0)
    if spec.home:
        first = FlightLabelReader(spec.home, spec.label_token, TEACHER, spec.config.cluster.step_timeout_s)
    log = storage.files(spec.label_folder)
    try:
        while not log.find(MANIFEST):
            first.poll()
            if give_up() or (first.ended is not None and first.ended.reason == STOPPED):
                return True
            time.sleep(LOOK_S)
    finally:
        first.close()
    return False


def wait_for_start(
    start: StartSettings, log: Follower, tell_place: Callable[[int], None], evaluate: Callable[[np.ndarray], float]
) -> int | None:
    """The teacher step after which the student starts; None if the log ended, or the run stopped, before it.

    tell_place: told the steps that it need not learn
    evaluate:   cross-entropy of the fresh student on tokens [B, S + 1], nats a token
    """
    if start.lead is not None:
        return _wait_for_lead(start.lead, log, tell_place, evaluate)
    first = log.newest_step() if start.now else start.step or 0
    tell_place(first)
    commit = log.wait_commit(first + 1)
    if commit is None and first > 0 and log.finished:
        raise LabelError(f"start is after step {first}, with which the log has ended; start earlier")
    return None if commit is None else commit.step - 1


def _wait_for_lead(
    wanted: float, log: Follower, tell_place: Callable[[int], None], evaluate: Callable[[np.ndarray], float]
) -> int | None:
    fresh, step, tracker = None, 0, LeadTracker()
    while True:
        tell_place(step)
        if fresh is None:
            found = log.next(step + 1)
            commit = None if found is None else found.commit
            if found is not None:
                fresh = evaluate(np.concatenate([block.tokens_BS1 for block in found.blocks]))
        else:
            commit = log.wait_commit(step + 1)
        if commit is None or fresh is None:  # a lead that was never reached is no stop
            return None
        step = commit.step
        tracker.add(commit.cross_entropy, fresh)
        if tracker.lead >= wanted:
            return step


def start_reason(start: StartSettings) -> str:
    """In words."""
    if start.lead is not None:
        return f"the teacher leads by {start.lead} nats"
    if start.now:
        return "from now on"
    return f"start.step is {start.step}" if start.step else "with the teacher"
