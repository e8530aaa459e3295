"""The picture of a pipeline step: a row a position, a bar a pass, so that waiting is what is left pale."""

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Protocol

from titan.observe.figure import QUIET_COLOUR
from titan.observe.words import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PASS_COLOURS = {"forward": "#0072B2", "backward": "#D55E00", "weight": "#009E73"}
"""Of Okabe and Ito's palette; white can be read on all three."""
TAIL_COLOUR, IDLE_COLOUR = "#4d4d4d", "#efefef"
PASS_WORDS = {"forward": "forward", "backward": "backward", "weight": "gradient of weights"}
MOST_ROWS = 64
"""Positions drawn; of more, a sample is."""
WIDTH_IN, DPI = 10.0, 140
LABEL_IN = 0.062
"""Width of a letter of a row's label, inches."""
NUMBER_IN = 0.075
"""Width of a digit inside a bar, inches."""


class PassKind(Protocol):
    """forward, backward or weight, as an enum's member."""

    @property
    def value(self) -> str:
        """Its name."""


class PassSpan(Protocol):
    """One pass: where, what and when; the spans of a timeline are such."""

    @property
    def position(self) -> int:
        """Row of the picture."""

    @property
    def chunk(self) -> int:
        """Which of the stages of its position."""

    @property
    def kind(self) -> PassKind:
        """What it computes."""

    @property
    def micro_batch(self) -> int:
        """The number in its bar."""

    @property
    def start_s(self) -> float:
        """Seconds from the start of the step."""

    @property
    def end_s(self) -> float:
        """Seconds from the start of the step."""


def draw_gantt(title: str, labels: Sequence[str], spans: Sequence[PassSpan], tail_s: Sequence[float]) -> bytes:
    """The picture as PNG, 1400 pixels wide and as high as its rows ask for.

    labels: of each position, for example "stage 0 · H100 x8 · layers 0-11"
    tail_s: of each position, what follows its last pass: gradient sync and optimizer
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    own: list[list[PassSpan]] = [[] for _ in labels]
    for span in spans:
        own[span.position].append(span)
    finish_s = [max((span.end_s for span in each), default=0.0) for each in own]
    step_s = max(end + tail for end, tail in zip(finish_s, tail_s, strict=True)) or 1.0
    busy_s = [sum(s.end_s - s.start_s for s in each) + tail for each, tail in zip(own, tail_s, strict=True)]
    shown = chosen_rows(busy_s)
    row_in = 0.30 if len(shown) <= 24 else 0.17
    height_in = 1.25 + row_in * len(shown)
    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI)
    FigureCanvasAgg(figure)
    left = min(0.34, (0.25 + LABEL_IN * max(map(len, labels))) / WIDTH_IN)
    axes = figure.add_axes((left, 0.52 / height_in, 0.925 - left, row_in * len(shown) / height_in))
    scale, unit = (1.0, "s") if step_s >= 1 else (1e3, "ms")
    axes.set_xlim(0, step_s * scale)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    for row, position in enumerate(shown):
        axes.barh(row, step_s * scale, 0.8, color=IDLE_COLOUR)
        _draw_passes(axes, row, own[position], scale, roomy=row_in > 0.2)
        axes.barh(row, tail_s[position] * scale, 0.8, left=finish_s[position] * scale, color=TAIL_COLOUR)
        idle = max(0.0, 1 - busy_s[position] / step_s)
        axes.text(1.008, row, percent(idle), transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    _dress(axes, [labels[position] for position in shown], f"time in the step, {unit}", small=row_in < 0.2)
    if len(shown) < len(labels):
        title += f"; {len(shown)} of {len(labels)} positions drawn"
    paler = ", paler with each later chunk" if any(span.chunk for span in spans) else ""
    _draw_legend(figure, height_in, title, paler, {span.kind.value for span in spans}, any(tail_s))
    out = BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def chosen_rows(busy_s: Sequence[float]) -> list[int]:
    """Positions to draw: all, or MOST_ROWS spread evenly, the first, the last and the busiest among them."""
    if len(busy_s) <= MOST_ROWS:
        return list(range(len(busy_s)))
    busiest = max(range(len(busy_s)), key=busy_s.__getitem__)
    last = len(busy_s) - 1
    return sorted({busiest, *(round(index * last / (MOST_ROWS - 2)) for index in range(MOST_ROWS - 1))})


def _draw_passes(axes: "Axes", row: int, spans: Sequence[PassSpan], scale: float, *, roomy: bool) -> None:
    """Bars of one position; later chunks are paler, numbers stand in bars that have room for them."""
    inch_s = (axes.get_xlim()[1] / scale) / (WIDTH_IN * axes.get_position().width)
    for kind, chunk in sorted({(span.kind.value, span.chunk) for span in spans}):
        bars = [
            (span.start_s * scale, (span.end_s - span.start_s) * scale)
            for span in spans
            if (span.kind.value, span.chunk) == (kind, chunk)
        ]
        wide = min(width for _, width in bars) / scale > 0.03 * inch_s
        axes.broken_barh(
            bars, (row - 0.4, 0.8), facecolor=PASS_COLOURS[kind], alpha=max(0.45, 1 - 0.25 * chunk),
            edgecolor="white", linewidth=0.5 if wide else 0.0,
        )  # fmt: skip
    for span in spans if roomy else ():
        if span.end_s - span.start_s > (0.03 + NUMBER_IN * len(str(span.micro_batch))) * inch_s:
            middle = (span.start_s + span.end_s) / 2 * scale
            axes.text(middle, row, str(span.micro_batch), ha="center", va="center", color="white", fontsize=7)


def _dress(axes: "Axes", labels: Sequence[str], under: str, *, small: bool) -> None:
    axes.set_yticks(range(len(labels)), labels, fontsize=6.5 if small else 8.5)
    axes.set_xlabel(under, fontsize=8.5)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.text(1.008, 1.0, "idle", transform=axes.transAxes, va="bottom", fontsize=8, color=QUIET_COLOUR)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_legend(figure: "Figure", height_in: float, title: str, paler: str, kinds: set[str], tail: bool) -> None:
    from matplotlib.patches import Patch

    figure.text(0.02, 1 - 0.13 / height_in, title, va="top", fontsize=10.5, fontweight="bold")
    patches = [
        Patch(color=PASS_COLOURS[kind], label=PASS_WORDS[kind] + paler * (kind == "forward"))
        for kind in PASS_WORDS
        if kind in kinds
    ]
    if tail:
        patches.append(Patch(color=TAIL_COLOUR, label="gradient sync and optimizer"))
    patches.append(Patch(color=IDLE_COLOUR, label="waiting"))
    figure.legend(
        handles=patches, loc="upper left", bbox_to_anchor=(0.012, 1 - 0.32 / height_in), ncols=len(patches),
        frameon=False, fontsize=8.5, borderaxespad=0.2, handlelength=1.2,
    )  # fmt: skip
