"""The ranks of one role as one thing: started, watched and ended, without ever waiting for it.

`advance` is called again and again; it goes as far as what has come in the meantime allows. So one role can start again
while the others train.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from titan.cluster.failure import Failure, HungError, error_of, find_cause
from titan.cluster.placement import nodes_of, rank_groups, reserve, start_actor
from titan.cluster.processes import kill_processes
from titan.cluster.rank_actor import Whereabouts
from titan.cluster.spares import SparePool
from titan.config.model import LayoutSettings
from titan.config.settings import RunConfig
from titan.distill.rank import RankSpec, RoleReport
from titan.errors import PlatformError
from titan.plan.layout import make_layout

AWAY_S = 2.0
"""A driver that itself was away for so long does not count silence from before."""
START_HANG_S = 60.0
"""The same for a rank that starts: imports leave no room for an answer, and an actor takes a while to be there."""
CAUSE_WAIT_S = 3.0
"""How long to collect failures after the first: the rank at fault may be reported after those that lost their peer."""
SAVE_S = 20.0
"""For roles to save once Ray's head is lost: a minute after that, Ray ends this process."""
LOGS = "see Ray's logs in /tmp/ray"


class Phase(Enum):
    """How far a role is."""

    IDLE = "idle"
    ROOM = "room"
    BUILD = "build"
    STORE = "store"
    JOIN = "join"
    READY = "ready"
    TRAIN = "train"
    DONE = "done"


class RoleLostError(Exception):
    """Errors of ranks of this role; `RoleGroup.cause` makes one failure of them."""

    def __init__(self, errors: Sequence[Exception]):
        super().__init__(*errors)
        self.errors = list(errors)


