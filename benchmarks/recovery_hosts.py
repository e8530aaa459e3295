"""How long a teacher takes to train again after one of its ranks, or the host it is on, is killed, over three hosts.

    python -m benchmarks.recovery_hosts [--rounds 10] [--spares 0 2] [--json FILE]

One run of the tests' tiny config on three network namespaces, so as root: driver and students on the first host, the
teacher's two ranks on the second or third. Each round kills one of its ranks and then its host; the other host has room
for the same layout, so nothing shrinks. All times count from the kill. `--spares` has one such run for each number of
spare processes a host; with some, a fault waits until the host that is to take over has them.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tests.hosts.cluster import HurtRun, commands
from tests.hosts.namespaces import Host, hosts
from tests.runs import write_tiny_config
from titan.observe.events import event_time_s, read_events

SETTINGS = (
    "run.steps=1000000",
    "checkpoint.every_steps=100",
    "recovery.max_restarts=100",
    "labels.delivery=files",
    "cluster.nodes=3",
    "cluster.cpu_ranks_per_core=4",
)
TEACHER_STAGE = 'layout = { stages = [{ layers = 2, tp = 2, device = "t" }] }'
ROOMS = (("--num-cpus=1",), *(("--num-cpus=1", '--resources={"t": 2}'),) * 2)
WAIT_S = 240.0
CALM_S = 10.0
"""From the first new step, or a host's return, to the next fault."""
PHASES = {"room": "room", "build": "processes, imports", "store": "meeting point", "join": "joining, checkpoint"}
"""Of a start, as the event `ranks_up` has them, in words."""


def times_of(run: Path, killed_s: float) -> dict[str, float] | None:
    """Seconds from the kill to each mark, and of each phase; None while the teacher has not recovered."""
    after = [one for one in read_events(run) if one.get("role") == "teacher" and event_time_s(one) >= killed_s]
    found: dict[str, float] = {}
    for event in after:
        if event["event"] in ("rank_lost", "ranks_up", "recovered"):
            found.setdefault(event["event"], round(event_time_s(event) - killed_s, 2))
        if event["event"] == "ranks_up":
            found |= {PHASES[name]: seconds for name, seconds in event["phases_s"].items()}
    return found if "recovered" in found else None


def table(results: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Median, least and most: until it was noticed, of each phase of the start, and until a step came."""
    rows: dict[str, dict[str, list[float]]] = {}
    for kind, rounds in results.items():
        parts: dict[str, list[float]] = {"noticed": [one["rank_lost"] for one in rounds]}
        for name in PHASES.values():
            parts[name] = [one[name] for one in rounds]
        starts = [sum(one[name] for name in PHASES.values()) for one in rounds]
        parts["ending old processes, files"] = [
            one["ranks_up"] - one["rank_lost"] - start for one, start in zip(rounds, starts, strict=True)
        ]
        parts["first step"] = [one["recovered"] - one["ranks_up"] for one in rounds]
        parts["all"] = [one["recovered"] for one in rounds]
        rows[kind] = {
            name: [round(value, 2) for value in (statistics.median(found), min(found), max(found))]
            for name, found in parts.items()
        }
    return rows


def num_spares(hurt: HurtRun, host: Host) -> int:
    """Spare processes that are up on a host and were not taken. A host that was killed gives its numbers anew."""
    waiting: set[int] = set()
    for event in read_events(hurt.run):
        if event["event"] == "spare_up" and event["host"] == host.name:
            waiting.add(event["pid"])
        elif event["event"] == "placed":
            here = [one.rpartition(":")[2] for one in event["processes"] if one.startswith(f"{host.name}:")]
            waiting -= {int(pid) for pid in here}
    return len(waiting & commands(host).keys())


def measure(hurt: HurtRun, rounds: int, spares: int) -> dict[str, list[dict[str, float]]]:
    """A killed rank and a killed host, in turn."""
    results: dict[str, list[dict[str, float]]] = {"rank": [], "host": []}
    hurt.wait(lambda: bool(_recent_steps(hurt.run, 0.0)), WAIT_S, "step of the teacher")
    for _ in range(rounds):
        for kind, found in results.items():
            time.sleep(CALM_S)
            for one in hurt.hosts[1:]:
                hurt.wait(lambda one=one: num_spares(hurt, one) >= spares, WAIT_S, "spares")  # type: ignore[misc]
            host = next(one for one in hurt.hosts if one.name == hurt.placed("teacher")[0].rpartition(":")[0])
            begin = time.time()
            if kind == "rank":
                hurt.strike_rank("teacher", random.choice, "KILL")
            else:
                hurt.down.add(host.name)
                host.kill()
            hurt.wait(lambda begin=begin: times_of(hurt.run, begin) is not None, WAIT_S, "recovery")  # type: ignore[misc]
            times = times_of(hurt.run, begin)
            assert times is not None
            found.append(times)
            print(kind, times, flush=True)
            if kind == "host":
                hurt.bring_back(host)
                hurt.wait(lambda host=host: _has_ray(host), WAIT_S, "Ray on the host that was killed")  # type: ignore[misc]
    return results


def _recent_steps(run: Path, since_s: float) -> list[Any]:
    return [one for one in read_events(run) if one["event"] == "checkpoint" and event_time_s(one) >= since_s]


def _has_ray(host: Host) -> bool:
    return any(words.split()[0].endswith("/raylet") for words in commands(host).values())


def main() -> int:
    """Run it, print the table, write everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--spares", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/recovery_hosts.json"))
    asked = parser.parse_args()
    found: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "rounds": asked.rounds, "spares": {}}
    for spares in asked.spares:
        load = os.getloadavg()[0]
        with hosts(3) as made:
            path = write_tiny_config(made[0].folder / "shared/work")
            path.write_text(path.read_text().replace("layout = { tp = 2 }", TEACHER_STAGE, 1))
            hurt = HurtRun(made, (*SETTINGS, f"recovery.spares={spares}"), ROOMS)
            hurt.begin("run", path)
            results = measure(hurt, asked.rounds, spares)
            hurt.kill_driver()
        rows = table(results)
        print(spares, "spares", json.dumps(rows, indent=1))
        found["spares"][spares] = {
            "load_before": round(load, 1),
            "load_after": round(os.getloadavg()[0], 1),
            "seconds_median_least_most": rows,
            "all": results,
        }
    asked.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
