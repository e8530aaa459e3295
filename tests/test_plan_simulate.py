"""The simulator of runs against closed forms, one that goes second by second, and the statistics of its draws."""

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.simulations import PIPELINE, config_of
from titan.cli.simulate import simulate, simulation_json
from titan.plan.schedule import make_schedule
from titan.plan.simulate.failures import DAY_S, Failure, draw_failures, draw_slow_times, fleet_mtbf_s
from titan.plan.simulate.outcome import PARTS
from titan.plan.simulate.replay import World, make_worlds, replay
from titan.plan.simulate.step_times import jitter_factors, make_pipeline, many_steps, slow_steps_s
from titan.plan.timeline import StageTimes, timeline

# Closed forms -------------------------------------------------------------------------------------------------------


def test_without_trouble_a_run_takes_its_steps_and_checkpoints_exactly() -> None:
    outcome = replay(make_worlds(config_of(steps=1000))[0])
    assert (outcome.steps, outcome.num_checkpoints, outcome.num_failures) == (1000, 166, 0)
    assert outcome.wall_s == 1000 * 10.0 + 166 * 4.0
    assert outcome.parts_s == dict.fromkeys(PARTS, 0.0) | {"useful": 10_000.0, "checkpoint": 664.0}
    assert outcome.goodput == 10_000 / 10_664


def test_without_trouble_the_step_is_that_of_the_timeline() -> None:
    outcome = replay(make_worlds(config_of(step=PIPELINE, steps=50))[0])
    assert outcome.step_s == (8 + 3) * 3.0 + 0.5
    assert outcome.wall_s == 50 * outcome.step_s + 8 * 4.0


def test_a_run_of_days_counts_whole_steps_only() -> None:
    outcome = replay(make_worlds(config_of(days=100.0 / DAY_S))[0])
    assert outcome.wall_s == pytest.approx(100.0)
    assert outcome.steps == 6 + 3, "6 steps, 4 s of checkpoint, 3 steps, and 6 s of a step that the end cut short"
    assert outcome.parts_s["lost"] == pytest.approx(6.0)


@pytest.mark.parametrize("stall_s", [0.0, 4.0])
def test_a_checkpoint_that_is_not_written_yet_holds_up_the_next(stall_s: float) -> None:
    checkpoint = {"every_steps": 1, "stall_s": stall_s, "write_s": 25.0}
    outcome = replay(make_worlds(config_of(steps=5, checkpoint=checkpoint))[0])
    assert outcome.wall_s == pytest.approx(10.0 + 4 * stall_s + 3 * 25.0 + 10.0)


# Second by second -----------------------------------------------------------------------------------------------------


def test_replay_agrees_with_a_simulator_that_goes_second_by_second() -> None:
    rng = random.Random(5)
    seen = Counter[str]()
    for case in range(300):
        world = random_world(rng)
        outcome, slow = replay(world), by_seconds(world)
        parts = {part: round(seconds, 6) for part, seconds in outcome.parts_s.items() if seconds > 1e-9}
        assert (outcome.steps, outcome.num_failures) == (slow["steps"], slow["failures"]), case
        work = ("useful", "stragglers", "jitter", "shrunk")
        assert sum(parts.get(part, 0) for part in work) == slow["work"], case
        others = [part for part in PARTS if part not in work]
        assert {part: parts.get(part, 0.0) for part in others} == {part: slow[part] for part in others}, case
        assert sum(outcome.parts_s.values()) == pytest.approx(outcome.wall_s)
        seen.update(part for part in PARTS if parts.get(part, 0.0) > 0)
    assert all(seen[part] >= 10 for part in PARTS if part != "jitter"), f"some parts were hardly tried: {seen}"


