"""How long a role takes to train again after one of its ranks is killed, with spare processes and without.

    python -m benchmarks.recovery [--rounds 5] [--spares 2] [--json FILE]

Each round starts the tests' tiny run twice, without spares and with, and kills a rank of its teacher (two ranks,
tensor-parallel). All times count from the kill: until it was noticed, until all ranks of the role were up, until the
first step of the role came in.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from tests.runs import kill_tree, placed, start_titan, wait_for_events, wait_for_step, write_tiny_config
from titan.observe.events import event_time_s, read_events

MARKS = ("rank_lost", "ranks_up", "recovered")
WAIT_S = 240.0


def recover(folder: Path, name: str, spares: int) -> dict[str, float]:
    """Seconds from the kill to each mark in a run of its own, and the memory of one spare process in bytes."""
    run = folder / "runs" / name
    sets = (f"run.name={name}", "run.steps=100000", f"recovery.spares={spares}", "recovery.policy=wait")
    process = start_titan("run", "tiny.toml", *(part for one in sets for part in ("--set", one)), cwd=folder)
    try:
        wait_for_step(run, "teacher", 12, process, WAIT_S)
        memory = 0.0
        if spares:
            wait_for_events(run, "spare_up", spares, process, WAIT_S)
            ups = [event for event in read_events(run) if event["event"] == "spare_up"]
            memory = statistics.mean(psutil.Process(event["pid"]).memory_full_info().uss for event in ups)
        killed_s = time.time()
        psutil.Process(placed(run, "teacher")[-1]).kill()
        wait_for_events(run, "recovered", 1, process, WAIT_S)
    finally:
        kill_tree(process.pid)
        process.communicate()
    found: dict[str, float] = {"spare_bytes": memory}
    for event in read_events(run):
        if event["event"] in MARKS and event.get("role") == "teacher":
            found[event["event"]] = round(event_time_s(event) - killed_s, 2)
            assert event.get("spares", spares) == spares, event
    return found


def main() -> int:
    """Run it, print medians, write everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--spares", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/recovery.json"))
    asked = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="titan-recovery-") as place:
        folder = Path(place) / "work"
        write_tiny_config(folder)
        for number in range(asked.rounds):
            for name, spares in (("without", 0), ("with", asked.spares)):
                results[name].append(recover(folder, f"{name}{number}", spares))
                print(name, results[name][-1], flush=True)
    medians: dict[str, Any] = {
        name: {mark: statistics.median(one[mark] for one in found) for mark in (*MARKS, "spare_bytes")}
        for name, found in results.items()
    }
    print(json.dumps(medians, indent=1))
    text = {
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(load, 1),
        "spares": asked.spares,
        "median_s_after_the_kill": medians,
        "all": results,
    }
    asked.json.write_text(json.dumps(text, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
