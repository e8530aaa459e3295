"""How far the teacher leads a student, and what follows: when the student starts and how much labels count."""

from dataclasses import dataclass

from titan.config.distillation import DistillSettings

SMOOTHING = 0.95
"""Decay of the running means; about the last twenty steps count."""


@dataclass
class LeadTracker:
    """Running means of teacher's and student's cross-entropy on the same batches, in nats a token."""

    teacher: float = 0.0
    student: float = 0.0
    weight: float = 0.0
    """Sum of the decays so far; divides out the start at zero."""

    def add(self, teacher: float, student: float) -> None:
        """One step of both."""
        self.teacher = SMOOTHING * self.teacher + (1 - SMOOTHING) * teacher
        self.student = SMOOTHING * self.student + (1 - SMOOTHING) * student
        self.weight = SMOOTHING * self.weight + (1 - SMOOTHING)

    @property
    def lead(self) -> float:
        """Student's smoothed loss minus the teacher's; 0 before the first step."""
        return (self.student - self.teacher) / self.weight if self.weight else 0.0


def distillation_weight(settings: DistillSettings, lead: float, step: int, steps: int) -> float:
    """The weight a of the labels at a student's own step `step` of `steps`, counted from 1.

    The labels of a young teacher hurt and those of one that leads help, so by default a follows the lead.
    """
    if settings.schedule == "constant":
        return settings.weight
    rise = min(1.0, step / (settings.ramp_fraction * steps))
    if settings.schedule == "ramp":
        return settings.weight * rise
    if settings.schedule == "wsd":  # warm-up, stable, decay
        return settings.weight * min(rise, (steps - step) / (settings.decay_fraction * steps))
    return settings.weight * min(1.0, max(0.0, lead / settings.full_lead))
