"""What a run shows about distillation, in sentences that claim no more than the numbers do."""

import math
from collections.abc import Mapping, Sequence

from titan.config.settings import RunConfig
from titan.observe import words
from titan.observe.metrics import EvalMetric, Metric
from titan.observe.progress import role_names
from titan.observe.summary import Comparison, compare

NOISE = 0.03
"""Differences below this share of the control's loss are of the size by which seeds differ."""


def verdict(config: RunConfig, metrics: Sequence[Metric], finished: bool) -> list[str]:
    """Sentences, the most important first."""
    if not config.students:
        return [_teacher_alone(metrics)]
    pairs = compare(config, {})
    evals = evals_by_step(metrics)
    sentences = [_pair_sentence(config, evals, pair, finished) for pair in pairs]
    found = [at_common_step(config, evals, pair) for pair in pairs]
    shares = [abs(item[1].heldout_bits_per_byte_gain or 0.0) / item[3] for item in found if item is not None]
    if shares:
        small, large = (
            "differences of this size vary from seed to seed",
            "another `run.seed` tells how much of it is luck",
        )
        sentences.append(f"One seed: {small if max(shares) < NOISE else large}.")
    compared = {pair.student for pair in pairs}
    alone = [student.name for student in config.students if student.distill.weight > 0 and student.name not in compared]
    if alone:
        names = ", ".join(f"`{name}`" for name in alone)
        sentences.append(
            f"Whether distillation helped {names} cannot be told: there is no control, "
            "a student of the same shape with distill.weight = 0."
        )
    if all(student.distill.weight == 0 for student in config.students):
        sentences.append("No student learned from labels: every distill.weight is 0.")
    return sentences


def evals_by_step(metrics: Sequence[Metric]) -> dict[str, dict[int, float]]:
    """Held-out bits per byte of each role at each step at which it was evaluated, oldest first."""
    evals: dict[str, dict[int, float]] = {}
    for metric in metrics:
        if isinstance(metric, EvalMetric):
            evals.setdefault(metric.role, {})[metric.step] = metric.heldout_bits_per_byte
    return evals


def newest_evals(config: RunConfig, metrics: Sequence[Metric]) -> dict[str, tuple[int, float]]:
    """Newest evaluation of each role that has one: step, held-out bits per byte."""
    evals = evals_by_step(metrics)
    return {role: max(evals[role].items()) for role in role_names(config) if evals.get(role)}


def at_common_step(
    config: RunConfig, evals: Mapping[str, Mapping[int, float]], pair: Comparison
) -> tuple[int, Comparison, float, float] | None:
    """A pair compared at the newest step at which both were evaluated: step, comparison, student's and control's bits.

    The teacher's bits are those of that step, or of its newest evaluation before it. None if there is no such step.
    """
    common = evals.get(pair.student, {}).keys() & evals.get(pair.control, {}).keys()
    if not common:
        return None
    step = max(common)
    teacher = {at: bits for at, bits in evals.get("teacher", {}).items() if at <= step}
    bits = {role: evals[role][step] for role in (pair.student, pair.control)}
    known = bits | ({"teacher": teacher[max(teacher)]} if teacher else {})
    names = (pair.student, pair.control)
    compared = next(other for other in compare(config, known) if (other.student, other.control) == names)
    return step, compared, bits[pair.student], bits[pair.control]


def _pair_sentence(
    config: RunConfig, evals: Mapping[str, Mapping[int, float]], pair: Comparison, finished: bool
) -> str:
    student, control = f"`{pair.student}`", f"`{pair.control}`"
    found = at_common_step(config, evals, pair)
    if found is None:
        return f"{student} and its control {control} cannot be compared: no held-out evaluation of both at one step."
    step, compared, student_bits, control_bits = found
    gain = compared.heldout_bits_per_byte_gain
    final = finished and step == config.run.steps
    numbers = f"{student} ends at" if final else f"After step {step:,} {student} is at"
    numbers += f" {student_bits:.3f} held-out bits per byte, its control without labels {control} at {control_bits:.3f}"
    if gain is None or not math.isfinite(gain):
        return f"{numbers}: no comparison, a loss is not a finite number."
    caveat = f" (They also differ in {', '.join(pair.differs_in)}.)" if pair.differs_in else ""
    if round(gain, 3) == 0:
        return f"{numbers}: distillation made no difference that three digits show.{caveat}"
    if gain < 0:
        return f"{numbers}: distillation did not help, the student is {-gain:.3f} worse.{caveat}"
    closed = compared.gap_to_teacher_closed
    share = "" if closed is None else f" ({words.percent(closed)} of the control's gap to the teacher)"
    return f"{numbers}: distillation helped by {gain:.3f}{share}.{caveat}"


def _teacher_alone(metrics: Sequence[Metric]) -> str:
    evals = evals_by_step(metrics).get("teacher")
    if not evals:
        return "A teacher without students; no held-out evaluation yet."
    step, bits = max(evals.items())
    return f"A teacher without students: {bits:.3f} held-out bits per byte after step {step}."
