"""Runs whose labels are hidden states: students learn what whole labels teach, and a recoded log teaches others."""

from pathlib import Path

import pytest
import torch

from tests.runs import titan, weights, write_tiny_config
from titan.observe.metrics import StepMetric, read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(400)]
LAYOUT = ("--set", "teacher.layout.tp=2", "--set", "teacher.layout.dp=2")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same run under `hidden` and under `full` labels, teacher tp 2 and dp 2."""
    folder = tmp_path_factory.mktemp("hidden")
    write_tiny_config(folder)
    for codec in ("hidden", "full"):
        names = ("--set", f"run.name={codec}", "--set", f"labels.codec={codec}", *LAYOUT)
        result = titan("run", "tiny.toml", *names, cwd=folder)
        assert result.returncode == 0, result.stderr
    return folder


def first_losses(run: Path) -> dict[str, tuple[int, float]]:
    """Each role's first step, and its loss on the text there, before it has learned anything."""
    metrics = [metric for metric in read_metrics(run) if isinstance(metric, StepMetric)]
    return {
        metric.role: (metric.step, metric.cross_entropy) for metric in reversed(metrics) if metric.role != "teacher"
    }


def test_a_student_of_hidden_states_becomes_that_of_whole_labels(workplace: Path) -> None:
    runs = workplace / "runs"
    same, other = weights(runs / "hidden", "teacher", 40), weights(runs / "full", "teacher", 40)
    assert all(torch.equal(same[key], other[key]) for key in same), "the tap does not touch the teacher"
    losses = {
        codec: {
            metric.step: (metric.cross_entropy, metric.distill_loss)
            for metric in read_metrics(runs / codec)
            if isinstance(metric, StepMetric) and metric.role == "early"
        }
        for codec in ("hidden", "full")
    }
    assert len(losses["full"]) == 35
    for step, full in losses["full"].items():
        assert losses["hidden"][step] == pytest.approx(full, rel=1e-3), "2^-9 of each number of a logit"
    assert losses["hidden"] != losses["full"]


def test_the_tools_read_it_and_students_learn_from_it_recoded(workplace: Path) -> None:
    for command in ("audit", "verify", "ls", "stats"):
        looked = titan("labels", command, "runs/hidden", cwd=workplace)
        assert looked.returncode == 0, looked.stdout + looked.stderr
    made = titan("labels", "recode", "runs/hidden", "sampled", "--codec", "sampled", cwd=workplace)
    assert made.returncode == 0 and "steps 1 to 40, 40 steps made now" in made.stdout, made.stdout + made.stderr
    head, _, rest = (workplace / "tiny.toml").read_text().partition("[teacher]")
    students = rest[rest.index("[[students]]") :].replace("start = { step", "seed = 3\nstart = { step")
    text = head.replace('name = "tiny"', 'name = "later"') + '[teacher]\nsource = "log:sampled"\n' + students
    (workplace / "later.toml").write_text(text)
    result = titan("run", "later.toml", cwd=workplace)
    assert result.returncode == 0, result.stderr
    for run in ("runs/later", "sampled"):
        assert titan("labels", "audit", run, cwd=workplace).returncode == 0
    first = [first_losses(workplace / "runs" / run) for run in ("later", "hidden")]
    assert first[0]["late"] == first[1]["late"], "the same initial weights and the same tokens"
    assert first[0]["early"][0] == first[1]["early"][0] == 6
    assert first[0]["early"][1] != first[1]["early"][1], "initial weights of its own"
