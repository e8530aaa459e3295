"""Metrics for Prometheus, scraped from a real port, against what slow readers of the folder say; the dashboard."""

import json
import math
import re
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from titan.config.load import load_config
from titan.config.settings import RunConfig
from titan.errors import PlatformError
from titan.observe.events import EventLog, event_time_s, read_events
from titan.observe.exporter import COUNTERS, GAUGES, metrics_endpoint
from titan.observe.metrics import EvalMetric, MetricsLog, StepMetric, read_metrics, to_line
from titan.observe.useful import goodput

ROOT = Path(__file__).parents[1]
GRAFANA = ROOT / "launch/grafana"
TORN = b'{"kind": "step", "role": "tea'


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def config() -> RunConfig:
    return load_config(ROOT / "configs/quickstart.toml", [f"observe.metrics_port={free_port()}", "run.steps=500"])


def scrape(config: RunConfig) -> dict[tuple[str, str], float]:
    """Samples by name and label value."""
    address = f"http://{config.observe.metrics_host}:{config.observe.metrics_port}/metrics"
    with urllib.request.urlopen(address, timeout=20) as answer:
        text = answer.read().decode()
    return {
        (sample.name, ", ".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def teacher(step: int) -> StepMetric:
    return StepMetric("teacher", step, time.time(), 3.0 + step, 2.0 + step, 1.0, 1e-3, 1000, 0.002 * step)


def student(name: str, step: int) -> StepMetric:
    metric = replace(teacher(step), role=name, lag=step % 7, lead=0.5, label_bytes=30_000, label_wait_s=0.125)
    return replace(metric, loss=math.nan) if step == 9 else metric


def test_a_scrape_says_what_the_run_folder_says_and_goes_on_where_the_one_before_ended(
    tmp_path: Path, config: RunConfig
) -> None:
    name = config.students[0].name
    with EventLog(tmp_path) as events, MetricsLog(tmp_path) as log, metrics_endpoint(tmp_path, config):
        bare = scrape(config)
        assert bare["titan_role_step", "teacher"] == 0 and ("titan_role_loss_nats", "teacher") not in bare
        events.emit("run_started", pid=1, host="a")
        for step in range(1, 10):
            log.write(teacher(step))
            log.write(student(name, step))
        first = scrape(config)
        assert first["titan_role_step", "teacher"] == 9 and math.isnan(first["titan_role_loss_nats", name])

        events.emit("checkpoint", role="teacher", step=8, stall_s=0.5)
        events.emit("restarting", role="teacher", from_step=8, lost_steps=1)
        events.emit("recovered", role="teacher", seconds=6.5)
        events.emit("straggler", role="teacher", rank=1, factor=1.4, step=7)
        events.emit("straggler", role="teacher", rank=1, factor=1.5, step=9)
        for step in range(9, 13):
            log.write(teacher(step))  # step 9 once more
        log.write(EvalMetric("teacher", 12, time.time(), 2.0, 1.75, 4096))
        with (tmp_path / "metrics.jsonl").open("ab") as torn:
            torn.write(TORN)
        (tmp_path / "checkpoints/teacher").mkdir(parents=True)
        (tmp_path / "checkpoints/teacher/weights").write_bytes(bytes(12345))
        time.sleep(0.3)
        found = scrape(config)
        metrics = read_metrics(tmp_path)
        start_s = event_time_s(read_events(tmp_path)[0])
        wall_s = found["titan_run_wall_seconds", ""]
        assert found["titan_run_goodput_ratio", ""] < 1
        assert found["titan_run_goodput_ratio", ""] == pytest.approx(goodput(metrics, start_s, wall_s))
        newest = next(one for one in reversed(metrics) if isinstance(one, StepMetric))
        expected = {
            "step": 12, "steps_wanted": 500, "loss_nats": newest.loss, "cross_entropy_nats": newest.cross_entropy,
            "heldout_bits_per_byte": 1.75, "step_seconds": 0.024, "tokens_total": 13_000, "restarts_total": 1,
            "stragglers": 1, "checkpoint_step": 8, "checkpoints_total": 1, "checkpoint_stall_seconds_total": 0.5,
            "recovery_seconds": 6.5, "label_bytes_total": 0,
        }  # fmt: skip
        assert {key: found[f"titan_role_{key}", "teacher"] for key in expected} == expected
        expected = {
            "step": 9, "lag_steps": 2, "lead_nats": 0.5, "label_bytes_total": 270_000, "label_bytes_per_token": 30.0,
            "label_wait_seconds_total": 1.125, "restarts_total": 0, "stragglers": 0,
        }  # fmt: skip
        assert {key: found[f"titan_role_{key}", name] for key in expected} == expected
        assert found["titan_run_info", f"{config.run.name}, 0.1.0"] == 1.0
        assert found["titan_run_disk_free_bytes", ""] > 0
        rest = to_line(teacher(13)).encode().removeprefix(TORN) + b"\n"
        with (tmp_path / "metrics.jsonl").open("ab") as torn:
            torn.write(rest)
        assert scrape(config)["titan_role_step", "teacher"] == 13
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", config.observe.metrics_port or 0)) != 0, "the port outlives the run"


def test_sizes_on_disk_are_those_of_the_files(tmp_path: Path, config: RunConfig) -> None:
    for name, size in (("checkpoints/a/b", 1000), ("labels/c", 200), ("labels/d/e", 30), ("config.toml", 4)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    with metrics_endpoint(tmp_path, config):
        found = scrape(config)
    sizes = {part: found["titan_run_disk_bytes", part] for part in ("checkpoints", "labels", "other")}
    assert sizes == {"checkpoints": 1000, "labels": 230, "other": 4}


def test_a_port_that_is_taken_is_an_error_in_one_line_and_none_is_opened_unless_asked_for(
    tmp_path: Path, config: RunConfig
) -> None:
    port = config.observe.metrics_port
    with socket.socket() as other:
        other.bind(("127.0.0.1", port or 0))
        other.listen()
        with (
            pytest.raises(PlatformError, match=f"observe.metrics_port is {port}, .*choose another"),
            metrics_endpoint(tmp_path, config),
        ):
            raise AssertionError("it was opened")
        quiet = load_config(ROOT / "configs/quickstart.toml")
        with metrics_endpoint(tmp_path, quiet):
            pass


def test_every_expression_of_the_dashboard_names_metrics_that_the_endpoint_exports(
    tmp_path: Path, config: RunConfig
) -> None:
    name = config.students[0].name
    with EventLog(tmp_path) as events, MetricsLog(tmp_path) as log, metrics_endpoint(tmp_path, config):
        events.emit("run_started", pid=1, host="a")
        for metric in (teacher(1), student(name, 1), EvalMetric("teacher", 1, time.time(), 2.0, 1.75, 4096)):
            log.write(metric)
        events.emit("checkpoint", role="teacher", step=1, stall_s=0.5)
        events.emit("recovered", role="teacher", seconds=6.5)
        exported = {sample for sample, _ in scrape(config)}
    dashboard = json.loads((GRAFANA / "titan.json").read_text())
    asked = {target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}
    asked.add(dashboard["templating"]["list"][1]["query"]["query"])
    named = {word for expression in asked for word in re.findall(r"\btitan_\w+", expression)}
    assert named <= exported and all(re.search(r"titan_\w+", expression) for expression in asked)
    every = set(GAUGES) | {f"{counter}_total" for counter in COUNTERS}
    assert every <= exported, "a metric that nothing sets"
    unseen = {"titan_run_wall_seconds", "titan_role_tokens_total", "titan_role_checkpoints_total"}
    assert every - named == unseen, "what no panel shows"
    assert all(expression.count("(") == expression.count(")") for expression in asked)
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in dashboard["panels"]})


def test_the_dashboard_is_the_one_of_its_table() -> None:
    made = subprocess.run([sys.executable, GRAFANA / "dashboard.py"], capture_output=True, text=True, timeout=60)
    assert made.stdout == (GRAFANA / "titan.json").read_text(), "python launch/grafana/dashboard.py > ...titan.json"
