"""How long the planner takes, over the layers of a model and the devices of three kinds; one core.

    OMP_NUM_THREADS=1 python -m benchmarks.planner [--repeats 3]

The plan file is configs/inventories/three-kinds-768.toml with other numbers of layers or nodes. Writes
benchmarks/results/planner.json and planner.png. Bars: 128 layers on 3 x 256 devices in at most 10 s with a gap of at
most 5 %; seconds grow at most linearly in layers.
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import RESULTS, save_result
from titan.config.planning import InventorySettings, PlanSettings, ProfileSettings, load_plan
from titan.plan.cost import Costs
from titan.plan.fleet import make_fleet
from titan.plan.profile import Profile
from titan.plan.search.node_loss import plans_after_node_loss
from titan.plan.search.role import plan_role

PLAN = Path(__file__).parents[1] / "configs/inventories/three-kinds-768.toml"
LAYERS = (16, 32, 64, 96, 128, 192, 256)
NODES = (4, 8, 16, 32, 64)
"""Of each kind."""
BAR_S, BAR_GAP = 10.0, 0.05
Files = tuple[PlanSettings, InventorySettings, ProfileSettings]


@dataclass(frozen=True)
class Point:
    """One size of problem."""

    layers: int
    devices: int
    seconds: float
    """Of processor time, median over repeats."""
    gap: float
    step_s: float
    bound_step_s: float
    uniform_step_s: float | None
    best_single_kind_step_s: float | None


def costs_of(files: Files, layers: int, nodes: int) -> Costs:
    """The plan file's role with other layers, on other numbers of nodes of each kind."""
    plan, inventory, profile = files
    task = plan.task.model_copy(update={"model": plan.task.model.model_copy(update={"layers": layers})})
    groups = tuple(group.model_copy(update={"count": nodes}) for group in inventory.nodes)
    fleet = make_fleet(inventory.model_copy(update={"nodes": groups}))
    return Costs(task, fleet, Profile(task, profile))


def variants(files: Files) -> dict[str, Files]:
    """The same size of problem with other figures: the bars are set for the plan file, not all of these meet them."""
    plan, inventory, profile = files

    def on_links(gb_per_s: float) -> InventorySettings:
        links = (
            link if link.between[0] == link.between[1] else link.model_copy(update={"gb_per_s": gb_per_s})
            for link in inventory.links
        )
        return inventory.model_copy(update={"links": tuple(links)})

    def with_task(**changed: Any) -> PlanSettings:
        return plan.model_copy(update={"task": plan.task.model_copy(update=changed)})

    smaller = plan.task.model.model_copy(update={"hidden": 5120, "ffn": 13824, "heads": 40})
    return {
        "1.5 GB/s between islands": (plan, on_links(1.5), profile),
        "batch of 1024": (with_task(batch_size=1024), inventory, profile),
        "batch of 8192": (with_task(batch_size=8192), inventory, profile),
        "hidden 5120": (with_task(model=smaller), inventory, profile),
    }


def measure(files: Files, layers: int, nodes: int, repeats: int) -> Point:
    """Plan one size."""
    costs, taken = costs_of(files, layers, nodes), []
    for _ in range(repeats):
        begin = time.process_time()
        plan = plan_role(costs, files[0].search)
        taken.append(time.process_time() - begin)
    point = Point(
        layers,
        costs.fleet.num_devices,
        statistics.median(taken),
        plan.gap,
        plan.step_s,
        plan.bound_step_s,
        plan.uniform_step_s,
        plan.best_single_kind_step_s,
    )
    print(
        f"{layers:4} layers, {point.devices:5} devices: {point.seconds:6.2f} s, "
        f"step {plan.step_s:8.2f} s, gap {plan.gap:.1%}"
    )
    return point


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Exponent of a power law through the points, by least squares of logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    return statistics.linear_regression(x, y).slope


def losses(files: Files) -> dict[str, Any]:
    """What planning for every lost node takes beforehand, and looking one up."""
    plan = plan_role(costs_of(files, files[0].task.model.layers, files[1].nodes[0].count), files[0].search)
    begin = time.process_time()
    after = plans_after_node_loss(plan)
    ahead_s = time.process_time() - begin
    begin = time.process_time()
    steps = {kind: then and then.step_s for kind, then in after.items()}
    return {"planned_ahead_s": ahead_s, "look_up_s": time.process_time() - begin, "step_s": steps, "whole": plan.step_s}


def picture(by_layers: Sequence[Point], by_devices: Sequence[Point]) -> bytes:
    """Seconds over both sizes, as PNG."""
    from io import BytesIO

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, points, name in zip(figure.subplots(1, 2), (by_layers, by_devices), ("layers", "devices"), strict=True):
        sizes = [getattr(point, name) for point in points]
        axes.loglog(sizes, [point.seconds for point in points], "o-", label="titan plan")
        linear = [points[0].seconds * size / sizes[0] for size in sizes]
        axes.loglog(sizes, linear, ":", color="#888888", label="linear")
        axes.axhline(BAR_S, color="#cc4444", linewidth=1, label=f"{BAR_S:g} s")
        axes.set(xlabel=name, ylabel="seconds on one core", xticks=sizes, xticklabels=[str(size) for size in sizes])
        axes.minorticks_off()
        axes.legend()
        for size, point in zip(sizes, points, strict=True):
            axes.annotate(
                f"{point.gap:.1%}", (size, point.seconds), textcoords="offset points", xytext=(0, 7), fontsize=8
            )
    figure.suptitle("Planning for three kinds of devices; beside each point the gap to the bound")
    out = BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    files = load_plan(PLAN)
    whole = files[1].nodes[0].count
    by_layers = [measure(files, layers, whole, repeats) for layers in LAYERS]
    by_devices = [measure(files, files[0].task.model.layers, nodes, repeats) for nodes in NODES]
    varied = {}
    for name, changed in variants(files).items():
        print(f"{name}:", end=" ")
        varied[name] = measure(changed, files[0].task.model.layers, whole, repeats)
    large = next(point for point in by_layers if point.layers == files[0].task.model.layers)
    result = {
        "passed": large.seconds <= BAR_S and large.gap <= BAR_GAP,
        "seconds": large.seconds,
        "gap": large.gap,
        "exponent_in_layers": slope([p.layers for p in by_layers], [p.seconds for p in by_layers]),
        "exponent_in_devices": slope([p.devices for p in by_devices], [p.seconds for p in by_devices]),
        "by_layers": [vars(point) for point in by_layers],
        "by_devices": [vars(point) for point in by_devices],
        "variants": {name: vars(point) for name, point in varied.items()},
        "node_loss": losses(files),
    }
    path = save_result("planner", result)
    path.with_suffix(".png").write_bytes(picture(by_layers, by_devices))
    print(f"exponents: {result['exponent_in_layers']:.2f} in layers, {result['exponent_in_devices']:.2f} in devices")
    print(f"wrote {RESULTS / 'planner.json'} and planner.png")


if __name__ == "__main__":
    main()
