"""What planning gives on a mixed cluster: two fast and two slow paced devices, at speed ratios 1.5, 2, 4 and 9.

    python -m benchmarks.mixed_gain

For each ratio the planned layout, equal layers on all devices, and the best layout of the fast pair alone are trained
for some steps. The throughput of the plan stands beside its bound (1F1B: that of layer granularity and pipeline fill;
interleaved: that of layer granularity alone; stages on several kinds: that of every layout), and that bound beside the
sum of the devices' speeds.
Writes benchmarks/results/mixed_gain.json.
"""

import statistics
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.figures import save_result
from benchmarks.prediction import BATCH, LENGTH, SMALL, VOCAB, WARM_UP, run
from titan.config.model import LayoutSettings, StageSettings
from titan.config.planning import (
    BlockSettings,
    DeviceCostSettings,
    InventorySettings,
    LinkSettings,
    NodeSettings,
    ProfileSettings,
    SearchSettings,
    ShapeSettings,
    TaskSettings,
)
from titan.plan.cost import Costs
from titan.plan.fleet import make_fleet
from titan.plan.profile import BlockKind, Profile
from titan.plan.search.role import plan_role

RATIOS = (1.5, 2.0, 4.0, 9.0)
FAST_LAYER_S = 0.010
STEPS = 4
SHARES: tuple[tuple[BlockKind, float], ...] = (("embedding", 0.02), ("layer", 1.0), ("head", 0.2))
"""Seconds of a block over those of a layer."""
SEARCH = SearchSettings(tensor=(1,), replicas=(1, 2), micro_batches=(1, 2, 3, 4, 6, 8, 12, 24))
BAR = 0.90


def costs_at(ratio: float) -> Costs:
    """Two fast devices and two that take `ratio` times as long."""
    blocks = [
        BlockSettings(
            kind=kind,
            block=block,
            tp=1,
            samples=samples,
            forward_s=FAST_LAYER_S * slower * share * samples,
            backward_s=2 * FAST_LAYER_S * slower * share * samples,
            activation_bytes=samples * LENGTH * SMALL.hidden * 64,
        )
        for kind, slower in (("fast", 1.0), ("slow", ratio))
        for block, share in SHARES
        for samples in (1, BATCH)
    ]
    shape = ShapeSettings(
        hidden=SMALL.hidden, heads=SMALL.heads, kv_heads=SMALL.num_kv_heads, ffn=SMALL.ffn, vocab_size=VOCAB,
        sequence_length=LENGTH, precision="fp32", blocks=tuple(blocks),
    )  # fmt: skip
    nodes = tuple(NodeSettings(name=kind, kind=kind, devices=2, memory_gb=2.0, paced=True) for kind in ("fast", "slow"))
    pairs = (("fast", "fast"), ("slow", "slow"), ("fast", "slow"))
    links = tuple(LinkSettings(between=pair, gb_per_s=1.0, latency_s=2e-4) for pair in pairs)
    devices = tuple(DeviceCostSettings(kind=kind, update_gb_per_s=1.0) for kind in ("fast", "slow"))
    task = TaskSettings(model=SMALL, vocab_size=VOCAB, sequence_length=LENGTH, batch_size=BATCH, precision="fp32")
    fleet = make_fleet(InventorySettings(nodes=nodes, links=links))
    return Costs(task, fleet, Profile(task, ProfileSettings(devices=devices, shapes=(shape,))))


def sum_of_speeds_s(costs: Costs) -> float:
    """Seconds of a step if all devices worked all the time at their own speed, in any part of a layer."""
    whole = {}
    for kind in costs.fleet.kinds:
        seconds = 0.0
        for block, number in (("embedding", 1), ("layer", SMALL.layers), ("head", 1)):
            one = costs.profile.block(kind, block, 1, 1)  # type: ignore[arg-type]
            seconds += number * (one.forward_s + one.backward_s)
        whole[kind] = seconds * BATCH
    return 1.0 / sum(kind.devices / whole[kind.name] for kind in costs.fleet.kinds.values())


def measured_s(costs: Costs, settings: LayoutSettings) -> float:
    """Median seconds of a step, trained for real."""
    return statistics.median(run(costs, settings, STEPS, paced=True)[1][WARM_UP:])


def compare(ratio: float) -> dict[str, Any]:
    costs = costs_at(ratio)
    plan = plan_role(costs, SEARCH)
    fast = Costs(costs.task, replace(costs.fleet, kinds={"fast": costs.fleet.kinds["fast"]}), costs.profile)
    alone = plan_role(fast, SEARCH)
    equal = SMALL.layers // 4
    uniform = LayoutSettings(
        stages=tuple(StageSettings(layers=(equal,), device=kind) for kind in ("fast", "fast", "slow", "slow")),
        micro_batches=max(SEARCH.micro_batches or ()),
    )
    steps = {name: measured_s(on, settings) for name, on, settings in (
        ("planned", costs, plan.settings), ("uniform", costs, uniform), ("fast pair", fast, alone.settings),
    )}  # fmt: skip
    number = len(plan.layout.positions)
    layers = [
        f"{stage.end_layer - stage.first_layer} on "
        + " of ".join(reversed(plan.prediction.shared(stage.index % number)))
        for stage in plan.layout.stages
    ]
    row = {
        "layout": layers,
        "mixed": plan.mixed,
        "schedule": plan.layout.schedule,
        "chunks": plan.layout.chunks,
        "micro_batches": plan.layout.micro_batches,
        "layers": SMALL.layers,
        "bound_s": plan.bound_step_s,
        "predicted_s": plan.step_s,
        "sum_of_speeds_s": sum_of_speeds_s(costs),
        **{f"{name.replace(' ', '_')}_s": seconds for name, seconds in steps.items()},
        "share_of_bound": plan.bound_step_s / steps["planned"],
        "bound_of_sum_of_speeds": sum_of_speeds_s(costs) / plan.bound_step_s,
        "over_uniform": steps["uniform"] / steps["planned"],
        "over_fast_pair": steps["fast pair"] / steps["planned"],
        "bar": BAR,
    }
    print(f"ratio {ratio}: {row}", flush=True)
    return row


def main() -> None:
    rows = {str(ratio): compare(ratio) for ratio in RATIOS}
    table = Table(box=None, pad_edge=False)
    titles = (
        "ratio",
        "plan",
        "schedule",
        "M",
        "step s",
        "of the bound",
        "bound of all speeds",
        "over fast pair",
        "over uniform",
    )
    for title in titles:
        table.add_column(title)
    for ratio, row in rows.items():
        met = "met" if row["share_of_bound"] >= BAR and row["over_fast_pair"] >= 1.0 else "NOT MET"
        table.add_row(
            ratio, " + ".join(row["layout"]), row["schedule"], str(row["micro_batches"]), f"{row['planned_s']:.2f}",
            f"{row['share_of_bound']:.1%} {met}", f"{row['bound_of_sum_of_speeds']:.1%}",
            f"{row['over_fast_pair']:.2f}x", f"{row['over_uniform']:.2f}x",
        )  # fmt: skip
    Console(width=150).print(table)
    save_result("mixed_gain", {"ratios": rows})


if __name__ == "__main__":
    main()
