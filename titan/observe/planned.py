"""What the plan promised beside what the run took, from plan.json and the `measured` events of a run folder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from titan.observe import words
from titan.observe.files import Record, read_json
from titan.observe.metrics import Metric, StepMetric

PLAN_FILE = "plan.json"
PICTURE_FILE = "plan.png"


@dataclass(frozen=True)
class Promise:
    """One role's step."""

    role: str
    predicted_s: float
    measured_s: float
    """Median over the steps in the present layout, label waits not counted; NaN before the first."""
    busy: tuple[tuple[str, float, float], ...]
    """Kind of device, predicted and measured seconds of computing in a step, of every position that was measured."""
    stages: tuple[Record, ...]
    """A row a pipeline position; text throughout."""

    @property
    def sentence(self) -> str:
        """`teacher: 0.52 s a step predicted, 0.55 s measured (+6 %)`."""
        said = f"{self.role}: {_seconds(self.predicted_s)} a step predicted"
        if math.isnan(self.measured_s):
            return f"{said}, none measured yet"
        return f"{said}, {_seconds(self.measured_s)} measured ({self.measured_s / self.predicted_s - 1:+.0%})"


def promises(folder: Path, events: Sequence[Record], metrics: Sequence[Metric]) -> list[Promise]:
    """Every role that was predicted; [] for a run without an inventory."""
    predictions = (read_json(folder / PLAN_FILE) or {}).get("predictions", {})
    found = []
    for role, prediction in predictions.items():
        of_role = [event for event in events if event.get("role") == role]
        changes = [index for index, event in enumerate(of_role) if event["event"] == "layout"]
        since = of_role[changes[-1]].get("step", 0) if changes else 0  # the step before the present layout
        steps = [metric for metric in metrics if isinstance(metric, StepMetric) and metric.role == role]
        seconds = [metric.step_s for metric in steps if metric.step > since]
        told = [event for event in of_role[changes[-1] if changes else 0 :] if event["event"] == "measured"]
        busy_s = told[-1].get("busy_s", []) if told else []
        rows: list[Record] = []
        busy: list[tuple[str, float, float]] = []
        for index, position in enumerate(prediction["positions"]):
            measured_s = busy_s[index] if index < len(busy_s) else math.nan
            if not math.isnan(measured_s) and "+" not in position["device"]:  # whose of several kinds is not known
                busy.append((position["device"], position["busy_s"], measured_s))
            rows.append(
                {
                    "role": role if index == 0 else "",
                    "position": str(index),
                    "device": position["device"],
                    "ranks": _ranks(position),
                    "layers": str(position["layers"]),
                    "memory": f"{position['memory_bytes'] / 1e9:.3g} of {position['limit_bytes'] / 1e9:.3g} GB",
                    "idle": words.percent(position["idle_share"]),
                    "predicted": _seconds(position["busy_s"]),
                    "measured": _seconds(measured_s),
                    "error": "" if math.isnan(measured_s) else f"{measured_s / position['busy_s'] - 1:+.0%}",
                }
            )
        measured = median(seconds) if seconds else math.nan
        found.append(Promise(role, prediction["step_s"], measured, tuple(busy), tuple(rows)))
    return found


def _ranks(position: Record) -> str:
    degrees = [f"{name} {position[name]}" for name in ("tp", "dp") if position[name] > 1]
    number = words.plural(position["tp"] * position["dp"], "rank")
    return f"{number}: {', '.join(degrees)}" if degrees else number


def _seconds(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
