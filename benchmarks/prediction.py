"""Predicted against measured: step time on paced devices and on this CPU, and bytes of living tensors.

    python -m benchmarks.prediction [paced cpu memory]   (all without a name)

Paced ranks take the time that a profile says for other devices, with real numbers and messages; they check engine,
schedule, edges and timeline. On this CPU the profile is measured first. Writes benchmarks/results/prediction.json.
"""

import argparse
import contextlib
import json
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.figures import RESULTS, save_result
from titan.platform.device import prepare_process, select_platform

CPU = select_platform("cpu")
prepare_process(CPU)

import numpy as np  # noqa: E402

from titan.config.model import LayoutSettings, ModelSettings, OptimizerSettings, StageSettings  # noqa: E402
from titan.config.planning import (  # noqa: E402
    BlockSettings,
    DeviceCostSettings,
    InventorySettings,
    LinkSettings,
    NodeSettings,
    ProfileSettings,
    ShapeSettings,
    TaskSettings,
)
from titan.ops.objective import Objective  # noqa: E402
from titan.parallel.live_bytes import LiveBytes  # noqa: E402
from titan.parallel.local import run_worlds  # noqa: E402
from titan.parallel.world import World  # noqa: E402
from titan.plan.cost import Costs, Prediction  # noqa: E402
from titan.plan.fleet import make_fleet  # noqa: E402
from titan.plan.layout import make_layout  # noqa: E402
from titan.plan.pace import Pace  # noqa: E402
from titan.plan.profile import BlockKind, Profile  # noqa: E402
from titan.train.measure import measure_shape  # noqa: E402
from titan.train.trainer import Trainer, TrainerSettings  # noqa: E402

VOCAB, LENGTH, BATCH = 512, 64, 24
SMALL = ModelSettings(layers=12, hidden=64, heads=4, kv_heads=2, ffn=128)
LAYER_S = {"fast": 0.010, "middle": 0.018, "slow": 0.036}
"""Forward seconds of a layer and sample on three kinds of paced devices; backward takes twice as long."""
STEPS, WARM_UP = 4, 1
CPU_ROUNDS, CPU_STEPS = 5, 12
TIMEOUT_S = 240.0


def stages(*wanted: dict[str, Any], **more: Any) -> LayoutSettings:
    return LayoutSettings(stages=tuple(StageSettings(**stage) for stage in wanted), **more)


F, M, S = "fast", "middle", "slow"
PACED = {
    "8 fast + 4 middle": stages({"layers": 8, "device": F}, {"layers": 4, "device": M}, micro_batches=8),
    "4 middle + 8 fast": stages({"layers": 4, "device": M}, {"layers": 8, "device": F}, micro_batches=8),
    "even, fast + slow": stages({"layers": 6, "device": F}, {"layers": 6, "device": S}, micro_batches=6),
    "three kinds": stages(
        {"layers": 6, "device": F}, {"layers": 4, "device": M}, {"layers": 2, "device": S}, micro_batches=8
    ),
    "slow in the middle": stages(
        {"layers": 5, "device": F}, {"layers": 2, "device": S}, {"layers": 5, "device": F}, micro_batches=6
    ),
    "few micro-batches": stages(
        {"layers": 6, "device": F}, {"layers": 4, "device": M}, {"layers": 2, "device": S}, micro_batches=3
    ),
    "tp2 to tp1": stages({"layers": 8, "device": M, "tp": 2}, {"layers": 4, "device": M}, micro_batches=8),
    "shares 2:1 to one": stages(
        {"layers": 8, "device": M, "dp": 2, "shares": (2, 1)}, {"layers": 4, "device": M}, micro_batches=8
    ),
    "dp3 to dp2": stages({"layers": 8, "device": M, "dp": 3}, {"layers": 4, "device": M, "dp": 2}, micro_batches=4),
    "dp2 of fast, dp4 of slow": stages(
        {"layers": 8, "device": F, "dp": 2}, {"layers": 4, "device": S, "dp": 4}, micro_batches=3
    ),
    "interleaved": stages(
        {"layers": (4, 4), "device": F}, {"layers": (2, 2), "device": M}, micro_batches=8, schedule="interleaved",
        chunks=2,
    ),
    "interleaved, three kinds": stages(
        {"layers": (3, 3), "device": F}, {"layers": (2, 2), "device": M}, {"layers": (1, 1), "device": S},
        micro_batches=6, schedule="interleaved", chunks=2,
    ),
    "six stages": stages(
        *({"layers": 3, "device": F} for _ in range(2)), *({"layers": 2, "device": M} for _ in range(2)),
        *({"layers": 1, "device": S} for _ in range(2)), micro_batches=6,
    ),
}  # fmt: skip
LARGE = ModelSettings(layers=8, hidden=256, heads=4, kv_heads=2, ffn=704)
UNPACED = {
    "4 + 4": LayoutSettings(pp=2, layers=(4, 4), micro_batches=4),
    "6 + 2": LayoutSettings(pp=2, layers=(6, 2), micro_batches=4),
    "2 + 6": LayoutSettings(pp=2, layers=(2, 6), micro_batches=4),
    "dp2": LayoutSettings(dp=2, micro_batches=2),
    "tp2": LayoutSettings(tp=2, micro_batches=4),
    "4 + 4, recompute": LayoutSettings(pp=2, layers=(4, 4), micro_batches=4, recompute=True),
}
IN_MEMORY = UNPACED | {
    "one stage": LayoutSettings(micro_batches=4),
    "dp2 sharded": LayoutSettings(dp=2, shard=2, micro_batches=2),
    "interleaved": LayoutSettings(pp=2, schedule="interleaved", chunks=2, micro_batches=4),
}


