"""`make gpu-smoke`: where there is a GPU, the kernels' tests on it, and a short run on it against the CPU.

Says "no GPU: not run" and exits 0 where there is none; then nothing here has been shown to work.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

TIMEOUT_S = 600.0
RUN = """
[run]
name = "gpu-smoke"
steps = 20
[data]
sources = ["python-stdlib"]
[teacher]
model = {{ layers = 4, hidden = 256, heads = 4, kv_heads = 2, ffn = 512 }}
layout = {{ pp = {stages} }}
precision = "bf16"
[cluster]
device = "cuda"
"""


def main() -> int:
    """Exit code: 0 if all went well or there is no GPU."""
    if not torch.cuda.is_available():
        print("no GPU: not run")
        return 0
    kernels = [sys.executable, "-m", "pytest", "tests", "-m", "gpu"]
    if subprocess.run(kernels, timeout=TIMEOUT_S, cwd=Path(__file__).parent.parent).returncode:
        return 1
    stages = min(2, torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "gpu.toml"
        config.write_text(RUN.format(stages=stages))
        losses = {}
        for device, precision in (("cuda", "bf16"), ("cpu", "fp32")):
            command = [sys.executable, "-m", "titan.cli.main", "run", str(config), "--overwrite"]
            command += ["--set", f"cluster.device={device}", "--set", f"teacher.precision={precision}"]
            subprocess.run(command, check=True, timeout=TIMEOUT_S, cwd=folder)
            losses[device] = _last_loss(Path(folder) / "runs/gpu-smoke")
    difference = abs(losses["cuda"] - losses["cpu"])
    print(f"{stages} GPU stages, bf16: loss after 20 steps differs from CPU fp32 by {difference:.4f} nats (bar 0.05)")
    return 0 if difference < 0.05 else 1


def _last_loss(folder: Path) -> float:
    from titan.observe.metrics import StepMetric, read_metrics

    return [metric.loss for metric in read_metrics(folder) if isinstance(metric, StepMetric)][-1]


if __name__ == "__main__":
    sys.exit(main())
