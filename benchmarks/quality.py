"""How good are students that learn from each kind of label? One teacher, its log in every codec, equal tokens.

    python -m benchmarks.quality [--seeds 1 2 3] [--scale 1.0] [--work FOLDER]

A teacher of 5.0M parameters (V 4,096) learns 2.87M tokens of Python's standard library, one epoch, and writes its last
hidden states as labels. `titan labels recode` makes logs of 36 bytes a token from them. Students of a quarter of its
size learn the last 1.23M of these tokens, each from one log, all with `titan run` and `teacher.source = "log:..."`:

    control        text alone
    full           KL to the whole distribution (codec hidden)
    renormalised   the likeliest entries, scaled to sum to one
    bucket         the likeliest entries, and the rest as one class (top_k)
    RS-KD          draws from the whole distribution (random)
    ours           the likeliest entries, and draws from the rest (sampled)

A seed is that of a student's initial weights; all arms have the same, so that they are compared pair by pair. What is
finished in the work folder is not done again: a benchmark that was killed goes on with the stage that it was in.
`--scale` shortens everything, to try it.
Writes benchmarks/results/quality.json and docs/quality.png; at another scale, both into the work folder.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import save_result
from benchmarks.quality_table import BUDGET_BYTES, draw_picture, label_bytes, show, table
from titan.config.load import check_config, dump_config
from titan.config.settings import RunConfig
from titan.observe.files import read_json
from titan.observe.metrics import EvalMetric, read_metrics

STEPS, START = 1400, 800
"""Of the teacher: 16 samples of 128 tokens each; and after which of them students start."""
EVALUATIONS = 5
PICTURE = Path(__file__).parents[1] / "docs" / "quality.png"
WAIT_S = 7200.0
"""For a message between ranks: the machine may be busy with other things."""
DISTILL = {"weight": 0.9, "schedule": "constant"}


@dataclass(frozen=True)
class Arm:
    """A way to learn."""

    log: str
    """Of these labels."""
    distill: dict[str, Any]


HIDDEN = "teacher"
ARMS = {
    "control": Arm(HIDDEN, {"weight": 0.0}),
    "full": Arm(HIDDEN, DISTILL),
    "renormalised": Arm("renormalised", DISTILL),
    "bucket": Arm("top_k", DISTILL),
    "RS-KD": Arm("random", DISTILL),
    "ours": Arm("sampled", DISTILL),
}


@dataclass(frozen=True)
class Experiment:
    """What is asked for."""

    work: Path
    seeds: tuple[int, ...]
    scale: float

    @property
    def steps(self) -> int:
        """Of the teacher."""
        return self.start + max(EVALUATIONS, round((STEPS - START) * self.scale))

    @property
    def start(self) -> int:
        """Teacher's step after which students start."""
        return max(5, round(START * self.scale))

    def log(self, name: str) -> Path:
        """Run folder of a log."""
        return self.work / "runs" / "teacher" if name == HIDDEN else self.work / "logs" / name

    def students(self, log: str) -> dict[str, Arm]:
        """Arms that learn from a log."""
        return {name: arm for name, arm in ARMS.items() if arm.log == log}

    def config(self, log: str | None = None) -> RunConfig:
        """Run of the teacher, or of the students of a log."""
        warmup = min(50, self.start)
        students = [
            {
                "name": f"{name}-{seed}", "seed": seed, "start": {"step": self.start}, "distill": arm.distill,
                "model": {"layers": 4, "hidden": 96, "heads": 4, "kv_heads": 2, "ffn": 304},
                "optimizer": {"learning_rate": 3e-3, "warmup_steps": warmup},
            }
            for name, arm in (self.students(log) if log is not None else {}).items()
            for seed in self.seeds
        ]  # fmt: skip
        teacher: dict[str, Any] = {
            "model": {"layers": 4, "hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 704},
            "layout": {"dp": 2}, "optimizer": {"learning_rate": 2e-3, "warmup_steps": 2 * warmup},
        }  # fmt: skip
        if log is not None:
            teacher = {"source": f"log:{self.log(log)}"}
        return check_config(
            {
                "run": {"name": HIDDEN if log is None else f"students-{log}", "dir": str(self.work / "runs"),
                        "steps": self.steps},
                "data": {
                    "sources": ["python-stdlib"], "vocab_size": 4096, "sequence_length": 128, "batch_size": 16,
                    "heldout_fraction": 0.04, "workers": 1, "cache": str(self.work / "data"),
                },
                "teacher": teacher,
                "students": students,
                "labels": {"codec": "hidden", "without_students": True} if log is None else {},
                "checkpoint": {"every_steps": 50},
                "eval": {
                    "every_steps": 0 if log is None else (self.steps - self.start) // EVALUATIONS,
                    "samples": max(64, min(600, round(600 * self.scale))),
                },
                "cluster": {"device": "cpu", "step_timeout_s": WAIT_S, "start_timeout_s": WAIT_S},
                "recovery": {"hang_timeout_s": 600.0},
            }
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of students' initial weights")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps")
    parser.add_argument("--work", type=Path, help="folder for runs and logs, 4 GB at scale 1 (runs/quality)")
    options = parser.parse_args()
    work = options.work or Path("runs/quality" if options.scale == 1.0 else f"runs/quality-{options.scale:g}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended with this
    experiment = Experiment(work.resolve(), tuple(options.seeds), options.scale)
    _sign(experiment)
    _run(experiment, None)
    _recode(experiment)
    for log in dict.fromkeys(arm.log for arm in ARMS.values()):
        _run(experiment, log)
    result = table(
        list(experiment.seeds),
        {name: [_losses(experiment, name, seed) for seed in experiment.seeds] for name in ARMS},
        {arm.log: label_bytes(experiment.log(arm.log), experiment.start) for arm in ARMS.values()},
        {name: arm.log for name, arm in ARMS.items()},
    )
    result |= _about(experiment)
    show(result)
    if options.scale == 1.0:
        save_result("quality", result)
        draw_picture(result, PICTURE)
    else:
        (experiment.work / "quality.json").write_text(json.dumps(result, indent=1) + "\n")
        draw_picture(result, experiment.work / "quality.png")


def _sign(experiment: Experiment) -> None:
    """A work folder is of one experiment."""
    path = experiment.work / "experiment.json"
    asked = {"seeds": list(experiment.seeds), "scale": experiment.scale}
    experiment.work.mkdir(parents=True, exist_ok=True)
    if path.exists() and json.loads(path.read_text()) != asked:
        sys.exit(
            f"{experiment.work} is of {path.read_text().strip()}, asked is {json.dumps(asked)}; give another --work"
        )
    path.write_text(json.dumps(asked) + "\n")


def _run(experiment: Experiment, log: str | None) -> None:
    """The teacher's run, or that of a log's students, begun or gone on with, to its end."""
    config = experiment.config(log)
    folder = experiment.work / "runs" / config.run.name
    if _finished(folder):
        return
    path = experiment.work / f"{config.run.name}.toml"
    path.write_text(dump_config(config))
    begin = time.monotonic()
    print(f"{time.strftime('%H:%M:%S')}  {config.run.name}: {config.run.steps} steps", flush=True)
    if (folder / "config.toml").exists():
        _titan("resume", folder)
    else:
        _titan("run", path)
    if not _finished(folder):
        sys.exit(f"{folder} has stopped before its end; start this again to go on")
    print(f"{time.strftime('%H:%M:%S')}  {config.run.name}: done in {time.monotonic() - begin:.0f} s", flush=True)


def _finished(folder: Path) -> bool:
    return (read_json(folder / "summary.json") or {}).get("status") == "finished"


def _recode(experiment: Experiment) -> None:
    """The teacher's log in every other codec; one that is whole is only looked through."""
    budget = ("--bytes-per-token", f"{BUDGET_BYTES:g}")
    wanted = {
        "top_k": ("--codec", "top_k", *budget),
        "renormalised": ("--codec", "top_k", "--renormalise", *budget),
        "random": ("--codec", "random", "--draws", str(_draws(experiment))),
        "sampled": ("--codec", "sampled", *budget),
    }
    for name, options in wanted.items():
        if not (experiment.log(name) / "done").exists():
            print(f"{time.strftime('%H:%M:%S')}  log {name}: {' '.join(options)}", flush=True)
            _titan("labels", "recode", experiment.log(HIDDEN), experiment.log(name), *options)
            (experiment.log(name) / "done").touch()


def _draws(experiment: Experiment) -> int:
    """As many draws of `random` as the bytes allow, on average over the students' steps."""
    path = experiment.work / "draws.json"
    if not path.exists():
        from benchmarks.quality_draws import draws_within  # it loads torch and megatron-core

        span = experiment.steps - experiment.start
        steps = [experiment.start + span * part // 4 for part in (1, 2, 3)]
        path.write_text(json.dumps(draws_within(experiment.log(HIDDEN) / "labels" / "teacher", steps, BUDGET_BYTES)))
    return int(json.loads(path.read_text()))


def _titan(*words: object) -> None:
    """Run a command of titan, its output into the work folder's log; it ends with this process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "titan.cli.main", *map(str, words)], env=environment
    )
    try:
        if process.wait() != 0:
            sys.exit(f"titan {' '.join(map(str, words))} failed with exit code {process.returncode}")
    finally:
        if process.poll() is None:
            process.terminate()  # titan stops after the step it is in
            try:
                process.wait(timeout=120)
            except subprocess.TimeoutExpired:
                process.kill()


def _losses(experiment: Experiment, arm: str, seed: int) -> dict[int, float]:
    """Held-out cross-entropy, nats a token, by the student's tokens."""
    folder = experiment.work / "runs" / f"students-{ARMS[arm].log}"
    tokens = 16 * 128
    return {
        (metric.step - experiment.start) * tokens: metric.heldout_nats
        for metric in read_metrics(folder)
        if isinstance(metric, EvalMetric) and metric.role == f"{arm}-{seed}"
    }


def _about(experiment: Experiment) -> dict[str, Any]:
    """Sizes, and the teacher's own loss."""
    summary = read_json(experiment.log(HIDDEN) / "summary.json") or {}
    students = read_json(experiment.work / "runs" / f"students-{HIDDEN}" / "summary.json") or {}
    teacher = [m.heldout_nats for m in read_metrics(experiment.log(HIDDEN)) if isinstance(m, EvalMetric)]
    one = next(iter(students["roles"].values()))
    return {
        "scale": experiment.scale,
        "random_draws": _draws(experiment),
        "teacher": {"params": summary["roles"]["teacher"]["params"], "tokens": summary["roles"]["teacher"]["tokens"],
                    "heldout_nats": teacher[-1]},
        "student": {"params": one["params"], "tokens": one["tokens"]},
        "command": "python -m benchmarks.quality",
    }  # fmt: skip


if __name__ == "__main__":
    main()
