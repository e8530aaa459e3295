"""What steps took, and which ranks are slower than their own kind should be, never than the fastest: kinds differ."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from titan.plan.layout import Layout

TOLERANCE = 0.2
"""How much slower than expected a rank may be."""
STEPS = 20
"""How many steps in a row it must be slower before it is named."""


@dataclass(frozen=True)
class Straggler:
    """A rank that was too slow for STEPS steps in a row."""

    rank: int
    factor: float
    """Its seconds over the expected ones, mean over those steps."""


@dataclass
class StragglerWatch:
    """Looks at every step of a role; names each rank once, and again only after it has kept its pace for a step."""

    expected_s: Sequence[float]
    """Seconds that each rank's passes of one step should take on its kind of device."""
    slow: dict[int, list[float]] = field(default_factory=dict)
    """Factors of the steps in a row in which a rank was too slow."""

    def look(self, busy_s: Sequence[float]) -> list[Straggler]:
        """Take in the seconds each rank computed in a step; returns those that are to be named now."""
        found = []
        for rank, (expected, busy) in enumerate(zip(self.expected_s, busy_s, strict=True)):
            if busy <= (1 + TOLERANCE) * expected:
                self.slow.pop(rank, None)
                continue
            factors = self.slow.setdefault(rank, [])
            factors.append(busy / expected)
            if len(factors) == STEPS:
                found.append(Straggler(rank, sum(factors) / STEPS))
        return found


@dataclass
class MeasuredSteps:
    """What a role's steps took, by position of its pipeline, since they were last told."""

    layout: Layout
    step_s: list[float] = field(default_factory=list)
    busy_s: list[list[float]] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        """Steps since the last report."""
        return len(self.step_s)

    def add(self, step_s: float, busy_s: Sequence[float]) -> None:
        """One step: its seconds, and by rank those computed; at a position the slowest rank counts."""
        self.step_s.append(step_s)
        self.busy_s.append([max(busy_s[rank] for rank in stage.ranks) for stage in self.layout.positions])

    def take(self) -> dict[str, object]:
        """Medians over the steps since the last call."""
        told: dict[str, object] = {
            "steps": self.num_steps,
            "step_s": round(median(self.step_s), 6),
            "busy_s": [round(median(seconds), 6) for seconds in zip(*self.busy_s, strict=True)],
        }
        self.step_s, self.busy_s = [], []
        return told
