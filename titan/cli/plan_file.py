"""`titan plan` for a plan file: stages on a fleet, predicted step and memory, the gap to the bound, and a timeline."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from titan.cluster.planning import plan_picture
from titan.config.check_layout import Batch, stage_mistakes
from titan.config.model import LayoutSettings
from titan.config.planning import (
    PAGE,
    PlanSettings,
    TaskSettings,
    check_inventory,
    load_inventory,
    load_plan,
    load_profile,
)
from titan.config.sections import check_values, read_values
from titan.errors import ConfigError
from titan.observe import words
from titan.plan.cost import Costs, Prediction
from titan.plan.fleet import make_fleet
from titan.plan.given import evaluate_layout
from titan.plan.layout import Layout, make_layout
from titan.plan.profile import Profile
from titan.plan.schedule import Pass
from titan.plan.search.role import RolePlan, devices_json, plan_role

WIDTH = 72
"""Columns of the timeline in a terminal."""
MOST_ROWS = 24
"""Positions that the terminal shows; a picture shows all."""
MARKS = {Pass.FORWARD: "▒", Pass.BACKWARD: "█", Pass.WEIGHT: "▓"}


def show_plan_file(
    path: Path,
    console: Console,
    as_json: bool,
    layout: Path | None = None,
    inventory: Path | None = None,
    model: Path | None = None,
    profile: Path | None = None,
    picture: Path | None = None,
) -> None:
    """Search for a plan, or evaluate a given layout, and print it. Other files stand for sections of the plan file."""
    plan, nodes, costs_of = load_plan(path)
    task = plan.task
    if inventory is not None:
        nodes = load_inventory(inventory)
    if profile is not None:
        costs_of = load_profile(profile)
    if model is not None:
        task = check_values(TaskSettings, read_values(model, "a task: model, vocab_size, batch_size and so on"), PAGE)
    costs = Costs(task, make_fleet(check_inventory(nodes), costs_of.links), Profile(task, costs_of))
    if layout is not None:
        prediction = evaluate_layout(costs, make_layout(task.model, _given_layout(layout, task)))
        devices, fits = devices_json(costs, prediction), not prediction.too_large
        result: dict[str, Any] = {"name": plan.name, **prediction.to_json(), "devices": devices, "fits": fits}
        said = [f"step {_seconds(prediction.step_s)}, as given by {layout}: nothing was searched for"]
    else:
        found = plan_role(costs, plan.search)
        prediction, result = found.prediction, {"name": plan.name, **found.to_json()}
        said = [
            _bounded(found),
            _compared("equal layers on all devices", found.uniform_step_s, found.step_s),
            _compared("the best single kind", found.best_single_kind_step_s, found.step_s),
            schedules_text(found.layout, found.schedules_s),
        ]
    if picture is not None:
        picture.write_bytes(plan_picture(plan.name, prediction))
        result["picture"] = str(picture)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        _print(console, plan, prediction, said)
    if layout is not None and prediction.too_large:
        raise ConfigError(_too_large(prediction))


def _given_layout(path: Path, task: TaskSettings) -> LayoutSettings:
    """The layout of a file. Raises ConfigError for what does not fit the model and the batch."""
    settings = check_values(LayoutSettings, read_values(path, "a layout"), "docs/config.md")
    batch = Batch(task.batch_size, task.sequence_length)
    mistakes = list(stage_mistakes("layout", settings, task.model, batch, task.precision))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return settings


def _too_large(prediction: Prediction) -> str:
    lines = []
    for position in prediction.too_large:
        needs, limit = prediction.memory[position].total, prediction.limit_bytes[position]
        lines.append(
            f"stage {position} needs {needs / 1e9:.2f} GB on each {prediction.kinds[position]}, which has "
            f"{limit / 1e9:.2f} GB: {needs - limit:,.0f} bytes too many; give it fewer layers or more tensor ranks"
        )
    return "\n".join(lines)


def _print(console: Console, plan: PlanSettings, prediction: Prediction, said: list[str]) -> None:
    if not console.is_terminal:
        console.width = 160
    table = Table(title=f"plan of {plan.name}", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("stage", "device", "tp", "dp", "samples", "layers", "busy", "idle", "memory", "of"):
        table.add_column(column, justify="left" if column in ("device", "samples", "layers") else "right")
    layout, line = prediction.layout, prediction.timeline
    number = len(layout.positions)
    for index, stage in enumerate(layout.positions):
        parts = layout.stages[index::number]
        device, samples = prediction.shared(index)
        table.add_row(
            str(index), device, str(stage.tp), str(stage.dp), samples,
            ", ".join(f"{part.first_layer}-{part.end_layer - 1}" for part in parts),
            _seconds(line.busy_s[index]), f"{line.idle_shares[index]:.0%}",
            f"{prediction.memory[index].total / 1e9:.2f} GB", f"{prediction.limit_bytes[index] / 1e9:.2f} GB",
        )  # fmt: skip
    console.print(table)
    console.print(_timeline(prediction), highlight=False, markup=False)
    ranks = ", ".join(f"{count} {kind}" for kind, count in _devices(prediction).items())
    said = [f"{layout.micro_batches} micro-batches on {ranks}", *said]
    for text in said:
        console.print(text, highlight=False, soft_wrap=True)


def _devices(prediction: Prediction) -> dict[str, int]:
    used: dict[str, int] = {}
    for kind in prediction.rank_kinds:
        used[kind] = used.get(kind, 0) + 1
    return used


def _timeline(prediction: Prediction) -> str:
    """One line a position: light for forward, full for backward, blank for idle, = for the end of the step."""
    line = prediction.timeline
    scale = WIDTH / line.step_s
    rows = [[" "] * WIDTH for _ in prediction.kinds]
    for span in line.spans:
        begin = min(WIDTH - 1, int(span.start_s * scale))
        for column in range(begin, max(begin + 1, int(span.end_s * scale))):
            rows[span.position][column] = MARKS[span.kind]
    for position, (finish, tail) in enumerate(zip(line.finish_s, line.tail_s, strict=True)):
        for column in range(int(finish * scale), min(WIDTH, int((finish + tail) * scale) + 1)):
            rows[position][column] = "="
    width = max(len(kind) for kind in prediction.kinds)
    shown = [f"{i:>4} {kind:<{width}} |{''.join(rows[i])}|" for i, kind in enumerate(prediction.kinds)]
    if len(shown) > MOST_ROWS:
        left_out = len(shown) - MOST_ROWS
        shown = [*shown[: MOST_ROWS // 2], f"     ... {words.plural(left_out, 'stage')} ...", *shown[-MOST_ROWS // 2 :]]
    marks = f"forward {MARKS[Pass.FORWARD]}  backward {MARKS[Pass.BACKWARD]}"
    legend = f"     {marks}  gradients and optimizer =  idle blank"

    return "\n".join([*shown, legend])


def _bounded(plan: RolePlan) -> str:
    """The step, and how much less it could be at most: among layouts of the plan's own sort, and among all."""
    step, least = _seconds(plan.step_s), _seconds(plan.bound_step_s)
    if plan.mixed:
        return f"step {step}; no layout at all takes less than {least}: gap {plan.gap:.1%}"
    which = "1F1B layout" if plan.layout.schedule == "1f1b" else "layout under any schedule"
    every_s = min(plan.step_s, plan.every_bound_s)
    return (
        f"step {step}; no {which} with one kind of device a stage takes less than {least}: gap {plan.gap:.1%} "
        f"(no layout at all less than {_seconds(every_s)})"
    )


def schedules_text(layout: Layout, schedules_s: Mapping[str, float | None]) -> str:
    """The schedule taken, and what the others would take."""
    taken = layout.schedule + (f" in {layout.chunks} chunks" if layout.chunks > 1 else "")
    told = {
        name: "fits on none of the stages tried" if step_s is None else _seconds(step_s)
        for name, step_s in schedules_s.items()
        if name != layout.schedule
    }
    others = ", ".join(f"{name} {text}" for name, text in told.items())
    return f"schedule {taken}; {others} (zero-bubble is only simulated, its memory not counted)"


def _compared(what: str, other_s: float | None, step_s: float) -> str:
    if other_s is None:
        return f"{what}: fits nowhere"
    return f"{what}: {_seconds(other_s)}, {other_s / step_s:.2f} times as long"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1000:.3g} ms"
