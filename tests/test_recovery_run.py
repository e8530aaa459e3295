"""A real run with spare processes: roles that start again take them over; and a SIGTERM whose grace is too short."""

import json
import signal
import subprocess
import time
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
from titan.observe.events import read_events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LONG_S = 240.0
"""On a busy machine; on an idle one all is over in less than a minute."""
SETTINGS = (
    "run.steps=100000",
    "checkpoint.every_steps=100",
    "recovery.spares=2",
    "recovery.hang_timeout_s=600",
    "recovery.grace_s=16",
)


def all_of(run: Path, event: str, role: str | None = None) -> list[dict[str, Any]]:
    return [one for one in read_events(run) if one["event"] == event and one.get("role") == role]


def spare_pids(run: Path) -> list[int]:
    return [int(event["pid"]) for event in all_of(run, "spare_up")]


def test_spares_are_taken_over_and_replaced_and_a_grace_that_is_too_short_is_kept_all_the_same(tmp_path: Path) -> None:
    write_tiny_config(tmp_path / "work")
    run = tmp_path / "work/runs/tiny"
    process = start_titan("run", "tiny.toml", *(f"--set={one}" for one in SETTINGS), cwd=tmp_path / "work")
    try:
        disturb(run, process)
    finally:
        if process.poll() is None:
            kill_tree(process.pid)


def disturb(run: Path, process: "subprocess.Popen[str]") -> None:
    wait_for_step(run, "teacher", 40, process, LONG_S)
    wait_for_events(run, "spare_up", 2, process, LONG_S)
    hung, good = spare_pids(run)
    psutil.Process(hung).suspend()  # which nobody has noticed when it is needed
    psutil.Process(placed(run, "teacher")[-1]).kill()
    wait_for_events(run, "recovered", 1, process)
    assert all_of(run, "ranks_up", "teacher")[-1]["spares"] == 1
    assert good in placed(run, "teacher") and not psutil.pid_exists(hung)

    wait_for_events(run, "spare_up", 4, process, LONG_S)
    spares = spare_pids(run)[2:]
    psutil.Process(placed(run, "early")[0]).kill()
    wait_for_events(run, "recovered", 2, process)
    assert sorted(placed(run, "early")) == sorted(spares)
    repeated: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for line in (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "step":
            repeated.setdefault((line["role"], line["step"]), []).append((line["loss"], line["grad_norm"]))
    twice = [found for found in repeated.values() if len(found) == 2]
    assert twice and all(first == second for first, second in twice), "a spare computes other bits"

    psutil.Process(placed(run, "early")[0]).suspend()
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert 8.0 <= time.monotonic() - begin <= 22.0, "16 s, and what Ray's processes take to go"
    (line,) = err.splitlines()  # one of two: on a busy machine eight seconds may be too little to wind up
    assert "16 s after SIGTERM" in line and "recovery.grace_s" in line and "titan resume runs/tiny" in line
    assert [event["roles"] for event in all_of(run, "grace_over")] == [["early"]]
    assert processes_under(run.parents[1]) == []
    status = titan("status", "runs/tiny", cwd=run.parents[1])
    assert status.stdout.startswith("tiny: stopped"), status.stdout + status.stderr


def test_a_sigterm_before_there_are_ranks_stops_the_run_with_a_word(tmp_path: Path) -> None:
    write_tiny_config(tmp_path / "work")
    process = start_titan("run", "tiny.toml", cwd=tmp_path / "work")
    wait_for_events(tmp_path / "work/runs/tiny", "data_ready", 1, process, LONG_S)  # Ray starts now, with a handler
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=90)
    assert (process.returncode, err.count("\n")) == (130, 1) and "stopped at once; `titan resume" in err, err
    assert processes_under(tmp_path) == []
