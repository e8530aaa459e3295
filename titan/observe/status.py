"""Where a run stands, told from its folder alone: from another terminal, while it runs or long after."""

import math
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from titan.config.settings import RunConfig
from titan.observe import words
from titan.observe.events import event_time_s, read_events
from titan.observe.files import Record, read_config, require_run_folder
from titan.observe.heartbeat import LATE_S, Beat, read_beat, this_machine
from titan.observe.metrics import Metric, StepMetric, read_metrics
from titan.observe.planned import Promise, promises
from titan.observe.progress import QUIET_S, RoleProgress, plain_lines, progress_table, role_names, waits
from titan.observe.useful import goodput

State = Literal["not started", "running", "quiet", "finished", "stopped", "failed"]

CLOCK_SLACK_S = 60.0
"""How much later than its own run_started event a driver may seem to have been born."""


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment."""

    name: str
    state: State
    detail: str
    """One clause about the state, empty where there is nothing to add."""
    total_steps: int
    rows: tuple[RoleProgress, ...]
    quiet_s: float
    """Seconds since the run last wrote anything; 0 for a run that is over."""
    wall_s: float
    """Seconds since the run started, or was resumed, to now or to its end."""
    last_error: str
    """The last failure of a rank, or else of the driver, as one line; empty if there was none since the last start."""
    checkpoints: dict[str, int]
    """Newest checkpoint of each role that has one: its step."""
    promises: tuple[Promise, ...] = ()
    """Predicted beside measured steps, where there was a prediction."""
    restarts: tuple[str, ...] = ()
    """Roles that started again since the run did, how often, and where they stand; one line each."""
    goodput: float = math.nan
    """Share of the wall time that went into steps that count."""
    stragglers: tuple[str, ...] = ()
    """Ranks that are slower than their kind of device should be, one line each."""


def read_status(folder: Path) -> RunStatus:
    """Read a run folder; RunError if it is none."""
    require_run_folder(folder)
    config = read_config(folder)
    events = read_events(folder)
    this_part = since_last_start(events)
    now_s = time.time()
    quiet_s = now_s - last_sign_of_life_s(folder)
    metrics = read_metrics(folder)
    state, detail = run_state(this_part, quiet_s, longest_step_s(metrics), read_beat(folder))
    over = state in ("finished", "stopped", "failed")
    start_s = event_time_s(this_part[0]) if this_part else now_s
    end_s = event_time_s(this_part[-1]) if over and this_part else now_s
    failures = [event for name in ("error", "failed") for event in this_part if event["event"] == name]
    return RunStatus(
        name=config.run.name,
        state=state,
        detail=detail,
        total_steps=config.run.steps,
        rows=tuple(role_rows(config, metrics)),
        quiet_s=0.0 if over or state == "not started" else max(0.0, quiet_s),
        wall_s=max(0.0, end_s - start_s),
        last_error=failure_text(failures[-1]) if failures else "",
        checkpoints={
            str(event["role"]): int(event["step"])
            for event in events
            if event["event"] == "checkpoint" and "role" in event and "step" in event
        },
        promises=tuple(promises(folder, this_part, metrics)),
        restarts=tuple(restart_lines(this_part)),
        goodput=goodput(metrics, start_s, end_s - start_s),
        stragglers=tuple(straggler_text(event) for event in this_part if event["event"] == "straggler"),
    )


def print_status(status: RunStatus, console: Console) -> None:
    """Print a status: a table on a terminal, aligned lines elsewhere."""
    headline = f"{status.name}: {status.state}" + (f", {status.detail}" if status.detail else "")
    if status.state != "not started":
        useful = "" if math.isnan(status.goodput) else f", goodput {status.goodput:.0%}"
        headline += f"  ({words.duration(status.wall_s)}{useful})"
    console.print(headline, style="bold", markup=False, emoji=False, highlight=False, soft_wrap=True)
    quiet_s = {row.role: status.quiet_s for row in status.rows}
    if console.is_terminal and status.state != "not started":
        console.print(progress_table(status.rows, quiet_s, console.width))
    elif status.state != "not started":
        for line in plain_lines(status.rows, quiet_s):
            console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
    if status.checkpoints:
        newest = ", ".join(f"{role} {step}" for role, step in status.checkpoints.items())
        console.print(f"newest checkpoints: {newest}", markup=False, highlight=False, soft_wrap=True)
    for line in (*(promise.sentence for promise in status.promises), *status.restarts, *status.stragglers):
        console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
    if status.last_error:
        console.print(f"last error: {status.last_error}", markup=False, emoji=False, highlight=False, soft_wrap=True)


def since_last_start(events: Sequence[Record]) -> list[Record]:
    """Events of the newest part of a run: from its last run_started on; all of them if it never said so."""
    starts = [index for index, event in enumerate(events) if event["event"] == "run_started"]
    return list(events[starts[-1] :] if starts else events)


def run_state(
    events: Sequence[Record], quiet_s: float, step_s: float = 0.0, beat: Beat | None = None
) -> tuple[State, str]:
    """State of a run and one clause about it.

    events:  those since its last start
    quiet_s: seconds since its folder last changed
    step_s:  the longest of its recent steps, a measure of how long silence is normal
    beat:    the newest sign of life of a driver
    """
    if not events:
        return "not started", ""
    last_end = next((event for event in reversed(events) if event["event"] == "run_finished"), None)
    if last_end is not None:
        status = last_end.get("status")
        return (status if status in ("finished", "stopped", "failed") else "finished"), ""
    started, host = events[0], str(events[0].get("host", ""))
    if gone := _gone(started, beat):
        return "failed", f"{gone}; `titan resume` continues it"
    if any(event["event"] == "stop_requested" for event in events):
        return "running", "asked to stop"
    if quiet_s > max(QUIET_S, 10 * step_s):
        return "quiet", f"no news for {words.duration(quiet_s)}" + (f" from {host}" if host else "")
    return "running", ""


def _gone(started: Record, beat: Beat | None) -> str:
    """Why the driver that wrote a run_started event must be dead, in words; "" if it need not be.

    A process id means something only on its own machine, and in its own container; elsewhere the heartbeat counts.
    """
    pid, host = started.get("pid"), str(started.get("host", ""))
    if beat is None or (beat.pid, beat.host) != (pid, host):  # the run is that of an earlier titan
        here = host == socket.gethostname()
    else:
        here = beat.machine == this_machine()
        silent_s = time.time() - beat.time_s
        if not here and silent_s > LATE_S:
            return f"its driver (pid {pid} on {host}) has given no sign of life for {words.duration(silent_s)}"
    return f"its driver (pid {pid}) is gone without a last word" if here and not driver_lives(started) else ""


def driver_lives(started: Record) -> bool:
    """Whether the process that wrote a run_started event on this host runs; a later one with its pid does not count."""
    try:
        pid = int(started.get("pid", 0))
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError, TypeError, ValueError):
        return False
    born_s = _birth_s(pid)
    return pid > 0 and (born_s is None or born_s <= event_time_s(started) + CLOCK_SLACK_S)


def last_sign_of_life_s(folder: Path) -> float:
    """Unix time at which metrics or events last changed; now if there are none."""
    files = [folder / name for name in ("metrics.jsonl", "events.jsonl")]
    return max((file.stat().st_mtime for file in files if file.exists()), default=time.time())


def longest_step_s(metrics: Sequence[Metric]) -> float:
    """Seconds of the longest of the last steps."""
    return max((metric.step_s for metric in metrics[-20:] if isinstance(metric, StepMetric)), default=0.0)


def role_rows(config: RunConfig, metrics: Sequence[Metric]) -> list[RoleProgress]:
    """One row a role of the run, in the order of its config."""
    reasons = waits(config)
    rows = {role: RoleProgress(role, config.run.steps, reasons.get(role, "waits")) for role in role_names(config)}
    for metric in metrics:
        if metric.role in rows:
            rows[metric.role].add(metric)
    return list(rows.values())


def restart_lines(events: Sequence[Record]) -> list[str]:
    """`early: started again 2 times, the last from step 80, up after 6.1 s` for each role that failed."""
    lines = []
    for role in dict.fromkeys(str(event.get("role")) for event in events if event["event"] == "restarting"):
        own = [event for event in events if event.get("role") == role]
        again = [event for event in own if event["event"] == "restarting"]
        after = own[own.index(again[-1]) :]
        up = next((event for event in after if event["event"] == "ranks_up"), None)
        how = f"up after {words.duration(float(up.get('seconds', 0)))}" if up else "not up yet"
        times = words.plural(len(again), "time")
        lines.append(f"{role}: started again {times}, the last from step {again[-1].get('from_step')}, {how}")
    return lines


def straggler_text(event: Record) -> str:
    """A `straggler` event as one line."""
    device = f" ({event['device']})" if event.get("device") else ""
    offer = ""
    if event.get("replan_gain"):
        gain = float(event["replan_gain"]) - 1
        again = f"titan resume --set {event.get('role')}.layout.planned=true"
        offer = "; no other plan would help"
        if gain > 0.01:
            offer = f"; in the inventory as a kind of its own a plan would be {gain:.0%} faster: {again}"
    times = f"{float(event.get('factor', 0)):.2f} times what its kind should, since about step {event.get('step')}"
    return f"straggler: {event.get('role')} rank {event.get('rank')}{device} takes {times}{offer}"


def failure_text(event: Record) -> str:
    """A `failed` event as one line: where, when, what."""
    place = [f"{name} {event[name]}" for name in ("role", "rank", "host", "step") if event.get(name) is not None]
    error = " ".join(str(event.get("error", "no reason given")).split())
    return f"{', '.join(place)}: {error}" if place else error


def _birth_s(pid: int) -> float | None:
    """Unix time at which a process started; None where /proc does not tell."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        boot_s = float(Path("/proc/stat").read_text().partition("btime")[2].split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return boot_s + ticks / os.sysconf("SC_CLK_TCK")
