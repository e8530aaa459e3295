"""What distillation costs a student, what students cost the teacher, and what a family costs in one run.

    make bench-speed     or     python -m benchmarks.speed [students teacher family] [--rounds 3] [--peer PYTHON]

students   tokens a second of a student on both cores: without labels, with labels of 36 bytes from a log, and in
           TRL's GKD trainer, which runs the teacher (random weights) for every batch. Bars: 0.85 of the first, 1.5 of
           the last.
teacher    tokens a second of a teacher alone on one core: with four students attached that train on the other core,
           and with the same four students on the other core that learn from another log. Encoding is apart: the
           teacher makes labels in both, and a third contender shows what making them costs. Bar: 0.97.
family     seconds a step of one teacher and three students in one run, against the teacher alone and then three
           distillations in TRL. Bar: 1.15 times what FLOPs alone would give.

Contenders take turns, so many rounds; every one starts as a user would, and its first steps do not count. --peer names
the Python that has TRL (benchmarks/peers/requirements.txt). Writes benchmarks/results/speed.json.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.figures import RESULTS, ratio_interval, save_result
from titan.config.load import check_config, dump_config
from titan.observe.events import read_events
from titan.observe.metrics import StepMetric, read_metrics

VOCAB, LENGTH, BATCH = 32_000, 128, 8
TEACHER = {"layers": 6, "hidden": 384, "heads": 6, "kv_heads": 6, "ffn": 1024}
STUDENT = {"layers": 2, "hidden": 160, "heads": 4, "kv_heads": 4, "ffn": 448}
"""A quarter of the teacher's work."""
WARM_UP, STEPS = 4, 16
LOG_STEPS = 100
TIMEOUT_S = 900.0
TEACHER_CORE, STUDENT_CORE = 0, 1
PEER = Path(__file__).parent / "peers" / "trl_gkd.py"
Ends = dict[str, list[float]]
"""By role, when its steps ended, seconds."""


def flops(shape: Mapping[str, int]) -> float:
    """Of a forward pass, a token: twice the weights it is multiplied with, and attention over half the sequence."""
    head = shape["hidden"] // shape["heads"]
    attention = shape["hidden"] * (2 * shape["hidden"] + 2 * head * shape["kv_heads"])
    layer = attention + 3 * shape["hidden"] * shape["ffn"] + LENGTH * shape["hidden"]
    return 2.0 * (shape["layers"] * layer + VOCAB * shape["hidden"])


def flops_ratio(students: int) -> float:
    """Separate runs over one run: each of them runs the teacher forward again."""
    teacher, student = flops(TEACHER), flops(STUDENT)
    return (3 * teacher + students * (teacher + 3 * student)) / (3 * teacher + students * 3 * student)


