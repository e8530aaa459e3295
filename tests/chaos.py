"""Faults of all kinds during one training, compared with the same training undisturbed.

    python -m tests.chaos --faults 50 [--steps 1500] [--seed 1] [--roles students | all] [--json FILE]
    python -m tests.chaos --hosts 3 --faults 30 --steps 700

Students and the label service are killed (SIGKILL) and hung (SIGSTOP) at random moments; with `--roles all` the
teacher too. In the end all weights must be those of the undisturbed run bit for bit, the audit clean, and no process
left. Where the teacher is left alone, its step times are compared as well.

With `--hosts 3` the run is on three hosts (network namespaces, so as root), and hosts, links, disk, Ray and the driver
fail too (tests/hosts/chaos.py); layouts change with the hosts, so losses agree within rounding, not in bits.
"""

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import pytest
import torch

from tests.hosts.chaos import hosts_chaos
from tests.hosts.namespaces import require_namespaces
from tests.runs import kill_tree, placed, processes_under, start_titan, titan, wait_for_step, weights, write_tiny_config
from titan.observe.events import read_events
from titan.observe.metrics import StepMetric, read_metrics

STUDENTS = ("early", "late")
SERVICE = "label service"
REST_S = (1.0, 6.0)
"""Between two faults."""
SETTINGS = ("labels.delivery=service", "checkpoint.every_steps=10", "recovery.max_restarts=20")


@dataclass
class Result:
    """What came of it."""

    faults: dict[str, int] = field(default_factory=dict)
    """By victim and signal."""
    problems: list[str] = field(default_factory=list)
    recovered_s: dict[str, float] = field(default_factory=dict)
    """By role: median seconds from the moment that a failure was seen to the first step after it."""
    teacher_step_s: dict[str, float] = field(default_factory=dict)
    """Median of the teacher's steps in the calm and the disturbed run."""
    wall_s: dict[str, float] = field(default_factory=dict)


def chaos(folder: Path, faults: int, steps: int, seed: int, victims: tuple[str, ...], timeout_s: float) -> Result:
    """Both runs, in an empty folder."""
    write_tiny_config(folder)
    result = Result()
    options = [part for one in (*SETTINGS, f"run.steps={steps}") for part in ("--set", one)]
    begin = time.monotonic()
    calm = titan("run", "tiny.toml", *options, "--set", "run.name=calm", cwd=folder, timeout_s=timeout_s)
    result.wall_s["calm"] = round(time.monotonic() - begin, 1)
    if calm.returncode:
        result.problems.append(f"the undisturbed run ended with {calm.returncode}: {calm.stderr}")
        return result
    begin = time.monotonic()
    process = start_titan("run", "tiny.toml", *options, "--set", "run.name=hurt", cwd=folder)
    try:
        _disturb(folder / "runs" / "hurt", process, faults, random.Random(seed), victims, result)
        _, error = process.communicate(timeout=timeout_s)
    except (subprocess.TimeoutExpired, AssertionError) as failure:
        kill_tree(process.pid)
        result.problems.append(str(failure))
        return result
    result.wall_s["hurt"] = round(time.monotonic() - begin, 1)
    if process.returncode:
        result.problems.append(f"the disturbed run ended with {process.returncode}: {error}")
    _compare(folder, steps, result)
    return result


def _disturb(
    run: Path,
    process: "subprocess.Popen[str]",
    faults: int,
    rng: random.Random,
    victims: tuple[str, ...],
    result: Result,
) -> None:
    """Strike, one after the other, for as long as the run lasts."""
    wait_for_step(run, "teacher", 12, process)
    while sum(result.faults.values()) < faults and process.poll() is None:
        victim, blow = rng.choice(victims), rng.choice((signal.SIGKILL, signal.SIGSTOP))
        pids = [_service(run)] if victim == SERVICE else placed(run, victim)
        try:
            target = psutil.Process(rng.choice(pids))
            if target.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                raise psutil.NoSuchProcess(target.pid)
            target.send_signal(blow)
        except psutil.NoSuchProcess:  # it is down already, or has done its part
            time.sleep(0.1)
            continue
        name = f"{victim} {blow.name}"
        result.faults[name] = result.faults.get(name, 0) + 1
        time.sleep(rng.uniform(*REST_S))


def _service(run: Path) -> int:
    return int(next(event["pid"] for event in reversed(read_events(run)) if event["event"] == "label_service"))


def _compare(folder: Path, steps: int, result: Result) -> None:
    calm, hurt = folder / "runs" / "calm", folder / "runs" / "hurt"
    for role in ("teacher", *STUDENTS):
        expected, found = weights(calm, role, steps), weights(hurt, role, steps)
        if expected.keys() != found.keys() or not all(torch.equal(expected[key], found[key]) for key in expected):
            result.problems.append(f"{role} has other weights than in the undisturbed run")
    for command in ("audit", "verify"):
        looked = titan("labels", command, hurt, cwd=folder)
        if looked.returncode:
            result.problems.append(f"labels {command}: {looked.stdout}{looked.stderr}")
    if left := processes_under(folder):
        result.problems.append(f"processes left: {left}")
    events = read_events(hurt)
    for role in ("teacher", *STUDENTS):
        seconds = [event["seconds"] for event in events if event["event"] == "recovered" and event["role"] == role]
        if seconds:
            result.recovered_s[role] = statistics.median(seconds)
    for name, run in (("calm", calm), ("hurt", hurt)):
        times = [one.step_s for one in read_metrics(run) if isinstance(one, StepMetric) and one.role == "teacher"]
        result.teacher_step_s[name] = round(statistics.median(times[10:]), 5)


def main() -> int:
    """Run it, print what came of it; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--roles", choices=("students", "all"), default="students")
    parser.add_argument("--hosts", type=int, choices=(1, 3), default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.hosts > 1:
        try:
            require_namespaces()
        except pytest.skip.Exception as missing:
            print(missing, file=sys.stderr)
            return 0
    victims = (*STUDENTS, SERVICE, *(("teacher",) if asked.roles == "all" else ()))
    with tempfile.TemporaryDirectory(prefix="titan-chaos-") as folder:
        place = Path(folder) / "work"
        result = (
            chaos(place, asked.faults, asked.steps, asked.seed, victims, timeout_s=3000.0)
            if asked.hosts == 1
            else hosts_chaos(place, asked.faults, asked.steps, asked.seed, timeout_s=3000.0)
        )
    text = json.dumps(asdict(result), indent=1)
    print(text)
    if asked.json is not None:
        asked.json.write_text(text + "\n")
    if sum(result.faults.values()) < asked.faults:
        print(f"the run was over after {sum(result.faults.values())} faults; give it more --steps", file=sys.stderr)
        return 1
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