def train(
    world: World, model: ModelSettings, settings: LayoutSettings, batch: int, length: int, steps: int,
    paces: tuple[Pace, ...] | None, count_bytes: bool,
) -> tuple[list[float], int]:  # fmt: skip
    """Seconds of every step, and the most bytes of living tensors in any but the first."""
    with LiveBytes() if count_bytes else contextlib.nullcontext() as live:
        trainer_settings = TrainerSettings(model, settings, OptimizerSettings(), "fp32", VOCAB, length, batch, seed=1)
        trainer = Trainer(world, trainer_settings, paces[world.place.rank] if paces else None)
        rng = np.random.default_rng(0)
        seconds = []
        for step in range(steps):
            tokens = rng.integers(0, VOCAB, (batch, length + 1))
            if isinstance(live, LiveBytes) and step == 1:
                live.peak = live.now
            seconds.append(trainer.step(tokens, 1e-3, Objective()).seconds)
    return seconds, live.peak if isinstance(live, LiveBytes) else 0


def run(
    costs: Costs, settings: LayoutSettings, steps: int, paced: bool, count_bytes: bool = False
) -> tuple[Prediction, list[float], list[int]]:
    """Prediction, seconds of every step, and each rank's bytes."""
    task = costs.task
    prediction = costs.predict(make_layout(task.model, settings))
    results = run_worlds(
        {"teacher": prediction.layout}, CPU, train, task.model, settings, task.batch_size, task.sequence_length, steps,
        prediction.paces if paced else None, count_bytes, timeout_s=TIMEOUT_S,
    )["teacher"]  # fmt: skip
    return prediction, results[0][0], [peak for _, peak in results]


def paced_costs() -> Costs:
    """Three kinds of devices on this machine's loopback."""
    blocks = []
    shares: tuple[tuple[BlockKind, float], ...] = (("embedding", 0.1), ("layer", 1.0), ("head", 1.5))
    for kind, layer_s in LAYER_S.items():
        for tp, share in ((1, 1.0), (2, 0.55)):
            for block, times in shares:
                seconds = layer_s * times * share
                blocks += [
                    BlockSettings(
                        kind=kind,
                        block=block,
                        tp=tp,
                        samples=samples,
                        forward_s=samples * seconds,
                        backward_s=samples * 2 * seconds,
                        activation_bytes=0,
                    )
                    for samples in (1, BATCH)
                ]
    shape = ShapeSettings(
        hidden=SMALL.hidden, heads=SMALL.heads, kv_heads=SMALL.num_kv_heads, ffn=SMALL.ffn, vocab_size=VOCAB,
        sequence_length=LENGTH, precision="fp32", blocks=tuple(blocks),
    )  # fmt: skip
    devices = tuple(DeviceCostSettings(kind=kind, update_gb_per_s=0.2) for kind in LAYER_S)
    nodes = tuple(NodeSettings(name=kind, kind=kind, devices=6, memory_gb=4.0, paced=True) for kind in LAYER_S)
    links = tuple(
        LinkSettings(between=(a, b), gb_per_s=1.0, latency_s=2e-4)
        for i, a in enumerate(LAYER_S)
        for b in list(LAYER_S)[i:]
    )
    task = TaskSettings(model=SMALL, vocab_size=VOCAB, sequence_length=LENGTH, batch_size=BATCH, precision="fp32")
    fleet = make_fleet(InventorySettings(nodes=nodes, links=links))
    return Costs(task, fleet, Profile(task, ProfileSettings(devices=devices, shapes=(shape,))))


def cpu_costs() -> Costs:
    """This machine's CPU, measured now."""
    task = TaskSettings(model=LARGE, vocab_size=VOCAB, sequence_length=128, batch_size=8, precision="fp32")
    shape, update_gb_per_s = measure_shape(CPU, "cpu", task, tensor=(1, 2), samples=(1, 2, 4), together=2)
    nodes = (NodeSettings(name="cpu", kind="cpu", devices=2, memory_gb=8.0),)
    links = (LinkSettings(between=("cpu", "cpu"), gb_per_s=1.0, latency_s=1e-4),)
    devices = (DeviceCostSettings(kind="cpu", update_gb_per_s=update_gb_per_s),)
    return Costs(
        task,
        make_fleet(InventorySettings(nodes=nodes, links=links)),
        Profile(task, ProfileSettings(devices=devices, shapes=(shape,))),
    )