def random_world(rng: random.Random) -> World:
    """Two nodes or one job that fail often, in whole seconds."""
    end_s = rng.randint(300, 1500)
    config = config_of(
        days=end_s / DAY_S,
        fleet=[
            {
                "kind": "H100",
                "nodes": 2,
                "spare_nodes": rng.randint(0, 1),
                "repair_hours": rng.choice((0, 30, 200)) / 3600,
            }
        ],
        checkpoint={
            "every_steps": rng.randint(1, 6),
            "stall_s": float(rng.choice((0, 1, 5))),
            "write_s": float(rng.choice((0, 3, 45))),
        },
        recovery={
            "detect_s": float(rng.choice((0, 4))),
            "rebuild_s": float(rng.choice((0, 7, 20))),
            "reload_s": float(rng.choice((0, 3))),
            "without_spare": rng.choice(("wait", "shrink", "stop")),
            "shrink_efficiency": 1.0,
        },
        steps=rng.choice((None, 20)),
    )
    times = sorted(rng.sample(range(1, end_s), min(end_s // 150, 7)))
    failures = tuple(Failure(float(at), rng.choice((None, 0)), rng.random()) for at in times)
    starts = [0, *sorted(rng.sample(range(1, end_s), 3))]
    paces = [float(rng.choice((10, 10, 13))) for _ in starts]
    return World(config, 10.0, failures, np.array(starts, float), np.array(paces), np.array([0.0, 1.0]))


def by_seconds(world: World) -> Counter[str]:
    """The same run, one second after another: what ends at a second ends first, then failures strike."""
    slow = BySeconds(world)
    while True:
        slow.go_on()
        if slow.is_over:
            break
        for failure in world.failures:
            if failure.time_s == slow.now and slow.strike(failure):
                slow.go_on()
        slow.log.append(slow.label)
        slow.left -= slow.left > 0
    if slow.phase == "step" and not slow.is_done:
        slow.log[slow.step_began :] = ["lost"] * (len(slow.log) - slow.step_began)
    return Counter(dict.fromkeys((*PARTS, "work"), 0)) + Counter(slow.log + ["steps"] * slow.step + slow.strikes)


class BySeconds:
    """Two nodes; one entry of the log a second."""

    def __init__(self, world: World) -> None:
        self.world, self.config = world, world.config
        self.log: list[str] = []
        self.strikes: list[str] = []
        self.missing, self.spares, self.back = 0, self.config.fleet[0].spare_nodes, list[int]()
        self.step, self.safe_step, self.safe_at, self.slowdown = 0, 0, 0, 1
        self.writing: tuple[int, int, int] | None = None
        self.begin("step")

    @property
    def now(self) -> int:
        return len(self.log)

    @property
    def is_done(self) -> bool:
        return self.config.steps is not None and self.step >= self.config.steps

    @property
    def is_over(self) -> bool:
        return self.is_done or self.now >= round(self.config.days * DAY_S)

    @property
    def label(self) -> str:
        names = {"step": "work", "stall": "checkpoint", "flush": "checkpoint", "regrow": "checkpoint"}
        return names.get(self.phase, self.phase)

    def begin(self, phase: str) -> None:
        recovery = self.config.recovery
        paces = zip(self.world.pace_start_s, self.world.pace_s, strict=True)
        seconds = {
            "step": self.slowdown * [pace for start, pace in paces if start <= self.now][-1],
            "stall": self.config.checkpoint.stall_s,
            "detect": recovery.detect_s,
            "rebuild": recovery.rebuild_s,
            "reload": recovery.reload_s,
        }
        self.phase, self.left, self.step_began = phase, round(seconds.get(phase, 0)), self.now

    def go_on(self) -> None:
        """From phase to phase until one takes time."""
        while self.left == 0 and not self.is_done:
            self.spares += sum(at <= self.now for at in self.back)
            self.back = [at for at in self.back if at > self.now]
            if self.phase == "step":
                self.step += 1
                if not self.is_done:
                    self.begin("step" if self.step % self.config.checkpoint.every_steps else "flush")
            elif self.phase in ("flush", "regrow"):
                self.settle()
                if self.writing is not None:
                    return
                self.begin("stall" if self.phase == "flush" else "found")
            elif self.phase == "stall":
                self.writing = (self.step, self.now + round(self.config.checkpoint.write_s), self.now)
                self.begin("regrow" if self.missing and self.spares else "step")
            elif self.phase == "stopped":
                return
            elif self.phase in ("detect", "waiting"):
                policy, few = self.config.recovery.without_spare, self.missing > self.spares
                if few and policy == "stop":
                    self.begin("stopped")
                elif few and (policy == "wait" or self.missing - self.spares == 2):
                    self.phase = "waiting"
                    return
                else:
                    self.begin("found")
            elif self.phase == "found":
                used = min(self.missing, self.spares)
                self.missing, self.spares = self.missing - used, self.spares - used
                self.slowdown = 2 if self.missing else 1
                self.begin("rebuild")
            else:
                self.begin("reload" if self.phase == "rebuild" else "step")

    def settle(self) -> None:
        if self.writing is not None and self.writing[1] <= self.now:
            (self.safe_step, _, self.safe_at), self.writing = self.writing, None

    def strike(self, failure: Failure) -> bool:
        if self.phase == "stopped" or (failure.group is not None and failure.luck * 2 >= 2 - self.missing):
            return False
        self.settle()
        self.log = ["lost" if second == "work" and at >= self.safe_at else second for at, second in enumerate(self.log)]
        self.writing, self.step, self.safe_at = None, self.safe_step, self.now
        self.strikes.append("failures")
        if failure.group is not None:
            self.missing += 1
            self.back.append(self.now + round(self.config.fleet[0].repair_hours * 3600))
        self.begin("detect")
        return True


# Chance ---------------------------------------------------------------------------------------------------------------


def test_runs_of_one_seed_are_equal_and_those_of_another_differ() -> None:
    trouble: dict[str, Any] = {
        "days": 5.0,
        "repeats": 2,
        "fleet": [{"kind": "H100", "nodes": 100, "device_mtbf_hours": 5000.0, "spare_nodes": 2}],
        "jitter": {"pass_sigma": 0.02, "step_sigma": 0.05},
        "stragglers": {"every_hours": 500.0, "hours": 3.0},
    }
    first, again = (simulation_json(simulate(config_of(**trouble))) for _ in range(2))
    assert first == again
    assert simulation_json(simulate(config_of(**trouble, seed=2)))["goodput"] != first["goodput"]


def test_failures_come_as_often_as_their_mean_time_says() -> None:
    config = config_of(
        days=1000.0,
        fleet=[
            {
                "kind": "H100",
                "nodes": 50,
                "devices_per_node": 4,
                "device_mtbf_hours": 4000.0,
                "node_mtbf_hours": 1000.0,
            },
            {"kind": "A100", "nodes": 10, "node_mtbf_hours": 500.0},
        ],
        recovery={"job_mtbf_hours": 100.0},
    )
    per_hour = {0: 50 * (4 / 4000 + 1 / 1000), 1: 10 / 500, None: 1 / 100}
    counted = Counter(failure.group for failure in draw_failures(config, np.random.default_rng(0)))
    for group, rate in per_hour.items():
        expected = 24_000 * rate
        assert abs(counted[group] - expected) < 4 * math.sqrt(expected), group
    assert fleet_mtbf_s(config) == pytest.approx(3600 / sum(per_hour.values()))
    assert fleet_mtbf_s(config_of()) == math.inf


def test_positions_are_slow_for_the_share_of_time_that_their_devices_say() -> None:
    config = config_of(days=2000.0, stragglers={"every_hours": 400.0, "hours": 2.0})
    slow = draw_slow_times(config, (10, 200), np.random.default_rng(0))
    lasts = np.diff([*slow.start_s, 2000 * DAY_S])
    assert (lasts > 0).all()
    for position, devices in enumerate((10, 200)):
        share = sum(last for last, those in zip(lasts, slow.positions, strict=True) if position in those)
        expected = 1 - math.exp(-devices * 2 / 400)
        assert share / (2000 * DAY_S) == pytest.approx(expected, abs=0.02), devices


def test_the_slowest_of_many_devices_is_drawn_as_if_each_had_been() -> None:
    sigma, rng = 0.3, np.random.default_rng(0)
    config = config_of(fleet=[{"kind": "H100", "nodes": 25}], jitter={"pass_sigma": sigma})
    drawn = np.concatenate([jitter_factors(make_pipeline(config), config, rng) for _ in range(30)])
    each = np.exp(sigma * rng.standard_normal((len(drawn), 200)) - sigma**2 / 2).max(axis=1)
    assert drawn.mean() == pytest.approx(each.mean(), rel=0.01)
    assert drawn.std() == pytest.approx(each.std(), rel=0.1)


def test_many_steps_at_once_are_those_of_the_timeline_one_by_one() -> None:
    rng = np.random.default_rng(2)
    for name, chunks in (("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1)):
        position = {"kind": "H100", "devices": 8, "count": 4, "forward_s": 1.0, "backward_s": 1.5, "to_next_s": 0.7,
                    "to_previous_s": 0.4, "tail_s": 0.2, "weight_s": 0.5 if name == "zero-bubble" else 0.0}  # fmt: skip
        step = {"schedule": name, "chunks": chunks, "micro_batches": 8, "positions": [position]}
        pipeline = make_pipeline(config_of(step=step))
        factors = 1 + rng.random((4, 10))
        got = many_steps(pipeline, 10, factors.__getitem__)
        for sample in range(10):
            times = [
                StageTimes(t.forward_s * f, t.backward_s * f, t.weight_s * f, t.to_next_s, t.to_previous_s)
                for t, f in zip(pipeline.times, list(factors[:, sample]) * chunks, strict=True)
            ]
            exact = timeline(pipeline.schedules, chunks, times, pipeline.tail_s)
            assert got[sample] == pytest.approx(exact.step_s, rel=1e-12)


def test_a_slow_position_slows_the_step_as_its_timeline_does() -> None:
    pipeline = make_pipeline(config_of(step=PIPELINE))
    quiet, last, all_of_them = slow_steps_s(pipeline, [frozenset(), frozenset({3}), frozenset(range(4))], 2.0)
    assert (quiet, all_of_them) == (33.5, 66.5)
    schedules = [make_schedule("1f1b", position, 4, 1, 8) for position in range(4)]
    exact = timeline(schedules, 1, [StageTimes(1.0, 2.0)] * 3 + [StageTimes(2.0, 4.0)], [0.5] * 4)
    assert last == exact.step_s


def test_noise_of_mean_one_costs_nothing_by_itself() -> None:
    config = config_of(days=30.0, jitter={"step_sigma": 0.1})
    parts = replay(make_worlds(config)[0]).parts_s
    assert parts["jitter"] / parts["useful"] == pytest.approx(0.0, abs=0.03)
    assert parts["jitter"] != 0
