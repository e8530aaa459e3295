"""Runs on an inventory: planned layouts, paced devices that keep their time, stragglers that are named."""

import itertools
import json
from pathlib import Path
from statistics import median

import pytest

from tests.runs import TINY, kill_tree, processes_under, start_titan, titan, wait_for_step, write_tiny_config
from titan.config.model import LayoutSettings, ModelSettings
from titan.observe.events import read_events
from titan.observe.metrics import StepMetric, read_metrics
from titan.observe.planned import promises
from titan.plan.layout import make_layout
from titan.plan.straggler import STEPS, MeasuredSteps, StragglerWatch

INVENTORY = """
nodes = [
  { name = "fast", kind = "fast", devices = 1, memory_gb = 2.0, paced = true },
  { name = "slow", kind = "slow", devices = 1, memory_gb = 2.0, paced = true },
  { name = "host", kind = "cpu", devices = 4, memory_gb = 2.0 },
]
links = [
  { between = ["fast", "slow"], gb_per_s = 1.0, latency_s = 2e-4 },
  { between = ["fast", "fast"], gb_per_s = 1.0 },
  { between = ["slow", "slow"], gb_per_s = 1.0 },
  { between = ["cpu", "cpu"], gb_per_s = 1.0 },
]
"""
SHAPE = """
[[shapes]]
hidden = 64
heads = 2
kv_heads = 2
ffn = 128
vocab_size = 512
sequence_length = 32
precision = "fp32"
blocks = [{blocks}]
"""


def blocks_of(kind: str, layer_s: float) -> str:
    lines = []
    shares = (("embedding", 0.1), ("layer", 1.0), ("head", 0.5))
    for (block, share), samples in itertools.product(shares, (1, 8)):
        seconds = layer_s * share
        lines.append(
            f'{{ kind = "{kind}", block = "{block}", tp = 1, samples = {samples}, forward_s = {seconds * samples:.6f}, '
            f"backward_s = {2 * seconds * samples:.6f}, activation_bytes = 100000 }}"
        )
    return ",".join(lines)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planned teacher of six layers on a fast and a slow paced device; a student on the CPU, which the profile
    believes to be a hundred times as fast as it is."""
    folder = tmp_path_factory.mktemp("planned")
    write_tiny_config(folder)
    (folder / "inventory.toml").write_text(INVENTORY)
    teacher = SHAPE.format(blocks=f"{blocks_of('fast', 0.002)},{blocks_of('slow', 0.006)}")
    student = (
        SHAPE.format(blocks=blocks_of("cpu", 1e-5))
        .replace("hidden = 64", "hidden = 32")
        .replace("ffn = 128", "ffn = 64")
    )
    (folder / "profile.toml").write_text(teacher + student)
    text = TINY.format(text=folder / "text").partition("[[students]]")[0]
    text = text.replace("layers = 2,", "layers = 6,").replace(
        "layout = { tp = 2 }", "layout = { planned = true, mixed = false }"
    )
    text += """
