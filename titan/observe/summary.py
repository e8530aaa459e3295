"""summary.json: what a run came to, in numbers that other programs read."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from titan.config.settings import RunConfig, StudentSettings
from titan.observe.files import Record, to_json, write_whole
from titan.observe.metrics import read_metrics
from titan.observe.useful import goodput

FILE = "summary.json"
RunEnd = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class RoleResult:
    """What one role came to. What is said of labels is of students, None for the teacher."""

    params: int
    """Parameters of the model."""
    tokens: int
    """Tokens trained on, over all parts of a resumed run."""
    tokens_per_s: float
    """Mean speed, the start not counted."""
    heldout_bits_per_byte: float | None
    """Last evaluation; None if there was none."""
    steps: int
    """Optimizer steps taken."""
    labels_consumed: int | None = None
    """Samples whose labels were learned."""
    labels_missed: int | None = None
    """Samples after the start that the student left out."""
    labels_repeated: int | None = None
    """Samples that it learned more than once."""
    max_lag_steps: int | None = None
    """Largest lag behind the teacher, steps."""
    label_bytes_per_token: float | None = None
    """Bytes of labels a token."""
    features_missed: int | None = None
    """Steps learned without the features that were asked for, because they were gone; None if none were asked for."""
    student_wait_s: float | None = None
    """Seconds that a role which teaches has waited for its students; None where it waits for none."""


def write_summary(
    folder: Path, config: RunConfig, roles: Mapping[str, RoleResult], wall_s: float, status: RunEnd
) -> Record:
    """Write summary.json whole, and return what it says. Numbers that are not finite are null in the file."""
    summary: Record = {
        "name": config.run.name,
        "status": status,
        "wall_s": round(wall_s, 3),
        "goodput": goodput(read_metrics(folder), time.time() - wall_s, wall_s),
        "seed": config.run.seed,
        "steps": config.run.steps,
        "roles": {role: _role_record(role, result) for role, result in roles.items()},
        "distillation": [
            asdict(pair)
            for pair in compare(config, {role: result.heldout_bits_per_byte for role, result in roles.items()})
        ],
    }
    write_whole(folder / FILE, to_json(summary, indent=2).encode() + b"\n")
    return summary


@dataclass(frozen=True)
class Comparison:
    """A student and its control: the same model shape, trained on text alone."""

    student: str
    control: str
    heldout_bits_per_byte_gain: float | None
    """Bits a byte by which the student beats its control; negative where it is worse, None where one is not known."""
    gap_to_teacher_closed: float | None
    """Share of the control's gap to the teacher that the gain closes; None where the control has no gap."""
    differs_in: tuple[str, ...]
    """Settings other than `distill` and `layout` in which the two differ: the gain may come from these."""


def compare(config: RunConfig, bits_per_byte: Mapping[str, float | None]) -> list[Comparison]:
    """Every distilled student with every control of its shape; `bits_per_byte` of each role, None if not known."""
    return [
        _comparison(student, control, bits_per_byte)
        for student in config.students
        for control in config.students
        if student.distill.weight > 0 and control.distill.weight == 0 and student.model == control.model
    ]


def _comparison(student: StudentSettings, control: StudentSettings, bits: Mapping[str, float | None]) -> Comparison:
    student_bits, control_bits, teacher_bits = (
        bits.get(role) if math.isfinite(bits.get(role) or 0.0) else None
        for role in (student.name, control.name, "teacher")
    )
    gain = None if student_bits is None or control_bits is None else control_bits - student_bits
    gap = None if control_bits is None or teacher_bits is None else control_bits - teacher_bits
    return Comparison(
        student=student.name,
        control=control.name,
        heldout_bits_per_byte_gain=gain,
        gap_to_teacher_closed=gain / gap if gain is not None and gap is not None and gap > 0 else None,
        differs_in=tuple(
            name
            for name in ("optimizer", "batch_size", "precision", "start")
            if getattr(student, name) != getattr(control, name)
        ),
    )


def _role_record(role: str, result: RoleResult) -> Record:
    """A role's numbers; the teacher has no keys about labels."""
    of_students = ("labels_consumed", "labels_missed", "labels_repeated", "max_lag_steps", "label_bytes_per_token")
    record = {name: value for name, value in asdict(result).items() if role != "teacher" or name not in of_students}
    for name in ("features_missed", "student_wait_s"):
        if record[name] is None:
            del record[name]
    return record