class Bench:
    """Starts runs in a work folder and reads what they measured."""

    def __init__(self, work: Path, peer: str):
        self.work, self.peer = work, peer

    def write(self, name: str, teacher: dict[str, Any], students: int = 0, dp: int = 1, steps: int = 0,
              labels: bool = False) -> Path:  # fmt: skip
        """run.toml of one contender; labels: made though nobody in the run learns from them."""
        config = check_config(
            {
                "run": {"name": name, "dir": str(self.work / "runs"), "steps": steps or WARM_UP + STEPS},
                "data": {"sources": ["python-stdlib"], "vocab_size": VOCAB, "sequence_length": LENGTH,
                         "batch_size": BATCH, "cache": str(self.work / "data")},
                "teacher": teacher,
                "students": [
                    {"name": f"student-{number}", "model": STUDENT, "layout": {"dp": dp},
                     "distill": {"weight": 0.9, "schedule": "constant"}}
                    for number in range(students)
                ],
                "labels": {"without_students": labels, "delivery": "files"},
                "checkpoint": {"every_steps": 100_000},
                "eval": {"samples": 16},
                "cluster": {"device": "cpu", "cpu_ranks_per_core": 8},
            }
        )  # fmt: skip
        path = self.work / f"{name}.toml"
        path.write_text(dump_config(config))
        return path

    def run(self, config: Path, pinned: str | None = None, core: int | None = None) -> Ends:
        """A run from its start to its end; core: for all of it but the role `pinned`."""
        with self.started(config, pinned, core) as process:
            if process.wait(timeout=TIMEOUT_S) != 0:
                sys.exit(f"{config} failed; its output is in {config.with_suffix('.log')}")
        return self.ends(config)

    @contextmanager
    def started(self, config: Path, pinned: str | None = None, core: int | None = None) -> Iterator[Any]:
        """A run that is on its way; it is stopped on leaving."""
        command = [sys.executable, "-W", "ignore", "-m", "titan.cli.main", "run", str(config), "--overwrite"]
        if core is not None:
            command = ["taskset", "-c", str(core), *command]
        with config.with_suffix(".log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            if pinned is not None:
                self.pin(config, pinned, process)
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=120)

    def pin(self, config: Path, role: str, process: Any) -> None:
        """Move a role's processes to the teacher's core as soon as they are there."""
        folder, deadline = self.work / "runs" / config.stem, time.monotonic() + TIMEOUT_S
        begun = time.time()
        while time.monotonic() < deadline and process.poll() is None:
            events = folder / "events.jsonl"
            if events.exists() and events.stat().st_mtime > begun:
                for event in read_events(folder):
                    if event["event"] == "placed" and event["role"] == role:
                        for place in event["processes"]:
                            for thread in Path(f"/proc/{place.rpartition(':')[2]}/task").iterdir():
                                os.sched_setaffinity(int(thread.name), {TEACHER_CORE})
                        return
            time.sleep(0.1)
        sys.exit(f"{config}: {role} did not start; its output is in {config.with_suffix('.log')}")

    def ends(self, config: Path) -> Ends:
        """Of a run that is over."""
        found: Ends = {}
        for metric in read_metrics(self.work / "runs" / config.stem):
            if isinstance(metric, StepMetric):
                found.setdefault(metric.role, []).append(metric.time_s)
        return found

    def log(self, students: int = 1) -> dict[str, Any]:
        """`[teacher]` of runs that learn from a log; the log is made once."""
        config = self.write("log", {"model": STUDENT, "layout": {"dp": 2}}, steps=LOG_STEPS, labels=True)
        if not (self.work / "runs" / "log" / "summary.json").exists():
            self.run(config)
        return {"source": f"log:{self.work / 'runs' / 'log'}"}

    def trl(self) -> list[float]:
        """Step times of TRL's trainer on both cores."""
        asked = {"teacher": TEACHER, "student": STUDENT, "vocab_size": VOCAB, "sequence_length": LENGTH,
                 "batch_size": BATCH, "steps": WARM_UP + STEPS, "threads": os.cpu_count()}  # fmt: skip
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        done = subprocess.run(
            [self.peer, "-W", "ignore", str(PEER), json.dumps(asked)],
            env=environment, check=False, timeout=TIMEOUT_S, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{self.peer} {PEER} failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
        return step_times(json.loads(done.stdout.splitlines()[-1]))


def step_times(ends: Sequence[float]) -> list[float]:
    """Seconds of each step after the warm-up."""
    return [after - before for before, after in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)]


def students(bench: Bench) -> dict[str, list[float]]:
    """One round of the first part."""
    plain = bench.run(bench.write("plain", {"model": STUDENT, "layout": {"dp": 2}}))
    labels = bench.run(bench.write("labels", bench.log(), students=1, dp=2))
    return {
        "plain": step_times(plain["teacher"]),
        "labels": step_times(labels["student-0"]),
        "trl": bench.trl(),
    }


def teacher(bench: Bench) -> dict[str, list[float]]:
    """One round of the second."""
    model = {"model": TEACHER}
    attached = bench.write("attached", model, students=4)
    times = {"attached": step_times(bench.run(attached, "teacher", STUDENT_CORE)["teacher"])}
    beside = bench.write("beside", bench.log(), students=4, steps=LOG_STEPS)
    for name, labels in (("unattached", True), ("no_labels", False)):
        with bench.started(beside, core=STUDENT_CORE):
            wait_for_steps(bench.work / "runs" / "beside", 1)
            alone = bench.run(bench.write(name, model, labels=labels), "teacher", STUDENT_CORE)
            begun, made = alone["teacher"][WARM_UP], bench.ends(beside)
        if not all(ends[-1] > alone["teacher"][-1] - 60 and ends[0] < begun for ends in made.values()):
            sys.exit("the students beside the teacher did not train all the while")
        times[name] = step_times(alone["teacher"])
    return times


