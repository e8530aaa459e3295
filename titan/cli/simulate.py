"""`titan simulate`: what a fleet of any size makes of a run, as a table, as JSON and as a picture."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from titan.config.simulation import SimulationConfig
from titan.errors import ConfigError
from titan.observe.files import write_whole
from titan.observe.goodput import GoodputPicture, draw_goodput
from titan.observe.words import duration, plural
from titan.plan.simulate.failures import DAY_S, fleet_mtbf_s
from titan.plan.simulate.goodput import (
    Goodput,
    Interval,
    Scale,
    daly_s,
    mean_of,
    try_intervals,
    weak_scaling,
    young_s,
)
from titan.plan.simulate.outcome import PARTS, Outcome, Part
from titan.plan.simulate.replay import make_worlds, replay
from titan.plan.simulate.step_times import Pipeline

PART_WORDS: dict[Part, str] = {
    "useful": "useful steps",
    "stragglers": "slow devices",
    "jitter": "noise",
    "shrunk": "missing nodes",
    "checkpoint": "checkpoints",
    "lost": "lost steps",
    "detect": "failures noticed",
    "rebuild": "new processes",
    "reload": "state reloaded",
    "waiting": "waiting for a node",
    "stopped": "stopped",
}
WINDOWS = 90
"""Points of the curve of goodput over the run."""


@dataclass(frozen=True)
class Simulation:
    """All that was found out."""

    config: SimulationConfig
    first: Outcome
    """The first run, which the curve over time is of."""
    goodput: Goodput
    mtbf_s: float
    intervals: tuple[Interval, ...]
    scaling: tuple[Scale, ...]

    @property
    def best(self) -> Interval | None:
        """The interval of most goodput."""
        return max(self.intervals, key=lambda interval: interval.goodput, default=None)


def simulate(config: SimulationConfig, planned: Pipeline | None = None) -> Simulation:
    """Replay all runs: those of the config, those of other intervals, and those of other sizes.

    planned: the step, where a plan tells it
    """
    worlds = make_worlds(config, planned)
    outcomes = [replay(world) for world in worlds]
    scaling = weak_scaling(config, planned)
    return Simulation(config, outcomes[0], mean_of(outcomes), fleet_mtbf_s(config), try_intervals(worlds), scaling)


def show_simulation(
    config: SimulationConfig, console: Console, as_json: bool, picture: Path | None, planned: Pipeline | None = None
) -> None:
    """Simulate; print a table or JSON, and write the picture if it has a place. planned: as `simulate` takes it.

    Raises ConfigError where that place has no folder, or the run has too many events.
    """
    if picture is not None and not picture.absolute().parent.is_dir():
        raise ConfigError(
            f"--picture is {picture}, but there is no folder {picture.parent}; make it, or choose another"
        )
    found = simulate(config, planned)
    if picture is not None:
        write_whole(picture, draw_goodput(_picture(found)))
    if as_json:
        print(json.dumps(simulation_json(found), indent=1))
        return
    runs = f"{duration(found.goodput.wall_s)}, mean of {plural(config.repeats, 'run')}"
    console.print(f"{config.name}: {plural(config.num_devices, 'device')}, {runs}", highlight=False, soft_wrap=True)
    console.print(_table(found))
    for line in _lines(found):
        console.print(line, highlight=False, soft_wrap=True)
    if picture is not None:
        console.print(f"picture: {picture}", highlight=False, soft_wrap=True)


def simulation_json(found: Simulation) -> dict[str, Any]:
    """Plain data; seconds unless the name says otherwise, None for what never happens."""
    goodput, mtbf_s = found.goodput, found.mtbf_s
    fails, stall_s = mtbf_s < float("inf"), found.config.checkpoint.stall_s
    return {
        "name": found.config.name,
        "devices": found.config.num_devices,
        "repeats": found.config.repeats,
        "step_s": goodput.step_s,
        "wall_s": goodput.wall_s,
        "steps": goodput.steps,
        "goodput": goodput.goodput,
        "goodput_error": goodput.goodput_error,
        "failures": goodput.num_failures,
        "mtbf_s": mtbf_s if fails else None,
        "parts_s": goodput.parts_s,
        "checkpoint": {
            "interval_s": found.config.checkpoint.every_steps * goodput.step_s,
            "every_steps": found.config.checkpoint.every_steps,
            "best_interval_s": found.best.interval_s if found.best else None,
            "best_every_steps": found.best.every_steps if found.best else None,
            "best_goodput": found.best.goodput if found.best else None,
            "young_s": young_s(stall_s, mtbf_s) if fails else None,
            "daly_s": daly_s(stall_s, mtbf_s) if fails else None,
            "tried": [{"interval_s": each.interval_s, "goodput": each.goodput} for each in found.intervals],
        },
        "weak_scaling": [
            {"devices": each.num_devices, "goodput": each.goodput.goodput, "error": each.goodput.goodput_error}
            for each in found.scaling
        ],
        "curve": [{"day": end_s / DAY_S, "goodput": share} for end_s, share in found.first.curve(WINDOWS)],
    }


def _table(found: Simulation) -> Table:
    goodput = found.goodput
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("wall time", "%", "time"):
        table.add_column(column, justify="left" if column == "wall time" else "right")
    for part in PARTS:
        seconds = goodput.parts_s[part]
        if seconds > 1e-6 * goodput.wall_s:
            table.add_row(PART_WORDS[part], f"{100 * seconds / goodput.wall_s:.2f}", duration(seconds))
    return table


def _lines(found: Simulation) -> Sequence[str]:
    goodput, stall_s, every = found.goodput, found.config.checkpoint.stall_s, found.config.checkpoint.every_steps
    lines = [
        f"goodput {goodput.goodput:.2%} (standard error {goodput.goodput_error:.2%}): "
        f"{goodput.steps:,.0f} steps that count, {goodput.step_s:.3f} s each without trouble",
    ]
    if found.mtbf_s < float("inf"):
        lines.append(f"{goodput.num_failures:.0f} failures a run, one every {duration(found.mtbf_s)} on this fleet")
    if found.best:
        lines.append(
            f"checkpoints every {every} steps ({duration(every * goodput.step_s)}); the best of those tried: "
            f"every {found.best.every_steps} ({duration(found.best.interval_s)}), goodput {found.best.goodput:.2%}; "
            f"Young {duration(young_s(stall_s, found.mtbf_s))}, Daly {duration(daly_s(stall_s, found.mtbf_s))}"
        )
    if found.scaling:
        sizes = ", ".join(f"{each.num_devices:,} devices {each.goodput.goodput:.2%}" for each in found.scaling)
        lines.append(f"weak scaling: {sizes}")
    return lines


def _picture(found: Simulation) -> GoodputPicture:
    goodput, config = found.goodput, found.config
    marks = {"configured": config.checkpoint.every_steps * goodput.step_s}
    if found.mtbf_s < float("inf"):
        marks["Young"] = young_s(config.checkpoint.stall_s, found.mtbf_s)
    return GoodputPicture(
        title=f"{config.name}: goodput {goodput.goodput:.1%}",
        sentence=f"{config.num_devices:,} devices, {duration(goodput.wall_s)} of wall time, {goodput.num_failures:.0f} "
        f"failures, {goodput.steps:,.0f} steps of {goodput.step_s:.2f} s that count. Mean of {config.repeats} runs; "
        "the curve over time is of the first.",
        curve=[(end_s / DAY_S, share) for end_s, share in found.first.curve(WINDOWS)],
        mean=found.first.goodput,
        losses={PART_WORDS[part]: goodput.parts_s[part] / goodput.wall_s for part in PARTS if part != "useful"},
        scaling=[(float(each.num_devices), each.goodput.goodput) for each in found.scaling],
        intervals=[(each.interval_s, each.goodput) for each in found.intervals],
        marks=marks,
    )
