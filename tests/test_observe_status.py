"""What a person sees: the live display on and off a terminal, and the status of a run from another terminal."""

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from titan.errors import RunError
from titan.observe import live as live_module
from titan.observe import words
from titan.observe.events import EventLog
from titan.observe.files import read_config
from titan.observe.live import LiveDisplay
from titan.observe.metrics import EvalMetric, MetricsLog, StepMetric
from titan.observe.progress import RoleProgress, Smoothed, plain_lines, progress_table, waits
from titan.observe.status import driver_lives, print_status, read_status

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


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(live_module.time, "monotonic", lambda: clock.now_s)
    yield clock


def plain_console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=60), out


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


def test_plain_lines_have_no_control_codes_and_are_not_wrapped(clock: Clock) -> None:
    console, out = plain_console()
    with LiveDisplay("night", 100, ["teacher", "small", "late"], console, waits={"late": "waits for step 60"}) as live:
        live.phase("preparing data")
        for step in range(1, 41):
            live.update(teacher(step))
            live.update(small(step))
        live.log("[bold]student :rocket: late waits[/bold] " + "x" * 100)
    text = out.getvalue()
    assert "\x1b" not in text and "\r" not in text
    assert "[bold]student :rocket: late waits[/bold] " + "x" * 100 + "\n" in text
    last = text.splitlines()[-3:]
    assert re.fullmatch(r"  teacher  40/100   loss  3\.000  ce  3\.000  20\.5k tok/s  left 6\.0 s", last[0])
    assert last[1].endswith("lag 2  a 0.50  label B/tok 34.0")
    assert last[2] == "  late     waits for step 60"


def test_a_plain_block_comes_every_few_seconds_and_not_oftener(clock: Clock) -> None:
    console, out = plain_console()
    with LiveDisplay("night", 1000, ["teacher"], console, plain_every_s=10.0) as live:
        for step in range(1, 301):  # 30 seconds
            clock.now_s += 0.1
            live.update(teacher(step))
            live.refresh()
        assert 3 <= out.getvalue().count("teacher") <= 4


def test_silence_is_told(clock: Clock) -> None:
    console, out = plain_console()
    with LiveDisplay("night", 100, ["teacher"], console) as live:
        live.update(teacher(1))
        for _ in range(45):
            clock.now_s += 1.0
            live.refresh()
        assert "no step for 4" in out.getvalue().splitlines()[-1]


def test_a_phase_is_told_at_once_and_its_progress_now_and_then(clock: Clock) -> None:
    console, out = plain_console()
    with LiveDisplay("night", 100, ["teacher"], console) as live:
        for up in range(64):
            live.phase(f"starting 64 ranks: {up + 1} up")
            clock.now_s += 0.1
        live.phase("loading")
    lines = out.getvalue().splitlines()
    assert "starting 64 ranks: 1 up (0.0 s)" in lines[0]
    assert "starting 64 ranks: 64 up (6." in lines[-2] and "loading (0.0 s)" in lines[-1]
    assert len(lines) < 12


def test_a_terminal_gets_a_table_that_is_redrawn_at_most_four_times_a_second(clock: Clock) -> None:
    out = io.StringIO()
    console = Console(file=out, width=130, force_terminal=True)
    with LiveDisplay("night", 100, ["teacher", "small"], console) as live:
        live.phase("starting 2 ranks: 1 up")
        for step in range(1, 101):  # 10 seconds
            clock.now_s += 0.1
            live.update(teacher(step))
            live.refresh()
        live.log("small starts")
    text = out.getvalue()
    assert "starting 2 ranks: 1 up" in text and "small starts" in text and "100/100" in text and "done" in text
    assert 20 < text.count("time left") <= 45


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = io.StringIO()
    with LiveDisplay("night", 100, ["teacher"], Console(file=out, force_terminal=True)) as live:
        live.update(teacher(1))
    assert "\x1b[" not in out.getvalue() and "1/100" in out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_a_table_fits_its_terminal_and_cuts_no_number(width: int) -> None:
    rows = [RoleProgress(role, 100_000) for role in ("teacher", "small")]
    for step in range(99_000, 99_050):
        rows[0].add(teacher(step))
        rows[1].add(small(step))
    rows[0].add(EvalMetric("teacher", 99_000, 1.0, 2.0, 1.75, 4096))
    out = io.StringIO()
    Console(file=out, width=width).print(progress_table(rows, {}, width))
    assert "…" not in out.getvalue() and len(out.getvalue().splitlines()) == 3


def test_speed_and_time_left_are_those_of_the_recent_past() -> None:
    row = RoleProgress("teacher", 1000)
    for step in range(1, 101):
        row.add(teacher(step, time_s=float(step)))
    for step in range(101, 301):
        row.add(teacher(step, time_s=100.0 + 0.25 * (step - 100)))
    assert row.tokens_per_s == pytest.approx(4 * 2048)
    assert row.remaining_s == pytest.approx(700 / 4)


def test_a_loss_that_is_no_number_is_shown_and_does_not_stick() -> None:
    row = RoleProgress("teacher", 100)
    row.add(teacher(1))
    row.add(teacher(2, loss=float("nan")))
    assert "loss    nan" in plain_lines([row], {})[0]
    row.add(teacher(3))
    assert "loss  3.000" in plain_lines([row], {})[0]


def test_a_smoothed_value_has_no_memory_of_a_start_at_zero() -> None:
    smoothed = Smoothed()
    for _ in range(3):
        smoothed.add(7.0)
    assert smoothed.mean == pytest.approx(7.0)


def test_a_running_run_shows_a_row_a_role(tmp_path: Path) -> None:
    events = make_run(tmp_path)
    events.emit("checkpoint", role="teacher", step=20, seconds=0.1)
    events.emit("checkpoint", role="teacher", step=40, seconds=0.1)
    events.emit("failed", role="small", rank=1, host="b", step=39, error="out of memory\nat line 3")
    status = read_status(tmp_path)
    assert (status.state, status.detail, status.total_steps, status.checkpoints) == (
        "running",
        "",
        100,
        {"teacher": 40},
    )
    for text in (printed(tmp_path), printed(tmp_path, terminal=True)):
        assert text.startswith("night: running")
        assert (
            "40/100" in text and "1.750" in text and "waits for step 60" in text and "waits for a lead of 0.25" in text
        )
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


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (41_234, "41.2k"), (999_600, "1.00M"), (7.6e9, "7.60B")],
)
def test_counts_have_three_digits(number: float, text: str) -> None:
    assert words.count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.96, "10 s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (442_800, "5d03h")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert words.duration(seconds) == text


def test_events_are_json_lines_another_tool_can_read(tmp_path: Path) -> None:
    make_run(tmp_path)
    assert [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").open()] == ["run_started"]
