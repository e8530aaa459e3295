"""A student's way along its teacher's log, the same on all of its ranks: which step is next, and what is left out."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from titan.distill.codec.block import LabelBlock
from titan.distill.log.reader import DroppedError, LabelReader
from titan.distill.log.records import FINISHED, Commit
from titan.distill.service.client import FlightLabelReader
from titan.parallel.world import World

Reader = LabelReader | FlightLabelReader
LOOK_S = 0.02
"""Before ranks look again that did not see the same."""
DROPPED = "dropped from the log"
OVER = -1.0
"""What a rank says that finds the log ended, or is to stop."""


@dataclass(frozen=True)
class Next:
    """The step that is learned next, with its labels."""

    commit: Commit
    blocks: list[LabelBlock]
    size_bytes: int
    lag: int
    """The teacher's newest step minus this one."""
    jumped_to: int
    """The step that was wanted: behind it steps are missing in the log."""
    max_lag: int | None

    def skipped(self, first: int) -> Iterator[tuple[int, int, str]]:
        """Steps from `first` on that are left out: ranges, and why."""
        if self.jumped_to > first:
            yield first, self.jumped_to, f"further behind than max_lag {self.max_lag}"
        if self.commit.step > self.jumped_to:
            yield self.jumped_to, self.commit.step, DROPPED


class Follower:
    """One rank's."""

    def __init__(self, reader: Reader, world: World, may_drop: bool, give_up: Callable[[], bool]):
        """may_drop: whether steps that were not learned may vanish, for one rank before the other
        give_up:  whether to stop waiting; asked while waiting, and only heeded by a role of one rank
        """
        self.reader, self.world, self.give_up = reader, world, give_up
        self.agrees = may_drop and world.layout.num_ranks > 1

    @property
    def finished(self) -> bool:
        """Whether the log has ended because its teacher is done."""
        return self.reader.ended is not None and self.reader.ended.reason == FINISHED

    def newest_step(self) -> int:
        """The log's last step as the lead sees it."""
        self.reader.poll()
        mine = float(self.reader.last_committed) if self.world.is_lead else 0.0
        return int(self.world.sum_over_ranks([mine])[0])

    def wait_commit(self, step: int) -> Commit | None:
        """The commit of a step or, if that was dropped, of the first that is there; None if none will come."""
        while True:
            commit = self.reader.wait_commit(step, self.give_up)
            same, furthest = self._agree(OVER if commit is None else commit.step)
            if same:
                return commit
            step = max(step, furthest)

    def next(self, step: int, max_lag: int | None = None) -> Next | None:
        """The same with the labels.

        max_lag: the newest step instead, if this one is further behind
        """
        newest = 0
        if max_lag is not None:
            newest = self.newest_step()
            step = newest if newest - step > max_lag else step
        wanted = step
        while True:
            commit = self.reader.wait_commit(step, self.give_up)
            labels = None
            if commit is not None:
                with suppress(DroppedError):
                    labels = self.reader.read(commit)
            found = OVER if commit is None else 0.0 if labels is None else commit.step
            same, furthest = self._agree(found)
            if same and commit is None:
                return None
            if same and commit is not None and labels is not None:
                lag = max(0, (newest or self.reader.last_committed) - commit.step)
                return Next(commit, *labels, lag, wanted, max_lag)
            step = max(step, furthest)
            time.sleep(LOOK_S)

    def _agree(self, found: float) -> tuple[bool, int]:
        """Whether all ranks found the same, and the furthest step that one found."""
        if not self.agrees:
            return True, int(found)
        mine = [found if rank == self.world.place.rank else 0.0 for rank in range(self.world.layout.num_ranks)]
        every = self.world.sum_over_ranks(mine)
        return min(every) == max(every), int(max(every))
