"""A whole run on a fleet that fails, event by event: where its wall time goes and what is left of it.

Chance is drawn first (titan.plan.simulate.failures), then a run is replayed, so that two replays of one world
under different checkpoint intervals meet the same failures.
"""

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from titan.config.simulation import SimulationConfig
from titan.plan.simulate.failures import DAY_S, HOUR_S, Failure, check_size, draw_failures, draw_slow_times
from titan.plan.simulate.outcome import Outcome, Part, Stretch
from titan.plan.simulate.step_times import Array, Pipeline, jitter_factors, make_pipeline, slow_steps_s

NUM_NOISES = 65536
"""Steps after which their noise begins again."""
MOST_SETS = 4096
"""Sets of slow positions whose step is computed at a time: a matter of memory."""


@dataclass(frozen=True)
class World:
    """Everything chance decides about a run, and the seconds of its steps."""

    config: SimulationConfig
    step_s: float
    """A step without any trouble."""
    failures: tuple[Failure, ...]
    pace_start_s: Array
    """When the seconds of a step change; the first is 0."""
    pace_s: Array
    """Seconds of a step from then on, noise apart."""
    jitter_sums: Array
    """From 0 on, the noise of the first, the first two, ... steps summed; after the last it begins again."""


def make_worlds(config: SimulationConfig, planned: Pipeline | None = None) -> tuple[World, ...]:
    """One a repeat, each of other chance. Those of one config are always the same.

    planned: the step, where a plan tells it rather than the config
    """
    pipeline = planned or make_pipeline(config)
    step_s = pipeline.timeline().step_s
    check_size(config, step_s)
    noise = jitter_factors(pipeline, config, np.random.default_rng(config.seed))
    worlds = []
    for repeat in range(config.repeats):
        streams = np.random.SeedSequence((config.seed, repeat)).spawn(3)
        failing, slowing, order = (np.random.default_rng(stream) for stream in streams)
        slow = draw_slow_times(config, pipeline.devices, slowing)
        noises = np.ones(1) if noise is None else order.choice(noise, NUM_NOISES)
        worlds.append(
            World(
                config,
                step_s,
                draw_failures(config, failing),
                slow.start_s,
                _paces_s(pipeline, slow.positions, config.stragglers.factor),
                np.concatenate([[0.0], np.cumsum(noises)]),
            )
        )
    return tuple(worlds)


def _paces_s(pipeline: Pipeline, slow: Sequence[frozenset[int]], factor: float) -> Array:
    """Seconds of a step for each set of slow positions; sets that come again are computed once."""
    distinct = sorted(set(slow), key=sorted)
    seconds: dict[frozenset[int], float] = {}
    for first in range(0, len(distinct), MOST_SETS):
        some = distinct[first : first + MOST_SETS]
        seconds |= dict(zip(some, slow_steps_s(pipeline, some, factor).tolist(), strict=True))
    return np.array([seconds[positions] for positions in slow])


def replay(world: World, every_steps: int | None = None) -> Outcome:
    """Live through a run.

    every_steps: steps between checkpoints, if other than the configured
    """
    run = _Run(world, every_steps or world.config.checkpoint.every_steps)
    while not run.is_over:
        run.work()
    return Outcome(tuple(run.stretches + run.pending), world.step_s, run.num_failures, run.num_checkpoints)


