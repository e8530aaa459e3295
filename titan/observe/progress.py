"""How far each role is: metrics in, one row a role out. The live display and `titan status` show the same rows."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from titan.config.settings import RunConfig
from titan.observe import words
from titan.observe.metrics import EvalMetric, Metric, StepMetric

WINDOW_S = 20.0
"""Speed is measured over this much of the recent past, and over two steps at least."""
SMOOTHING = 0.9
"""Weight of the past in the smoothed loss."""
QUIET_S = 30.0
"""From this long without a step on, a row says so."""

COLUMNS = ("role", "step", "loss", "cross-ent.", "tokens/s", "lag", "a", "label B/tok", "bits/byte", "time left")
BAR_WIDTH = 14


def role_names(config: RunConfig) -> list[str]:
    """All roles of a run, the teacher first."""
    return list(config.roles)


def waits(config: RunConfig) -> dict[str, str]:
    """What each student that does not start with the teacher waits for."""
    reasons = {}
    for student in config.students:
        if student.start.step:
            reasons[student.name] = f"waits for step {student.start.step}"
        elif student.start.lead is not None:
            reasons[student.name] = f"waits for a lead of {student.start.lead:g}"
    return reasons


@dataclass
class Smoothed:
    """An exponential mean without the bias of its start; values that are not finite are left out."""

    mean: float = math.nan
    weight: float = 0.0

    def add(self, value: float) -> None:
        """Take in one value."""
        if not math.isfinite(value):
            return
        past = SMOOTHING * self.weight
        self.weight = past + 1 - SMOOTHING
        self.mean = value if past == 0 else (past * self.mean + (1 - SMOOTHING) * value) / self.weight


@dataclass
class RoleProgress:
    """One role, as far as its metrics tell."""

    role: str
    total_steps: int
    waits: str = "waits"
    """What a row says before the role's first step."""
    step: int = 0
    first_step: int = 0
    loss: Smoothed = field(default_factory=Smoothed)
    cross_entropy: Smoothed = field(default_factory=Smoothed)
    newest: StepMetric | None = None
    heldout_bits_per_byte: float | None = None
    window: deque[StepMetric] = field(default_factory=deque)
    """Steps of the last WINDOW_S seconds, oldest first, and the one before them."""

    def add(self, metric: Metric) -> None:
        """Take in one metric of this role."""
        if isinstance(metric, EvalMetric):
            self.heldout_bits_per_byte = metric.heldout_bits_per_byte
            return
        self.newest = metric
        self.step = metric.step
        self.first_step = self.first_step or metric.step
        self.loss.add(metric.loss)
        self.cross_entropy.add(metric.cross_entropy)
        self.window.append(metric)
        while len(self.window) > 2 and metric.time_s - self.window[1].time_s > WINDOW_S:
            self.window.popleft()

    @property
    def done(self) -> bool:
        """Whether the role took its last step."""
        return self.step >= self.total_steps

    @property
    def tokens_per_s(self) -> float:
        """Recent speed; NaN before the first step."""
        if self.newest is None:
            return math.nan
        elapsed_s = self.newest.time_s - self.window[0].time_s
        if elapsed_s > 0:
            return sum(metric.tokens for metric in list(self.window)[1:]) / elapsed_s
        return self.newest.tokens / self.newest.step_s if self.newest.step_s > 0 else math.nan

    @property
    def remaining_s(self) -> float:
        """Seconds to the last step at recent speed; NaN if there is none."""
        if self.newest is None:
            return math.nan
        elapsed_s = self.newest.time_s - self.window[0].time_s
        steps = self.newest.step - self.window[0].step
        step_s = elapsed_s / steps if elapsed_s > 0 and steps > 0 else self.newest.step_s
        return (self.total_steps - self.step) * step_s

    @property
    def label_bytes_per_token(self) -> float:
        """Recent bytes of labels a token; NaN for a role without labels."""
        with_labels = [metric for metric in self.window if metric.label_bytes is not None]
        tokens = sum(metric.tokens for metric in with_labels)
        return sum(metric.label_bytes or 0 for metric in with_labels) / tokens if tokens else math.nan


