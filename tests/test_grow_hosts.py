"""A run that starts on two hosts, grows with a third and shrinks without it, and is the same training all the while."""

from pathlib import Path

import pytest

from tests.hosts.cluster import HurtRun
from tests.hosts.namespaces import hosts, require_namespaces
from tests.runs import titan, write_tiny_config
from titan.observe.events import read_events
from titan.observe.files import Record, read_lines
from titan.observe.metrics import StepMetric, read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]
ROLES = ("teacher", "early", "late")
STEPS = 400
TRAINING = (
    f"run.steps={STEPS}",
    "run.name=tiny",
    "data.batch_size=24",
    "data.sequence_length=64",
    "teacher.model.hidden=192",
    "teacher.model.ffn=512",
    "teacher.model.layers=3",
    "students.late.start={step=8}",  # not by a lead that rounding may move by a step
)
SETTINGS = (
    *TRAINING,
    "teacher.layout.tp=1",
    "teacher.layout.pp=3",
    "teacher.layout.dp=2",
    "checkpoint.every_steps=10",
    "labels.delivery=files",
    "cluster.nodes=2",
    "cluster.cpu_ranks_per_core=3",
    "cluster.step_timeout_s=60",
    "recovery.start_smaller=true",
)
"""Nine ranks; a host has room for three."""
ROOM = ("--num-cpus=1",)
WAIT_S = 240.0
TOLERANCE = {"teacher": 1e-4, "early": 1e-3, "late": 1e-3}
"""Nats: another layout is another order of sums, in every step since. To students a draw or a code of a label may fall
otherwise by that rounding.
"""


def test_roles_grow_with_a_host_and_shrink_without_it_and_no_step_is_lost(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    require_namespaces()
    calm = tmp_path_factory.mktemp("calm")
    write_tiny_config(calm)
    sets = [part for one in (*TRAINING, "teacher.layout.tp=1") for part in ("--set", one)]
    undisturbed = titan("run", "tiny.toml", *sets, cwd=calm, timeout_s=WAIT_S)
    assert undisturbed.returncode == 0, undisturbed.stderr
    with hosts(3, 256 << 20) as made:
        path = write_tiny_config(made[0].folder / "shared/work")
        hurt = HurtRun(made, SETTINGS, (ROOM,) * 3, num_up=2)
        run = hurt.run
        hurt.begin("run", path)
        hurt.wait(lambda: last_step(hurt) >= 40, WAIT_S, "step 40")
        first = ranks_of(hurt)
        assert first["teacher"] < 6 and sum(first.values()) <= 6, first

        hurt.join(made[2])
        hurt.wait(lambda: ranks_of(hurt) == {"teacher": 6, "early": 2, "late": 1}, WAIT_S, "growth of all roles")
        hurt.wait(lambda: all_train(hurt), WAIT_S, "first step after growing")
        grown_at = last_step(hurt)
        lines = [(one["role"], one["step"]) for one in read_lines(run / "metrics.jsonl") if one["kind"] == "step"]
        assert len(lines) == len(set(lines)), "growing cost a step"
        assert not events(hurt, "restarting")
        hurt.wait(lambda: last_step(hurt) >= grown_at + 40, WAIT_S, "40 steps more")

        hurt.down.add(made[2].name)
        made[2].kill()
        hurt.wait(lambda: bool(events(hurt, "restarting")), WAIT_S, "loss of the host")
        hurt.wait(lambda: sum(ranks_of(hurt).values()) <= 6 and all_train(hurt), WAIT_S, "recovery")
        assert ranks_of(hurt)["teacher"] < 6
        hurt.wait_for_end(2 * WAIT_S)
        assert hurt.ended() == 0, hurt.log.read_text()[-2000:]
        for command in ("audit", "verify"):
            looked = titan("labels", command, run, cwd=run)
            assert looked.returncode == 0, looked.stdout + looked.stderr
        for role in ROLES:
            expected, found = losses(calm / "runs/tiny", role), losses(run, role)
            assert list(found) == list(expected), f"{role}: not every step once and in order"
            furthest = max(abs(found[step] - expected[step]) for step in expected)
            assert furthest <= TOLERANCE[role], f"{role}: the loss differs by {furthest:.2e}"
        assert hurt.leftovers() == {}


def events(hurt: HurtRun, name: str) -> list[Record]:
    return [one for one in read_events(hurt.run) if one["event"] == name]


def last_step(hurt: HurtRun) -> int:
    """Of the teacher."""
    lines = read_lines(hurt.run / "metrics.jsonl")
    return max((one["step"] for one in lines if one["role"] == "teacher"), default=0)


def ranks_of(hurt: HurtRun) -> dict[str, int]:
    """Of each role, as it was placed last."""
    return {one["role"]: len(one["processes"]) for one in events(hurt, "placed")}


def all_train(hurt: HurtRun) -> bool:
    """Whether every role has made a step since it was placed last."""
    since = {one["role"]: one["generation"] for one in events(hurt, "placed")}
    recovered = {one["role"]: one["generation"] for one in events(hurt, "recovered")}
    done = {one["role"] for one in events(hurt, "role_finished")}
    return all(
        generation == 1 or role in done or recovered.get(role) == generation for role, generation in since.items()
    )


def losses(run: Path, role: str) -> dict[int, float]:
    """By step, in the order in which they were told."""
    return {one.step: one.loss for one in read_metrics(run) if isinstance(one, StepMetric) and one.role == role}
