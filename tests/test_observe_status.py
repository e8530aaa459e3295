"""The status of a run, as another terminal sees it."""

import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from titan.errors import RunError
from titan.observe import status as status_module
from titan.observe.events import EventLog
from titan.observe.files import Record, read_config
from titan.observe.heartbeat import FILE, LATE_S, Beat, Heartbeat, read_beat, this_machine
from titan.observe.metrics import EvalMetric, MetricsLog, StepMetric
from titan.observe.progress import waits
from titan.observe.status import driver_lives, print_status, read_status, restart_lines
from titan.observe.useful import goodput

MODEL = "layers = 1\nhidden = 32\nheads = 2\nffn = 64\n"
CONFIG = f"""
[run]
name = "night"
steps = 100
[data]
sources = ["python-stdlib"]
[teacher.model]
{MODEL}
[[students]]
name = "small"
[students.model]
{MODEL}
[[students]]
name = "late"
[students.model]
{MODEL}
[students.start]
step = 60
[[students]]
name = "behind"
[students.model]
{MODEL}
[students.start]
lead = 0.25
"""


def teacher(step: int, time_s: float | None = None, loss: float = 3.0) -> StepMetric:
    return StepMetric("teacher", step, 0.1 * step if time_s is None else time_s, loss, loss, 1.0, 1e-3, 2048, 0.1)


def small(step: int) -> StepMetric:
    labels = {"label_bytes": 2048 * 34, "label_wait_s": 0.01, "lag": 2}
    return replace(teacher(step), role="small", distill_loss=2.0, distill_weight=0.5, lead=0.2, **labels)


def make_run(folder: Path, last_step: int = 40, host: str | None = None, pid: int | None = None) -> EventLog:
    (folder / "config.toml").write_text(CONFIG)
    events = EventLog(folder)
    events.emit("run_started", pid=pid or os.getpid(), host=host or socket.gethostname(), version="0.1.0")
    with MetricsLog(folder) as log:
        for step in range(1, last_step + 1):
            log.write(teacher(step))
            log.write(small(step))
        log.write(EvalMetric("teacher", last_step, 4.0, 2.0, 1.75, 4096))
    return events


def age(folder: Path, seconds: float) -> None:
    for path in folder.glob("*.jsonl"):
        os.utime(path, (time.time() - seconds,) * 2)


def printed(folder: Path, terminal: bool = False) -> str:
    out = io.StringIO()
    print_status(read_status(folder), Console(file=out, width=140, force_terminal=terminal))
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())


def test_a_running_run_shows_a_row_a_role(tmp_path: Path) -> None:
    events = make_run(tmp_path)
    events.emit("checkpoint", role="teacher", step=20, seconds=0.1)
    events.emit("checkpoint", role="teacher", step=40, seconds=0.1)
    events.emit("failed", role="small", rank=1, host="b", step=39, error="out of memory\nat line 3")
    status = read_status(tmp_path)
    assert (status.state, status.detail, status.total_steps) == ("running", "", 100)
    assert status.checkpoints == {"teacher": 40}
    for text in (printed(tmp_path), printed(tmp_path, terminal=True)):
        assert text.startswith("night: running")
        assert "40/100" in text and "1.750" in text
        assert "waits for step 60" in text and "waits for a lead of 0.25" in text
        assert "newest checkpoints: teacher 40" in text
        assert "last error: role small, rank 1, host b, step 39: out of memory at line 3" in text


@pytest.mark.parametrize("status", ["finished", "stopped", "failed"])
def test_a_run_that_ended_says_how_and_is_never_quiet(tmp_path: Path, status: str) -> None:
    make_run(tmp_path).emit("run_finished", status=status, wall_s=4.0)
    age(tmp_path, 3600)
    assert (read_status(tmp_path).state, read_status(tmp_path).quiet_s) == (status, 0.0)


def test_a_run_resumed_after_its_end_is_running_again_and_its_old_error_forgotten(tmp_path: Path) -> None:
    events = make_run(tmp_path)
    events.emit("failed", role="small", error="old")
    events.emit("run_finished", status="failed", wall_s=4.0)
    make_run(tmp_path).emit("resumed", steps={"teacher": 40})
    status = read_status(tmp_path)
    assert (status.state, status.last_error) == ("running", "")


