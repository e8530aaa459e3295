"""What a terminal shows while a run lives: a table that redraws itself, or plain lines where there is no terminal."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from titan.observe import words
from titan.observe.metrics import Metric, StepMetric
from titan.observe.progress import QUIET_S, RoleProgress, plain_lines, progress_table

REDRAW_S = 0.25
"""Shortest time between two drawings of the table."""


class LiveDisplay:
    """Progress of a run. A context manager; not for several threads."""

    def __init__(
        self,
        run_name: str,
        total_steps: int,
        roles: Sequence[str],
        console: Console | None = None,
        plain_every_s: float = 10.0,
        waits: Mapping[str, str] | None = None,
    ) -> None:
        """`waits` says what a student that has not started waits for, as `progress.waits(config)` gives it."""
        self._console = console or Console()
        self._name = run_name
        self._total_steps = total_steps
        self._rows = {role: RoleProgress(role, total_steps, (waits or {}).get(role, "waits")) for role in roles}
        self._heard_s: dict[str, float] = {}
        self._start_s = time.monotonic()
        self._phase = ""
        self._phase_start_s = self._start_s
        self._drawn_s = -math.inf
        self._news = False
        self._unsaid_phase = ""
        self._plain_every_s = plain_every_s
        fancy = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="visible") if fancy else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None or self._news:
            self._draw()
        if self._live is not None:
            self._live.stop()

    def phase(self, text: str) -> None:
        """Say what the run is doing: "preparing data", "starting 7 ranks: 3 up"; "" when it is simply training.

        What stands before a colon names the phase; time is counted from its first appearance.
        """
        now_s = time.monotonic()
        if text.split(":")[0] != self._phase.split(":")[0]:
            self._say_phase()
            self._phase_start_s = now_s
            self._drawn_s = -math.inf
        if text != self._phase:
            self._phase = self._unsaid_phase = text
        self.refresh()

    def update(self, metric: Metric) -> None:
        """Take in one metric; the next `refresh` shows it."""
        self._rows[metric.role].add(metric)
        if isinstance(metric, StepMetric):
            self._heard_s[metric.role] = time.monotonic()
        self._news = True

    def refresh(self) -> None:
        """Draw if it is time to. Costs next to nothing otherwise, so call it often."""
        since_s = time.monotonic() - self._drawn_s
        if self._live is not None:
            due = since_s >= REDRAW_S
        elif self._unsaid_phase or self._news:
            due = since_s >= self._plain_every_s
        else:
            due = bool(self._heard_s) and since_s >= max(self._plain_every_s, QUIET_S)
        if due:
            self._draw()

    def log(self, text: str) -> None:
        """Print a line above the table."""
        self._print(text)

    def _draw(self) -> None:
        self._drawn_s = time.monotonic()
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            return
        self._say_phase()
        if self._heard_s and (self._news or not self._all_done()):
            self._news = False
            self._print(f"{time.strftime('%H:%M:%S')}  {self._header()}")
            for line in plain_lines(list(self._rows.values()), self._quiet_s()):
                self._print(line)

    def _table(self) -> Group:
        header = Text(self._header(), style="bold")
        if self._phase:
            header.append(f"  {self._phase_text(self._phase)}", style="not bold cyan")
        if not self._heard_s:
            return Group(header)
        return Group(header, progress_table(list(self._rows.values()), self._quiet_s(), self._console.width))

    def _header(self) -> str:
        return f"{self._name}  {words.duration(time.monotonic() - self._start_s)}"

    def _phase_text(self, phase: str) -> str:
        return f"{phase} ({words.duration(time.monotonic() - self._phase_start_s)})"

    def _say_phase(self) -> None:
        if self._live is None and self._unsaid_phase:
            self._print(f"{time.strftime('%H:%M:%S')}  {self._phase_text(self._unsaid_phase)}")
        self._unsaid_phase = ""

    def _quiet_s(self) -> dict[str, float]:
        now_s = time.monotonic()
        return {role: now_s - heard_s for role, heard_s in self._heard_s.items()}

    def _all_done(self) -> bool:
        return all(row.done for row in self._rows.values())

    def _print(self, text: str) -> None:
        """One line as it is: no markup, no wrapping, and out at once."""
        self._console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
        self._console.file.flush()
