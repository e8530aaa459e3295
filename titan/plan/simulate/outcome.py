"""A simulated run that has been lived through: where every stretch of its wall time went."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Part = Literal[
    "useful",
    "stragglers",
    "jitter",
    "shrunk",
    "checkpoint",
    "lost",
    "detect",
    "rebuild",
    "reload",
    "waiting",
    "stopped",
]
PARTS: tuple[Part, ...] = get_args(Part)
"""Where wall time goes: steps that count, at the speed without trouble; what slow devices, noise and missing nodes add
to them; saving; steps that a failure undid; noticing it, new processes, reading the state; waiting for a node; the rest
of a run that stopped."""


@dataclass(frozen=True)
class Stretch:
    """Some wall time and where it went, seconds of each part that is not 0."""

    start_s: float
    end_s: float
    parts: dict[Part, float]
    steps: int = 0
    """Steps that count."""


@dataclass(frozen=True)
class Outcome:
    """A run that was replayed."""

    stretches: tuple[Stretch, ...]
    step_s: float
    num_failures: int
    num_checkpoints: int

    @property
    def wall_s(self) -> float:
        """From its start to its end."""
        return self.stretches[-1].end_s if self.stretches else 0.0

    @property
    def steps(self) -> int:
        """Steps that count."""
        return sum(stretch.steps for stretch in self.stretches)

    @property
    def parts_s(self) -> dict[Part, float]:
        """Seconds of each part; together the wall time."""
        total = dict.fromkeys(PARTS, 0.0)
        for stretch in self.stretches:
            for part, seconds in stretch.parts.items():
                total[part] += seconds
        return total

    @property
    def goodput(self) -> float:
        """Share of wall time in steps that count, at the speed without trouble."""
        return self.steps * self.step_s / self.wall_s if self.stretches else 0.0

    def curve(self, windows: int) -> list[tuple[float, float]]:
        """End of each of so many equal windows of the wall time, seconds, and the share of it that is useful."""
        ends_s = np.array([0.0, *(stretch.end_s for stretch in self.stretches)])
        useful_s = np.cumsum([0.0, *(stretch.parts.get("useful", 0.0) for stretch in self.stretches)])
        edges_s = np.linspace(0.0, self.wall_s, windows + 1)
        shares = np.diff(np.interp(edges_s, ends_s, useful_s)) / np.diff(edges_s)
        return list(zip(edges_s[1:].tolist(), shares.tolist(), strict=True))
