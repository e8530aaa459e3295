"""Runs are started, killed, stopped and resumed as a user would; what they end with is compared bit for bit."""

import json
import platform
import random
import re
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch

from tests.runs import (
    kill_tree,
    placed,
    processes_under,
    rank_processes,
    start_titan,
    titan,
    wait_for_events,
    wait_for_step,
    weights,
    write_tiny_config,
)
from titan.checkpoint.load import Checkpoint
from titan.config.load import load_config
from titan.model.parameters import parameter_specs
from titan.observe.events import read_events
from titan.observe.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ROLES = ("teacher", "early", "late")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.toml and the run `tiny`, never disturbed."""
    folder = tmp_path_factory.mktemp("survive")
    write_tiny_config(folder)
    result = titan("run", "tiny.toml", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def killed(workplace: Path) -> Path:
    """The run `killed`: driver and all its processes got SIGKILL at a random step."""
    step = random.randint(3, 34)
    print(f"killing at step {step}")
    run = workplace / "runs" / "killed"
    process = start_titan("run", "tiny.toml", "--set", "run.name=killed", cwd=workplace)
    wait_for_step(run, "teacher", step, process)
    kill_tree(process.pid)
    process.communicate()
    return run


def test_an_undisturbed_run_learns_every_label_once_and_leaves_no_process(workplace: Path) -> None:
    summary = json.loads((workplace / "runs/tiny/summary.json").read_text())
    assert list(summary["roles"]) == list(ROLES)
    early = summary["roles"]["early"]
    assert early["labels_consumed"] == (40 - 5) * 8
    for name in ("early", "late"):
        assert summary["roles"][name]["labels_missed"] == summary["roles"][name]["labels_repeated"] == 0
    assert processes_under(workplace) == []


def test_a_killed_run_resumes_to_the_same_bits(workplace: Path, killed: Path) -> None:
    shutil.copytree(killed, workplace / "runs" / "moved")  # for the next test
    result = titan("resume", "runs/killed", cwd=workplace)
    assert result.returncode == 0, result.stderr
    for role in ROLES:
        expected, found = weights(workplace / "runs/tiny", role, 40), weights(killed, role, 40)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), role
    summary = json.loads((killed / "summary.json").read_text())
    assert summary["roles"]["early"]["labels_consumed"] == (40 - 5) * 8
    assert summary["roles"]["early"]["labels_repeated"] == 0
    for command in ("audit", "verify"):
        looked = titan("labels", command, "runs/killed", cwd=workplace)
        assert looked.returncode == 0, looked.stdout + looked.stderr


def test_a_killed_run_resumes_in_another_layout_within_rounding(workplace: Path, killed: Path) -> None:
    layouts = ["teacher.layout.tp=1", "teacher.layout.pp=2", "students.early.layout.pp=1", "students.early.layout.dp=2"]
    layouts += ["students.early.layout.shard=2"]
    overrides = [part for layout in layouts for part in ("--set", layout)]
    result = titan("resume", "runs/moved", *overrides, cwd=workplace)
    assert result.returncode == 0, result.stderr
    config = load_config(workplace / "tiny.toml")
    for role in ROLES:
        model = config.teacher.model if role == "teacher" else next(s for s in config.students if s.name == role).model
        ends = [
            Checkpoint(workplace / "runs" / name / "checkpoints" / role / "step-00000040") for name in ("tiny", "moved")
        ]
        for name, spec in parameter_specs(model, 512).items():
            expected, found = (end.whole("weight", name, spec) for end in ends)
            assert (expected - found).abs().max() < 1e-5, f"{role} {name}"


def test_ctrl_c_stops_cleanly_and_the_run_resumes_to_the_same_bits(workplace: Path) -> None:
    run = workplace / "runs" / "stopped"
    process = start_titan("run", "tiny.toml", "--set", "run.name=stopped", cwd=workplace)
    wait_for_step(run, "teacher", 3, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "titan resume" in err and "Traceback" not in err
    assert processes_under(workplace) == []
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    last = {json.loads(line)["role"]: number for number, line in enumerate(lines)}  # as if they had died unheard
    (run / "metrics.jsonl").write_bytes(b"".join(line for at, line in enumerate(lines) if at not in last.values()))
    result = titan("resume", "runs/stopped", cwd=workplace)
    assert result.returncode == 0, result.stderr
    metrics = [[(m.kind, m.role, m.step) for m in read_metrics(path)] for path in (workplace / "runs/tiny", run)]
    assert sorted(metrics[0]) == sorted(metrics[1])
    for role in ROLES:
        expected, found = weights(workplace / "runs/tiny", role, 40), weights(run, role, 40)
        assert all(torch.equal(expected[key], found[key]) for key in expected), role


def test_the_teacher_is_the_same_bit_for_bit_without_students(workplace: Path) -> None:
    config = (workplace / "tiny.toml").read_text()
    head, _, rest = config.partition("[[students]]")
    alone = workplace / "alone.toml"
    alone.write_text(head.replace('"tiny"', '"alone"') + rest[rest.index("[checkpoint]") :])
    result = titan("run", "alone.toml", cwd=workplace)
    assert result.returncode == 0, result.stderr
    expected, found = (weights(workplace / "runs" / name, "teacher", 40) for name in ("tiny", "alone"))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_rank_that_dies_or_hangs_ends_the_run_with_one_readable_line(workplace: Path, blow: signal.Signals) -> None:
    name = f"hurt-{blow.name.lower()}"
    settings = (f"run.name={name}", "run.steps=4000", "recovery.policy=stop")
    process = start_titan("run", "tiny.toml", *(part for s in settings for part in ("--set", s)), cwd=workplace)
    wait_for_step(workplace / "runs" / name, "teacher", 3, process)
    rank_processes(process.pid)[0].send_signal(blow)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    (line,) = err.splitlines()
    assert re.match(rf"titan: \w+ rank \d+ on {platform.node()}, (about )?step \d+: ", line), line
    assert processes_under(workplace) == []
    assert titan("status", f"runs/{name}", cwd=workplace).returncode == 0


@pytest.mark.timeout(300)
def test_ranks_that_die_or_hang_are_put_up_again_and_the_run_ends_with_the_same_bits(workplace: Path) -> None:
    long = ("--set", "run.steps=120", "--set", "checkpoint.every_steps=5")
    calm = titan("run", "tiny.toml", *long, "--set", "run.name=calm", cwd=workplace)
    assert calm.returncode == 0, calm.stderr
    run = workplace / "runs" / "hurt"
    process = start_titan("run", "tiny.toml", *long, "--set", "run.name=hurt", cwd=workplace)
    wait_for_step(run, "early", 12, process)
    blows = [signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL]
    for role, blow in zip(ROLES, blows, strict=True):
        psutil.Process(placed(run, role)[-1]).send_signal(blow)
    wait_for_events(run, "recovered", len(blows), process)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    for role in ROLES:
        expected, found = weights(workplace / "runs" / "calm", role, 120), weights(run, role, 120)
        assert all(torch.equal(expected[key], found[key]) for key in expected), role
    assert sorted(event["role"] for event in read_events(run) if event["event"] == "rank_lost") == sorted(ROLES)
    assert out.count("goes on from step") == len(blows)
    looked = titan("labels", "audit", "runs/hurt", cwd=workplace)
    assert looked.returncode == 0, looked.stdout + looked.stderr
    assert processes_under(workplace) == []


def test_a_role_that_fails_again_and_again_ends_the_run(workplace: Path) -> None:
    run = workplace / "runs" / "hopeless"
    settings = ("run.name=hopeless", "run.steps=4000", "checkpoint.every_steps=4000", "recovery.max_restarts=1")
    process = start_titan("run", "tiny.toml", *(part for s in settings for part in ("--set", s)), cwd=workplace)
    for count in range(2):
        wait_for_events(run, "ranks_up", count + 1, process)
        psutil.Process(placed(run, "teacher")[0]).kill()
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "restarted 1 times from step 0 (recovery.max_restarts)" in err, err
    assert processes_under(workplace) == []
