"""What every benchmark shares: ratios with a confidence interval, and a JSON that says on what it was measured."""

import json
import platform
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titan.config.environment import cpu_count

RESULTS = Path(__file__).parent / "results"


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Median of one over the median of the other."""
    return statistics.median(first) / statistics.median(second)


def ratio_interval(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], draws: int = 2000
) -> tuple[float, float, float]:
    """Median ratio of two contenders over paired rounds, with a 95 % bootstrap interval.

    first, second: times by round; rounds are drawn with replacement, and times within a round too, so that both the
    noise of a step and the drift of the machine between rounds count
    """
    generator = random.Random(0)
    rounds = range(len(first))

    def flat(side: Sequence[Sequence[float]], chosen: Sequence[int], redraw: bool) -> list[float]:
        return [
            t
            for index in chosen
            for t in (generator.choices(side[index], k=len(side[index])) if redraw else side[index])
        ]

    point = median_ratio(flat(first, list(rounds), False), flat(second, list(rounds), False))
    ratios = []
    for _ in range(draws):
        chosen = generator.choices(list(rounds), k=len(first))
        ratios.append(median_ratio(flat(first, chosen, True), flat(second, chosen, True)))
    ratios.sort()
    return point, ratios[int(0.025 * draws)], ratios[int(0.975 * draws)]


def save_result(name: str, result: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json with the machine it was measured on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    machine = {"cores": cpu_count(), "processor": _processor(), "python": platform.python_version()}
    path.write_text(json.dumps(result | {"machine": machine}, indent=1) + "\n")
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