def eta(row: RoleProgress, rows: Sequence[RoleProgress], quiet_s: float) -> str:
    """`done`, the time left, or how long nothing has come. A student cannot end before its teacher."""
    if row.done:
        return "done"
    slowest_step_s = max((metric.step_s for metric in row.window), default=0.0)
    if quiet_s > max(QUIET_S, 10 * slowest_step_s):
        return f"no step for {words.duration(quiet_s)}"
    left = [other.remaining_s for other in rows if other is row or other.role == "teacher"]
    return words.duration(max(left, key=lambda seconds: -1.0 if math.isnan(seconds) else seconds))


def progress_table(rows: Sequence[RoleProgress], quiet_s: Mapping[str, float], width: int) -> Table:
    """Rows as a table for a terminal `width` columns wide; a narrow one gets fewer columns.

    quiet_s: seconds since a role was heard, for roles whose silence is worth telling
    """
    cells = [_cells(row, rows, quiet_s.get(row.role, 0.0)) for row in rows]
    names = [name for name in COLUMNS if any(row[name] for row in cells)]
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in names}
    bar = True
    for name in (None, "label B/tok", "cross-ent.", "bits/byte", "a", "tokens/s"):
        if sum(widths.values()) + 2 * (len(widths) - 1) + (BAR_WIDTH + 1) * bar <= width:
            break
        bar = False
        widths.pop(name or "", None)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in widths:
        table.add_column(name, no_wrap=True, justify="left" if name in ("role", "step", "time left") else "right")
    for row, texts in zip(rows, cells, strict=True):
        table.add_row(*(_step_cell(row, texts["step"], bar) if name == "step" else texts[name] for name in widths))
    return table


def plain_lines(rows: Sequence[RoleProgress], quiet_s: Mapping[str, float]) -> list[str]:
    """Rows as aligned lines of text."""
    lines = []
    name_width = max(len(row.role) for row in rows)
    for row in rows:
        cells = _cells(row, rows, quiet_s.get(row.role, 0.0))
        parts = [f"  {row.role:<{name_width}}  {cells['step']:<{2 * len(str(row.total_steps)) + 1}}"]
        if row.newest is not None:
            parts += [f"loss {cells['loss']:>6}", f"ce {cells['cross-ent.']:>6}", f"{cells['tokens/s']:>5} tok/s"]
            left = cells["time left"]
            parts += [f"left {left:<7}" if left[0].isdigit() else f"{left:<12}"]
            parts += [f"{name} {cells[name]}" for name in ("lag", "a", "label B/tok", "bits/byte") if cells[name]]
        lines.append("  ".join(parts).rstrip())
    return lines


def _cells(row: RoleProgress, rows: Sequence[RoleProgress], quiet_s: float) -> dict[str, str]:
    """Text of every column of a row; empty where there is nothing to say."""
    if row.newest is None:
        return dict.fromkeys(COLUMNS, "") | {"role": row.role, "step": row.waits}
    newest, bytes_per_token = row.newest, row.label_bytes_per_token
    return {
        "role": row.role,
        "step": f"{row.step}/{row.total_steps}",
        "loss": _loss(newest.loss, row.loss),
        "cross-ent.": _loss(newest.cross_entropy, row.cross_entropy),
        "tokens/s": words.count(row.tokens_per_s),
        "lag": "" if newest.lag is None else str(newest.lag),
        "a": "" if newest.distill_weight is None else f"{newest.distill_weight:.2f}",
        "label B/tok": "" if math.isnan(bytes_per_token) else f"{bytes_per_token:.1f}",
        "bits/byte": "" if row.heldout_bits_per_byte is None else f"{row.heldout_bits_per_byte:.3f}",
        "time left": eta(row, rows, quiet_s),
    }


def _loss(newest: float, smoothed: Smoothed) -> str:
    """The smoothed value, unless the newest one is not a number: that must not hide."""
    return f"{smoothed.mean:.3f}" if math.isfinite(newest) else str(newest)


def _step_cell(row: RoleProgress, text: str, bar: bool) -> Table | Text:
    if row.newest is None or not bar:
        return Text(text, style="dim" if row.newest is None else "")
    cell = Table.grid(padding=(0, 1, 0, 0))
    cell.add_row(ProgressBar(total=row.total_steps, completed=row.step, width=BAR_WIDTH), text)
    return cell
