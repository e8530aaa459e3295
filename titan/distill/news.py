"""What the lead of a role tells the driver: nothing is let go before the driver has it."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan.checkpoint.folder import newest_step, read_manifest, step_folder
from titan.observe.metrics import EvalMetric, Metric, StepMetric

News = Metric | Mapping[str, Any]
"""A metric, or the fields of an event."""
UNTOLD = "untold_metrics"
"""Of a checkpoint's manifest: lines of metrics.jsonl that the driver may not have had when it was made."""


class Outbox:
    """News in order, numbered from 0. Filled by one thread, emptied by another."""

    def __init__(self) -> None:
        self._items: list[News] = []
        self._first = 0
        """Number of the oldest item that is kept."""
        self._lock = threading.Lock()

    def put(self, item: News) -> None:
        """Add one."""
        with self._lock:
            self._items.append(item)

    def take(self, heard: int) -> tuple[int, list[News]]:
        """All from number `heard` on, and the number of the next to come; those before `heard` have arrived."""
        with self._lock:
            del self._items[: max(0, heard - self._first)]
            self._first = max(self._first, heard)
            return self._first + len(self._items), list(self._items)

    def metrics(self) -> list[Metric]:
        """Metrics that may not have arrived."""
        with self._lock:
            return [item for item in self._items if isinstance(item, StepMetric | EvalMetric)]


def untold_metrics(checkpoints: Path) -> list[str]:
    """What the newest of a role's checkpoints keeps of metrics."""
    step = newest_step(checkpoints)
    lines: list[str] = [] if step is None else read_manifest(step_folder(checkpoints, step)).get(UNTOLD, [])
    return lines
