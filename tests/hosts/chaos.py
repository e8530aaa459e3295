"""Faults of every kind in one training over three hosts; `python -m tests.chaos --hosts 3` starts it."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.hosts.cluster import HurtRun, NotThereError
from tests.hosts.namespaces import hosts
from tests.runs import titan, write_tiny_config
from titan.distill.log.ledger import Place, ledger_path, read_ledger
from titan.observe.events import read_events
from titan.observe.files import read_lines
from titan.observe.metrics import StepMetric, read_metrics

ROLES = ("teacher", "early", "late")
KINDS = (
    "rank killed", "host killed", "host unplugged", "disk full", "driver killed", "head killed",
    "rank stopped", "raylet killed", "link down a moment", "service killed", "service stopped",
)  # fmt: skip
"""A run of N faults has the first N of them, or all again and again."""
ENDS = ("disk full", "driver killed", "head killed")
"""Of these, what ends the run, which is then resumed."""
TRAINING = (
    "data.batch_size=16",
    "data.sequence_length=64",
    "teacher.model.hidden=192",
    "teacher.model.ffn=512",
    "teacher.layout.tp=1",
    "teacher.layout.dp=2",
    *(f"students.{name}.{setting}" for name in ("early", "late") for setting in ("backpressure=wait", "max_lag=10")),
    "labels.wait_s=40",
)
"""So large, and students so close behind, that the training is not over before all faults are through."""
SETTINGS = (
    *TRAINING,
    "labels.delivery=service",
    "checkpoint.every_steps=5",
    "recovery.max_restarts=50",
    "recovery.hang_timeout_s=15",
    "cluster.nodes=3",
    "cluster.cpu_ranks_per_core=2",
    "cluster.step_timeout_s=60",
)
DISK_BYTES = 160 << 20
PROGRESS_S = 300.0
"""Longest wait for the teacher's next steps, and for what is to be struck to be there."""
LAST_STEPS = 20
TOLERANCE = 0.02
"""Nats by which the teacher's last losses may differ from those undisturbed: other layouts, other rounding."""


@dataclass
class HostsResult:
    """What came of it."""

    steps: int
    faults: dict[str, int] = field(default_factory=dict)
    starts: int = 0
    """Of the driver."""
    problems: list[str] = field(default_factory=list)
    ended_s: dict[str, list[float]] = field(default_factory=dict)
    """By kind of fault that ends a run: seconds until it had saved what it could, said why, and ended."""
    head_silent_s: list[float] = field(default_factory=list)
    """From the last sign of a head that was killed until roles began to save."""
    recovered_s: dict[str, float] = field(default_factory=dict)
    """By role: median seconds from the moment that a failure was seen to the first step after it."""
    restarts: int = 0
    layouts: int = 0
    """How often a role went on with fewer ranks, or more again."""
    last_loss: dict[str, float] = field(default_factory=dict)
    """Mean of the teacher's last steps, undisturbed and hurt."""
    wall_s: dict[str, float] = field(default_factory=dict)


def hosts_chaos(folder: Path, faults: int, steps: int, seed: int, timeout_s: float) -> HostsResult:
    """The undisturbed run on this host, in an empty folder, and the hurt one on three."""
    result, rng = HostsResult(steps), random.Random(seed)
    write_tiny_config(folder)
    begin = time.monotonic()
    alone = [part for one in (*TRAINING, f"run.steps={steps}") for part in ("--set", one)]
    calm = titan("run", "tiny.toml", *alone, "--set", "run.name=calm", cwd=folder, timeout_s=timeout_s)
    result.wall_s["calm"] = round(time.monotonic() - begin, 1)
    if calm.returncode:
        result.problems.append(f"the undisturbed run ended with {calm.returncode}: {calm.stderr}")
        return result
    with hosts(3, DISK_BYTES) as made:
        shared = made[0].folder / "shared"
        write_tiny_config(shared / "work")
        begin = time.monotonic()
        hurt = HurtRun(made, (*SETTINGS, f"run.steps={steps}"))
        try:
            _disturb(hurt, shared / "work/tiny.toml", faults, rng, result)
            hurt.wait_for_end(timeout_s)
            if hurt.ended() != 0:
                result.problems.append(f"the run ended with {hurt.ended()}: {hurt.log.read_text()[-2000:]}")
        except AssertionError as failure:
            last = [{**event, "trace": ""} for event in read_events(hurt.run)[-30:]]
            result.problems.append(f"{failure}; its last events: {last}")
        result.wall_s["hurt"] = round(time.monotonic() - begin, 1)
        result.starts = hurt.starts
        if left := hurt.leftovers():
            result.problems.append(f"left on hosts: {left}")
        _look_at_files(folder / "runs/calm", hurt.run, steps, result)
    return result