class _Run:
    """The state of a run at `now_s`. Methods move it on, and stop at a failure or at the end."""

    def __init__(self, world: World, every_steps: int) -> None:
        self.world, self.config, self.every_steps = world, world.config, every_steps
        self.now_s, self.end_s = 0.0, world.config.days * DAY_S
        self.stretches: list[Stretch] = []
        """What is final."""
        self.pending: list[Stretch] = []
        """Since the last safe checkpoint: its steps are lost if something fails now."""
        self.step, self.safe_step = 0, 0
        self.num_done = 0
        """Steps run, the lost ones too."""
        self.writing: tuple[int, float, int] | None = None
        """A checkpoint on its way: its step, when it is safe, and how many pending stretches came before it."""
        self.next_failure = 0
        self.num_failures, self.num_checkpoints = 0, 0
        fleet = world.config.fleet
        self.missing, self.spares = [0] * len(fleet), [group.spare_nodes for group in fleet]
        self.repairs: list[tuple[float, int]] = []
        """When a node is back, and its group."""
        self.slowdown = 1.0
        """How many times longer steps take for want of nodes."""

    @property
    def is_over(self) -> bool:
        """All steps are done, or the time is up."""
        return self.now_s >= self.end_s or (self.config.steps is not None and self.step >= self.config.steps)

    def work(self) -> None:
        """Go on until the next checkpoint has stalled training, or the pace changes, or something fails."""
        limit_s = min(self._next_failure_s(), self.end_s)
        target = self.step - self.step % self.every_steps + self.every_steps
        if self.config.steps is not None:
            target = min(target, self.config.steps)
        self._steps(target - self.step, limit_s)
        if self.is_over:
            return
        if self.step == target:
            self._save()
        if self._next_failure_s() <= self.now_s:
            self._fail()

    def _steps(self, most: int, limit_s: float) -> None:
        """Whole steps at the pace of now, at most until limit_s; the rest of the time up to there, if none fits."""
        world = self.world
        place = int(np.searchsorted(world.pace_start_s, self.now_s, side="right")) - 1
        pace_s = float(world.pace_s[place])
        change_s = float(world.pace_start_s[place + 1]) if place + 1 < len(world.pace_start_s) else np.inf
        step_s = pace_s * self.slowdown
        done, noise = most, self._noise_of(most)
        end_s = self.now_s + noise * step_s
        if end_s > min(limit_s, change_s):
            done = self._steps_before(most, step_s, change_s, limit_s)
            noise = self._noise_of(done)
            end_s = self.now_s + noise * step_s
        if done == 0:
            self._spend(limit_s - self.now_s, "lost")
            return
        useful_s, quiet_s, noisy_s = done * world.step_s, done * pace_s, noise * pace_s
        parts: dict[Part, float] = {
            "useful": useful_s,
            "stragglers": quiet_s - useful_s,
            "jitter": noisy_s - quiet_s,
            "shrunk": noisy_s * (self.slowdown - 1.0),
        }
        self.pending.append(Stretch(self.now_s, end_s, parts, done))
        self.step, self.num_done = self.step + done, self.num_done + done
        self._move_to(end_s)

    def _noise_of(self, number: int) -> float:
        """The next steps' noise, summed: `number` where there is none."""
        sums = self.world.jitter_sums
        if len(sums) == 2:
            return float(number)
        whole, first = divmod(self.num_done, len(sums) - 1)
        laps, last = divmod(self.num_done + number, len(sums) - 1)
        return float((laps - whole) * sums[-1] + sums[last] - sums[first])

    def _steps_before(self, most: int, step_s: float, change_s: float, limit_s: float) -> int:
        """How many of the next steps begin before the pace changes and end before the limit, by bisection."""

        def fits(number: int) -> bool:
            begin_s = self.now_s + self._noise_of(number - 1) * step_s
            return begin_s < change_s and self.now_s + self._noise_of(number) * step_s <= limit_s

        return bisect.bisect_left(range(1, most + 1), True, key=lambda number: not fits(number))

    def _save(self) -> None:
        """Take a checkpoint; afterwards nodes that have come back are taken in again."""
        if self.writing is not None:
            if not self._spend(self.writing[1] - self.now_s, "checkpoint"):
                return
            self._settle()
        if not self._spend(self.config.checkpoint.stall_s, "checkpoint"):
            return
        self.writing = (self.step, self.now_s + self.config.checkpoint.write_s, len(self.pending))
        self.num_checkpoints += 1
        self._collect_repaired()
        if any(missing and spare for missing, spare in zip(self.missing, self.spares, strict=True)) and self._spend(
            self.config.checkpoint.write_s, "checkpoint"
        ):
            self._settle()
            self._rebuild()

    def _settle(self) -> None:
        """If the checkpoint that was being written is safe by now, what came before it is final."""
        if self.writing is not None and self.writing[1] <= self.now_s:
            self.safe_step, _, covered = self.writing
            self.stretches += self.pending[:covered]
            del self.pending[:covered]
            self.writing = None

    def _fail(self) -> None:
        """Lose the steps since the last safe checkpoint, and recover, from the start again if something else fails."""
        self._settle()
        self.writing = None
        for stretch in self.pending:
            lost: dict[Part, float] = {"lost": stretch.end_s - stretch.start_s} if stretch.steps else stretch.parts
            self.stretches.append(Stretch(stretch.start_s, stretch.end_s, lost))
        self.pending.clear()
        self.step = self.safe_step
        while self._next_failure_s() <= self.now_s < self.end_s:
            self._strike(self.world.failures[self.next_failure])
            if self._spend(self.config.recovery.detect_s, "detect") and self._find_nodes():
                self._rebuild()

    def _strike(self, failure: Failure) -> None:
        """A node is gone for repair, or only the job is."""
        self.next_failure += 1
        self.num_failures += 1
        if failure.group is not None:
            self.missing[failure.group] += 1
            back_s = failure.time_s + self.config.fleet[failure.group].repair_hours * HOUR_S
            heapq.heappush(self.repairs, (back_s, failure.group))

    def _find_nodes(self) -> bool:
        """Spares where there are, else as the policy says; False if something fails or the time is up."""
        policy = self.config.recovery.without_spare
        while True:
            self._collect_repaired()
            short = [missing > spare for missing, spare in zip(self.missing, self.spares, strict=True)]
            may = all(group.shrinks for group, lacks in zip(self.config.fleet, short, strict=True) if lacks)
            enough = policy == "shrink" and may and self._share_left() >= self.config.recovery.least_share
            if not any(short) or enough:
                return True
            if policy == "stop":
                self._spend(self.end_s - self.now_s, "stopped", may_fail=False)
                return False
            back_s = min(at_s for at_s, group in self.repairs if short[group])
            if not self._spend(back_s - self.now_s, "waiting"):
                return False

    def _rebuild(self) -> None:
        """New worlds with the spares there are, and the state read into them."""
        for group, (missing, spare) in enumerate(zip(self.missing, self.spares, strict=True)):
            used = min(missing, spare)
            self.missing[group], self.spares[group] = missing - used, spare - used
        self.slowdown = self._slowdown()
        if self._spend(self.config.recovery.rebuild_s, "rebuild"):
            self._spend(self.config.recovery.reload_s, "reload")

    def _collect_repaired(self) -> None:
        while self.repairs and self.repairs[0][0] <= self.now_s:
            self.spares[heapq.heappop(self.repairs)[1]] += 1

    def _slowdown(self) -> float:
        """How many times longer a step takes without the missing nodes.

        The step that is told for the loss of one node counts once for every node that is missing; where none is told,
        it is the speed that is left that counts.
        """
        told, guessed = 1.0, False
        for group, missing in zip(self.config.fleet, self.missing, strict=True):
            if missing and group.shrunk_step_s is not None:
                told *= (group.shrunk_step_s / self.world.step_s) ** missing
            guessed = guessed or (missing > 0 and group.shrunk_step_s is None)
        efficiency = self.config.recovery.shrink_efficiency if guessed else 1.0
        return told / (efficiency * self._share_left(told_too=False))

    def _share_left(self, told_too: bool = True) -> float:
        """Of the fleet's speed, were all spares in use.

        told_too: whether missing nodes count for whose loss a step is told
        """
        whole = left = 0.0
        for group, missing, spare in zip(self.config.fleet, self.missing, self.spares, strict=True):
            speed = group.speed * group.devices_per_node
            lacking = max(0, missing - spare) if told_too or group.shrunk_step_s is None else 0
            whole += speed * group.nodes
            left += speed * (group.nodes - lacking)
        return left / whole

    def _spend(self, seconds: float, part: Part, *, may_fail: bool = True) -> bool:
        """Let time pass; False if a failure or the end of the run cut it short."""
        wanted_s = self.now_s + max(0.0, seconds)
        until_s = min(wanted_s, self.end_s, self._next_failure_s() if may_fail else np.inf)
        if until_s > self.now_s:
            self.pending.append(Stretch(self.now_s, until_s, {part: until_s - self.now_s}))
        self._move_to(until_s)
        return until_s >= wanted_s

    def _next_failure_s(self) -> float:
        """When the next failure strikes a node that is there, as long as no node comes or goes before."""
        failures = self.world.failures
        for index in range(self.next_failure, len(failures)):
            if self._strikes(failures[index]):
                return failures[index].time_s
        return np.inf

    def _strikes(self, failure: Failure) -> bool:
        """Whether it hits a node that is there, or the job."""
        if failure.group is None:
            return True
        nodes = self.config.fleet[failure.group].nodes
        return failure.luck * nodes < nodes - self.missing[failure.group]

    def _move_to(self, time_s: float) -> None:
        """Set the clock; failures in between that hit an empty place have not happened."""
        self.now_s = time_s
        failures = self.world.failures
        while self.next_failure < len(failures):
            failure = failures[self.next_failure]
            if failure.time_s > time_s or self._strikes(failure):
                return
            self.next_failure += 1
