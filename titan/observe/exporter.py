"""Numbers of a run for Prometheus: what its metrics and events say, by role, at an HTTP port of the driver.

A scrape reads what the run folder has since the scrape before, so the training loop knows nothing of it.
"""

import math
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import titan
from titan.config.settings import RunConfig
from titan.errors import PlatformError
from titan.observe.events import FILE as EVENTS
from titan.observe.events import event_time_s
from titan.observe.files import LinesTail, Record
from titan.observe.metrics import FILE as METRICS
from titan.observe.metrics import EvalMetric, StepMetric, read_metric
from titan.observe.progress import RoleProgress, role_names

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

DISK_EVERY_S = 30.0
"""Sizes of files are added up at most so often."""
RUN, ROLE = (), ("role",)
GAUGES: dict[str, tuple[tuple[str, ...], str]] = {
    "titan_run_info": (("run", "version"), "1; the labels say which run this is"),
    "titan_run_wall_seconds": (RUN, "Seconds since the run started or was resumed"),
    "titan_run_goodput_ratio": (RUN, "Share of the wall time that went into steps that count"),
    "titan_run_disk_bytes": (("part",), "Size of the run folder's files: checkpoints, labels, other"),
    "titan_run_disk_free_bytes": (RUN, "Free space of the run folder's disk"),
    "titan_role_step": (ROLE, "Newest step"),
    "titan_role_steps_wanted": (ROLE, "Last step of the run"),
    "titan_role_loss_nats": (ROLE, "What the role optimises, nats a token, of the newest step"),
    "titan_role_cross_entropy_nats": (ROLE, "Loss against the text alone, nats a token, of the newest step"),
    "titan_role_heldout_bits_per_byte": (ROLE, "Newest evaluation"),
    "titan_role_step_seconds": (ROLE, "How long the newest step took"),
    "titan_role_tokens_per_second": (ROLE, "Speed over the last 20 s"),
    "titan_role_lag_steps": (ROLE, "Students: teacher's newest step minus the step being learned"),
    "titan_role_lead_nats": (ROLE, "Students: smoothed loss of the student minus that of the teacher"),
    "titan_role_label_bytes_per_token": (ROLE, "Students: recent size of labels"),
    "titan_role_stragglers": (ROLE, "Ranks named as slower than their kind of device since the last start"),
    "titan_role_checkpoint_step": (ROLE, "Step of the newest checkpoint"),
    "titan_role_recovery_seconds": (ROLE, "From the newest failure until the role trained again"),
}
"""Each with its labels and what it is."""
COUNTERS: dict[str, str] = {
    "titan_role_tokens": "Tokens trained on, those of steps made again included",
    "titan_role_label_bytes": "Students: bytes of labels consumed",
    "titan_role_label_wait_seconds": "Students: seconds spent waiting for labels",
    "titan_role_restarts": "Starts after a failure",
    "titan_role_checkpoints": "Checkpoints made",
    "titan_role_checkpoint_stall_seconds": "Seconds that training stood still for checkpoints",
}
"""By role; Prometheus adds `_total` to their names."""


