"""Does distillation help? The quickstart with several seeds: each distilled student against its control.

    python -m benchmarks.distillation_gain [--seeds 1 2 3]

Writes benchmarks/results/distillation_gain.json. A run takes as long as the quickstart.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.figures import save_result

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.toml"
TIMEOUT_S = 1800.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    summaries: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            command = [sys.executable, "-m", "titan.cli.main", "run", str(CONFIG), "--set", f"run.seed={seed}"]
            command += ["--set", f"run.name=seed-{seed}"]
            subprocess.run(command, check=True, cwd=folder, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL)
            summaries[seed] = json.loads((Path(folder) / f"runs/seed-{seed}/summary.json").read_text())
            pairs = summaries[seed]["distillation"]
            line = ", ".join(f"{p['student']} {p['heldout_bits_per_byte_gain']:+.4f}" for p in pairs)
            print(f"seed {seed}: {line} bits a byte better than control, {summaries[seed]['wall_s']:.0f} s", flush=True)
    roles = list(summaries[options.seeds[0]]["roles"])
    table = {
        role: [summaries[seed]["roles"][role]["heldout_bits_per_byte"] for seed in options.seeds] for role in roles
    }
    for role, values in table.items():
        print(f"{role:10} {_with_spread(values)}   {' '.join(f'{value:.4f}' for value in values)}")
    gains: dict[str, dict[str, list[float]]] = {}
    for index, pair in enumerate(summaries[options.seeds[0]]["distillation"]):
        found = [summaries[seed]["distillation"][index] for seed in options.seeds]
        values = [entry["heldout_bits_per_byte_gain"] for entry in found]
        gains[pair["student"]] = {"gain": values, "gap_closed": [entry["gap_to_teacher_closed"] for entry in found]}
        print(f"{pair['student']} gains {_with_spread(values)} bits a byte over its control")
    wall_s = [summaries[seed]["wall_s"] for seed in options.seeds]
    save_result(
        "distillation_gain",
        {"seeds": options.seeds, "heldout_bits_per_byte": table, "gain_over_control": gains, "wall_s": wall_s},
    )


def _with_spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {spread:.4f}"


if __name__ == "__main__":
    main()
