"""The supervisor: a small state machine in the driver that plans, spawns the ranks, watches them and winds up."""

import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from titan.cluster.planning import Planned, plan_picture
from titan.cluster.rank_actor import RankActor, RankError
from titan.cluster.replan import replan_gain
from titan.cluster.session import ACCELERATORS, discover
from titan.config.settings import TEACHER, RunConfig
from titan.distill.rank import RankSpec, RoleReport
from titan.errors import ConfigError, PlatformError, WorkerError
from titan.observe.events import EventLog
from titan.observe.files import write_whole
from titan.observe.live import LiveDisplay
from titan.observe.metrics import EvalMetric, MetricsLog, StepMetric
from titan.observe.planned import PICTURE_FILE, PLAN_FILE
from titan.plan.inventory import check_fits, plan_json
from titan.plan.layout import Layout, Stage, role_layouts

POLL_S = 0.25
RESULT_TIMEOUT_S = 30.0
CAUSE_WAIT_S = 3.0
"""How long to collect failures after the first: the rank at fault may be reported after those that lost their peer."""


class State(Enum):
    """Where a run is."""

    PLAN = "plan"
    SPAWN = "spawn"
    RUN = "run"
    DRAIN = "drain"
    LOST = "lost"
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
    ):
        """resumed: step of the checkpoint each role goes on from."""
        self.planned, self.config = planned, planned.config
        self.run_folder, self.corpus_folder = run_folder, corpus_folder
        self.events, self.metrics, self.display = events, metrics, display
        self.last_step = dict(resumed)
        self.state = State.PLAN
        self.signals = 0
        self.actors: dict[str, list[Any]] = {}
        self.hosts: dict[str, list[str]] = {}
        self.asked: dict[str, tuple[Any, float]] = {}
        """What each lead was asked, and since when it owes an answer."""

    def run(self) -> Outcome:
        """The whole run. Raises WorkerError if a rank failed; no actor is left in any case."""
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            layouts = self._plan()
            self._spawn(layouts)
            return self._watch()
        finally:
            for actor in (actor for actors in self.actors.values() for actor in actors):
                ray.kill(actor, no_restart=True)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """First signal: stop after the step under way. Second: at once."""
        self.signals += 1
        if self.signals > 1:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name

    # --- PLAN ---

    def _plan(self) -> dict[str, Layout]:
        config = self.config
        layouts = role_layouts(config)
        inventory = discover(config.cluster)
        check_fits(layouts, inventory, config.cluster.cpu_ranks_per_core)
        plan = plan_json(layouts, inventory)
        plan["predictions"] = {role: found.to_json() for role, found in self.planned.predictions.items()}
        (self.run_folder / PLAN_FILE).write_text(json.dumps(plan, indent=1))
        if TEACHER in self.planned.predictions:
            write_whole(self.run_folder / PICTURE_FILE, plan_picture(TEACHER, self.planned.predictions[TEACHER]))
        self.events.emit("plan", ranks=plan["num_ranks"], slots=inventory.slots, nodes=len(inventory.nodes))
        for role, found in self.planned.predictions.items():
            self.events.emit("predicted", role=role, step_s=round(found.step_s, 4), devices=list(found.kinds))
        for role, why in self.planned.unknown.items():
            self.events.emit("not_predicted", role=role, why=why)
        return layouts

    # --- SPAWN ---

    def _spawn(self, layouts: dict[str, Layout]) -> None:
        """Start one actor a rank, tensor-parallel groups together on a node, and join each role's world."""
        self.state = State.SPAWN
        begin = time.monotonic()
        deadline = begin + self.config.cluster.start_timeout_s
        total = sum(layout.num_ranks for layout in layouts.values())
        groups = {role: _reserve(layout, self.config, self.planned.paced) for role, layout in layouts.items()}
        ready = [group.ready() for role_groups in groups.values() for group in role_groups]
        self._wait(ready, deadline, f"room for {total} ranks in the Ray cluster", "is another job using it?")
        for role, layout in layouts.items():
            self.actors[role] = [
                _start_actor(self._spec(role, rank, layout), group, layout)
                for rank, group in _rank_groups(layout, groups[role])
            ]
        building = [actor.build.remote() for actors in self.actors.values() for actor in actors]
        hosts = iter(self._wait(building, deadline, f"{total} ranks", "see Ray's logs in /tmp/ray", show_count=True))
        self.hosts = {role: [next(hosts) for _ in actors] for role, actors in self.actors.items()}
        stores = {role: actors[0].open_store.remote() for role, actors in self.actors.items()}
        joining = []
        for role, actors in self.actors.items():
            (address,) = self._wait([stores[role]], deadline, f"rank 0 of {role}", "see Ray's logs in /tmp/ray")
            joining += [actor.join.remote(*address) for actor in actors]
        up = self._wait(joining, deadline, f"{total} ranks to join their worlds", "see Ray's logs in /tmp/ray")
        self.events.emit("ranks_up", seconds=round(time.monotonic() - begin, 2), ranks=len(up))

    def _spec(self, role: str, rank: int, layout: Layout) -> RankSpec:
        found = self.planned.predictions.get(role)
        paced = layout.place(rank).stage.device in self.planned.paced
        return RankSpec(
            self.config,
            role,
            rank,
            self.run_folder,
            self.corpus_folder,
            pace=found.paces[rank] if found is not None and paced else None,
            expected_busy_s=found.busy_s if found is not None else (),
        )

    def _wait(self, refs: Sequence[Any], deadline: float, what: str, hint: str, show_count: bool = False) -> list[Any]:
        """Results of all refs, or an error that says what did not come."""
        pending = list(refs)
        while pending:
            ready, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S)
            self.display.phase(f"starting {len(refs)} ranks: {len(ready)} up" if show_count else f"waiting for {what}")
            self.display.refresh()
            failed = [error for ref in ready if (error := _error_of(ref)) is not None]
            if failed:
                raise self._lost(failed)
            if self.signals:
                raise KeyboardInterrupt
            if pending and time.monotonic() > deadline:
                raise PlatformError(
                    f"waited {self.config.cluster.start_timeout_s:.0f} s for {what}, {len(pending)} of {len(refs)} are "
                    f"not there; {hint} (cluster.start_timeout_s sets the wait)"
                )
            pending = list(refs) if pending else []
        return list(ray.get(list(refs)))

    # --- RUN and DRAIN ---

    def _watch(self) -> Outcome:
        """Follow all roles to their end."""
        self.state = State.RUN
        role_of = {actor.train.remote(): role for role, actors in self.actors.items() for actor in actors}
        pending = list(role_of)
        left = {role: len(actors) for role, actors in self.actors.items()}
        reports: dict[str, RoleReport] = {}
        self.display.phase("training")
        while pending:
            ready, pending = ray.wait(pending, num_returns=1, timeout=POLL_S)
            self._take_news(left)
            self.display.refresh()
            failed = [error for ref in ready if (error := _error_of(ref)) is not None]
            if failed:
                raise self._lost(failed + self._more_failures(pending))
            for ref in ready:
                role = role_of[ref]
                left[role] -= 1
                reports[role] = ray.get(ref)
                if left[role] == 0:
                    self._last_news(role)
                    self.events.emit("role_finished", role=role, step=reports[role].step)
            if self.signals and self.state is State.RUN:
                self.state = State.DRAIN
                self.events.emit("stop_requested", signal=self.signal_name)
                self.display.phase("stopping after this step; once more to stop at once")
                for role, actors in self.actors.items():
                    if left[role]:
                        actors[0].request_stop.remote()
        self.state = State.DONE
        return Outcome(reports, any(report.stopped for report in reports.values()))

    def _take_news(self, left: dict[str, int]) -> None:
        """Ask every lead for news, without waiting, and pass on what has come.

        Raises WorkerError if a lead has not answered for `cluster.step_timeout_s`: its process hangs.
        """
        for role in left:
            if role not in self.asked:
                if left[role]:
                    self.asked[role] = (self.actors[role][0].take_news.remote(), time.monotonic())
                continue
            ref, since = self.asked[role]
            if ray.wait([ref], timeout=0)[0]:
                del self.asked[role]
                if _error_of(ref) is None:  # else its train() says what is wrong
                    self._pass_on(role, ray.get(ref))
            elif time.monotonic() - since > self.config.cluster.step_timeout_s:
                waited_s = self.config.cluster.step_timeout_s
                raise self._lost([WorkerError(f"{self._where(role, 0)}: no answer for {waited_s:.0f} s; it hangs")])

    def _last_news(self, role: str) -> None:
        """What a lead had to say when its role ended."""
        ref, _ = self.asked.pop(role, (None, 0.0))
        for late in filter(None, (ref, self.actors[role][0].take_news.remote())):
            if _error_of(late) is None:
                self._pass_on(role, ray.get(late))

    def _pass_on(self, role: str, items: Sequence[Any]) -> None:
        for item in items:
            if isinstance(item, StepMetric | EvalMetric):
                self.metrics.write(item)
                self.display.update(item)
                self.last_step[role] = max(self.last_step.get(role, 0), item.step)
            else:
                self.events.emit(item.pop("event"), **item, **self._offer(item))

    def _offer(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """What a new plan would gain, for a straggler that was named; nothing for any other event."""
        role = item.get("role", "")
        if "factor" not in item or role not in self.planned.predictions:
            return {}
        gain = replan_gain(
            self.planned.costs[role], self.planned.predictions[role], item["rank"], float(item["factor"])
        )
        return {} if gain is None else {"replan_gain": round(gain, 3)}

    # --- LOST ---

    def _more_failures(self, pending: Sequence[Any]) -> list[Exception]:
        ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=CAUSE_WAIT_S) if pending else ([], [])
        return [error for ref in ready if (error := _error_of(ref)) is not None]

    def _lost(self, failures: Sequence[Exception]) -> WorkerError:
        """The error to show: the cause, not those who noticed it."""
        self.state = State.LOST
        died = [error for error in failures if isinstance(error, ActorDiedError | ActorUnavailableError)]
        own = [error for error in failures if isinstance(error, RankError) and not error.secondary]
        first = (own or died or list(failures))[0]
        if type(first) is WorkerError:
            self.events.emit("failed", error=str(first))
            return first
        if isinstance(first, RankError):
            self.events.emit("failed", **first.who, error=str(first), trace=first.trace)
            return WorkerError(str(first))
        message = self._describe_death(first)
        self.events.emit("failed", error=message)
        return WorkerError(message)

    def _where(self, role: str, rank: int) -> str:
        """A rank that cannot speak for itself, in the words of those that can."""
        host = self.hosts[role][rank] if role in self.hosts else "a host it had not reached"
        return f"{role} rank {rank} on {host}, about step {self.last_step.get(role, 0)}"

    def _describe_death(self, error: Exception) -> str:
        """A process that died without a word: say which, and where it was."""
        for role, actors in self.actors.items():
            for rank, actor in enumerate(actors):
                if getattr(error, "actor_id", None) == actor._actor_id.hex():
                    return f"{self._where(role, rank)}: its process was killed or crashed"
        return f"a rank died: {str(error).splitlines()[0]}"


