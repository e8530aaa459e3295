"""What failures leave of a run's time, measured, beside what the simulator says of the same failures.

    python -m benchmarks.goodput [--kills 180:3 120:3 60:5] [--spares 0 2] [--json FILE]

Real runs with a local Ray: a small teacher of two ranks, tensor-parallel, and two students that follow it. `180:3`:
every 180 s from the first step on a rank of the teacher is killed, three times, and 180 s later the run is stopped.
Failures of students are not tried: they cost the teacher nothing.

The simulator gets the seconds of a step, of a checkpoint and of a recovery, and when the failures came. It gets the
seconds twice: those of the run itself, and those of the first run with as many spares, which is a prediction.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from tests.runs import kill_tree, placed, processes_under, start_titan, titan, wait_for_step, write_tiny_config
from titan.config.simulation import SimulationConfig, check_simulation
from titan.observe.events import event_time_s, read_events
from titan.observe.files import Record, read_json
from titan.observe.metrics import StepMetric, read_metrics
from titan.plan.simulate.failures import Failure
from titan.plan.simulate.replay import make_worlds, replay

TEACHER, EVERY_STEPS = "teacher", 40
SETTINGS = (
    "run.steps=1000000",
    "data.batch_size=16",
    "data.sequence_length=64",
    "teacher.model.hidden=192",
    "teacher.model.ffn=512",
    f"checkpoint.every_steps={EVERY_STEPS}",
    "checkpoint.keep=100000",
    "recovery.max_restarts=1000",
)
WAIT_S = 240.0
CHANCES = 200
"""Simulated runs of one real one."""


@dataclass(frozen=True)
class Costs:
    """Means of a run, seconds."""

    step_s: float
    """As titan counts steps that are useful."""
    between_s: float
    """From the end of a step to the beginning of the next: labels are committed, metrics told."""
    stall_s: float
    """What a checkpoint adds to that."""
    write_s: float
    """Until it is safe."""
    detect_s: float
    rebuild_s: float
    reload_s: float


@dataclass(frozen=True)
class Measured:
    """A real run from the beginning of its first step to the end of its last."""

    costs: Costs
    wall_s: float
    failures_s: tuple[float, ...]
    """When ranks were killed."""
    steps: int
    lost_steps: int
    lost_s: float
    """From the checkpoints that roles went back to until the kills."""
    goodput: float
    whole_goodput: float
    """As summary.json has it: of the whole command, starting and ending included."""
    whole_s: float


def hurt_run(folder: Path, name: str, every_s: float, failures: int, spares: int) -> tuple[Path, list[float]]:
    """A run of which a rank is killed every so often; its folder, and the Unix times of the kills."""
    run, rng = folder / "runs" / name, random.Random(name)
    sets = (*SETTINGS, f"run.name={name}", f"recovery.spares={spares}")
    process = start_titan("run", "tiny.toml", *(part for one in sets for part in ("--set", one)), cwd=folder)
    killed: list[float] = []
    try:
        wait_for_step(run, TEACHER, 1, process, WAIT_S)
        begin = time.time()
        for number in range(1, failures + 1):
            _sleep_until(begin + number * every_s)
            assert process.poll() is None, process.communicate()
            victim = psutil.Process(rng.choice(placed(run, TEACHER)))
            victim.kill()
            killed.append(time.time())
        _sleep_until(begin + (failures + 1) * every_s)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=WAIT_S)
        assert process.returncode == 130, error
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
    audit = titan("labels", "audit", run, cwd=folder)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert not (left := processes_under(folder)), left
    return run, killed


def _sleep_until(time_s: float) -> None:
    time.sleep(max(0.0, time_s - time.time()))


def measure(run: Path, killed: Sequence[float]) -> Measured:
    """What the run's own files say."""
    steps = [one for one in read_metrics(run) if isinstance(one, StepMetric) and one.role == TEACHER]
    begin_s, end_s = steps[0].time_s - steps[0].step_s, steps[-1].time_s
    events = [one for one in read_events(run) if one.get("role") == TEACHER]
    restarts = [one for one in events if one["event"] == "restarting"]
    assert len(restarts) == len(killed), f"{len(killed)} kills, {len(restarts)} restarts"
    gaps: dict[bool, list[float]] = {False: [], True: []}
    for before, after in pairwise(steps):
        gap_s = after.time_s - after.step_s - before.time_s
        if not any(before.time_s < kill < after.time_s for kill in killed):
            gaps[before.step % EVERY_STEPS == 0].append(gap_s)
    between_s = statistics.mean(gaps[False])
    summary = read_json(run / "summary.json")
    assert summary is not None
    return Measured(
        Costs(
            statistics.mean(one.step_s for one in steps),
            between_s,
            statistics.mean(gaps[True]) - between_s,
            statistics.mean(_writing_s(run, steps)),
            *(
                statistics.mean(times)
                for times in zip(*(_recovery(events, steps, kill) for kill in killed), strict=True)
            ),
        ),
        end_s - begin_s,
        tuple(kill - begin_s for kill in killed),
        len(steps),
        sum(one["lost_steps"] for one in restarts),
        sum(kill - max(one.time_s for one in steps if one.time_s < kill) for kill in killed),
        sum(one.step_s for one in steps) / (end_s - begin_s),
        summary["goodput"],
        summary["wall_s"],
    )


