"""The live display, on a terminal and off one."""

import io
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console

from titan.observe import live as live_module
from titan.observe import words
from titan.observe.live import LiveDisplay
from titan.observe.metrics import EvalMetric, StepMetric
from titan.observe.progress import RoleProgress, Smoothed, plain_lines, progress_table


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
        assert "tok/s  no step for 3" in out.getvalue().splitlines()[-1]


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
    assert len(lines) == 3


def test_a_phase_is_shown_until_the_next_one_even_while_steps_come_in(clock: Clock) -> None:
    out = io.StringIO()
    with LiveDisplay("night", 100, ["teacher"], Console(file=out, width=130, force_terminal=True)) as live:
        live.phase("stopping after this step")
        clock.now_s += 3.0
        live.update(teacher(1))
    assert "stopping after this step (3.0 s)" in out.getvalue()


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
