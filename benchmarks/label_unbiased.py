"""Are labels unbiased? The mean gradient over 100,000 labels of one token, beside that of full distillation.

    python -m benchmarks.label_unbiased [--teacher FOLDER] [--labels 100000]

Tokens: Zipf distributions of 4,096 entries with a student whose logits are off by noise of 0.5, and tokens of a
held-out text under a real teacher and a student in the middle of its training (benchmarks.label_models). Each label is
said, encoded at 36 bytes, decoded and turned into the gradient in the student's logits, with draws of its own.
Printed: the bias as a share of the exact gradient, estimated without the noise's part (products of different chunks'
errors), and how many standard errors its square is from zero: within 3 is within Monte-Carlo error.
Writes benchmarks/results/label_unbiased.json.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.figures import save_result
from benchmarks.label_models import Models, random_draws, renormalised, sent, with_models
from titan.config.distillation import LabelSettings
from titan.distill.control import ControlTracker
from titan.ops.head import run_head
from titan.ops.label import SparseLabels
from titan.ops.look import VocabShard
from titan.ops.objective import Objective
from titan.tasks.causal_lm import told

BUDGET_BYTES = 36.0
CHUNK = 2000
STUDENT_STEP = 150
POSITIONS = (20, 60, 100)
SAMPLED = LabelSettings(bytes_per_token=BUDGET_BYTES)
TOP_K = LabelSettings(codec="top_k", bytes_per_token=BUDGET_BYTES)
NAMES = {
    "sampled (ours)": SAMPLED, "sampled, control 1": SAMPLED, "sampled, shrink 0.5": SAMPLED,
    "random (RS-KD)": LabelSettings(codec="random"), "top_k renormalised": TOP_K, "top_k, one bucket": TOP_K,
}  # fmt: skip


def zipf(exponent: float, size: int = 4096, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    """Logits of a teacher and of a student."""
    generator = torch.Generator().manual_seed(3)
    teacher = (-exponent * torch.arange(1, size + 1).log())[torch.randperm(size, generator=generator)]
    return teacher, teacher + noise * torch.randn(size, generator=generator)


def errors(teacher_V: Tensor, student_V: Tensor, labels: int) -> dict[str, Tensor]:
    """By contender [chunks, V]: each chunk's mean gradient, less the exact one, in units of the exact one's norm."""
    exact_V = student_V.double().softmax(0) - teacher_V.double().softmax(0)
    logits = teacher_V.expand(CHUNK, -1).contiguous()
    settings = dict(NAMES)
    draws = random_draws(logits[:200], np.arange(200), BUDGET_BYTES)
    settings["random (RS-KD)"] = LabelSettings(codec="random", draws=draws)
    tracker = ControlTracker()
    found: dict[str, list[Tensor]] = {name: [] for name in settings}
    for chunk in range(labels // CHUNK):
        ids = np.arange(CHUNK, dtype=np.int64) + chunk * CHUNK
        read = {each: _labels(logits, each, ids) for each in set(settings.values())}
        control = tracker.control
        for name, each in settings.items():
            label = read[each]
            if name == "top_k renormalised":
                label = renormalised(label)
            shrink = 0.5 if "shrink" in name else 1.0
            label = replace(label, control=control if "ours" in name else 1.0, shrink=shrink)
            gradient_V, fit = _gradient(student_V, label)
            found[name].append((gradient_V - exact_V) / exact_V.norm())
            if "ours" in name and fit is not None:
                tracker.add(*fit.tolist())
    return {name: torch.stack(rows) for name, rows in found.items()}


def _labels(logits_NV: Tensor, settings: LabelSettings, ids: np.ndarray) -> SparseLabels:
    """Each label is of a sample of one token."""
    labels, _ = sent(logits_NV, settings, 1, ids)
    size = logits_NV.shape[1]
    read = told(labels, VocabShard(0, size, size, None), 1.0, 1.0, torch.device("cpu"))
    assert isinstance(read, SparseLabels)
    return read


def _gradient(student_V: Tensor, labels: SparseLabels) -> tuple[Tensor, Tensor | None]:
    """float64 [V] mean over labels: a head of width one, whose weight is the logits."""
    size, weight_V1 = len(student_V), student_V[:, None].contiguous()
    grad_V1 = torch.zeros(size, 1)
    result = run_head(
        torch.ones(CHUNK, 1), weight_V1, torch.zeros(CHUNK, dtype=torch.int64), torch.ones(CHUNK),
        VocabShard(0, size, size, None), objective=Objective(1.0), labels=labels, grad_weight_VD=grad_V1,
        grad_scale=1.0 / CHUNK,
    )  # fmt: skip
    return grad_V1[:, 0].double(), result.tail_fit


def bias_of(errors_CV: Tensor) -> dict[str, float]:
    """Relative bias, and how sure it is: the mean of products of different chunks' errors is its square on average."""
    chunks = len(errors_CV)
    products = errors_CV @ errors_CV.t()
    apart = products[~torch.eye(chunks, dtype=torch.bool)]
    square = float(apart.mean())
    error = math.sqrt(2.0 / (chunks * (chunks - 1)) * float(apart.var()))
    noise = math.sqrt(max(0.0, float(products.diagonal().mean()) - square) * CHUNK)
    return {
        "bias": math.copysign(math.sqrt(abs(square)), square),
        "standard_errors": square / error,
        "bias_at_most": math.sqrt(max(0.0, square + 2 * error)),
        "noise_of_one_label": noise,
    }


def measure(models: Models, labels: int) -> dict[str, Any]:
    """Every token under every label."""
    torch.set_num_threads(1)
    tokens = {f"Zipf {exponent}": zipf(exponent) for exponent in (1.0, 1.5, 2.0)}
    models.load_student(STUDENT_STEP)
    batch = models.sampler(1).heldout(1)
    with torch.no_grad():
        sides = [
            models.hidden(trainer, batch) @ models.weight(trainer)[: models.vocab_size].t()
            for trainer in (models.teacher, models.student)
        ]
    tokens |= {f"real, position {place}": (sides[0][place], sides[1][place]) for place in POSITIONS}
    found = {}
    print(f"{'':20} {'':22} {'bias':>9} {'at most':>9} {'std errors':>11} {'noise a label':>14}")
    for token, (teacher_V, student_V) in tokens.items():
        rows = {name: bias_of(rows) for name, rows in errors(teacher_V, student_V, labels).items()}
        found[token] = {
            "largest_probability": float(teacher_V.softmax(0).max()),
            "entropy": float(-(teacher_V.softmax(0) * teacher_V.log_softmax(0)).sum()),
            "labels": rows,
        }
        for name, row in rows.items():
            print(
                f"{token:20} {name:22} {row['bias']:9.5f} {row['bias_at_most']:9.5f} {row['standard_errors']:11.1f}"
                f" {row['noise_of_one_label']:14.3f}",
                flush=True,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, default=Path("runs/label_models"), help="folder to keep both models in")
    parser.add_argument("--labels", type=int, default=100_000)
    options = parser.parse_args()
    tokens = with_models(options.teacher, measure, options.labels)
    save_result("label_unbiased", {"budget_bytes": BUDGET_BYTES, "labels": options.labels, "tokens": tokens})


if __name__ == "__main__":
    main()
