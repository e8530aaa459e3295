"""Metrics of a run: one line a step or evaluation of a role in metrics.jsonl, the same numbers in TensorBoard."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from titan.errors import RunError
from titan.observe.files import Record, append_line, open_lines, read_lines, require_run_folder, to_json, write_whole

FILE = "metrics.jsonl"
TENSORBOARD_FLUSH_S = 5
"""Longest wait before TensorBoard sees a number."""


@dataclass(frozen=True)
class StepMetric:
    """One optimizer step of one role."""

    kind: ClassVar[str] = "step"

    role: str
    step: int
    """Teacher step; for a student the teacher step whose labels it consumed. Counts from 1."""
    time_s: float
    """Unix time at the end of the step."""
    loss: float
    """What the role optimises, nats a token."""
    cross_entropy: float
    """Loss against the text itself, nats a token."""
    grad_norm: float
    """Norm of the gradient over all parameters of the role, before clipping."""
    learning_rate: float
    tokens: int
    """Tokens predicted in this step."""
    step_s: float
    """Seconds the step took."""

    own_step: int | None = None
    """Students: own steps since the start, those that a jump left out included. With a batch size of its own a student
    may make several in a teacher step, or one in several."""
    distill_loss: float | None = None
    """Students: T^2 * KL(teacher || student), nats a token."""
    distill_weight: float | None = None
    """Students: a, the share of the distillation loss in this step."""
    lag: int | None = None
    """Students: the teacher's newest step minus the step being learned."""
    lead: float | None = None
    """Students: smoothed loss of the student minus that of the teacher, nats a token."""
    label_bytes: int | None = None
    """Students: bytes of labels consumed in this step."""
    label_wait_s: float | None = None
    """Students: seconds of the step spent waiting for labels."""
    student_wait_s: float | None = None
    """Who teaches: seconds before the step spent waiting for students, where some may be waited for."""

    query_loss: float | None = None
    """Students: a loss of features before its weight, a mean over tokens (docs/features.md); likewise those below. None
    where there is none: not asked for, or the step's features were gone."""
    key_loss: float | None = None
    value_loss: float | None = None
    attention_loss: float | None = None
    attention_map_loss: float | None = None
    hint_loss: float | None = None
    affinity_loss: float | None = None


@dataclass(frozen=True)
class EvalMetric:
    """One evaluation of one role on held-out text."""

    kind: ClassVar[str] = "eval"

    role: str
    step: int
    """Teacher step after which the role was evaluated."""
    time_s: float
    """Unix time at the end of the evaluation."""
    heldout_nats: float
    """Cross-entropy on held-out text, nats a token."""
    heldout_bits_per_byte: float
    """The same in bits a byte of text, which does not depend on the tokenizer."""
    tokens: int
    """Tokens predicted in the evaluation."""


Metric = StepMetric | EvalMetric
Key = tuple[str, str, int, int | None]
AXES = ("role", "step", "own_step", "time_s")
"""Fields that say where and when, not how much."""
KINDS: Mapping[str, type[StepMetric] | type[EvalMetric]] = {"step": StepMetric, "eval": EvalMetric}


class MetricsLog:
    """The only writer of metrics.jsonl and of TensorBoard's files. A line is with the system when `write` returns."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._tensorboard = folder / "tensorboard"
        self._writers: dict[str, Any] = {}
        self._file = open_lines(folder / FILE)

    def write(self, metric: Metric) -> None:
        """Append one metric."""
        append_line(self._file, _to_record(metric))
        if metric.role not in self._writers:
            self._writers[metric.role] = _event_writer(self._tensorboard / metric.role)
        self._writers[metric.role].add_event(_tensorboard_event(metric))

    def write_missing(self, lines: Sequence[str]) -> None:
        """Append metrics, given as their lines, that are not there yet: a role was killed before it could tell them."""
        if not lines:
            return
        there = {_key(metric) for metric in read_metrics(self._folder)}
        for metric in (_from_record(json.loads(line), self._folder / FILE) for line in lines):
            if _key(metric) not in there:
                self.write(metric)

    def close(self) -> None:
        """Flush and close all files; closing twice does nothing."""
        self._file.close()
        while self._writers:
            self._writers.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @staticmethod
    def rewind(folder: Path, steps: Mapping[str, int]) -> None:
        """Before a run resumes: drop what each role reported beyond its step in `steps`, and a torn last line.

        Roles that `steps` does not name keep all their lines. The file is replaced whole. TensorBoard is told to
        forget the same steps.
        """
        path = folder / FILE
        if not path.exists():
            return
        kept = [line for line in read_lines(path) if line.get("step", 0) <= steps.get(line.get("role", ""), math.inf)]
        write_whole(path, "".join(to_json(line) + "\n" for line in kept).encode())
        for role, step in steps.items():
            if (folder / "tensorboard" / role).is_dir():
                _purge_tensorboard(folder / "tensorboard" / role, first_dropped=step + 1)


def read_metrics(folder: Path) -> list[Metric]:
    """All metrics of a run, oldest first. Of two with the same role, kind, step and own step, the later one counts.

    A torn last line is left out. Raises RunError if `folder` is no run folder or a line is damaged.
    """
    require_run_folder(folder)
    newest: dict[Key, Metric] = {}
    for record in read_lines(folder / FILE):
        metric = read_metric(record, folder)
        if metric is None:
            continue  # a newer version may say more
        key = _key(metric)
        newest.pop(key, None)  # so that the order is that of the lines that count
        newest[key] = metric
    return list(newest.values())


def read_metric(record: Record, folder: Path) -> Metric | None:
    """The metric of a line of metrics.jsonl; None for a kind of a newer version. Raises RunError for other fields."""
    return _from_record(record, folder / FILE) if record.get("kind") in KINDS else None


def _key(metric: Metric) -> Key:
    return metric.role, metric.kind, metric.step, metric.own_step if isinstance(metric, StepMetric) else None


def to_line(metric: Metric) -> str:
    """As in metrics.jsonl, without the line end."""
    return to_json(_to_record(metric))


def _to_record(metric: Metric) -> Record:
    return {"kind": metric.kind} | {name: value for name, value in asdict(metric).items() if value is not None}


def _from_record(record: Record, path: Path) -> Metric:
    kind = KINDS[record["kind"]]
    values = {field.name: record[field.name] for field in fields(kind) if field.name in record}
    for name, value in values.items():
        if value is None:
            values[name] = math.nan  # how a number that is not finite is written; absent ones have no key
    try:
        metric = kind(**values)
    except TypeError as error:
        raise RunError(f"{path} was written by another version of titan ({error}); use that version") from None
    return metric


def _event_writer(folder: Path) -> Any:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    return EventFileWriter(str(folder), flush_secs=TENSORBOARD_FLUSH_S)


def _tensorboard_event(metric: Metric) -> Any:
    """A protobuf with one scalar a number of the metric; step and wall time are those of the metric."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    prefix = "eval/" if metric.kind == "eval" else "train/"
    said = {name: value for name, value in asdict(metric).items() if value is not None}
    values = [
        Summary.Value(tag=prefix + name, simple_value=number) for name, number in said.items() if name not in AXES
    ]
    return Event(wall_time=metric.time_s, step=metric.step, summary=Summary(value=values))


def _purge_tensorboard(folder: Path, first_dropped: int) -> None:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    writer = _event_writer(folder)
    writer.add_event(Event(step=first_dropped, session_log=SessionLog(status=SessionLog.START)))
    writer.close()
