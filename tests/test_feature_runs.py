"""A run whose students learn from features: killed, resumed, looked at and exported as a user would."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.runs import kill_tree, processes_under, start_titan, titan, wait_for_step, weights, write_tiny_config
from titan.observe.metrics import StepMetric, read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
STEPS, START = 60, 20
LOSSES = {"early": {"query_loss", "value_loss", "hint_loss"}, "late": {"attention_loss"}}
FEATURES = {
    # in the middle of its pipeline, with relation heads across the teacher's tensor ranks and a width of its own
    "early": "{ layer = 0, relation_heads = 1, query = 300.0, value = 100.0, hint = 3.0 }",
    "late": "{ attention = 300.0 }",
}


def write_config(folder: Path) -> None:
    """tiny.toml with features: the teacher on two tensor ranks, one student on two stages, one with the extra layer."""
    path = write_tiny_config(folder)
    text = path.read_text()
    for name, start in (("early", "start = { step = 5 }"), ("late", "start = { lead = 0.05 }")):
        more = ", auxiliary_layer = true" if name == "late" else ""
        distill = f'distill = {{ schedule = "constant", features = {FEATURES[name]}{more} }}'
        text = text.replace(
            start, f"start = {{ step = {START} }}\n{distill}\noptimizer = {{ learning_rate = 5e-3, warmup_steps = 5 }}"
        )
    # a teacher that no longer moves much, so that students can catch up with it
    text = text.replace(
        "layout = { tp = 2 }", "layout = { tp = 2 }\noptimizer = { warmup_steps = 5, final_fraction = 0.0 }"
    )
    path.write_text(text.replace("steps = 40", f"steps = {STEPS}"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed in the middle with all its processes, then resumed to the end."""
    folder = tmp_path_factory.mktemp("features")
    write_config(folder)
    process = start_titan("run", "tiny.toml", cwd=folder)
    try:
        wait_for_step(folder / "runs/tiny", "late", 42, process, timeout_s=150.0)
    finally:
        kill_tree(process.pid)
        process.communicate()
    result = titan("resume", "runs/tiny", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert processes_under(folder) == []
    return folder / "runs/tiny"


def test_students_learn_from_features_across_a_kill(run: Path) -> None:
    """Losses fall; a step is either learned with features or counted as one whose features were gone."""
    roles = json.loads((run / "summary.json").read_text())["roles"]
    assert "features_missed" not in roles["teacher"]
    for name, losses in LOSSES.items():
        steps = [metric for metric in read_metrics(run) if isinstance(metric, StepMetric) and metric.role == name]
        with_features = [metric for metric in steps if getattr(metric, min(losses)) is not None]
        made, missed = roles[name]["steps"], roles[name]["features_missed"]
        assert made == STEPS - START and missed < made / 2
        # the kill may have taken the lines of steps that a checkpoint had just saved
        assert len(steps) - len(with_features) <= missed <= made - len(with_features)
        for loss in losses:
            values = [getattr(metric, loss) for metric in with_features]
            assert sum(values[-5:]) < 0.8 * sum(values[:5]), (name, loss, values)
        for metric in with_features:
            asked = {field for field, value in vars(metric).items() if field.endswith("_loss") and value is not None}
            assert asked - {"distill_loss"} == losses


def test_labels_are_accounted_for_and_the_report_shows_the_losses(run: Path) -> None:
    for command in ("audit", "verify"):
        looked = titan("labels", command, run, cwd=run.parent)
        assert looked.returncode == 0, looked.stdout + looked.stderr
    page = (run / "report.html").read_text()
    assert "<h2>Features</h2>" in page and "<td>hint</td>" in page and "<td>attention</td>" in page


def test_what_helped_to_learn_is_in_the_checkpoint_and_not_in_the_export(run: Path, tmp_path: Path) -> None:
    for name, helper in (
        ("early", "auxiliary.projection"),
        ("late", "auxiliary.layer.self_attention.linear_qkv.weight"),
    ):
        assert any(helper in key for key in weights(run, name, STEPS))
        result = titan("export", run, "--student", name, "--out", tmp_path / name, cwd=run.parent)
        assert result.returncode == 0, result.stderr
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            keys = list(file.keys())
        assert keys and not any("auxiliary" in key or key.startswith("layers") for key in keys)
