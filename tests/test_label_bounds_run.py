"""Runs whose logs are kept short and twice, with students that are waited for, skip, or come too late."""

import json
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.runs import (
    kill_tree,
    placed,
    processes_under,
    start_titan,
    titan,
    wait_for_events,
    wait_for_step,
    write_tiny_config,
)
from titan.distill.log.ledger import read_ledger
from titan.distill.log.reader import LabelReader
from titan.distill.log.retention import first_kept, log_bytes
from titan.observe.events import read_events
from titan.observe.metrics import StepMetric, read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.toml, in which both students start with their teachers."""
    folder = tmp_path_factory.mktemp("bounds")
    path = write_tiny_config(folder)
    text = path.read_text().replace("start = { lead = 0.05 }\n", "").replace("start = { step = 5 }\n", "")
    path.write_text(text.replace("step_timeout_s = 60.0", "step_timeout_s = 120.0"))
    return folder


def overrides(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def steps_of(run: Path, role: str) -> list[StepMetric]:
    return [metric for metric in read_metrics(run) if isinstance(metric, StepMetric) and metric.role == role]


def told(run: Path, event: str) -> list[dict[str, Any]]:
    return [one for one in read_events(run) if one["event"] == event]


def look(workplace: Path, run: str, *commands: str) -> None:
    for command in commands:
        looked = titan("labels", command, run, cwd=workplace)
        assert looked.returncode == 0, looked.stdout + looked.stderr


def blocks(log: Path, first: int) -> dict[int, list[bytes]]:
    """The bytes of all committed steps from one on."""
    reader, found = LabelReader(log, 0.0), {}
    reader.poll()
    for step in range(first, reader.last_committed + 1):
        commit = reader.wait_commit(step)
        assert commit is not None and commit.step == step
        found[step] = [bytes(block) for block in reader.read_raw(commit)]
    reader.close()
    return found


@pytest.mark.long
def test_an_assistant_waits_for_its_pupil_and_a_lost_log_comes_back_from_its_copy(workplace: Path) -> None:
    run, second = workplace / "runs" / "twice", workplace / "second" / "twice"
    chain = ("run.name=twice", "run.steps=60", "students.late.teacher=early", "students.late.backpressure=wait")
    chain += ("students.late.max_lag=2", "labels.wait_s=100", "checkpoint.every_steps=5")
    chain += ("labels.keep=needed", "labels.segment_bytes=12000", f"labels.copy_to={second.parent}")
    process = start_titan("run", "tiny.toml", *overrides(*chain), cwd=workplace)
    wait_for_step(run, "late", 7, process, timeout_s=200)
    for pid in placed(run, "late"):
        psutil.Process(pid).kill()
    wait_for_events(run, "recovered", 1, process, timeout_s=200)
    wait_for_step(run, "late", 19, process, timeout_s=200)  # by then the pause is in a checkpoint of early
    kill_tree(process.pid)
    process.communicate()
    logs = {role: run / "labels" / role for role in ("teacher", "early")}
    kept = {role: first_kept(log) for role, log in logs.items()}
    assert all(first > 1 for first in kept.values()), "what all students have in a checkpoint is gone"
    before = {role: blocks(log, kept[role]) for role, log in logs.items()}
    shutil.rmtree(run / "labels")
    result = titan("resume", "runs/twice", cwd=workplace, timeout_s=300)
    assert result.returncode == 0, result.stderr

    for role, log in logs.items():
        now, copy = (blocks(folder, first_kept(folder)) for folder in (log, second / "labels" / role))
        same = now.keys() & before[role].keys()
        assert now == copy and 60 in now and all(now[step] == before[role][step] for step in same)
        assert first_kept(log) >= kept[role]
    assert first_kept(logs["early"]) > 40, "its pupil is never far behind"
    roles = json.loads((run / "summary.json").read_text())["roles"]
    for name in ("early", "late"):
        assert (roles[name]["labels_consumed"], roles[name]["labels_missed"]) == (60 * 8, 0)
        assert roles[name]["labels_repeated"] == 0 and roles[name]["tokens"] == 60 * 8 * 32
    look(workplace, "runs/twice", "audit", "verify", "stats")
    look(workplace, "second/twice", "verify")
    assert roles["early"]["student_wait_s"] > 1, "it paused while its pupil was dead"
    assert max(metric.student_wait_s or 0.0 for metric in steps_of(run, "early")) > 1
    assert "student_wait_s" not in roles["teacher"] and not told(run, "student_overdue")
    assert max(metric.lag or 0 for metric in steps_of(run, "late")) <= 2 + 5, "and what a restart lost"
    assert processes_under(workplace) == []


def test_a_hung_student_is_waited_for_so_long_one_that_skips_jumps_and_dropped_labels_are_counted(
    workplace: Path,
) -> None:
    run = workplace / "runs" / "short"
    settings = ("run.name=short", "students.late.backpressure=wait", "students.late.max_lag=2", "labels.wait_s=3")
    settings += ("students.early.backpressure=skip", "students.early.max_lag=4", "recovery.hang_timeout_s=100")
    settings += ("labels.max_bytes=100000", "checkpoint.every_steps=7")
    process = start_titan("run", "tiny.toml", *overrides(*settings), cwd=workplace)
    wait_for_step(run, "late", 4, process, timeout_s=200)
    wait_for_step(run, "early", 4, process)
    hung = [psutil.Process(pid) for role in ("early", "late") for pid in placed(run, role)]
    for one in hung:
        one.send_signal(signal.SIGSTOP)
    wait_for_events(run, "student_overdue", 1, process, timeout_s=200)
    wait_for_step(run, "teacher", 40, process, timeout_s=150)
    for one in hung:
        one.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err

    (overdue,) = told(run, "student_overdue")
    assert overdue["student"] == "late" and overdue["lag"] == 3 and overdue["waited_s"] == pytest.approx(3, abs=2)
    roles = json.loads((run / "summary.json").read_text())["roles"]
    assert roles["teacher"]["student_wait_s"] > 3 and log_bytes(run / "labels" / "teacher") <= 100_000
    assert roles["early"]["max_lag_steps"] <= 4
    reasons = {}
    for name in ("early", "late"):
        counts = Counter[str]()
        for entry in read_ledger(run / "ledger" / f"{name}.jsonl"):
            counts[entry.reason or entry.kind] += (entry.end.step - entry.start.step) * 8
        reasons[name] = set(counts) - {"consumed"}
        assert sum(counts.values()) == 40 * 8
        assert roles[name]["labels_consumed"] == counts["consumed"] == 8 * len(steps_of(run, name))
        assert roles[name]["labels_missed"] == 320 - counts["consumed"] > 8 * 10
        assert roles[name]["tokens"] == counts["consumed"] * 32
    too_far, dropped = "further behind than max_lag 4", "dropped from the log"
    assert reasons["late"] == {dropped} and {too_far} <= reasons["early"] <= {too_far, dropped}
    look(workplace, "runs/short", "audit", "verify", "ls")
    assert {event["role"] for event in told(run, "steps_skipped")} == {"early", "late"}
    assert any("late" in event["overtaken"] for event in told(run, "labels_dropped"))
    report = (run / "report.html").read_text()
    assert "waited for students" in report