class RunCollector:
    """What prometheus_client asks at each scrape. Several may ask at once."""

    def __init__(self, folder: Path, config: RunConfig):
        self.folder, self.config = folder, config
        self.rows = {role: RoleProgress(role, config.run.steps) for role in role_names(config)}
        self.counts: dict[str, dict[str, float]] = {name: defaultdict(float) for name in COUNTERS}
        self.checkpoint: dict[str, int] = {}
        self.recovery_s: dict[str, float] = {}
        self.stragglers: dict[str, set[int]] = defaultdict(set)
        self.start_s = time.time()
        self._step_s: dict[tuple[int, int | None], float] = {}
        """Of the leading role since the start, a step once."""
        self._leading = next(iter(self.rows))
        self._metrics, self._events = LinesTail(folder / METRICS), LinesTail(folder / EVENTS)
        self._disk: dict[str, int] = {}
        self._disk_due_s = 0.0
        self._lock = threading.Lock()

    def collect(self) -> Iterator["Family"]:
        """All families; of a role that has not said something there is no sample."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        with self._lock:
            self._read()
            samples = self.samples()
            counts = {name: dict(found) for name, found in self.counts.items()}
        for name, (labels, meaning) in GAUGES.items():
            gauge = GaugeMetricFamily(name, meaning, labels=labels)
            for values, number in samples[name].items():
                gauge.add_metric(values, number)
            yield gauge
        for name, meaning in COUNTERS.items():
            counter = CounterMetricFamily(name, meaning, labels=ROLE)
            for role in self.rows:
                counter.add_metric((role,), counts[name].get(role, 0))
            yield counter

    def samples(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Of each gauge its numbers by the values of its labels."""
        found: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in GAUGES}
        wall_s = max(0.0, time.time() - self.start_s)
        found["titan_run_info"][self.config.run.name, titan.__version__] = 1.0
        found["titan_run_wall_seconds"][()] = wall_s
        if self._step_s and wall_s:
            found["titan_run_goodput_ratio"][()] = min(1.0, sum(self._step_s.values()) / wall_s)
        for part, size in self._disk_bytes().items():
            found["titan_run_disk_bytes"][part,] = size
        found["titan_run_disk_free_bytes"][()] = shutil.disk_usage(self.folder).free
        for role, row in self.rows.items():
            for name, number in self._of_role(row).items():
                if number is not None:
                    found[f"titan_role_{name}"][role,] = number
        return found

    def _of_role(self, row: RoleProgress) -> dict[str, float | None]:
        newest, bytes_per_token = row.newest, row.label_bytes_per_token
        numbers: dict[str, float | None] = {
            "step": row.step,
            "steps_wanted": row.total_steps,
            "heldout_bits_per_byte": row.heldout_bits_per_byte,
            "label_bytes_per_token": None if math.isnan(bytes_per_token) else bytes_per_token,
            "stragglers": len(self.stragglers[row.role]),
            "checkpoint_step": self.checkpoint.get(row.role),
            "recovery_seconds": self.recovery_s.get(row.role),
        }
        if newest is not None:
            numbers |= {
                "loss_nats": newest.loss,
                "cross_entropy_nats": newest.cross_entropy,
                "step_seconds": newest.step_s,
                "tokens_per_second": row.tokens_per_s,
                "lag_steps": newest.lag,
                "lead_nats": newest.lead,
            }
        return numbers

    def _read(self) -> None:
        """What is new in the folder. Events come first: they say since when steps count."""
        for event in self._events.read():
            self._hear(event)
        for record in self._metrics.read():
            metric = read_metric(record, self.folder)
            if metric is None or metric.role not in self.rows:
                continue
            self.rows[metric.role].add(metric)
            if isinstance(metric, EvalMetric):
                continue
            self._count(metric)
            if metric.role == self._leading and metric.time_s >= self.start_s:
                self._step_s[metric.step, metric.own_step] = metric.step_s

    def _count(self, metric: StepMetric) -> None:
        self.counts["titan_role_tokens"][metric.role] += metric.tokens
        self.counts["titan_role_label_bytes"][metric.role] += metric.label_bytes or 0
        self.counts["titan_role_label_wait_seconds"][metric.role] += metric.label_wait_s or 0

    def _hear(self, event: Record) -> None:
        name, role = event.get("event"), str(event.get("role"))
        if name == "run_started":
            self.start_s = event_time_s(event)
            self.stragglers.clear()
            self._step_s.clear()
        elif name == "restarting":
            self.counts["titan_role_restarts"][role] += 1
        elif name == "recovered":
            self.recovery_s[role] = float(event["seconds"])
        elif name == "straggler":
            self.stragglers[role].add(int(event["rank"]))
        elif name == "checkpoint":
            self.checkpoint[role] = int(event["step"])
            self.counts["titan_role_checkpoints"][role] += 1
            self.counts["titan_role_checkpoint_stall_seconds"][role] += event.get("stall_s", 0)

    def _disk_bytes(self) -> dict[str, int]:
        if time.monotonic() >= self._disk_due_s:
            self._disk_due_s = time.monotonic() + DISK_EVERY_S
            self._disk = dict.fromkeys(("checkpoints", "labels", "other"), 0)
            for path in self.folder.rglob("*"):
                part = path.relative_to(self.folder).parts[0]
                try:
                    size = path.lstat().st_size if path.is_file() else 0
                except OSError:  # it went in between, as old checkpoints do
                    continue
                self._disk[part if part in self._disk else "other"] += size
        return self._disk


@contextmanager
def metrics_endpoint(folder: Path, config: RunConfig) -> Iterator[None]:
    """Serve the metrics of a run while the block runs, if `observe.metrics_port` asks for it.

    Raises PlatformError if the port cannot be had.
    """
    port, host = config.observe.metrics_port, config.observe.metrics_host
    if port is None:
        yield
        return
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(RunCollector(folder, config))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise PlatformError(
            f"observe.metrics_port is {port}, which cannot be listened to on {host} ({error.strerror}); choose another "
            "port, or the address of this host in observe.metrics_host"
        ) from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
