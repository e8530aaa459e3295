"""A planned run on two kinds of devices, each on a host of its own: without one it goes on as the planner says."""

import json
from pathlib import Path

import pytest

from tests.hosts.cluster import HurtRun
from tests.hosts.namespaces import hosts, require_namespaces
from tests.runs import TINY, titan, write_tiny_config
from tests.test_grow_hosts import ROLES, WAIT_S, all_train, events, last_step, losses
from tests.test_planned_run import SHAPE, blocks_of
from titan.observe.files import Record

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]
STEPS = 240
INVENTORY = """
nodes = [
  { name = "fast", kind = "fast", devices = 2, memory_gb = 2.0 },
  { name = "slow", kind = "slow", devices = 2, memory_gb = 2.0 },
]
links = [
  { between = ["fast", "slow"], gb_per_s = 1.0, latency_s = 2e-4 },
  { between = ["fast", "fast"], gb_per_s = 1.0 },
  { between = ["slow", "slow"], gb_per_s = 1.0 },
]
"""
TRAINING = (f"run.steps={STEPS}", "data.sequence_length=32", "students.late.start={step=8}")
SETTINGS = (
    *TRAINING,
    "checkpoint.every_steps=10",
    "labels.delivery=files",
    "cluster.nodes=3",
    "cluster.cpu_ranks_per_core=3",
    "cluster.step_timeout_s=60",
)
TOLERANCE = {"teacher": 1e-4, "early": 1e-3, "late": 1e-3}
"""Nats, as in tests/test_grow_hosts.py."""
ROOMS = tuple(
    ("--num-cpus=1", *((f"--resources={json.dumps({kind: 2})}",) if kind else ())) for kind in ("", "fast", "slow")
)


def write_config(folder: Path, layout: str) -> Path:
    """A teacher of six layers."""
    path = write_tiny_config(folder)
    text = TINY.format(text=folder / "text").replace("layers = 2, hidden = 64", "layers = 6, hidden = 64")
    path.write_text(text.replace("layout = { tp = 2 }", layout))
    return path


def devices(hurt: HurtRun) -> list[dict[str, int]]:
    """Of each layout that the teacher has changed to."""
    return [one["devices"] for one in events(hurt, "layout") if one["role"] == "teacher"]


def promised(hurt: HurtRun) -> Record:
    """What the teacher's present layout is said to take."""
    return dict(json.loads((hurt.run / "plan.json").read_text())["predictions"]["teacher"])


def test_a_lost_kind_of_device_is_done_without_as_planned_and_taken_back(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    require_namespaces()
    calm = tmp_path_factory.mktemp("calm")
    write_config(calm, "")
    undisturbed = titan(
        "run", "tiny.toml", *(part for one in TRAINING for part in ("--set", one)), cwd=calm, timeout_s=WAIT_S
    )
    assert undisturbed.returncode == 0, undisturbed.stderr
    with hosts(3, 256 << 20) as made:
        path = write_config(made[0].folder / "shared/work", "layout = { planned = true, mixed = false }")
        profile = SHAPE.format(blocks=f"{blocks_of('fast', 0.002)},{blocks_of('slow', 0.005)}")
        path.with_name("inventory.toml").write_text(INVENTORY)
        path.with_name("profile.toml").write_text(profile)
        files = (f"cluster.{name}={path.with_name(name + '.toml')}" for name in ("inventory", "profile"))
        hurt = HurtRun(made, (*SETTINGS, *files), ROOMS)
        hurt.begin("run", path)
        hurt.wait(lambda: last_step(hurt) >= 20, WAIT_S, "step 20")
        (prepared,) = events(hurt, "planned_for_loss")
        assert set(prepared["step_s_without_a_node"]) == {"fast", "slow"}

        hurt.down.add(made[1].name)
        made[1].kill()
        hurt.wait(lambda: devices(hurt) == [{"slow": 2}] and all_train(hurt), WAIT_S, "steps on slow devices alone")
        lost_at = last_step(hurt)
        hurt.wait(lambda: last_step(hurt) >= lost_at + 20, WAIT_S, "20 steps more")

        assert {stage["device"] for stage in promised(hurt)["positions"]} == {"slow"}
        slow_s = promised(hurt)["step_s"]
        assert slow_s == pytest.approx(prepared["step_s_without_a_node"]["fast"], abs=1e-4), "it was looked up"

        hurt.bring_back(made[1])
        both = {"fast": 2, "slow": 2}
        hurt.wait(lambda: devices(hurt)[-1] == both and promised(hurt)["step_s"] < slow_s, WAIT_S, "both kinds again")
        assert last_step(hurt) < STEPS
        hurt.wait_for_end(2 * WAIT_S)
        assert hurt.ended() == 0, hurt.log.read_text()[-2000:]
        for command in ("audit", "verify"):
            looked = titan("labels", command, hurt.run, cwd=hurt.run)
            assert looked.returncode == 0, looked.stdout + looked.stderr
        for role in ROLES:
            expected, found = losses(calm / "runs/tiny", role), losses(hurt.run, role)
            assert list(found) == list(expected), f"{role}: not every step once and in order"
            furthest = max(abs(found[step] - expected[step]) for step in expected)
            assert furthest <= TOLERANCE[role], f"{role}: the loss differs by {furthest:.2e}"
        assert hurt.leftovers() == {}
