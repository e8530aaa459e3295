"""Where roles started again or changed their layout, as marks in the run's picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from titan.observe.files import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_TEXTS = 12
"""Changes of layout that are told in words; of more, only the lines are drawn."""
TEXT_TOPS = (0.97, 0.72, 0.47)
"""Heights at which the words of one role and the next begin: they may change at the same step."""


@dataclass(frozen=True)
class Mark:
    """A role goes on from a step in a new start."""

    role: str
    step: int
    """The last that it had made, or goes on from."""
    text: str
    """How its layout changed; empty where it did not."""


def marks_of(events: Sequence[Record]) -> list[Mark]:
    """All of a run, in the order of its events."""
    found: dict[tuple[str, int], Mark] = {}
    for event in events:
        if event["event"] == "layout" and "step" in event:
            before, ranks = event["before"], event["ranks"]
            text = f"{before} to {ranks} ranks" if ranks != before else "other devices"
            mark = Mark(event["role"], event["step"], text)
        elif event["event"] == "restarting":
            mark = Mark(event["role"], event["from_step"], "")
        else:
            continue
        if mark.text or (mark.role, mark.step) not in found:
            found[mark.role, mark.step] = mark
    return list(found.values())


def draw_marks(axes: "Axes", marks: Sequence[Mark], colours: Mapping[str, str], words: bool = True) -> None:
    """Changes of layout as lines, with their words; starts in the same layout as triangles at the foot.

    colours: of each role that is drawn
    """
    changes = [mark for mark in marks if mark.text]
    for mark in marks:
        if mark.role not in colours:
            continue
        colour = colours[mark.role]
        if not mark.text:
            axes.plot([mark.step], [0.0], marker="^", markersize=5, color=colour, transform=axes.get_xaxis_transform(),
                      linestyle="", clip_on=False)  # fmt: skip
            continue
        axes.axvline(mark.step, color=colour, linewidth=0.8, alpha=0.6)
        if words and len(changes) <= MOST_TEXTS:
            left = mark.step < sum(axes.get_xlim()) / 2  # so that words do not leave the panel
            axes.annotate(
                mark.text, (mark.step, TEXT_TOPS[list(colours).index(mark.role) % len(TEXT_TOPS)]),
                xycoords=("data", "axes fraction"), xytext=(2 if left else -2, 0), textcoords="offset points",
                ha="left" if left else "right", va="top", fontsize=6.5, color=colour, rotation=90,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            )  # fmt: skip
    if words and marks:
        axes.set_xlabel("teacher step (line: another layout, ▲: started again)", fontsize=8.5)
