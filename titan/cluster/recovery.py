"""A role that failed, or gave way, is put up again from its newest checkpoint, in the layout there is room for."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from titan.cluster.failure import Failure
from titan.cluster.role_group import Phase, RoleGroup
from titan.cluster.room import RoomFinder, devices_of
from titan.config.model import LayoutSettings
from titan.config.settings import RunConfig
from titan.distill.news import untold_metrics
from titan.errors import WorkerError
from titan.observe.events import EventLog
from titan.observe.live import LiveDisplay
from titan.observe.metrics import MetricsLog

RECONSIDER_S = 1.0
ASK_AGAIN_S = 30.0
"""A role that waits asks another to give way no more often: that one saves, ends and starts again each time."""


class Recovery:
    """Of the roles of one run."""

    def __init__(
        self,
        config: RunConfig,
        run_folder: Path,
        groups: Mapping[str, RoleGroup],
        events: EventLog,
        metrics: MetricsLog,
        display: LiveDisplay,
        room: RoomFinder,
        tidy: Callable[[str], int],
    ):
        """tidy: makes the files of a role ready to go on, none of its ranks running; returns the step to go on from"""
        self.config, self.run_folder, self.groups = config, run_folder, groups
        self.events, self.metrics, self.display, self.room = events, metrics, display, room
        self._tidy_files = tidy
        self.since: dict[str, float] = {}
        """Roles that failed and have made no step since, and when that was noticed."""
        self._next_look: dict[str, float] = {}
        self._next_ask: dict[str, float] = {}
        self._restarts: dict[str, tuple[int, int]] = {}
        """By role: restarts in a row, and the step of the checkpoint they went on from."""

    def recover(self, group: RoleGroup, failure: Failure, since: float) -> None:
        """Put up a role again that failed. Raises WorkerError if that is not to be or cannot help."""
        policy = self.config.recovery
        if not failure.passes or policy.policy == "stop":
            raise self._give_up(failure)
        self.events.emit("rank_lost", **failure.fields, error=failure.message)
        group.kill()
        step = self.tidy(group.role)
        count, last = self._restarts.get(group.role, (0, -1))
        count = count + 1 if step <= last else 1
        self._restarts[group.role] = (count, step)
        if count > policy.max_restarts:
            raise self._give_up(failure, f"; it was restarted {policy.max_restarts} times from step {step} "
                                         "(recovery.max_restarts)")  # fmt: skip
        self.events.emit("restarting", role=group.role, from_step=step, lost_steps=max(0, group.last_step - step))
        self.display.log(f"{time.strftime('%H:%M:%S')}  {failure.message}; {group.role} goes on from step {step}")
        self.start_again(group, step, since)

    def tidy(self, role: str) -> int:
        """Files of a role whose ranks are gone; returns the step it goes on from."""
        step = self._tidy_files(role)
        self.metrics.write_missing(untold_metrics(self.run_folder / "checkpoints" / role))
        return step

    def start_again(self, group: RoleGroup, step: int, since: float) -> None:
        """From its newest checkpoint, that of `step`, in the layout there is room for."""
        group.last_step = step
        self.since[group.role] = since
        self.use(group, self.room.layout_for(group, self.groups.values()))
        group.start()

    def use(self, group: RoleGroup, settings: LayoutSettings) -> None:
        """Give a role that is to start this layout, and say so if it has other ranks than before."""
        before, had = group.num_ranks, devices_of(group.settings)
        group.use_layout(settings)
        has = devices_of(settings)
        if group.num_ranks != before or has != had:
            wanted = group.wanted.layout.ranks
            self.events.emit(
                "layout", role=group.role, step=group.last_step, ranks=group.num_ranks, before=before, wanted=wanted,
                devices=has or None,
            )  # fmt: skip
            said = f"{group.role} goes on with {group.num_ranks} of {wanted} ranks"
            on = f" ({', '.join(f'{number} {kind}' for kind, number in has.items())})" if has else ""
            self.display.log(f"{time.strftime('%H:%M:%S')}  {said}{on}")

    def reconsider(self, group: RoleGroup) -> None:
        """While a role waits for room: a host may have been found dead, or have come, in the meantime."""
        if group.generation == 1 or group.phase is not Phase.ROOM:
            return
        now = time.monotonic()
        if now < self._next_look.get(group.role, 0.0):
            return
        self._next_look[group.role] = now + RECONSIDER_S
        settings = self.room.layout_for(group, self.groups.values())
        if settings != group.settings:
            group.kill()
            self.use(group, settings)
            group.start()
        elif now >= self._next_ask.get(group.role, 0.0):
            other = self.room.who_must_give_way(group, self.groups.values())
            if other is not None:
                self._next_ask[group.role] = now + ASK_AGAIN_S
                other.request_pause()

    def grow(self, group: RoleGroup) -> None:
        """At a checkpoint of a role with fewer ranks than it should have: give it more if there is room now."""
        if group.phase is not Phase.TRAIN or group.settings == group.wanted.layout:
            return
        settings = self.room.layout_for(group, self.groups.values())
        if settings != group.settings and (settings == group.wanted.layout or settings.ranks > group.num_ranks):
            group.request_pause()

    def note_step(self, group: RoleGroup) -> None:
        """The first step or evaluation after a restart ends the recovery."""
        if group.role in self.since and group.phase in (Phase.TRAIN, Phase.DONE):
            seconds = time.monotonic() - self.since.pop(group.role)
            self.events.emit("recovered", role=group.role, seconds=round(seconds, 2), generation=group.generation)

    def _give_up(self, failure: Failure, more: str = "") -> WorkerError:
        """The error that ends the run."""
        self.events.emit("failed", **failure.fields, error=failure.message + more)
        return WorkerError(failure.message + more)