class RoleGroup:
    """One role's actors. `generation` counts how often they were started."""

    def __init__(
        self,
        role: str,
        config: RunConfig,
        paced: frozenset[str],
        spec_of: Callable[[str, int, LayoutSettings], RankSpec],
        step: int,
        spares: SparePool,
    ):
        """step: of the checkpoint the role goes on from"""
        self.role, self.config, self.paced, self.spec_of = role, config, paced, spec_of
        self.spares, self.num_spares = spares, 0
        """Where spare processes come from, and how many of them this generation has."""
        self.wanted = config.roles[role]
        self.use_layout(self.wanted.layout)
        self.last_step = step
        self.generation = 0
        self.phase = Phase.IDLE
        self.actors: list[Any] = []
        self.places: list[Whereabouts] = []
        self.pending: list[Any] = []
        """Calls that the present phase waits for, one a rank or group."""
        self.deadline = 0.0
        self.report: RoleReport | None = None
        self._room: list[PlacementGroup] = []
        self._asked: dict[int, tuple[Any, float]] = {}
        """What each rank was asked, and since when it owes an answer."""
        self._looked = 0.0
        self._heard = 0
        """News of this generation's lead that have arrived."""
        self._pausing = False
        self.took_s: dict[str, float] = {}
        """Seconds of each phase of the newest start."""
        self._entered = 0.0

    def use_layout(self, settings: LayoutSettings) -> None:
        """The layout of the next start."""
        self.settings = settings
        self.layout = make_layout(self.wanted.model, settings)

    @property
    def num_ranks(self) -> int:
        """Ranks of the role."""
        return self.layout.num_ranks

    @property
    def is_starting(self) -> bool:
        """Whether its ranks are on their way to train."""
        return self.phase in (Phase.ROOM, Phase.BUILD, Phase.STORE, Phase.JOIN)

    @property
    def num_up(self) -> int:
        """Ranks whose process is there and ready."""
        if self.phase in (Phase.IDLE, Phase.ROOM):
            return 0
        if self.phase is Phase.BUILD:
            return len(ray.wait(self.pending, num_returns=len(self.pending), timeout=0)[0])
        return self.num_ranks

    # --- starting ---

    def start(self) -> None:
        """Ask for room; `advance` does the rest."""
        self.generation += 1
        self._pausing, self.report, self._heard = False, None, 0
        again = self.generation > 1
        self._patience_s = self.config.recovery.wait_s if again else self.config.cluster.start_timeout_s
        self.deadline = time.monotonic() + self._patience_s
        self._room = reserve(self.layout, self.config, self.paced, now=not again)
        self._enter(Phase.ROOM, [group.ready() for group in self._room])

    def advance(self) -> Phase:
        """Go on as far as possible without waiting, and say where that is.

        Raises RoleLostError for ranks that failed, PlatformError for ranks that do not come up.
        """
        if self.phase is Phase.TRAIN:
            self._look_at_training()
        while self.is_starting:
            ready, waiting = ray.wait(self.pending, num_returns=len(self.pending), timeout=0)
            if errors := [error for ref in ready if (error := error_of(ref)) is not None]:
                raise RoleLostError(errors)
            if waiting:
                if time.monotonic() > self.deadline:
                    raise self._late(len(waiting))
                break
            self._go_on(ray.get(self.pending))
        return self.phase

    def train(self) -> None:
        """Begin to train; the role is ready."""
        assert self.phase is Phase.READY
        self._enter(Phase.TRAIN, [actor.train.remote() for actor in self.actors])

    def _go_on(self, results: list[Any]) -> None:
        """To the phase after one whose calls have all returned."""
        if self.phase is Phase.ROOM:
            self._patience_s = self.config.cluster.start_timeout_s
            self.deadline = time.monotonic() + self._patience_s
            specs = [self.spec_of(self.role, rank, self.settings) for rank in range(self.num_ranks)]
            name = f"{specs[0].run_folder.name}/{self.role}"
            groups = rank_groups(self.layout, self._room)
            tensors = [self.layout.place(rank).tensor for rank in range(self.num_ranks)]
            ready = self.spares.take(nodes_of(groups, tensors)) if self.generation > 1 else [None] * self.num_ranks
            self.num_spares = self.num_ranks - ready.count(None)
            self.actors = [
                spare or start_actor(f"{name}/{rank}/{time.time_ns()}", group, tensor)
                for rank, (spare, group, tensor) in enumerate(zip(ready, groups, tensors, strict=True))
            ]
            calls = [actor.build.remote(spec) for actor, spec in zip(self.actors, specs, strict=True)]
            self._enter(Phase.BUILD, calls)
        elif self.phase is Phase.BUILD:
            self.places = results
            self._enter(Phase.STORE, [self.actors[0].open_store.remote()])
        elif self.phase is Phase.STORE:
            (address,) = results
            self._enter(Phase.JOIN, [actor.join.remote(*address) for actor in self.actors])
        else:
            self._enter(Phase.READY, [])

    def _enter(self, phase: Phase, calls: list[Any]) -> None:
        now = time.monotonic()
        if phase is Phase.ROOM:
            self.took_s = {}
        elif self.is_starting:
            self.took_s[self.phase.value] = round(now - self._entered, 2)
        self.phase, self.pending, self._entered = phase, calls, now
        self._asked = {rank: (ref, now) for rank, (ref, _) in self._asked.items()}  # each phase has a limit of its own

    def _late(self, missing: int) -> PlatformError:
        what = {
            Phase.ROOM: f"room for {self.num_ranks} ranks in the Ray cluster",
            Phase.BUILD: f"the processes of {self.num_ranks} ranks",
            Phase.STORE: "rank 0",
            Phase.JOIN: f"{self.num_ranks} ranks to join their world",
        }[self.phase]
        hint = "is another job using it?" if self.phase is Phase.ROOM else LOGS
        setting = "recovery.wait_s" if self.phase is Phase.ROOM and self.generation > 1 else "cluster.start_timeout_s"
        return PlatformError(
            f"{self.role}: waited {self._patience_s:.0f} s for {what}, {missing} of {len(self.pending)} are not there; "
            f"{hint} ({setting} sets the wait)"
        )

    # --- training ---

    def _look_at_training(self) -> None:
        ready, _ = ray.wait(self.pending, num_returns=len(self.pending), timeout=0)
        if errors := [error for ref in ready if (error := error_of(ref)) is not None]:
            raise RoleLostError(errors)
        if len(ready) == len(self.pending):
            self.report = ray.get(self.pending[0])
            self.phase, self.pending = Phase.DONE, []

    def take_news(self) -> list[Any]:
        """What the lead had to say. Raises RoleLostError if a rank has not answered for too long: it hangs."""
        now, limit_s = time.monotonic(), self.config.recovery.hang_timeout_s
        if self.is_starting:
            limit_s = max(limit_s, START_HANG_S)
        if now - self._looked > AWAY_S:
            self._asked = {rank: (ref, now) for rank, (ref, _) in self._asked.items()}
        self._looked = now
        news: list[Any] = []
        for rank, actor in enumerate(self.actors):
            ref, since = self._asked.pop(rank, (None, now))
            if ref is None:
                ref = actor.take_news.remote(self._heard)
            elif ray.wait([ref], timeout=0)[0]:
                if error_of(ref) is None:  # else its train() says what is wrong
                    news += self._hear(rank, ref)
                continue
            elif now - since > limit_s:
                raise RoleLostError([HungError(rank, limit_s)])
            self._asked[rank] = (ref, since)
        return news

    def last_news(self) -> list[Any]:
        """What the lead had to say when the role ended."""
        ref, _ = self._asked.pop(0, (None, 0.0))
        news = [] if ref is None or error_of(ref) is not None else self._hear(0, ref)
        ref = self.actors[0].take_news.remote(self._heard)
        return news if error_of(ref) is not None else news + self._hear(0, ref)

    def _hear(self, rank: int, answer: Any) -> list[Any]:
        heard, news = ray.get(answer)
        if rank == 0:
            self._heard = heard
        return news  # type: ignore[no-any-return]

    def request_stop(self) -> None:
        """Ask the role to stop after the step under way."""
        self.actors[0].request_stop.remote()

    def heed_disk(self, low: bool) -> None:
        """Tell the role whether the disk that its labels go to is nearly full."""
        self.actors[0].heed_disk.remote(low)

    def request_pause(self) -> None:
        """Ask the role to make a checkpoint after the step under way and end, to be started in another layout."""
        if not self._pausing:
            self._pausing = True
            self.actors[0].request_stop.remote(for_good=False)

    @property
    def is_paused(self) -> bool:
        """Whether it ended only because it was asked to pause."""
        return self.phase is Phase.DONE and self.report is not None and self.report.paused

    # --- the end ---

    def cause(self, errors: Sequence[Exception]) -> Failure:
        """The failure behind `errors` and what else comes in a moment."""
        errors = list(errors)
        if self.phase is Phase.TRAIN and not any(isinstance(error, HungError) for error in errors):
            ready, _ = ray.wait(self.pending, num_returns=len(self.pending), timeout=CAUSE_WAIT_S)
            errors += [error for ref in ready if (error := error_of(ref)) is not None]
        where = []
        for rank, actor in enumerate(self.actors):
            host = self.places[rank].host if rank < len(self.places) else "a host it had not reached"
            words = f"{self.role} rank {rank} on {host}, about step {self.last_step}"
            where.append((actor._actor_id.hex(), words, self._who(rank, host)))
        return find_cause(errors, where)

    def _who(self, rank: int, host: str) -> dict[str, Any]:
        return {"role": self.role, "rank": rank, "host": host, "step": self.last_step}

    def close(self) -> None:
        """Let a finished role's processes go; what they held is free for others."""
        self.kill()
        self._enter(Phase.DONE, [])

    def kill(self, headless: bool = False) -> None:
        """End all processes and give up the room. A process that hangs cannot be asked to, so the system is.

        headless: without what needs Ray's head, as that is lost; the room goes with it
        """
        for actor in self.actors:
            ray.kill(actor, no_restart=True)
        kill_processes(self.places, headless)
        for group in () if headless else self._room:
            remove_placement_group(group)
        self.actors, self.places, self._room, self._asked = [], [], [], {}
        self._enter(Phase.IDLE, [])


def save_without_head(groups: Iterable[RoleGroup]) -> list[str]:
    """Let the roles that train save and end, Ray's head being lost; returns those that could not, or were not up."""
    groups = list(groups)
    training = [group for group in groups if group.phase is Phase.TRAIN]
    for group in training:
        group.request_stop()
    pending = [ref for group in training for ref in group.pending]
    done = set(ray.wait(pending, num_returns=len(pending), timeout=SAVE_S)[0]) if pending else set()
    saved = [one for one in training if all(ref in done and error_of(ref) is None for ref in one.pending)]
    return [group.role for group in groups if group.phase is not Phase.DONE and group not in saved]
