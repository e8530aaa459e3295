"""Spare processes: ranks of no role yet, with their imports behind them, for roles that start again.

A spare is a process, not a place: it takes no slot, and a role that takes it over has reserved its room as ever. It
goes only to a rank whose room is on the spare's own node. A process that was a rank of a failed role is never used
again: a fresh one has no half-finished collective, socket or thread of its former world.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from titan.cluster.failure import error_of
from titan.cluster.placement import free_slots, ranks_are_on_cpu, start_spare
from titan.cluster.processes import kill_processes
from titan.cluster.rank_actor import Whereabouts
from titan.config.settings import RunConfig
from titan.observe.events import EventLog

LOOK_EVERY_S = 2.0
ANSWER_S = 1.0
"""A spare that is to be taken and says nothing for so long is not taken."""
AFTER_TROUBLE_S = 60.0
"""Before another try, when a spare did not come up."""


@dataclass
class Spare:
    """One process."""

    actor: Any
    node_id: str
    coming: Any
    """The call that ends with its imports."""
    since: float
    place: Whereabouts | None = None
    """Where it is, once it is ready."""
    asked: tuple[Any, float] | None = None
    """The question whether it lives, and since when it owes an answer."""


class SparePool:
    """All spares of a run: `recovery.spares` on each node that has room for ranks. Never waits long."""

    def __init__(self, config: RunConfig, events: EventLog):
        self.config, self.events = config, events
        self.spares: list[Spare] = []
        self._next_look = self._next_start = 0.0
        self._useful: bool | None = None
        """Whether ranks can use them; not known before the first look."""

    def look(self, calm: bool) -> None:
        """See what became of them; call it often. calm: nothing else starts, so that missing ones can"""
        now = time.monotonic()
        if not self.config.recovery.spares or now < self._next_look or self._useful is False:
            return
        self._next_look = now + LOOK_EVERY_S
        if self._useful is None:
            self._useful = ranks_are_on_cpu(self.config)
            if not self._useful:
                self.events.emit("no_spares", why="ranks with an accelerator choose it when their process starts")
                return
        for spare in list(self.spares):
            self._look_at(spare, now)
        if calm and now >= self._next_start:
            self._fill(now)

    def take(self, nodes: Sequence[str]) -> list[Any | None]:
        """For ranks on these nodes, by id: an actor for each that can have one, None for the others."""
        ready = [spare for spare in self.spares if spare.place is not None]
        chosen: list[Spare | None] = []
        for node in nodes:
            found = next((one for one in ready if one.node_id == node), None)
            if found is not None:
                ready.remove(found)
            chosen.append(found)
        calls = {id(one): one.actor.take_news.remote(0) for one in chosen if one is not None}
        if calls:
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=ANSWER_S)
        taken: list[Any | None] = []
        for one in chosen:
            if one is None:
                taken.append(None)
            elif ray.wait([calls[id(one)]], timeout=0)[0] and error_of(calls[id(one)]) is None:
                self.spares.remove(one)
                taken.append(one.actor)
            else:
                self._drop(one, "it gave no answer when it was needed")
                taken.append(None)
        return taken

    def close(self, headless: bool = False) -> None:
        """End all of them; headless: as for `RoleGroup.kill`."""
        for spare in self.spares:
            ray.kill(spare.actor, no_restart=True)
        kill_processes([spare.place for spare in self.spares if spare.place is not None], headless)
        self.spares = []

    def _look_at(self, spare: Spare, now: float) -> None:
        if spare.place is None:
            self._look_at_start(spare, now)
        elif spare.asked is None:
            spare.asked = spare.actor.take_news.remote(0), now
        elif ray.wait([spare.asked[0]], timeout=0)[0]:
            error, spare.asked = error_of(spare.asked[0]), None
            if error is not None:
                self._drop(spare, "its process was killed or crashed")
        elif now - spare.asked[1] > self.config.recovery.hang_timeout_s + LOOK_EVERY_S:
            self._drop(spare, f"no answer for {now - spare.asked[1]:.0f} s")

    def _look_at_start(self, spare: Spare, now: float) -> None:
        if ray.wait([spare.coming], timeout=0)[0]:
            error = error_of(spare.coming)
            if error is None:
                spare.place = ray.get(spare.coming)
                self.events.emit(
                    "spare_up", host=spare.place.host, pid=spare.place.pid, seconds=round(now - spare.since, 2)
                )
                return
            self._drop(spare, str(error).strip().splitlines()[-1])
        elif now - spare.since > self.config.cluster.start_timeout_s:
            self._drop(spare, f"not there after {now - spare.since:.0f} s (cluster.start_timeout_s)")
        else:
            return
        self._next_start = now + AFTER_TROUBLE_S

    def _fill(self, now: float) -> None:
        for node, slots in free_slots(self.config, ()).items():
            have = sum(spare.node_id == node for spare in self.spares)
            for _ in range(self.config.recovery.spares - have if slots else 0):
                actor = start_spare(f"{self.config.run.name}/spare/{time.time_ns()}", node)
                self.spares.append(Spare(actor, node, actor.warm_up.remote(), now))

    def _drop(self, spare: Spare, why: str) -> None:
        self.spares.remove(spare)
        self.events.emit("spare_lost", node=spare.node_id, why=why)
        ray.kill(spare.actor, no_restart=True)
        if spare.place is not None:
            kill_processes([spare.place])