def _reserve(layout: Layout, config: RunConfig, paced: frozenset[str]) -> list[PlacementGroup]:
    """One placement group a tensor-parallel group; its bundles stay on one node.

    A stage of a named kind of device goes where Ray knows that kind: `ray start --resources='{"KIND": N}'`. Kinds that
    are paced, and a local Ray that knows no kinds, take any slot.
    """
    bundle = {"CPU": 1.0 / config.cluster.cpu_ranks_per_core}
    resources = ray.cluster_resources()
    for kind, name in ACCELERATORS.items():
        if config.cluster.device in ("auto", kind) and resources.get(name):
            bundle = {"CPU": 1.0, name: 1.0}
            break

    def bundle_of(stage: Stage) -> dict[str, float]:
        if stage.device is None or stage.device in paced or config.cluster.address is None:
            return bundle
        wanted = sum(len(one.ranks) for one in layout.positions if one.device == stage.device)
        if resources.get(stage.device, 0) < wanted:
            raise ConfigError(
                f"layout wants {wanted} devices of kind {stage.device!r}, the Ray cluster offers "
                f"{resources.get(stage.device, 0):g}; start its nodes with --resources='{{\"{stage.device}\": N}}'"
            )
        return bundle | {stage.device: 1.0}

    return [
        placement_group([bundle_of(stage)] * stage.tp, strategy="STRICT_PACK")
        for stage in layout.positions
        for _ in range(stage.dp)
    ]


