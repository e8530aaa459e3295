"""The picture of a simulated run: goodput over time, where the rest went, other sizes, checkpoint intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from textwrap import wrap
from typing import TYPE_CHECKING

from titan.observe.figure import QUIET_COLOUR, STUDENT_COLOURS
from titan.observe.words import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOUR, SECOND_COLOUR = STUDENT_COLOURS[0], STUDENT_COLOURS[1]
Points = Sequence[tuple[float, float]]
"""Places on the axis and values."""


@dataclass(frozen=True)
class GoodputPicture:
    """What is drawn. Shares are 0 to 1."""

    title: str
    sentence: str
    curve: Points
    """Days, and share of useful time in the window that ends there."""
    mean: float
    """Goodput, which the curve varies around."""
    losses: Mapping[str, float]
    """Share of wall time by where it was lost."""
    scaling: Points
    """Devices and goodput; empty if that was not asked for."""
    intervals: Points
    """Checkpoint interval, seconds, and goodput; empty if nothing fails."""
    marks: Mapping[str, float]
    """Intervals with a name, seconds."""


def draw_goodput(picture: GoodputPicture) -> bytes:
    """The picture as PNG, 1400 x 840."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), dpi=140)
    FigureCanvasAgg(figure)
    figure.text(0.02, 0.97, picture.title, fontsize=14, fontweight="bold", va="top")
    figure.text(0.02, 0.915, "\n".join(wrap(picture.sentence, 150)[:2]), fontsize=9, va="top", color="#333333")
    left = figure.add_gridspec(2, 1, left=0.05, right=0.50, bottom=0.085, top=0.81, hspace=0.5)
    right = figure.add_gridspec(2, 1, left=0.64, right=0.975, bottom=0.085, top=0.81, hspace=0.5)
    _draw_curve(figure.add_subplot(left[0]), picture)
    _draw_losses(figure.add_subplot(right[0]), picture.losses)
    _draw_scaling(figure.add_subplot(left[1]), picture.scaling)
    _draw_intervals(figure.add_subplot(right[1]), picture)
    out = BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _draw_curve(axes: "Axes", picture: GoodputPicture) -> None:
    _dress(axes, "Goodput over the run, share of wall time", "day")
    days, shares = [day for day, _ in picture.curve], [share for _, share in picture.curve]
    if days:
        edges = [0.0, *days]
        axes.stairs(shares, edges, color=COLOUR, linewidth=1.4, fill=False, baseline=None)
        axes.stairs(shares, edges, color=COLOUR, alpha=0.12, fill=True)
        axes.set_xlim(0, days[-1])
    axes.axhline(picture.mean, color="#1a1a1a", linewidth=1.0, linestyle="--")
    axes.text(0.015, 0.04, f"dashed: mean, {picture.mean:.1%}", transform=axes.transAxes, fontsize=8)
    axes.set_ylim(0, 1.03)


def _draw_losses(axes: "Axes", losses: Mapping[str, float]) -> None:
    """Bars, the largest on top."""
    _dress(axes, "Where the rest went, % of wall time", None)
    shown = sorted(((name, 100 * share) for name, share in losses.items() if share > 0), key=lambda each: -each[1])
    if not shown:
        _say(axes, "nothing is lost")
        return
    axes.barh([name for name, _ in shown], [share for _, share in shown], 0.68, color=SECOND_COLOUR)
    for row, (_, share) in enumerate(shown):
        axes.annotate(f"{share:.2f}", (share, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_ylim(max(len(shown), 4) - 0.5, -0.5)
    axes.set_xlim(0, 1.15 * shown[0][1])
    axes.set_xticks([])
    axes.grid(visible=False)


def _draw_scaling(axes: "Axes", scaling: Points) -> None:
    _dress(axes, "Weak scaling: goodput of fleets of other sizes", "devices")
    if not scaling:
        _say(axes, "give `weak_scaling` some numbers of devices")
        return
    axes.set_xscale("log")
    axes.plot(*zip(*scaling, strict=True), color=COLOUR, marker="o", markersize=4, linewidth=1.4)
    for devices, goodput in scaling:
        axes.annotate(f"{goodput:.1%}", (devices, goodput), xytext=(0, 5), textcoords="offset points", fontsize=7.5,
                      ha="center")  # fmt: skip
    axes.set_xticks([devices for devices, _ in scaling], [f"{devices:,.0f}" for devices, _ in scaling], fontsize=7.5)
    axes.minorticks_off()
    axes.margins(x=0.08)
    axes.set_ylim(0, 1.12)


def _draw_intervals(axes: "Axes", picture: GoodputPicture) -> None:
    _dress(axes, "Goodput by time between checkpoints", "between checkpoints")
    if not picture.intervals:
        _say(axes, "nothing fails, or saving is free")
        return
    axes.set_xscale("log")
    seconds, shares = zip(*picture.intervals, strict=True)
    axes.plot(seconds, shares, color=COLOUR, marker="o", markersize=4, linewidth=1.4)
    axes.set_xticks(seconds[::2], [duration(each) for each in seconds[::2]], fontsize=7.5)
    axes.minorticks_off()
    margin = 0.15 * (max(shares) - min(shares)) or 0.01
    axes.set_ylim(min(shares) - margin, max(shares) + margin)
    for (name, at), colour in zip(picture.marks.items(), (SECOND_COLOUR, "#1a1a1a", QUIET_COLOUR), strict=False):
        axes.axvline(at, color=colour, linewidth=1.1, linestyle="--", label=f"{name} {duration(at)}")
    axes.legend(facecolor="white", edgecolor="none", framealpha=0.85, fontsize=8, loc="lower center")


def _dress(axes: "Axes", title: str, under: str | None) -> None:
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
    if under is not None:
        axes.set_xlabel(under, fontsize=8.5)
    axes.tick_params(labelsize=8.5, length=0)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom" and under is not None)
        spine.set_color("#bbbbbb")


def _say(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=QUIET_COLOUR, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