def _disturb(hurt: HurtRun, config: Path, faults: int, rng: random.Random, result: HostsResult) -> None:
    """A fault each time that the teacher has come some steps further."""
    deck = [kind for turn in range(-(-faults // len(KINDS))) for kind in KINDS][:faults]
    rng.shuffle(deck)
    hurt.begin("run", config)
    for number, kind in enumerate(deck, start=1):
        goal = result.steps * number // (faults + 1)
        hurt.wait(lambda goal=goal: _has_come(hurt, goal), PROGRESS_S, f"step {goal} of the teacher")  # type: ignore[misc]
        time.sleep(rng.uniform(0.0, 2.0))
        print(f"{kind} at step {_teacher_step(hurt.run)}", flush=True)
        took = _strike(hurt, kind, rng)
        result.faults[kind] = result.faults.get(kind, 0) + 1
        if took is not None:
            result.ended_s.setdefault(kind, []).append(took)


def _strike(hurt: HurtRun, kind: str, rng: random.Random) -> float | None:
    """One fault; what ends the run is put right, and the run resumed. Returns the seconds until it ended by itself."""
    host = rng.choice(hurt.hosts[1:])
    acts: dict[str, Callable[[], object]] = {
        "rank killed": lambda: hurt.strike_rank(rng.choice(ROLES), rng.choice, "KILL"),
        "rank stopped": lambda: hurt.strike_rank(rng.choice(ROLES), rng.choice, "STOP"),
        "service killed": lambda: hurt.strike_service("KILL"),
        "service stopped": lambda: hurt.strike_service("STOP"),
        "raylet killed": lambda: hurt.kill_raylet(host),
        "host killed": lambda: hurt.kill_host(host, rng.uniform(3.0, 10.0)),
        "host unplugged": lambda: hurt.unplug(host, rng.uniform(8.0, 14.0), given_up=True),
        "link down a moment": lambda: hurt.unplug(host, 1.5, given_up=False),
        "disk full": hurt.fill_disk,
        "head killed": hurt.kill_head,
        "driver killed": hurt.kill_driver,
    }
    took: list[object] = []

    def has_struck() -> bool:
        try:
            took.append(acts[kind]())
        except NotThereError:  # it is down already, or not up yet
            return False
        return True

    hurt.wait(has_struck, PROGRESS_S, f"chance for: {kind}")
    if kind in ENDS:
        hurt.resume()
    else:
        assert hurt.ended() in (None, 0), f"{kind}: the run ended with {hurt.ended()}: {hurt.log.read_text()[-2000:]}"
    return round(took[0], 2) if isinstance(took[0], float) else None


def _has_come(hurt: HurtRun, step: int) -> bool:
    return _teacher_step(hurt.run) >= step


def _teacher_step(run: Path) -> int:
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl") if line["role"] == "teacher"]
    return max(steps, default=0)


def _look_at_files(calm: Path, run: Path, steps: int, result: HostsResult) -> None:
    """What is true if nothing was lost, and nothing done twice."""
    for command in ("audit", "verify"):
        looked = titan("labels", command, run, cwd=run)
        if looked.returncode:
            result.problems.append(f"labels {command}: {looked.stdout}{looked.stderr}")
    for role in ROLES[1:]:
        entries = list(read_ledger(ledger_path(run, role)))
        consumed = [place for one in entries if one.kind == "consumed" for place in range(one.start.step, one.end.step)]
        if consumed != list(range(entries[0].start.step, steps + 1)) or entries[-1].end != Place(steps + 1, 0):
            result.problems.append(f"{role} did not learn every step from {entries[0].start.step} on exactly once")
    events = read_events(run)
    for role in ROLES:
        seconds = [event["seconds"] for event in events if event["event"] == "recovered" and event["role"] == role]
        if seconds:
            result.recovered_s[role] = round(statistics.median(seconds), 2)
    result.head_silent_s = [event["silent_s"] for event in events if event["event"] == "head_lost"]
    result.restarts = sum(event["event"] == "restarting" for event in events)
    result.layouts = sum(event["event"] == "layout" for event in events)
    for name, folder in (("calm", calm), ("hurt", run)):
        found = {
            one.step: one.loss for one in read_metrics(folder) if isinstance(one, StepMetric) and one.role == "teacher"
        }
        if sorted(found) != list(range(1, steps + 1)):
            result.problems.append(f"{name}: metrics of {len(found)} steps of the teacher, not {steps}")
        last = [loss for step, loss in found.items() if step > steps - LAST_STEPS]
        result.last_loss[name] = round(statistics.mean(last), 5) if last else float("nan")
    if not abs(result.last_loss["calm"] - result.last_loss["hurt"]) <= TOLERANCE:
        result.problems.append(f"the teacher ends elsewhere: {result.last_loss}")
