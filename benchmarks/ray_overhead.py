"""Does Ray cost step time? The same two ranks train under `titan run` and under torchrun, turn and turn about.

    python -m benchmarks.ray_overhead [--rounds 6] [--steps 60]

Writes benchmarks/results/ray_overhead.json. Bar: ratio of medians at most 1.05.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.figures import ratio_interval, save_result
from titan.config.load import check_config
from titan.config.settings import TEACHER, RunConfig
from titan.distill.build import make_rank
from titan.distill.rank import RankSpec
from titan.observe.metrics import StepMetric, read_metrics

WARM_UP_STEPS = 10
TIMEOUT_S = 300.0


def make_config(folder: Path, steps: int) -> RunConfig:
    """A teacher on two tensor-parallel ranks, without students."""
    return check_config(
        {
            "run": {"name": "bench", "dir": str(folder), "steps": steps + WARM_UP_STEPS},
            "data": {"sources": ["python-stdlib"], "vocab_size": 2048, "cache": str(folder / "data")},
            "teacher": {
                "model": {"layers": 4, "hidden": 192, "heads": 6, "kv_heads": 2, "ffn": 512},
                "layout": {"tp": 2},
            },
            "checkpoint": {"every_steps": 10_000},
            "eval": {"samples": 16},
            "cluster": {"device": "cpu"},
        }
    )


def measure_ray(config: RunConfig) -> list[float]:
    """Seconds of each step under `titan run`."""
    from rich.console import Console

    from titan.cluster.launch import new_run

    with open(os.devnull, "w") as nowhere:
        folder = new_run(config, overwrite=True, console=Console(file=nowhere))
    return [metric.step_s for metric in read_metrics(folder) if isinstance(metric, StepMetric)][WARM_UP_STEPS:]


def measure_torchrun(config: RunConfig, folder: Path) -> list[float]:
    """Seconds of each step with the same ranks started by torchrun."""
    run = folder / "torchrun"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    (run / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "benchmarks.ray_overhead", "--rank-of", str(run)]
    subprocess.run(command, check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    times: list[float] = json.loads((run / "times.json").read_text())
    return times[WARM_UP_STEPS:]


def be_a_rank(run: Path) -> None:
    """What each torchrun process does: the plain class of titan.distill, no Ray."""
    config = RunConfig.model_validate_json((run / "config.json").read_text())
    rank = int(os.environ["RANK"])
    corpus = next(path for path in (run.parent / "data").iterdir() if path.is_dir())
    worker = make_rank(RankSpec(config, TEACHER, rank, run, corpus))
    port_file = run / "port"
    if rank == 0:
        port = worker.open_store("127.0.0.1")
        port_file.with_suffix(".tmp").write_text(str(port))
        port_file.with_suffix(".tmp").rename(port_file)
    deadline = time.monotonic() + TIMEOUT_S
    while not port_file.exists():
        assert time.monotonic() < deadline, "rank 0 did not open its store"
        time.sleep(0.05)
    worker.join("127.0.0.1", int(port_file.read_text()))
    worker.train()
    times = [item.step_s for item in worker.take_news(0)[1] if isinstance(item, StepMetric)]
    if rank == 0:
        (run / "times.json").write_text(json.dumps(times))
    worker.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        be_a_rank(options.rank_of)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_config(folder, options.steps)
        under_ray, under_torchrun = [], []
        for turn in range(options.rounds):
            under_ray.append(measure_ray(config))  # the first one also prepares the corpus
            under_torchrun.append(measure_torchrun(config, folder))
            print(f"round {turn + 1}: Ray {_median_ms(under_ray[-1])}, torchrun {_median_ms(under_torchrun[-1])}")
    point, low, high = ratio_interval(under_ray, under_torchrun)
    print(f"step time under Ray / under torchrun: {point:.3f} (95 % interval {low:.3f} to {high:.3f}); bar 1.05")
    save_result(
        "ray_overhead",
        {
            "ratio": point,
            "interval_95": [low, high],
            "bar": 1.05,
            "steps_a_side": sum(map(len, under_ray)),
            "ray_step_s": under_ray,
            "torchrun_step_s": under_torchrun,
        },
    )


def _median_ms(times: list[float]) -> str:
    return f"{sorted(times)[len(times) // 2] * 1000:.1f} ms"


if __name__ == "__main__":
    main()