def _writing_s(run: Path, steps: Sequence[StepMetric]) -> list[float]:
    """From the end of a step to the last file of its checkpoint."""
    folders = {one.step: run / f"checkpoints/{TEACHER}/step-{one.step:08d}" for one in steps}
    return [folders[one.step].stat().st_mtime - one.time_s for one in steps if folders[one.step].is_dir()]


def _recovery(events: Sequence[Record], steps: Sequence[StepMetric], kill: float) -> tuple[float, float, float]:
    """Seconds until it was noticed, then until all ranks were up, then until the first step began."""
    lost_s, up_s = (
        min(event_time_s(one) for one in events if one["event"] == name and event_time_s(one) > kill)
        for name in ("rank_lost", "ranks_up")
    )
    first = min((one for one in steps if one.time_s - one.step_s > lost_s), key=lambda one: one.time_s)
    return lost_s - kill, up_s - lost_s, max(0.0, first.time_s - first.step_s - up_s)


def simulation(costs: Costs, wall_s: float, mtbf_s: float, repeats: int) -> SimulationConfig:
    """The run as the simulator sees it; what is between steps belongs to them."""
    return check_simulation(
        {
            "name": "a real run",
            "days": wall_s / 86400.0,
            "repeats": repeats,
            "fleet": [{"kind": "cpu", "nodes": 1, "devices_per_node": 2}],
            "step": {"seconds": costs.step_s + costs.between_s},
            "recovery": {"job_mtbf_hours": mtbf_s / 3600.0}
            | {name: getattr(costs, name) for name in ("detect_s", "rebuild_s", "reload_s")},
            "checkpoint": {
                "every_steps": EVERY_STEPS,
                "stall_s": max(0.0, costs.stall_s),
                "write_s": max(0.0, costs.write_s - costs.stall_s),
            },
        }
    )


def predicted(costs: Costs, found: Measured) -> tuple[float, float]:
    """Goodput as titan counts it, with the same failures at the same times; mean, and what chance makes of it.

    Where between two checkpoints a failure strikes is chance: each comes up to one interval later or earlier.
    """
    rng = random.Random(1)
    world = make_worlds(simulation(costs, found.wall_s, found.wall_s, repeats=1))[0]
    half_s = EVERY_STEPS * world.step_s / 2
    outcomes = []
    for _ in range(CHANCES):
        times_s = sorted(time_s + rng.uniform(-half_s, half_s) for time_s in found.failures_s)
        outcomes.append(replay(replace(world, failures=tuple(Failure(time_s, None, 0.0) for time_s in times_s))))
    goodputs = [outcome.goodput * costs.step_s / world.step_s for outcome in outcomes]
    return statistics.mean(goodputs), statistics.stdev(goodputs)


def row(found: Measured, first: Measured, every_s: float, spares: int) -> dict[str, Any]:
    """Measured and predicted, side by side. Goodput is titan's: seconds of steps over wall time."""
    own, before = predicted(found.costs, found), predicted(first.costs, found)
    return {
        "failure_every_s": every_s,
        "spares": spares,
        "failures": len(found.failures_s),
        "whole_command": {"seconds": round(found.whole_s, 1), "goodput": round(found.whole_goodput, 4)},
        "goodput": {
            "measured": round(found.goodput, 4),
            "predicted": round(own[0], 4),
            "predicted_from_first_run": round(before[0], 4),
            "standard_deviation": round(own[1], 4),
        },
        "steps": found.steps,
        "lost_steps": found.lost_steps,
        "lost_s": round(found.lost_s, 2),
        "costs": {name: round(value, 4) for name, value in asdict(found.costs).items()},
        "wall_s": round(found.wall_s, 2),
        "failures_s": [round(time_s, 2) for time_s in found.failures_s],
    }


def main() -> int:
    """Run it, print a line a run, write everything after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", nargs="+", default=["180:3", "120:3", "60:5"], metavar="SECONDS:NUMBER")
    parser.add_argument("--spares", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/goodput.json"))
    asked = parser.parse_args()
    text: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "checkpoint_every_steps": EVERY_STEPS, "runs": []}
    first: dict[int, Measured] = {}
    with tempfile.TemporaryDirectory(prefix="titan-goodput-") as place:
        folder = Path(place) / "work"
        write_tiny_config(folder)
        for every, failures in (kills.split(":") for kills in asked.kills):
            for spares in asked.spares:
                name, load = f"every{every}-spares{spares}", os.getloadavg()[1]
                found = measure(*hurt_run(folder, name, float(every), int(failures), spares))
                text["runs"].append(row(found, first.setdefault(spares, found), float(every), spares))
                text["runs"][-1]["load_5_minutes"] = [round(load, 1), round(os.getloadavg()[1], 1)]
                print(json.dumps(text["runs"][-1]), flush=True)
                asked.json.write_text(json.dumps(text, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
