"""report.png: the run in one picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from textwrap import wrap
from typing import TYPE_CHECKING

from titan.config.settings import RunConfig
from titan.observe.marks import Mark, draw_marks
from titan.observe.metrics import Metric, StepMetric
from titan.observe.progress import role_names
from titan.observe.verdict import newest_evals

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEACHER_COLOUR = "#1a1a1a"
STUDENT_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
DARK_COLOURS = (TEACHER_COLOUR, "#0072B2", "#D55E00", "#009E73")
"""Those on which white can be read."""
QUIET_COLOUR = "#6b6b6b"
MOST_POINTS = 1500
"""Points drawn of a curve; more would only cost time."""
RESTART_S = 30.0
"""A pause between two steps longer than this, and five times the step, is a restart and not slowness."""

LEAST_STEPS_TO_ZOOM = 30
"""A shorter run gets no picture of its last third."""

Steps = Mapping[str, list[StepMetric]]
"""Steps of each role, in the order of the config."""
Curve = tuple[list[int], list[float]]
"""Steps and values."""


def draw(
    config: RunConfig, metrics: Sequence[Metric], headline: str, sentence: str, marks: Sequence[Mark] = ()
) -> bytes:
    """The picture as PNG, 1400 x 900: training loss, held-out loss, lag and speed.

    headline: the first line of the title;  sentence: the verdict below it
    marks:    where roles started again
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 900 / 140), dpi=140)
    FigureCanvasAgg(figure)
    styles = role_styles(config)
    steps: dict[str, list[StepMetric]] = {role: [] for role in role_names(config)}
    for metric in metrics:
        if isinstance(metric, StepMetric) and metric.role in steps:
            steps[metric.role].append(metric)
    last_step = max((each[-1].step for each in steps.values() if each), default=1)
    top = _draw_title(figure, headline, sentence, styles)
    upper = figure.add_gridspec(
        1, 3, width_ratios=(1.5, 0.9, 1.25), left=0.05, right=0.975, bottom=0.47, top=top, wspace=0.17
    )
    lower = figure.add_gridspec(1, 2, left=0.05, right=0.975, bottom=0.085, top=0.335, wspace=0.13)
    colours = {role: style.colour for role, style in styles.items()}
    loss = figure.add_subplot(upper[0] if last_step >= LEAST_STEPS_TO_ZOOM else upper[:2])
    _draw_loss(loss, steps, styles, last_step)
    draw_marks(loss, marks, colours)
    if last_step >= LEAST_STEPS_TO_ZOOM:
        _draw_last_third(figure.add_subplot(upper[1]), steps, styles, last_step)
    _draw_heldout(figure.add_subplot(upper[2]), config, metrics, styles)
    _draw_lag(figure.add_subplot(lower[0]), steps, styles, last_step)
    speed = figure.add_subplot(lower[1])
    _draw_speed(speed, steps, styles, last_step)
    draw_marks(speed, marks, colours, words=False)
    out = BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


@dataclass(frozen=True)
class Style:
    """How a role looks in every panel."""

    label: str
    colour: str
    control: bool
    dashes: str
    width: float
    """Line width, points. Earlier roles are wider, so that curves that coincide all remain visible."""


