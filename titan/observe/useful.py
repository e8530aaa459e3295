"""Goodput: the share of a run's wall time that went into steps that count."""

import math
from collections.abc import Sequence

from titan.observe.metrics import Metric, StepMetric


def goodput(metrics: Sequence[Metric], since_s: float, wall_s: float) -> float:
    """Seconds of the leading role's steps over wall time; NaN before its first step.

    The rest went into starting, waiting, and steps that were made again after a failure: of those the last counts.
    metrics: as `read_metrics` gives them, a step once; the leading role is that of the first of them
    since_s: Unix time from which `wall_s` seconds are counted
    """
    steps = [metric for metric in metrics if isinstance(metric, StepMetric) and metric.time_s >= since_s]
    if not steps or wall_s <= 0:
        return math.nan
    names = {metric.role for metric in steps}
    leading = "teacher" if "teacher" in names else steps[0].role
    return min(1.0, sum(metric.step_s for metric in steps if metric.role == leading) / wall_s)