def compare_times(
    costs: Costs, layouts: dict[str, LayoutSettings], steps: int, paced: bool, mean_bar: float, worst_bar: float
) -> dict[str, Any]:
    """Predicted and median measured step of every layout."""
    rows: dict[str, Any] = {}
    for name, settings in layouts.items():
        prediction, seconds, _ = run(costs, settings, steps, paced)
        measured = statistics.median(seconds[WARM_UP:])
        rows[name] = {
            "ranks": prediction.layout.num_ranks,
            "forward_s": [round(times.forward_s, 4) for times in prediction.times],
            "predicted_s": prediction.step_s,
            "measured_s": measured,
            "spread_s": [min(seconds[WARM_UP:]), max(seconds[WARM_UP:])],
            "error": measured / prediction.step_s - 1,
        }
        print(f"{name:28} {prediction.step_s:8.3f} {measured:8.3f} {rows[name]['error']:+.1%}", flush=True)
    errors = [abs(row["error"]) for row in rows.values()]
    return {
        "layouts": rows,
        "mean_error": statistics.mean(errors),
        "worst_error": max(errors),
        "bars": {"mean": mean_bar, "worst": worst_bar},
    }


def compare_on_cpu() -> dict[str, Any]:
    """Rounds of profile first, layouts then: this machine's own speed drifts by tens of percent within minutes."""
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in UNPACED}
    for turn in range(CPU_ROUNDS):
        costs = cpu_costs()
        for name, settings in UNPACED.items():
            prediction, seconds, _ = run(costs, settings, CPU_STEPS, paced=False)
            rounds[name].append((prediction.step_s, statistics.median(seconds[WARM_UP:])))
            predicted, measured = rounds[name][-1]
            print(
                f"round {turn} {name:20} {predicted:8.3f} {measured:8.3f} {measured / predicted - 1:+.1%}", flush=True
            )
    rows: dict[str, Any] = {}
    for name, found in rounds.items():
        errors = sorted(measured / predicted - 1 for predicted, measured in found)
        rows[name] = {
            "predicted_s": statistics.median(predicted for predicted, _ in found),
            "measured_s": statistics.median(measured for _, measured in found),
            "error": statistics.median(errors),
            "errors_of_rounds": errors,
        }
    return {"layouts": rows, "worst_error": max(abs(row["error"]) for row in rows.values()), "bar": 0.15}


def compare_bytes(costs: Costs) -> dict[str, Any]:
    """Predicted and measured bytes of every rank."""
    rows: dict[str, Any] = {}
    for name, settings in IN_MEMORY.items():
        prediction, _, peaks = run(costs, settings, 3, paced=False, count_bytes=True)
        layout = prediction.layout
        predicted = [prediction.memory[layout.place(rank).position].total for rank in range(layout.num_ranks)]
        errors = [peak / told - 1 for peak, told in zip(peaks, predicted, strict=True)]
        rows[name] = {"predicted_bytes": predicted, "measured_bytes": peaks, "error": max(errors, key=abs)}
        print(f"{name:28} {[round(p / 1e6, 2) for p in predicted]} {[round(p / 1e6, 2) for p in peaks]} MB {errors}")
    return {"layouts": rows, "worst_error": max(abs(row["error"]) for row in rows.values()), "bar": 0.06}


def show(name: str, result: dict[str, Any]) -> None:
    """One table."""
    table = Table(title=name, box=None, title_justify="left")
    for column in ("layout", "predicted", "measured", "error"):
        table.add_column(column)
    for layout, row in result["layouts"].items():
        if "predicted_s" in row:
            texts = [f"{row['predicted_s']:.3f} s", f"{row['measured_s']:.3f} s"]
        else:
            texts = [f"{max(row['predicted_bytes']) / 1e6:.2f} MB", f"{max(row['measured_bytes']) / 1e6:.2f} MB"]
        table.add_row(layout, *texts, f"{row['error']:+.1%}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=["paced", "cpu", "memory", []], help="what to compare")
    parts = parser.parse_args().parts or ["paced", "cpu", "memory"]
    result: dict[str, Any] = {}
    if "paced" in parts:
        result["paced"] = compare_times(paced_costs(), PACED, STEPS, True, 0.05, 0.10)
    if "cpu" in parts:
        result["cpu"] = compare_on_cpu()
    if "memory" in parts:
        result["memory"] = compare_bytes(cpu_costs())
    for name, part in result.items():
        show(name, part)
    before = RESULTS / "prediction.json"
    known = json.loads(before.read_text()) if before.exists() else {}
    save_result("prediction", {name: known[name] for name in ("paced", "cpu", "memory") if name in known} | result)


if __name__ == "__main__":
    main()