def wait_for_steps(folder: Path, step: int) -> None:
    """Until all students of a run that was just started have made a step."""
    deadline, begun = time.monotonic() + TIMEOUT_S, time.time()
    while time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        if path.exists() and path.stat().st_mtime > begun:
            made = {m.role for m in read_metrics(folder) if isinstance(m, StepMetric) and m.step >= step}
            if len(made) == 4:
                return
        time.sleep(0.2)
    sys.exit(f"{folder}: no step {step} in {TIMEOUT_S:.0f} s")


def family(bench: Bench) -> dict[str, list[float]]:
    """One round of the third; one number each, the mean over the steps, as roles overlap."""
    model = {"model": TEACHER, "layout": {"dp": 2}}
    together = bench.run(bench.write("family", model, students=3))
    last = max(ends[-1] for ends in together.values())
    alone = bench.run(bench.write("alone", model))
    return {
        "together": [(last - together["teacher"][WARM_UP - 1]) / STEPS],
        "teacher": [statistics.mean(step_times(alone["teacher"]))],
        "trl": [statistics.mean(bench.trl())],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"students": students, "teacher": teacher, "family": family}
    parser.add_argument("parts", nargs="*", default=list(parts), help="students, teacher, family; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", default=".venv-peers/bin/python", help="a Python that has TRL")
    parser.add_argument("--work", type=Path, default=Path("runs/speed"))
    options = parser.parse_args()
    if unknown := set(options.parts) - set(parts):
        parser.error(f"no part named {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.work.resolve(), options.peer)
    path = RESULTS / "speed.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    for name in options.parts:
        rounds: dict[str, list[list[float]]] = {}
        for number in range(options.rounds):
            for contender, times in parts[name](bench).items():
                rounds.setdefault(contender, []).append(times)
            said = ", ".join(f"{who} {statistics.median(times[-1]):.2f} s" for who, times in rounds.items())
            print(f"{time.strftime('%H:%M:%S')}  {name}, round {number + 1}: {said}", flush=True)
        result[name] = JUDGE[name](rounds) | {
            "median_step_s": {
                who: statistics.median(step_s for times in every for step_s in times) for who, every in rounds.items()
            },
            "rounds_step_s": {who: [statistics.median(times) for times in every] for who, every in rounds.items()},
        }
        print(json.dumps(result[name], indent=1))
        result["shapes"] = {"vocab_size": VOCAB, "sequence_length": LENGTH, "batch_size": BATCH, "teacher": TEACHER,
                            "student": STUDENT}  # fmt: skip
        save_result("speed", {key: value for key, value in result.items() if key != "machine"})


def _judge_students(rounds: dict[str, list[list[float]]]) -> dict[str, Any]:
    return {
        "of_plain": ratio_interval(rounds["plain"], rounds["labels"]),
        "of_trl": ratio_interval(rounds["trl"], rounds["labels"]),
        "bars": {"of_plain": 0.85, "of_trl": 1.5},
    }


def _judge_teacher(rounds: dict[str, list[list[float]]]) -> dict[str, Any]:
    return {
        "of_unattached": ratio_interval(rounds["unattached"], rounds["attached"]),
        "encoding": ratio_interval(rounds["no_labels"], rounds["unattached"]),
        "bars": {"of_unattached": 0.97},
    }


def _judge_family(rounds: dict[str, list[list[float]]]) -> dict[str, Any]:
    separate = [[t[0] + 3 * s[0]] for t, s in zip(rounds["teacher"], rounds["trl"], strict=True)]
    gain = ratio_interval(separate, rounds["together"])
    return {
        "gain": gain,
        "gain_by_flops": flops_ratio(3),
        "beyond_flops": [value / flops_ratio(3) for value in gain],
        "bars": {"beyond_flops": 1.15},
    }


JUDGE = {"students": _judge_students, "teacher": _judge_teacher, "family": _judge_family}


if __name__ == "__main__":
    main()
