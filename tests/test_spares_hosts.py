"""The teacher's host dies, and spare processes on another host take its place: the run ends with the very same bits."""

from pathlib import Path

import pytest
import torch

from tests.hosts.cluster import HurtRun
from tests.hosts.namespaces import hosts, require_namespaces
from tests.runs import titan, weights, write_tiny_config
from titan.observe.events import read_events
from titan.observe.files import Record

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1500)]
STEPS = 1500
TRAINING = (
    f"run.steps={STEPS}",
    'teacher.layout={stages=[{layers=2,tp=2,device="t"}]}',
    'students.early.layout={stages=[{layers=1,device="s"},{layers=1,device="s"}]}',
    'students.late.layout={stages=[{layers=1,device="s"}]}',
)
SETTINGS = (
    *TRAINING,
    "checkpoint.every_steps=50",
    "labels.delivery=files",
    "recovery.spares=2",
    "recovery.policy=wait",
    "cluster.nodes=3",
)
ROOMS = (
    ("--num-cpus=1", '--resources={"s": 3}'),
    *(("--num-cpus=1", '--resources={"t": 2}'),) * 2,
)
"""Students stay on the first host; each of the others has room for the whole teacher."""
WAIT_S = 400.0


def test_a_killed_host_with_a_spare_one_beside_it_changes_no_bit_of_any_role(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    require_namespaces()
    calm = tmp_path_factory.mktemp("calm")
    write_tiny_config(calm / "work")
    sets = [part for one in TRAINING for part in ("--set", one)]
    undisturbed = titan("run", "tiny.toml", *sets, cwd=calm / "work", timeout_s=WAIT_S)
    assert undisturbed.returncode == 0, undisturbed.stderr
    with hosts(3, 256 << 20) as made:
        path = write_tiny_config(made[0].folder / "shared/work")
        hurt = HurtRun(made, SETTINGS, ROOMS)
        hurt.begin("run", path)
        hurt.wait(lambda: len(told(hurt.run, "spare_up")) >= 6, WAIT_S, "two spares on each of three hosts")
        name = hurt.placed("teacher")[0].rpartition(":")[0]
        host = next(one for one in made if one.name == name)
        hurt.down.add(name)
        host.kill()
        hurt.wait(lambda: bool(told(hurt.run, "recovered")), WAIT_S, "recovery")
        (up,) = [one for one in told(hurt.run, "ranks_up") if one.get("role") == "teacher"]
        assert up["spares"] == up["ranks"] == 2
        assert hurt.placed("teacher")[0].rpartition(":")[0] not in (name, "h0")
        hurt.wait_for_end(2 * WAIT_S)
        assert hurt.ended() == 0, hurt.log.read_text()[-2000:]
        assert told(hurt.run, "restarting")[0]["from_step"] > 0 and not told(hurt.run, "layout")
        for command in ("audit", "verify"):
            looked = titan("labels", command, hurt.run, cwd=hurt.run)
            assert looked.returncode == 0, looked.stdout + looked.stderr
        for role in ("teacher", "early", "late"):
            expected, found = weights(calm / "work/runs/tiny", role, STEPS), weights(hurt.run, role, STEPS)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected), f"{role} has other weights"
        assert hurt.leftovers() == {}


def told(run: Path, event: str) -> list[Record]:
    """Events of a kind."""
    return [one for one in read_events(run) if one["event"] == event]