def _rank_groups(layout: Layout, groups: Sequence[PlacementGroup]) -> list[tuple[int, PlacementGroup]]:
    """Every rank with its placement group, in rank order."""
    remaining = iter(groups)
    return [
        (stage.rank(replica, tensor), group)
        for stage in layout.positions
        for replica, group in zip(range(stage.dp), remaining, strict=False)
        for tensor in range(stage.tp)
    ]


def _start_actor(spec: RankSpec, group: PlacementGroup, layout: Layout) -> Any:
    place = layout.place(spec.rank)
    bundle = group.bundle_specs[place.tensor]
    skin = ray.remote(concurrency_groups={"control": 1}, max_restarts=0)(RankActor).options(
        name=f"{spec.run_folder.name}/{spec.role}/{spec.rank}/{time.time_ns()}",
        num_cpus=bundle["CPU"],
        num_gpus=bundle.get("GPU", 0),
        resources={name: share for name, share in bundle.items() if name not in ("CPU", "GPU")},
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place.tensor),
    )
    return skin.remote(spec)


def _error_of(ref: Any) -> Exception | None:
    """What a finished call raised, as itself."""
    try:
        ray.get(ref, timeout=RESULT_TIMEOUT_S)
    except RayTaskError as error:
        cause: Exception = error.cause if isinstance(error.cause, Exception) else error
        return cause
    except RayError as error:
        itself: Exception = error
        return itself
    return None
