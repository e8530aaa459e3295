"""Students with batches of their own in one run: what one slow process learns, killed or not; every sample counted.

The slow twin takes the log's samples one by one, groups them, and trains in one process. With Adam's default eps a
rounding error in a gradient near zero would become a step of its own.
"""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.runs import (
    kill_tree,
    placed,
    processes_under,
    start_titan,
    titan,
    wait_for_events,
    wait_for_step,
    weights,
    write_tiny_config,
)
from tests.worlds import run_world, save_checkpoint
from titan.checkpoint.folder import newest_step, read_manifest, step_folder
from titan.checkpoint.load import Checkpoint
from titan.config.load import load_config
from titan.config.model import LayoutSettings
from titan.config.settings import RunConfig, StudentSettings
from titan.distill.control import ControlTracker
from titan.distill.lead import LeadTracker, distillation_weight
from titan.distill.log.audit import audit
from titan.distill.log.reader import LabelReader
from titan.distill.log.records import decode_line, encode_line
from titan.model.parameters import parameter_specs
from titan.observe.metrics import StepMetric, read_metrics
from titan.ops.objective import Objective
from titan.parallel.world import World
from titan.tasks.sample_labels import SampleLabels
from titan.train.trainer import Trainer, TrainerSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
STEPS, STEP, LENGTH, VOCAB = 21, 8, 32, 512
STUDENTS = """
[[students]]
name = "same"
optimizer = { eps = 1e-5 }
model = { layers = 1, hidden = 32, heads = 2, ffn = 64 }
[[students]]
name = "three"
optimizer = { eps = 1e-5 }
batch_size = 3
model = { layers = 1, hidden = 32, heads = 2, ffn = 64 }
[[students]]
name = "wide"
optimizer = { eps = 1e-5 }
batch_size = 16
start = { step = 2 }
model = { layers = 2, hidden = 32, heads = 2, ffn = 64 }
layout = { stages = [{ layers = 2, dp = 2, shares = [3, 1] }] }
[[students]]
name = "piped"
batch_size = 18
model = { layers = 2, hidden = 32, heads = 2, ffn = 64 }
layout = { pp = 2, micro_batches = 2 }
optimizer = { eps = 1e-5, schedule = "linear" }
distill = { schedule = "wsd" }
"""
SIZES = {"same": 8, "three": 3, "wide": 16, "piped": 18}
SAMPLES = {"same": 168, "three": 168, "wide": 152, "piped": 168}
"""From the start to the end of the run; `wide` and `piped` end with a smaller batch."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.toml and the run `tiny`, never disturbed."""
    folder = tmp_path_factory.mktemp("batches")
    path = write_tiny_config(folder)
    head, _, rest = path.read_text().partition("[[students]]")
    text = head.replace("steps = 40", f"steps = {STEPS}") + STUDENTS + rest[rest.index("[checkpoint]") :]
    path.write_text(text.replace("every_steps = 10", "every_steps = 4"))
    result = titan("run", "tiny.toml", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def steps_of(run: Path, role: str) -> list[StepMetric]:
    return [metric for metric in read_metrics(run) if isinstance(metric, StepMetric) and metric.role == role]


def learn_slowly(world: World, config: RunConfig, student: StudentSettings, log: Path, out: Path) -> list[Any]:
    """The student in one process, from single samples; what its metrics should say of each step."""
    size, start = student.batch_size or STEP, student.start.step or 0
    reader = LabelReader(log, timeout_s=1.0)
    stream: list[tuple[np.ndarray, SampleLabels, float]] = []
    for step in range(start + 1, STEPS + 1):
        commit = reader.wait_commit(step)
        assert commit is not None
        for block in reader.read(commit)[0]:
            labels = block.labels.at(1.0)
            stream += [
                (tokens, labels.rows(row, row + 1), commit.cross_entropy) for row, tokens in enumerate(block.tokens_BS1)
            ]
    reader.close()
    settings = TrainerSettings(
        student.model, LayoutSettings(), student.optimizer, "fp32", VOCAB, LENGTH, size, config.run.seed
    )
    trainer = Trainer(world, settings)
    tracker, control, told = LeadTracker(), ControlTracker(), []
    groups = [stream[first : first + size] for first in range(0, len(stream), size)]
    for own_step, group in enumerate(groups, 1):
        weight = distillation_weight(student.distill, tracker.lead, own_step, len(groups))
        rate = trainer.learning_rate(own_step, len(groups))
        labels = SampleLabels.cat([sample[1] for sample in group])
        tokens = np.stack([sample[0] for sample in group])
        result = trainer.step(tokens, rate, Objective(weight), labels=labels, control=control.control)
        tracker.add(float(np.mean([sample[2] for sample in group])), result.cross_entropy)
        control.add(*result.tail_fit)
        newest = start + 1 + (own_step * size - 1) // STEP
        told.append((own_step, min(STEPS, newest), len(group) * LENGTH, rate, weight, result.cross_entropy))
    save_checkpoint(trainer, out, STEPS)
    return told


@pytest.mark.parametrize("name", SIZES)
def test_each_student_is_what_one_slow_process_makes_of_the_logs_samples(
    workplace: Path, tmp_path: Path, name: str
) -> None:
    config = load_config(workplace / "tiny.toml")
    student = next(student for student in config.students if student.name == name)
    run = workplace / "runs/tiny"
    told = run_world(
        LayoutSettings(), learn_slowly, config, student, run / "labels/teacher", tmp_path, model=student.model
    )[0]
    found = [
        (m.own_step, m.step, m.tokens, m.learning_rate, m.distill_weight, m.cross_entropy) for m in steps_of(run, name)
    ]
    assert [one[:4] for one in found] == [one[:4] for one in told]
    np.testing.assert_allclose([one[4:] for one in found], [one[4:] for one in told], rtol=0, atol=1e-5)
    ends = Checkpoint(run / f"checkpoints/{name}/step-{STEPS:08d}"), Checkpoint(step_folder(tmp_path, STEPS))
    for parameter, spec in parameter_specs(student.model, VOCAB).items():
        fast, slow = (end.whole("weight", parameter, spec) for end in ends)
        assert (fast - slow).abs().max() < 1e-5, parameter


def test_every_sample_is_counted_once_whatever_the_batch(workplace: Path) -> None:
    run = workplace / "runs/tiny"
    roles = json.loads((run / "summary.json").read_text())["roles"]
    for name, samples in SAMPLES.items():
        role, steps = roles[name], steps_of(run, name)
        assert (role["labels_consumed"], role["labels_missed"], role["labels_repeated"]) == (samples, 0, 0)
        assert role["tokens"] == samples * LENGTH == sum(metric.tokens for metric in steps)
        assert role["steps"] == len(steps) == -(-samples // SIZES[name])
        whole = sum(metric.label_bytes or 0 for metric in steps) / role["tokens"]
        assert role["label_bytes_per_token"] == pytest.approx(whole)
    report = (run / "report.html").read_text()
    assert "8 samples of 32 tokens; three 3 samples, wide 16 samples, piped 18 samples" in report
    for command in ("labels audit", "labels verify", "status"):
        looked = titan(*command.split(), "runs/tiny", cwd=workplace)
        assert looked.returncode == 0, looked.stdout + looked.stderr


def assert_as_undisturbed(workplace: Path, run: Path) -> None:
    calm = workplace / "runs/tiny"
    for role in ("teacher", *SIZES):
        expected, found = weights(calm, role, STEPS), weights(run, role, STEPS)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), role
        want, told = ([(m.step, m.own_step, m.loss) for m in steps_of(path, role)] for path in (calm, run))
        assert sorted(told) == sorted(want), role
    summary = json.loads((run / "summary.json").read_text())["roles"]
    assert {name: summary[name]["labels_consumed"] for name in SIZES} == SAMPLES
    looked = titan("labels", "audit", f"runs/{run.name}", cwd=workplace)
    assert looked.returncode == 0, looked.stdout + looked.stderr


def place_of(run: Path, role: str) -> list[int]:
    """Step and sample, as the newest checkpoint says."""
    folder = run / "checkpoints" / role
    step = newest_step(folder)
    assert step is not None
    place: list[int] = read_manifest(step_folder(folder, step))["state"]["place"]
    return place


def test_a_run_killed_with_students_amid_a_step_resumes_to_the_same_bits(workplace: Path) -> None:
    run = workplace / "runs/killed"
    process = start_titan("run", "tiny.toml", "--set", "run.name=killed", cwd=workplace)
    for name in ("three", "piped"):
        wait_for_step(run, name, 6, process)
    kill_tree(process.pid)
    process.communicate()
    assert any(place_of(run, name)[1] > 0 for name in ("three", "piped")), "a checkpoint amid a step was the point"
    result = titan("resume", "runs/killed", cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert_as_undisturbed(workplace, run)


def test_students_that_are_killed_are_put_up_again_and_end_with_the_same_bits(workplace: Path) -> None:
    """Here labels come from a service."""
    run = workplace / "runs/hurt"
    settings = ("--set", "run.name=hurt", "--set", "labels.delivery=service")
    process = start_titan("run", "tiny.toml", *settings, cwd=workplace)
    wait_for_events(run, "placed", 5, process)
    teacher = [psutil.Process(pid) for pid in placed(run, "teacher")]
    reader = LabelReader(run / "labels/teacher", 60.0)
    assert reader.wait_commit(7) is not None
    reader.close()
    for rank in teacher:
        rank.suspend()  # so that no student is at its end when it is killed
    for name in ("three", "wide"):
        wait_for_step(run, name, 5, process)
        psutil.Process(placed(run, name)[-1]).send_signal(signal.SIGKILL)
    for rank in teacher:
        rank.resume()
    wait_for_events(run, "recovered", 2, process)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert_as_undisturbed(workplace, run)
    assert processes_under(workplace) == []


@pytest.mark.parametrize(
    ("shift", "finding"),
    [
        ((-1, 0), "samples from step 4 sample 2 up to step 4 sample 3 are accounted for twice, in own steps 9 and 10"),
        ((1, 0), "samples from step 4 sample 3 up to step 4 sample 4 were neither consumed nor skipped"),
        ((0, 1), "samples from step 4 sample 6 up to step 4 sample 7 are accounted for twice, in own steps 10 and 11"),
        ((0, -1), "samples from step 4 sample 5 up to step 4 sample 6 were neither consumed nor skipped"),
    ],
)
def test_the_audit_finds_a_single_sample_that_was_learned_twice_or_never(
    workplace: Path, tmp_path: Path, shift: tuple[int, int], finding: str
) -> None:
    """The tenth batch of three: its first or its last sample."""
    run = tmp_path / "run"
    for part in ("labels", "ledger", "checkpoints"):
        shutil.copytree(workplace / "runs/tiny" / part, run / part)
    assert audit(run).clean
    path = run / "ledger/three.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    record = decode_line(lines[9])
    assert record is not None and (record["from"], record["to"]) == ([4, 3], [4, 6])
    record["from"][1] += shift[0]
    record["to"][1] += shift[1]
    path.write_bytes(b"".join([*lines[:9], encode_line(record), *lines[10:]]))
    result = audit(run)
    assert not result.clean
    assert any(finding in each for each in result.findings), result.findings
