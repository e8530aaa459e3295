"""`titan simulate` over a plan: its devices are the fleet, its timeline the step, the planner's the shrunk step."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.runs import titan
from tests.test_plan_command import PLAN
from tests.test_plan_schedules import PIPELINES, few_micro_batches
from titan.config.simulation import SimulationConfig, check_simulation
from titan.errors import ConfigError
from titan.plan.search.node_loss import plans_after_node_loss
from titan.plan.search.role import plan_role
from titan.plan.simulate.failures import DAY_S, Failure
from titan.plan.simulate.planned import pipeline_of, read_simulation
from titan.plan.simulate.replay import World, make_worlds, replay
from titan.plan.simulate.step_times import slow_steps_s

SIMULATION = """
name = "planned"
plan = "plan.toml"
days = 2.0
repeats = 2
weak_scaling = [8, 64]
[[fleet]]
kind = "fast"
device_mtbf_hours = 400.0
spare_nodes = 1
[recovery]
without_spare = "shrink"
[stragglers]
every_hours = 20.0
[checkpoint]
every_steps = 20
"""
SMALL = PLAN.replace("batch_size = 256", "batch_size = 32")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "plan.toml").write_text(SMALL)
    (tmp_path / "sim.toml").write_text(SIMULATION)
    return tmp_path


def test_fleet_and_step_are_those_of_the_best_plan(place: Path) -> None:
    told = json.loads(titan("plan", "plan.toml", "--json", cwd=place).stdout)
    result = titan("simulate", "sim.toml", "--json", cwd=place)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["step_s"] == pytest.approx(told["step_s"], rel=1e-12)
    config, planned = read_simulation(place / "sim.toml")
    assert planned is not None and sum(planned.devices) == sum(told["used"].values())
    assert {group.kind: group.nodes * group.devices_per_node for group in config.fleet} == told["used"]
    fast = next(group for group in config.fleet if group.kind == "fast")
    assert (fast.spare_nodes, fast.device_mtbf_hours, fast.shrinks) == (1, 400.0, True)
    assert fast.shrunk_step_s is not None and fast.shrunk_step_s > told["step_s"]
    assert [each["devices"] for each in found["weak_scaling"]] == [8, 64]
    assert found["goodput"] < 1.0 and found["failures"] > 0 and found["parts_s"]["stragglers"] > 0


def test_a_lost_node_slows_the_run_to_the_step_that_the_planner_finds(place: Path) -> None:
    config, planned = read_simulation(place / "sim.toml")
    fleet = tuple(group.model_copy(update={"spare_nodes": 0, "repair_hours": 1e6}) for group in config.fleet)
    quiet = config.model_copy(update={"fleet": fleet, "repeats": 1})
    (made,) = make_worlds(quiet, planned)
    slow = [group for group in fleet if group.kind == "slow"]
    for struck in ([0], [1], [0, 1])[: 3 if slow else 1]:
        failures = tuple(Failure(3600.0 * (index + 1), group, 0.5) for index, group in enumerate(struck))
        world = World(quiet, made.step_s, failures, np.zeros(1), np.array([made.step_s]), np.array([0.0, 1.0]))
        last = [stretch for stretch in replay(world).stretches if stretch.steps > 1][-1]
        expected_s = made.step_s
        for group in struck:
            shrunk_s = fleet[group].shrunk_step_s
            assert shrunk_s is not None
            expected_s *= shrunk_s / made.step_s
        assert (last.end_s - last.start_s) / last.steps == pytest.approx(expected_s, rel=1e-9)


def test_a_run_waits_where_nothing_fits_without_the_node() -> None:
    values = {
        "name": "waits",
        "days": 2.0,
        "fleet": [{"kind": "a", "nodes": 4, "repair_hours": 5.0, "shrinks": False}],
        "step": {"seconds": 10.0},
        "recovery": {"without_spare": "shrink"},
        "checkpoint": {"every_steps": 10},
    }
    config = check_simulation(values)
    assert _waited_s(config) > 4 * 3600.0
    assert _waited_s(check_simulation(values | {"fleet": [{"kind": "a", "nodes": 4, "repair_hours": 5.0}]})) == 0.0


def _waited_s(config: SimulationConfig) -> float:
    (world, *_) = make_worlds(config)
    failing = World(
        config, world.step_s, (Failure(3600.0, 0, 0.1),), world.pace_start_s, world.pace_s, world.jitter_sums
    )
    outcome = replay(failing)
    assert outcome.wall_s == pytest.approx(2 * DAY_S)
    return outcome.parts_s["waiting"]


def test_the_step_of_an_interleaved_plan_is_its_timeline_slow_positions_included() -> None:
    plan = plan_role(few_micro_batches(), PIPELINES)
    assert plan.layout.schedule == "interleaved"
    pipeline = pipeline_of(plan.prediction)
    quiet_s, slow_s, all_s = slow_steps_s(pipeline, [frozenset(), frozenset({0}), frozenset({0, 1})], 2.0)
    assert quiet_s == pytest.approx(plan.step_s, rel=1e-12)
    assert quiet_s < slow_s < all_s < 2 * quiet_s
    assert any(then is not None for then in plans_after_node_loss(plan).values())


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"plan.toml"', '"none.toml"', "none.toml: No such file"),
        ('kind = "fast"', 'kind = "quick"', "fleet.0.kind is 'quick'; the plan file has fast, slow"),
        ("spare_nodes = 1", "nodes = 4", "fleet.0.nodes is 4 beside plan, which tells it; leave it out"),
        ("[checkpoint]", "[step]\nseconds = 1.0\n[checkpoint]", "step is given beside plan"),
        ("spare_nodes = 1", "spare_nodes = -1", "spare_nodes is -1; want"),
        ('plan = "plan.toml"', "plan = 3", "plan is 3; want"),
    ],
)
def test_a_mistake_says_what_to_do(place: Path, old: str, new: str, says: str) -> None:
    (place / "sim.toml").write_text(SIMULATION.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        read_simulation(place / "sim.toml")
    assert says in str(caught.value)