def test_a_driver_that_died_without_a_word_is_found_out(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    make_run(tmp_path, pid=child.pid)
    status = read_status(tmp_path)
    assert status.state == "failed" and f"pid {child.pid}) is gone" in status.detail and "titan resume" in status.detail


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_later_process_with_the_pid_of_the_driver_is_not_the_driver() -> None:
    assert driver_lives({"pid": os.getpid(), "time": "2999-01-01T00:00:00+00:00"})
    assert not driver_lives({"pid": os.getpid(), "time": "2001-01-01T00:00:00+00:00"})


def test_a_run_of_another_host_that_says_nothing_is_quiet(tmp_path: Path) -> None:
    make_run(tmp_path, host="elsewhere")
    assert read_status(tmp_path).state == "running"
    age(tmp_path, 42)
    status = read_status(tmp_path)
    assert (status.state, status.detail) == ("quiet", "no news for 42 s from elsewhere")
    assert "no step for 42 s" in printed(tmp_path)


def leave_beat(folder: Path, ago_s: float, host: str, machine: str, pid: int) -> None:
    (folder / FILE).write_text(json.dumps(asdict(Beat(time.time() - ago_s, host, machine, pid))))


def test_a_driver_on_another_host_lives_as_long_as_it_gives_signs_of_life(tmp_path: Path) -> None:
    """Also one whose host has the same name: its process id means nothing here."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for folder, host in ((tmp_path / "a", "elsewhere"), (tmp_path / "b", socket.gethostname())):
        folder.mkdir()
        make_run(folder, host=host, pid=dead.pid)
        leave_beat(folder, LATE_S - 5, host, "another machine", dead.pid)
        assert read_status(folder).state == "running"
        age(folder, 42)
        assert read_status(folder).state == "quiet"
        leave_beat(folder, LATE_S + 15, host, "another machine", dead.pid)
        found = read_status(folder)
        gone = f"its driver (pid {dead.pid} on {host}) has given no sign of life for 1m15s; `titan resume` continues it"
        assert (found.state, found.detail) == ("failed", gone)


def test_on_the_machine_of_the_driver_the_system_knows_better_than_its_heartbeat(tmp_path: Path) -> None:
    make_run(tmp_path)
    leave_beat(tmp_path, 3600, socket.gethostname(), this_machine(), os.getpid())  # a disk that is full
    assert read_status(tmp_path).state == "running"
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    make_run(tmp_path, pid=child.pid)
    leave_beat(tmp_path, 0, socket.gethostname(), this_machine(), child.pid)
    assert read_status(tmp_path).state == "failed"


def test_a_heartbeat_goes_on_whatever_the_driver_waits_for_and_tells_other_machines_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Heartbeat(tmp_path, every_s=0.02):
        first = read_beat(tmp_path)
        assert first is not None and (first.host, first.pid) == (socket.gethostname(), os.getpid())
        deadline = time.monotonic() + 20
        while read_beat(tmp_path) == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read_beat(tmp_path) != first
    last = read_beat(tmp_path)
    time.sleep(0.1)
    assert read_beat(tmp_path) == last, "it ends with its block"
    events = make_run(tmp_path)
    assert (first.machine, read_status(tmp_path).state) == (this_machine(), "running")
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")  # the same folder, looked at from there
    monkeypatch.setattr(status_module, "this_machine", lambda: "another machine")
    monkeypatch.setattr(status_module, "driver_lives", lambda started: False)
    assert read_status(tmp_path).state == "running"
    leave_beat(tmp_path, LATE_S + 1, first.host, first.machine, first.pid)
    assert read_status(tmp_path).state == "failed"
    events.emit("run_finished", status="stopped")
    assert read_status(tmp_path).state == "stopped"


def test_a_run_that_was_asked_to_stop_says_so(tmp_path: Path) -> None:
    make_run(tmp_path).emit("stop_requested", signal="SIGINT")
    assert read_status(tmp_path).detail == "asked to stop"


def test_a_run_without_events_has_not_started(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    assert read_status(tmp_path).state == "not started"
    assert printed(tmp_path) == "night: not started\n"


def test_the_status_of_no_run_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run folder"):
        read_status(tmp_path / "nothing")


def test_waits_tells_only_of_students_that_start_later(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    assert waits(read_config(tmp_path)) == {"late": "waits for step 60", "behind": "waits for a lead of 0.25"}


def test_events_are_json_lines_another_tool_can_read(tmp_path: Path) -> None:
    make_run(tmp_path)
    assert [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").open()] == ["run_started"]


def test_roles_that_started_again_are_named_with_how_long_it_took(tmp_path: Path) -> None:
    events: list[Record] = [
        {"event": "ranks_up", "seconds": 9.0},
        {"event": "restarting", "role": "small", "from_step": 40},
        {"event": "ranks_up", "role": "small", "seconds": 6.1},
        {"event": "restarting", "role": "teacher", "from_step": 50},
        {"event": "restarting", "role": "small", "from_step": 60},
        {"event": "ranks_up", "role": "small", "seconds": 65.0},
    ]
    assert restart_lines(events) == [
        "small: started again 2 times, the last from step 60, up after 1m05s",
        "teacher: started again 1 time, the last from step 50, not up yet",
    ]


def test_goodput_counts_a_step_once_and_only_those_of_the_leading_role() -> None:
    def step(role: str, number: int, time_s: float) -> StepMetric:
        return StepMetric(role, number, time_s, 1.0, 1.0, 1.0, 0.1, 10, 2.0)

    metrics = [step("teacher", 1, 100.0), step("small", 1, 101.0), step("teacher", 2, 104.0), step("teacher", 3, 110.0)]
    assert goodput(metrics, since_s=102.0, wall_s=10.0) == pytest.approx(0.4)
    assert goodput(metrics[1:2], since_s=0.0, wall_s=10.0) == pytest.approx(0.2)
    assert math.isnan(goodput([], 0.0, 10.0))