def role_styles(config: RunConfig) -> dict[str, Style]:
    """A colour a role; controls are dashed. After six students colours come again, with other dashes."""
    styles = {"teacher": Style("teacher", TEACHER_COLOUR, control=False, dashes="-", width=2.4)}
    for index, student in enumerate(config.students):
        control, again = student.distill.weight == 0, index >= len(STUDENT_COLOURS)
        styles[student.name] = Style(
            label=_short(student.name) + (" (control)" if control and "control" not in student.name else ""),
            colour=STUDENT_COLOURS[index % len(STUDENT_COLOURS)],
            control=control,
            dashes=(":" if again else "--") if control else ("-." if again else "-"),
            width=max(1.1, 1.9 - 0.2 * index),
        )
    return styles


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the finite values among the `width` around each one; NaN where there are none."""
    sums, counts = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    means = []
    for index in range(len(values)):
        low, high = max(0, index - width // 2), min(len(values), index + width // 2 + 1)
        number = counts[high] - counts[low]
        means.append((sums[high] - sums[low]) / number if number else math.nan)
    return means


def thinned(steps: Sequence[int], values: Sequence[float]) -> Curve:
    """At most about MOST_POINTS points of a curve, the last one always among them."""
    stride = max(1, len(steps) // MOST_POINTS)
    picked = sorted({*range(0, len(steps), stride), len(steps) - 1} if steps else ())
    return [steps[index] for index in picked], [values[index] for index in picked]


def speeds(metrics: Sequence[StepMetric]) -> list[float]:
    """Tokens a second at each step of one role, over the time around it; the pause of a restart is left out."""
    tokens = [float(metric.tokens) for metric in metrics]
    seconds = [metric.step_s for metric in metrics]
    for index in range(1, len(metrics)):
        elapsed_s = metrics[index].time_s - metrics[index - 1].time_s
        if 0 < elapsed_s < max(RESTART_S, 5 * seconds[index]):
            seconds[index] = elapsed_s
    width = smoothing_width(len(metrics))
    means = zip(running_mean(tokens, width), running_mean(seconds, width), strict=True)
    return [mean_tokens / mean_s if mean_s > 0 else math.nan for mean_tokens, mean_s in means]


def smoothing_width(number: int) -> int:
    """Steps that a smoothed curve of `number` steps takes the mean of."""
    return max(1, number // 40)


def _draw_loss(axes: "Axes", steps: Steps, styles: Mapping[str, Style], last_step: int) -> None:
    _dress(axes, "Training loss on text, nats a token", last_step)
    tops, bottoms = [], []
    for role, metrics in steps.items():
        at, raw = [metric.step for metric in metrics], [metric.cross_entropy for metric in metrics]
        axes.plot(*thinned(at, raw), color=styles[role].colour, alpha=0.16, linewidth=0.7)
        smooth = running_mean(raw, smoothing_width(len(raw)))
        _plot(axes, at, smooth, styles[role])
        finite = [value for value in smooth if math.isfinite(value)]
        tops += finite[:1]
        bottoms += finite and [min(finite)]
        _mark_break(axes, at, raw, styles[role])
    if tops:
        margin = 0.05 * (max(tops) - min(bottoms)) or 0.1
        axes.set_ylim(min(bottoms) - margin, max(tops) + margin)
    else:
        _say(axes, "no finite loss" if any(steps.values()) else "no step yet")


def _draw_last_third(axes: "Axes", steps: Steps, styles: Mapping[str, Style], last_step: int) -> None:
    """The end of the curves of training loss: what matters there is too small to see beside their start."""
    from matplotlib.ticker import MaxNLocator

    _dress(axes, "The last third of it", last_step)
    first_step = last_step * 2 // 3
    for role, metrics in steps.items():
        smooth = running_mean([metric.cross_entropy for metric in metrics], 2 * smoothing_width(len(metrics)))
        shown = [(m.step, mean) for m, mean in zip(metrics, smooth, strict=True) if m.step >= first_step]
        _plot(axes, [step for step, _ in shown], [mean for _, mean in shown], styles[role])
    axes.set_xlim(first_step, last_step)
    axes.margins(y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True, steps=[1, 2, 5, 10]))


def _draw_heldout(axes: "Axes", config: RunConfig, metrics: Sequence[Metric], styles: Mapping[str, Style]) -> None:
    """Bars from zero, the role's name inside and its value behind; a pale hatched bar is a control."""
    evals = newest_evals(config, metrics)
    at_steps = {step for step, _ in evals.values()}
    when = f", after step {max(at_steps):,}" if len(at_steps) == 1 else ""
    _dress(axes, "Held-out text, bits a byte", None)
    axes.set_xticks([])
    if not evals:
        _say(axes, "no held-out evaluation yet")
        return
    longest = max((bits for _, bits in evals.values() if math.isfinite(bits)), default=1.0)
    size = 8.5 if len(evals) <= 8 else 7
    for row, (role, (step, bits)) in enumerate(evals.items()):
        style, length = styles[role], bits if math.isfinite(bits) else 0.0
        axes.barh(row, length, height=0.72, color=style.colour, alpha=0.3 if style.control else 1.0)
        if style.control:
            axes.barh(
                row, length, height=0.72, fill=False, hatch="////", edgecolor=style.colour, linewidth=0, alpha=0.35
            )
        inside = "white" if style.colour in DARK_COLOURS and not style.control and length else "black"
        beside = f"{bits:.3f}" + ("" if when else f" (step {step:,})")
        texts = ((style.label, 0.0, inside, "normal"), (beside, length if length else 0.35 * longest, "black", "bold"))
        for text, at, colour, weight in texts:
            axes.annotate(text, (at, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=size,
                          color=colour, fontweight=weight)  # fmt: skip
    axes.set_xlabel(f"less is better{when}", fontsize=8.5)
    axes.set_yticks([])
    axes.set_ylim(max(len(evals), 3) - 0.5, -0.5)
    axes.set_xlim(0, (1.22 if when else 1.5) * longest or 1.0)
    axes.grid(visible=False)


def _draw_lag(axes: "Axes", steps: Steps, styles: Mapping[str, Style], last_step: int) -> None:
    _dress(axes, "Lag of the students, steps behind the teacher", last_step)
    highest = 0.0
    for role, metrics in steps.items():
        at = [metric.step for metric in metrics if metric.lag is not None]
        lags = [float(metric.lag) for metric in metrics if metric.lag is not None]
        axes.plot(*thinned(at, lags), color=styles[role].colour, alpha=0.16, linewidth=0.7)
        _plot(axes, at, running_mean(lags, smoothing_width(len(lags))), styles[role])
        highest = max([highest, *lags])
    if all(metric.lag is None for metrics in steps.values() for metric in metrics):
        _say(axes, "no student has started" if len(steps) > 1 else "no students in this run")
    axes.set_ylim(-0.02 * max(1.0, highest), 1.08 * max(1.0, highest))


def _draw_speed(axes: "Axes", steps: Steps, styles: Mapping[str, Style], last_step: int) -> None:
    from matplotlib.ticker import EngFormatter

    _dress(axes, "Speed, tokens a second", last_step)
    highest = 0.0
    for role, metrics in steps.items():
        values = speeds(metrics)
        highest = max([highest, *(value for value in values if math.isfinite(value))])
        _plot(axes, [metric.step for metric in metrics], values, styles[role])
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylim(0, 1.12 * highest or 1.0)


def _plot(axes: "Axes", at: Sequence[int], values: Sequence[float], style: Style) -> None:
    marker = "o" if len(at) == 1 else None  # a line through one point is invisible
    axes.plot(*thinned(at, values), color=style.colour, ls=style.dashes, linewidth=style.width, marker=marker,
              markersize=5, clip_on=marker is None)  # fmt: skip


def _mark_break(axes: "Axes", at: Sequence[int], losses: Sequence[float], style: Style) -> None:
    """Mark the first step whose loss is not a number: there the curve just ends."""
    broken = [step for step, loss in zip(at, losses, strict=True) if not math.isfinite(loss)]
    if broken:
        axes.axvline(broken[0], color=style.colour, linewidth=0.9, linestyle=":")
        axes.annotate(f"{style.label}: loss not finite", (broken[0], 0.97), xycoords=("data", "axes fraction"),
                      xytext=(-3, 0), textcoords="offset points", fontsize=7.5, color=style.colour, rotation=90,
                      ha="right", va="top")  # fmt: skip


def _draw_title(figure: "Figure", headline: str, sentence: str, styles: Mapping[str, Style]) -> float:
    """Headline, verdict and legend; returns where the panels may begin, as a share of the height."""
    from matplotlib.lines import Line2D

    lines = wrap(sentence.replace("`", ""), 150)[:3]
    figure.text(0.02, 0.972, headline, fontsize=14, fontweight="bold", va="top")
    figure.text(0.02, 0.925, "\n".join(lines), fontsize=9, va="top", color="#333333", linespacing=1.35)
    legend_top = 0.925 - 0.028 * len(lines) - 0.002
    handles = [
        Line2D([], [], color=style.colour, ls=style.dashes, linewidth=2, label=style.label) for style in styles.values()
    ]
    across = max(1, min(len(handles), int(130 / (7 + max(len(style.label) for style in styles.values())))))
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.012, legend_top), ncols=across, frameon=False,
                  fontsize=8.5, borderaxespad=0.3, columnspacing=1.6)  # fmt: skip
    return max(0.6, legend_top - 0.03 * math.ceil(len(handles) / across) - 0.05)


def _dress(axes: "Axes", title: str, last_step: int | None) -> None:
    """The plain look of all panels; `last_step` is where the axis of teacher steps ends, None if there is none."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
    if last_step is not None:
        axes.set_xlabel("teacher step", fontsize=8.5)
        axes.set_xlim(0, max(1, last_step))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=8.5, length=0)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom" and last_step is not None)
        spine.set_color("#bbbbbb")


def _say(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=QUIET_COLOUR, fontsize=9)
    axes.set_yticks([])


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
