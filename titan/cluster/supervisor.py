"""The supervisor: a small state machine in the driver that plans, spawns the ranks, watches them and winds up."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

import ray

from titan.checkpoint.fence import read_generation
from titan.cluster.disk import DiskWatch
from titan.cluster.failure import Failure
from titan.cluster.grace import Grace
from titan.cluster.head import HeadWatch
from titan.cluster.label_service import ServiceKeeper
from titan.cluster.label_source import home_folders, initial_weights
from titan.cluster.plan_record import PlanRecord
from titan.cluster.planning import Planned, with_layouts
from titan.cluster.processes import kill_processes
from titan.cluster.recovery import Recovery
from titan.cluster.replan import replan_gain
from titan.cluster.role_group import Phase, RoleGroup, RoleLostError, save_without_head
from titan.cluster.room import RoomFinder
from titan.cluster.session import discover
from titan.cluster.spares import SparePool
from titan.config.model import LayoutSettings
from titan.config.settings import TEACHER
from titan.distill.log.second_copy import copy_folder
from titan.distill.news import untold_metrics
from titan.distill.rank import RankSpec, RoleReport
from titan.distill.service.server import LOCALHOST
from titan.errors import PlatformError
from titan.observe.events import EventLog
from titan.observe.live import LiveDisplay
from titan.observe.metrics import EvalMetric, MetricsLog, StepMetric
from titan.plan.inventory import check_fits
from titan.plan.layout import make_layout, role_layouts

POLL_S = 0.25
LOOK_S = 0.05
"""The same while ranks start: each of their phases ends soon."""
LEAST_S = 0.01


class State(Enum):
    """Where a run is."""

    PLAN = "plan"
    SPAWN = "spawn"
    RUN = "run"
    DRAIN = "drain"
    DONE = "done"


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    reports: dict[str, RoleReport]
    stopped: bool


class Supervisor:
    """Drives one run on a connected Ray. Decides nothing that the plan decides."""

    def __init__(
        self,
        planned: Planned,
        run_folder: Path,
        corpus_folder: Path,
        events: EventLog,
        metrics: MetricsLog,
        display: LiveDisplay,
        resumed: Mapping[str, int],
        tidy: Callable[[str], int],
        grace: Grace,
    ):
        """resumed: step of the checkpoint each role goes on from
        tidy:    makes the files of a role ready to go on, none of its ranks running; returns the step to go on from
        """
        self.planned, self.config = planned, planned.config
        self.run_folder, self.corpus_folder = run_folder, corpus_folder
        self.events, self.metrics, self.display = events, metrics, display
        self.resumed, self.grace = resumed, grace
        self.state = State.PLAN
        self.signals = 0
        self.groups: dict[str, RoleGroup] = {}
        self.service: ServiceKeeper | None = None
        self.home = ""
        """Address of the run folder for hosts that do not see it."""
        if self.config.serves_labels or self.config.run.storage == "per-node":
            local = self.config.cluster.address is None
            self.service = ServiceKeeper(run_folder, events, LOCALHOST if local else None)
        self.spares = SparePool(self.config, events)
        self.head = HeadWatch(self._leave_without_head)
        self.disk = DiskWatch(self.config, run_folder, events)
        self.begin = time.monotonic()
        self.record = PlanRecord(planned, run_folder, events)
        self.room = RoomFinder(planned)
        self.recovery = Recovery(self.config, run_folder, self.groups, events, metrics, display, self.room, tidy)

    def run(self) -> Outcome:
        """The whole run. Raises WorkerError if a role failed for good; no actor is left in any case."""
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self.head:
                self._plan()
                self._spawn()
                return self._watch()
        finally:
            for group in self.groups.values():
                group.kill(headless=self.head.lost)
            self.spares.close(headless=self.head.lost)
            if self.service is not None:
                self.service.stop()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """First signal: stop after the step under way. Second: at once."""
        self.signals += 1
        if number == signal.SIGTERM:
            self.grace.begin()
        if self.signals > 1:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name

    # --- PLAN ---

    def _plan(self) -> None:
        config = self.config
        layouts = role_layouts(config)
        inventory = discover(config.cluster)
        if not config.recovery.start_smaller:
            check_fits(layouts, inventory, config.cluster.cpu_ranks_per_core)
        self.record.begin(layouts, inventory)

    # --- SPAWN ---

    def _spawn(self) -> None:
        """Start all ranks; training begins when all of them are up. Raises WorkerError if that cannot be."""
        self.state = State.SPAWN
        begin = time.monotonic()
        if self.service is not None and self.config.run.storage == "per-node":
            self.home = self.service.start_home(home_folders(self.config, self.corpus_folder))
        for role in self.config.roles:
            step = self.resumed.get(role, 0)
            self.metrics.write_missing(untold_metrics(self.run_folder / "checkpoints" / role))
            self.groups[role] = RoleGroup(role, self.config, self.planned.paced, self._spec, step, self.spares)
        groups = list(self.groups.values())
        if self.config.recovery.start_smaller:
            for role, settings in self.room.layouts_to_start(groups).items():
                self.recovery.use(self.groups[role], settings)
        for group in groups:
            group.start()
        total = sum(group.num_ranks for group in groups)
        while not all(group.phase is Phase.READY for group in groups):
            for group in groups:
                noticed = time.monotonic()
                try:
                    self.recovery.reconsider(group)
                    group.advance()
                except RoleLostError as lost:
                    if not self.head.look():
                        break
                    self._recover(group, group.cause(lost.errors), noticed)
            if self.service is not None:
                self.service.look()
            self.display.phase(_starting(groups, total))
            self.display.refresh()
            if self.signals:
                raise KeyboardInterrupt
            if self.head.lost:
                raise self._without_head()
            _rest(groups, LOOK_S)
        self.events.emit("ranks_up", seconds=round(time.monotonic() - begin, 2), ranks=total)

    def _spec(self, role: str, rank: int, settings: LayoutSettings) -> RankSpec:
        config = with_layouts(self.config, {role: settings})
        layout = make_layout(config.roles[role].model, settings)
        found = self.record.prediction(role, layout)
        paced = layout.place(rank).device in self.planned.paced
        return RankSpec(
            config,
            role,
            rank,
            self.run_folder.absolute(),  # the nodes of a Ray that was joined were not started here
            self.corpus_folder.absolute(),
            init=initial_weights(config, role),
            copy_folder=copy_folder(config, role) if config.teaches(role) else None,
            label_token=self.service.token if self.service is not None else "",
            home=self.home,
            pace=found.paces[rank] if found is not None and paced else None,
            expected_busy_s=found.busy_s if found is not None else (),
            generation=read_generation(self.run_folder, role),
        )

    # --- RUN and DRAIN ---

    def _watch(self) -> Outcome:
        """Follow all roles to their end, and put up again those that fail."""
        self.state = State.RUN
        for group in self.groups.values():
            self._train(group)
        self.room.prepare(self.events)
        self.display.phase("training")
        while not all(group.phase is Phase.DONE for group in self.groups.values()):
            if self.head.lost:
                raise self._without_head()
            if not self.head.answers:
                time.sleep(LOOK_S)  # what has to be done may wait for it
                continue
            if self.service is not None:
                self.service.look()
            starting = any(group.is_starting for group in self.groups.values())
            self.spares.look(calm=self.state is State.RUN and not starting and not self.recovery.since)
            _rest(self.groups.values(), LOOK_S if starting else POLL_S)
            for group in self.groups.values():
                noticed = time.monotonic()
                try:
                    self._look_after(group)
                except RoleLostError as lost:
                    if not self.head.look():
                        break  # a lost head's node takes its ranks along
                    self._recover(group, group.cause(lost.errors), noticed)
                except PlatformError as late:
                    again = group.phase is not Phase.ROOM  # recovery.wait_s has been waited already
                    self._recover(group, Failure(str(late), again, {"role": group.role}), noticed)
            self.display.refresh()
            self.disk.look(self.groups.values())
            if (self.signals or self.disk.must_stop) and self.state is State.RUN:
                self.state = State.DRAIN
                self.events.emit("stop_requested", signal=self.signal_name if self.signals else "disk_low")
                self.display.phase("stopping after this step; once more to stop at once")
                for group in self.groups.values():
                    if group.phase is Phase.TRAIN:
                        group.request_stop()
            if self.grace.is_nearly_over:
                unsaved = [group.role for group in self.groups.values() if group.phase is not Phase.DONE]
                self.events.emit("grace_over", roles=unsaved, grace_s=self.grace.seconds)
                raise self.grace.out_of_time(unsaved)
        self.grace.saved()
        if self.disk.must_stop and any(group.report.stopped for group in self.groups.values() if group.report):
            raise self.disk.error()
        self.state = State.DONE
        reports = {role: group.report for role, group in self.groups.items() if group.report is not None}
        return Outcome(reports, any(report.stopped for report in reports.values()))

    def _without_head(self) -> PlatformError:
        """Ray's head is lost: roles that train save and end, which needs no head; nothing can be started any more."""
        self.head.heeded.set()
        silent_s, begin = self.head.silent_s, time.monotonic()
        late = save_without_head(self.groups.values())
        self.events.emit(
            "head_lost", address=self.head.address, not_saved=late, silent_s=round(silent_s, 1),
            saving_s=round(time.monotonic() - begin, 1),
        )  # fmt: skip
        return PlatformError(
            f"Ray's head at {self.head.address} could not be reached for {silent_s:.0f} s: "
            + ("every role has saved" if not late else f"{', '.join(late)} could not save")
            + ("; " if self.config.cluster.address is None else "; start Ray again, then ")
            + f"`titan resume {self.run_folder}` goes on from there"
        )

    def _leave_without_head(self) -> None:
        """The same in the watch's thread, as the main one waits for the head inside Ray and cannot be woken."""
        error = self._without_head()
        for group in self.groups.values():
            kill_processes(group.places, headless=True)
        with suppress(OSError):
            self.events.emit("error", error=str(error))
            self.events.emit("run_finished", status="failed", wall_s=round(time.monotonic() - self.begin, 1))
        print(f"titan: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)

    def _train(self, group: RoleGroup) -> None:
        """Let a role train whose ranks are up, and leave word of where they are."""
        processes = [f"{place.host}:{place.pid}" for place in group.places]
        self.events.emit("placed", role=group.role, generation=group.generation, processes=processes)
        self.record.goes_on(group.role, group.layout)
        group.train()
        if group.role == TEACHER and self.service is not None and not self.home:
            node = group.places[group.layout.stages[-1].rank(0, 0)].node_id
            if node != self.service.node_id:
                self.service.stop()
                self.service.start(node)

    def _look_after(self, group: RoleGroup) -> None:
        """News of a role and its next phase. Raises RoleLostError if it failed."""
        if group.phase is Phase.DONE:
            return
        if group.phase not in (Phase.IDLE, Phase.ROOM):
            self._pass_on(group, group.take_news())
        self.recovery.reconsider(group)
        phase = group.advance()
        if phase is Phase.READY:
            self._train(group)
            seconds = time.monotonic() - self.recovery.since[group.role]
            self.events.emit(
                "ranks_up", role=group.role, seconds=round(seconds, 2), ranks=group.num_ranks, spares=group.num_spares,
                phases_s=group.took_s,
            )  # fmt: skip
            self._show_starting()
            if self.state is State.DRAIN:
                group.request_stop()
        elif group.is_paused:
            self._pass_on(group, group.last_news())
            group.kill()
            self.recovery.start_again(group, self.recovery.tidy(group.role), time.monotonic())
            self._show_starting()
        elif phase is Phase.DONE:
            assert group.report is not None
            self._pass_on(group, group.last_news())
            group.close()
            self.events.emit("role_finished", role=group.role, step=group.report.step)

    def _pass_on(self, group: RoleGroup, items: Sequence[Any]) -> None:
        for item in items:
            if isinstance(item, StepMetric | EvalMetric):
                self.metrics.write(item)
                self.display.update(item)
                group.last_step = item.step
                self.recovery.note_step(group)
            else:
                event = item.pop("event")
                self.events.emit(event, **item, **self._offer(item))
                if event == "checkpoint":
                    self.recovery.grow(group)

    def _offer(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """What a new plan would gain, for a straggler that was named; nothing for any other event."""
        role = item.get("role", "")
        found = self.record.prediction(role, self.groups[role].layout) if "factor" in item else None
        if found is None:
            return {}
        gain = replan_gain(self.planned.costs[role], found, item["rank"], float(item["factor"]))
        return {} if gain is None else {"replan_gain": round(gain, 3)}

    def _recover(self, group: RoleGroup, failure: Failure, since: float) -> None:
        """Put a role up again that failed. Raises WorkerError if that is not to be or cannot help."""
        self.recovery.recover(group, failure, since)
        self._show_starting()

    def _show_starting(self) -> None:
        """Which roles are not up."""
        if self.state is State.RUN:
            names = ", ".join(group.role for group in self.groups.values() if group.is_starting)
            self.display.phase(f"training; {names} starting again" if names else "training")


def _starting(groups: Sequence[RoleGroup], total: int) -> str:
    """What a start waits for, in words."""
    if any(group.phase is Phase.ROOM for group in groups):
        return f"waiting for room for {total} ranks in the Ray cluster"
    return f"starting {total} ranks: {sum(group.num_up for group in groups)} up"


def _rest(groups: Iterable[RoleGroup], seconds: float) -> None:
    """Wait until something happens in a role, or for so long."""
    pending = [ref for group in groups for ref in group.pending]
    begin = time.monotonic()
    if pending:
        ray.wait(pending, num_returns=1, timeout=seconds)
    if time.monotonic() - begin < LEAST_S:  # a rank that is done before the others of its role stays so
        time.sleep(seconds if not pending else LEAST_S)
