"""A teacher assistant: learns of the teacher, teaches a pupil in the same run; killed, resumed, learned from later."""

import json
import signal
from pathlib import Path

import psutil
import pytest
import torch

from tests.runs import (
    placed,
    processes_under,
    start_titan,
    titan,
    wait_for_events,
    wait_for_step,
    weights,
    write_tiny_config,
)
from titan.distill.log.manifest import read_manifest
from titan.distill.log.reader import LabelReader

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STUDENTS = """
[[students]]
name = "assistant"
model = { layers = 2, hidden = 48, heads = 2, ffn = 96 }
layout = { dp = 2 }
start = { step = 3 }
[[students]]
name = "pupil"
teacher = "assistant"
model = { layers = 1, hidden = 32, heads = 2, ffn = 64 }
[[students]]
name = "grandpupil"
teacher = "pupil"
model = { layers = 1, hidden = 32, heads = 2, ffn = 64 }
start = { step = 8 }
"""
ROLES = ("teacher", "assistant", "pupil", "grandpupil")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with chain.toml and its run, never disturbed."""
    folder = tmp_path_factory.mktemp("chain")
    write_tiny_config(folder)
    head, _, rest = (folder / "tiny.toml").read_text().partition("[[students]]")
    text = head.replace('name = "tiny"', 'name = "chain"') + STUDENTS + rest[rest.index("[checkpoint]") :]
    (folder / "chain.toml").write_text(text)
    result = titan("run", "chain.toml", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_every_member_of_the_chain_learns_all_of_its_own_teacher(workplace: Path) -> None:
    run = workplace / "runs" / "chain"
    roles = json.loads((run / "summary.json").read_text())["roles"]
    assert {role: roles[role].get("labels_consumed") for role in ROLES} == {
        "teacher": None,
        "assistant": 37 * 8,
        "pupil": 37 * 8,
        "grandpupil": 32 * 8,
    }
    for command in ("audit", "verify", "ls", "stats"):
        looked = titan("labels", command, "runs/chain", cwd=workplace)
        assert looked.returncode == 0, looked.stdout + looked.stderr
    manifest = read_manifest(run / "labels" / "assistant")
    assert (manifest.producer, manifest.start_step) == ("assistant", 3)


def test_the_assistant_s_labels_are_of_the_teacher_s_samples_and_of_its_own_making(workplace: Path) -> None:
    logs = workplace / "runs" / "chain" / "labels"
    of_teacher, of_assistant = (LabelReader(logs / name, 1.0) for name in ("teacher", "assistant"))
    for step in (4, 40):
        blocks = [reader.read(reader.wait_commit(step)) for reader in (of_teacher, of_assistant)]  # type: ignore[arg-type]
        (taught, _), (made, _) = blocks
        for name in ("tokens_BS1", "sample_ids_B"):
            first, second = (torch.cat([torch.from_numpy(getattr(b, name)) for b in some]) for some in (taught, made))
            assert torch.equal(first, second), name
        assert taught[0].labels.entropy_BS.mean() != made[0].labels.entropy_BS.mean()
    for reader in (of_teacher, of_assistant):
        reader.close()


def test_a_chain_with_killed_members_ends_with_the_same_bits(workplace: Path) -> None:
    run = workplace / "runs" / "hurt"
    process = start_titan("run", "chain.toml", "--set", "run.name=hurt", cwd=workplace)
    wait_for_step(run, "pupil", 6, process)
    psutil.Process(placed(run, "assistant")[-1]).send_signal(signal.SIGKILL)
    wait_for_events(run, "recovered", 1, process)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    for role in ROLES:
        expected, found = weights(workplace / "runs" / "chain", role, 40), weights(run, role, 40)
        assert all(torch.equal(expected[key], found[key]) for key in expected), role
    looked = titan("labels", "audit", "runs/hurt", cwd=workplace)
    assert looked.returncode == 0, looked.stdout + looked.stderr
    assert processes_under(workplace) == []


def test_a_later_run_learns_from_the_assistant_s_log(workplace: Path) -> None:
    text = (workplace / "chain.toml").read_text()
    head, _, rest = text.partition("[teacher]")
    pupil = '[[students]]\nname = "pupil"\nmodel = { layers = 1, hidden = 32, heads = 2, ffn = 64 }\n'
    source = '[teacher]\nsource = "log:runs/chain/labels/assistant"\n'
    (workplace / "later.toml").write_text(
        head.replace('"chain"', '"later"') + source + pupil + rest[rest.index("[checkpoint]") :]
    )
    result = titan("run", "later.toml", cwd=workplace)
    assert result.returncode == 0, result.stderr
    live, later = (weights(workplace / "runs" / name, "pupil", 40) for name in ("chain", "later"))
    assert all(torch.equal(live[key], later[key]) for key in live)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["students.pupil.teacher=nobody"], "students.pupil.teacher is 'nobody', which is no role of this run"),
        (["students.assistant.teacher=grandpupil"], "assistant learns from grandpupil learns from pupil learns from"),
        (["students.pupil.teacher=pupil"], "students.pupil.teacher leads in a circle"),
    ],
)
def test_chains_that_lead_nowhere_are_refused(workplace: Path, settings: list[str], said: str) -> None:
    overrides = [part for one in ("run.name=refused", *settings) for part in ("--set", one)]
    result = titan("run", "chain.toml", *overrides, cwd=workplace)
    assert result.returncode == 2 and said in result.stderr, result.stderr
    assert not (workplace / "runs" / "refused").exists()


def test_an_assistant_starts_from_a_checkpoint(workplace: Path) -> None:
    saved = workplace / "runs" / "chain" / "checkpoints" / "assistant"
    overrides = [
        "run.name=warm",
        "run.steps=10",
        f"students.assistant.init={saved}",
        "students.assistant.optimizer.learning_rate=1e-12",
    ]
    overrides += ["students.assistant.optimizer.warmup_steps=0"]
    result = titan("run", "chain.toml", *(part for one in overrides for part in ("--set", one)), cwd=workplace)
    assert result.returncode == 0, result.stderr
    before, after = (
        weights(workplace / "runs" / "chain", "assistant", 40),
        weights(workplace / "runs" / "warm", "assistant", 10),
    )
    for key in before:
        if key.startswith("weight"):
            assert (before[key] - after[key]).abs().max() < 1e-6, key
    wrong = ("run.name=refused", f"students.pupil.init={saved}")
    result = titan("run", "chain.toml", *(part for one in wrong for part in ("--set", one)), cwd=workplace)
    assert (
        result.returncode == 2 and "of another model: " in result.stderr and "layers 2 there, 1 here" in result.stderr
    )