[[students]]
name = "early"
model = { layers = 2, hidden = 32, heads = 2, ffn = 64 }
layout = { stages = [{ layers = 2, device = "cpu" }] }
[cluster]
device = "cpu"
inventory = "inventory.toml"
profile = "profile.toml"
"""
    (folder / "planned.toml").write_text(text.replace('name = "tiny"', 'name = "planned"'))
    return folder


@pytest.fixture(scope="module")
def ran(workplace: Path) -> Path:
    result = titan("run", "planned.toml", cwd=workplace)
    assert result.returncode == 0, result.stderr
    return workplace / "runs" / "planned"


@pytest.mark.slow
def test_the_plan_is_unequal_and_paced_devices_are_never_faster_than_told(ran: Path) -> None:
    prediction = json.loads((ran / "plan.json").read_text())["predictions"]["teacher"]
    layers = {position["device"]: position["layers"] for position in prediction["positions"]}
    assert layers["fast"] > layers["slow"] >= 1, "a device three times as fast gets more layers"
    steps = [m.step_s for m in read_metrics(ran) if isinstance(m, StepMetric) and m.role == "teacher"]
    assert median(steps) >= 0.95 * prediction["step_s"], "how much slower: benchmarks/prediction.py"


@pytest.mark.slow
def test_the_report_and_the_status_set_the_plan_beside_what_was_measured(ran: Path, workplace: Path) -> None:
    html = (ran / "report.html").read_text()
    assert "<h2>Plan</h2>" in html and "fast" in html and "predicted" in html and (ran / "plan.png").is_file()
    said = titan("status", ran, cwd=workplace).stdout
    assert "teacher: " in said and "a step predicted, " in said and " measured (" in said
    measured = [event for event in read_events(ran) if event["event"] == "measured" and event["role"] == "teacher"]
    assert measured and len(measured[-1]["busy_s"]) == 2


def test_only_steps_of_the_present_layout_are_set_beside_what_it_should_take(tmp_path: Path) -> None:
    position = {"tp": 1, "dp": 1, "layers": 2, "idle_share": 0.0, "memory_bytes": 1, "limit_bytes": 2}
    positions = [position | {"device": "slow", "busy_s": 2.0}]
    (tmp_path / "plan.json").write_text(
        json.dumps({"predictions": {"teacher": {"step_s": 2.5, "positions": positions}}})
    )
    seconds = {1: 1.0, 2: 1.0, 3: 2.0, 4: 3.0}
    metrics = [StepMetric("teacher", step, 0.0, 1.0, 1.0, 1.0, 1e-3, 8, took_s) for step, took_s in seconds.items()]
    fast = {"event": "measured", "role": "teacher", "busy_s": [0.7, 0.8]}
    change = {"event": "layout", "role": "teacher", "step": 2, "ranks": 1, "before": 2}
    (before,) = promises(tmp_path, [fast], metrics[:2])
    assert before.measured_s == 1.0 and before.busy == (("slow", 2.0, 0.7),)
    (after,) = promises(tmp_path, [fast, change], metrics)
    assert after.measured_s == 2.5 and after.busy == (), "nothing was measured in this layout yet"
    (later,) = promises(tmp_path, [fast, change, fast | {"busy_s": [1.9]}], metrics)
    assert later.busy == (("slow", 2.0, 1.9),)


@pytest.mark.slow
def test_a_rank_slower_than_its_own_kind_is_named_once_and_a_slow_kind_is_not(ran: Path, workplace: Path) -> None:
    named = [event for event in read_events(ran) if event["event"] == "straggler"]
    assert [(event["role"], event["rank"], event["device"]) for event in named] == [("early", 0, "cpu")]
    assert named[0]["step"] == STEPS and named[0]["factor"] > 1.2 and "replan_gain" in named[0]
    assert "straggler: early rank 0 (cpu) takes" in titan("status", ran, cwd=workplace).stdout
    assert processes_under(workplace) == []


@pytest.mark.slow
def test_a_planned_run_resumes_in_the_layout_it_got(ran: Path, workplace: Path) -> None:
    result = titan("resume", ran, "--set", "run.steps=40", cwd=workplace)
    assert result.returncode == 0 and "is finished" in result.stdout
    text = (ran / "config.toml").read_text()
    assert "planned = false" in text and "[[teacher.layout.stages]]" in text


@pytest.mark.slow
def test_a_killed_run_may_be_planned_anew(workplace: Path) -> None:
    sets = ["--set", "run.name=cut", "--set", "checkpoint.every_steps=5"]
    process = start_titan("run", "planned.toml", *sets, cwd=workplace)
    wait_for_step(workplace / "runs" / "cut", "teacher", 12, process)
    kill_tree(process.pid)
    process.communicate()
    (workplace / "other.toml").write_text(INVENTORY.replace('name = "slow", kind', 'name = "more", kind'))
    anew = ["--set", "teacher.layout.planned=true", "--set", "cluster.inventory=other.toml"]
    result = titan("resume", "runs/cut", *anew, cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert [event["event"] for event in read_events(workplace / "runs" / "cut")].count("predicted") == 4


@pytest.mark.slow
def test_a_run_trains_in_the_interleaved_layout_that_was_planned(workplace: Path) -> None:
    """Two devices that are alike and few micro-batches: chunks make the bubble smaller."""
    alike = SHAPE.format(blocks=f"{blocks_of('fast', 0.003)},{blocks_of('slow', 0.003)}")
    (workplace / "alike.toml").write_text(alike)
    text = (workplace / "planned.toml").read_text()
    alone = text.partition("[[students]]")[0] + "[cluster]" + text.partition("[cluster]")[2]
    (workplace / "alike-run.toml").write_text(alone.replace("profile.toml", "alike.toml"))
    sets = ["--set", "run.name=woven", "--set", "run.steps=12", "--set", "data.batch_size=4"]
    planned = titan("plan", "alike-run.toml", "--json", *sets, cwd=workplace)
    assert planned.returncode == 0, planned.stderr
    told = json.loads(planned.stdout)
    layout, prediction = told["roles"]["teacher"], told["predictions"]["teacher"]
    assert layout["schedule"] == "interleaved" and layout["chunks"] >= 2
    assert prediction["step_s"] == prediction["schedules_step_s"]["interleaved"]
    assert prediction["step_s"] < prediction["schedules_step_s"]["1f1b"]
    assert "schedule interleaved in" in titan("plan", "alike-run.toml", *sets, cwd=workplace).stdout
    result = titan("run", "alike-run.toml", *sets, cwd=workplace)
    assert result.returncode == 0, result.stderr
    ran = workplace / "runs" / "woven"
    made = json.loads((ran / "plan.json").read_text())["roles"]["teacher"]
    assert {key: made[key] for key in layout} == layout
    chunks = [(stage["chunk"], stage["first_layer"], stage["end_layer"]) for stage in made["stages"]]
    assert [chunk for chunk, _, _ in chunks] == sorted(list(range(layout["chunks"])) * 2)
    assert [end for _, _, end in chunks[:-1]] == [first for _, first, _ in chunks[1:]] and chunks[-1][2] == 6
    metrics = [m for m in read_metrics(ran) if isinstance(m, StepMetric) and m.role == "teacher"]
    assert len(metrics) == 12 and metrics[-1].loss < metrics[0].loss
    assert median(m.step_s for m in metrics[1:]) >= 0.95 * prediction["step_s"]
    assert 'schedule = "interleaved"' in (ran / "config.toml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("cluster.inventory=none.toml", "cannot read none.toml: No such file or directory"),
        ("teacher.layout.tp=2", "teacher.layout.tp is 2 beside planned"),
        ("teacher.model.ffn=96", "profile knows nothing of"),
        (
            "students.early.layout.stages=[{layers=2,device='gpu'}]",
            "early.layout.stages.0.device is 'gpu'; the inventory has fast, slow, cpu",
        ),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_line_and_no_run(workplace: Path, change: str, says: str) -> None:
    result = titan("run", "planned.toml", "--set", "run.name=bad", "--set", change, cwd=workplace)
    assert result.returncode != 0 and not (workplace / "runs" / "bad").exists()
    assert says in result.stderr and "Traceback" not in result.stderr


def test_a_straggler_is_slow_for_its_own_kind_for_twenty_steps_in_a_row() -> None:
    watch = StragglerWatch(expected_s=(1.0, 3.0))
    for _ in range(3 * STEPS):
        assert watch.look((1.19, 3.5)) == [], "the slow kind is as slow as it should be"
    for step in range(1, 3 * STEPS):
        found = watch.look((1.0, 4.5))
        assert bool(found) == (step == STEPS)
        assert not found or (found[0].rank, found[0].factor) == (1, 1.5)
    watch.look((1.0, 3.0))
    for step in range(1, STEPS + 1):
        assert bool(watch.look((1.0, 4.5))) == (step == STEPS), "once it kept its pace it may be named again"


def test_measured_steps_are_told_by_position_with_the_slowest_rank() -> None:
    layout = make_layout(ModelSettings(layers=4, hidden=64, heads=4, ffn=128), LayoutSettings(pp=2, dp=2))
    measured = MeasuredSteps(layout)
    for seconds in (1.0, 2.0, 9.0):
        measured.add(seconds, (seconds, 2 * seconds, 3 * seconds, seconds))
    assert measured.take() == {"steps": 3, "step_s": 2.0, "busy_s": [4.0, 6.0]}
    assert measured.num_steps == 0
