"""What benchmarks.quality found: the share of the gap that each kind of label closes, as a table and a picture."""

import statistics
from pathlib import Path
from typing import Any

from titan.distill.codec.bits import packed_bytes, width_of
from titan.distill.log.segment import parts_of, scan, segments_of

BUDGET_BYTES = 36.0
SMALLEST_GAP = 0.03
"""Nats between control and full, below which nothing can be said."""
WANTED = 0.95
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
"""Student's t of a 95 % interval, by number of seeds."""


def table(
    seeds: list[int], curves: dict[str, list[dict[int, float]]], sizes: dict[str, float], logs: dict[str, str]
) -> dict[str, Any]:
    """Figures of every arm.

    curves: by arm and seed, held-out nats a token by tokens learned;  sizes: bytes a token of each log's labels
    """
    last = {name: [curve[max(curve)] for curve in found] for name, found in curves.items()}
    gaps = [control - full for control, full in zip(last["control"], last["full"], strict=True)]
    arms = {}
    for name, losses in last.items():
        shares = [(control - own) / gap for control, own, gap in zip(last["control"], losses, gaps, strict=True)]
        arms[name] = {
            "heldout_nats": losses, "mean": statistics.mean(losses), "spread": _spread(losses),
            "gap_closed": shares, "gap_closed_mean": statistics.mean(shares), "gap_closed_interval": interval(shares),
            "bytes_per_token": 0.0 if name == "control" else sizes[logs[name]],
            "curve": {tokens: statistics.mean(curve[tokens] for curve in curves[name]) for tokens in curves[name][0]},
        }  # fmt: skip
    conclusive = statistics.mean(gaps) >= SMALLEST_GAP
    return {
        "seeds": seeds,
        "gap_nats": gaps,
        "gap_mean": statistics.mean(gaps),
        "gap_interval": interval(gaps),
        "arms": arms,
        "verdict": verdict(arms["ours"], statistics.mean(gaps)) if conclusive else
        f"inconclusive: control and full are {statistics.mean(gaps):.3f} nats apart, less than {SMALLEST_GAP}",
    }  # fmt: skip


def verdict(ours: dict[str, Any], gap: float) -> str:
    """In words."""
    share, (low, high) = ours["gap_closed_mean"], ours["gap_closed_interval"]
    sure = "also at the interval's lower end" if low >= WANTED else "but not at the interval's lower end"
    met = f"at least {WANTED:.0%}, {sure}" if share >= WANTED else f"less than {WANTED:.0%}"
    return f"ours closes {share:.1%} ({low:.1%} to {high:.1%}) of a gap of {gap:.3f} nats: {met}"


def interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean, by Student's t over seeds; infinite for one seed."""
    mean = statistics.mean(values)
    half = T_975.get(len(values), 2.5) * _spread(values) / len(values) ** 0.5 if len(values) > 1 else float("inf")
    return mean - half, mean + half


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def label_bytes(run: Path, start: int) -> float:
    """Bytes a token of the labels of a run's log after a step, without token ids, sample ids and headers."""
    size = tokens = 0
    folder = run / "labels" / "teacher"
    for path in (path for part in parts_of(folder) for path in segments_of(folder, part)):
        for header in (block.header for block in scan(path)):
            if header.step > start:
                ids = packed_bytes(header.samples * (header.sequence_length + 1), width_of(header.vocab_size))
                size += header.payload_bytes - ids - 8 * header.samples
                tokens += header.samples * header.sequence_length
    return size / max(1, tokens)


def show(result: dict[str, Any]) -> None:
    """The table."""
    print(f"\n{'labels':14} {'bytes/token':>11}  {'held-out nats':>17}  {'gap closed':>10}  95 % interval")
    for name, row in result["arms"].items():
        low, high = row["gap_closed_interval"]
        ends = name in ("control", "full") or result["gap_mean"] < SMALLEST_GAP
        closed = "" if ends else f"{row['gap_closed_mean']:10.1%}  {low:.1%} to {high:.1%}"
        print(f"{name:14} {row['bytes_per_token']:11.1f}  {row['mean']:8.4f} ± {row['spread']:.4f}   {closed}")
    low, high = result["gap_interval"]
    print(f"{'teacher':14} {'':11}  {result['teacher']['heldout_nats']:8.4f}")
    print(f"gap between control and full: {result['gap_mean']:.4f} nats ({low:.4f} to {high:.4f})")
    print(result["verdict"], flush=True)


def draw_picture(result: dict[str, Any], path: Path) -> None:
    """Left: the share of the gap that each arm closes, seed by seed. Right: held-out loss by tokens, above full."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    arms = {name: row for name, row in result["arms"].items() if name not in ("control", "full")}
    for place, row in enumerate(reversed(arms.values())):
        mean, (low, high) = row["gap_closed_mean"], row["gap_closed_interval"]
        left.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color="black", capsize=3)
        left.plot(row["gap_closed"], [place + 0.2] * len(row["gap_closed"]), "x", color="tab:blue", markersize=5)
        left.annotate(f"{mean:.1%}", (mean, place), (0, -14), textcoords="offset points", ha="center", fontsize=8)
    left.set_yticks(
        range(len(arms)), [f"{name}\n{row['bytes_per_token']:.0f} B" for name, row in reversed(arms.items())]
    )
    left.axvline(WANTED, color="gray", linestyle=":")
    left.axvline(1.0, color="gray")
    left.set_ylim(-0.6, len(arms) - 0.4)
    left.set_xlabel("share of the gap from control to full that is closed\n(mean and 95 % interval; crosses: seeds)")
    full = result["arms"]["full"]["curve"]
    for name, row in result["arms"].items():
        if name != "full":
            points = [(int(tokens) / 1e6, loss - full[tokens]) for tokens, loss in row["curve"].items()]
            right.plot(*zip(*points, strict=True), marker=".", label=name)
    right.axhline(0.0, color="gray")
    right.set_xlabel("tokens learned, millions")
    right.set_ylabel("held-out nats a token above full")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=130)
