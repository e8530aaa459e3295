"""How true is the gradient that a label gives? Angle to full distillation, every codec at the same bytes a token.

    python -m benchmarks.label_angle [--teacher FOLDER] [--batches 16]

The gradient is that of all the student's parameters, under forward KL alone, with a real teacher and the student early,
in the middle and late in its training (benchmarks.label_models; trained into FOLDER unless it is there). Labels are
said, encoded at 36 bytes a token, decoded and learned as in a run. Angles are those of single batches of 8,192 tokens
(root mean square) and of the mean over all batches, where noise averages out and bias shows.
Writes benchmarks/results/label_angle.json and docs/label_angle.png.
"""

import argparse
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.figures import save_result
from benchmarks.label_models import Models, random_draws, renormalised, sent, with_models
from titan.config.distillation import LabelSettings
from titan.data.sampler import SampleBatch
from titan.distill.control import ControlTracker
from titan.ops.head import HeadResult, run_head
from titan.ops.label import DenseLabels, SparseLabels
from titan.ops.look import VocabShard
from titan.ops.objective import Objective
from titan.tasks.causal_lm import told

BUDGET_BYTES = 36.0
STUDENTS = {"early": 25, "middle": 150, "late": 400}
"""Steps that the student has made."""
BATCH_TOKENS = 8192
PIECE_SAMPLES = 8
"""Samples whose gradients are made at a time: 1,024 tokens."""
WARM_UP_PIECES = 8
"""Before the first that counts, for the control of `sampled`."""
FULL = "full"
PICTURE = Path(__file__).parents[1] / "docs" / "label_angle.png"


@dataclass(frozen=True)
class Contender:
    """A label, and how a student learns from it."""

    settings: LabelSettings
    renormalise: bool = False
    control: float | None = None
    """None: as a student keeps it, from earlier batches."""
    shrink: float = 1.0


def contenders(draws: int) -> dict[str, Contender]:
    """draws: of RS-KD, as many as the bytes allow."""
    sampled = LabelSettings(bytes_per_token=BUDGET_BYTES)
    top_k = LabelSettings(codec="top_k", bytes_per_token=BUDGET_BYTES)
    return {
        "sampled (ours)": Contender(sampled),
        "random (RS-KD)": Contender(LabelSettings(codec="random", draws=draws)),
        "top_k renormalised": Contender(top_k, renormalise=True),
        "top_k, one bucket": Contender(top_k),
        "sampled, control 1": Contender(sampled, control=1.0),
        "sampled, control 0": Contender(sampled, control=0.0),
        "sampled, shrink 0.8": Contender(sampled, shrink=0.8),
    }


class Measured:
    """Gradients of one student under every label, summed over a batch and over all."""

    def __init__(self, models: Models, names: dict[str, Contender]):
        self.models, self.contenders = models, names
        self.shard = VocabShard(0, models.vocab_size, models.vocab_size, None)
        self.control = {name: ControlTracker() for name in names}
        self.batch: dict[str, Tensor] = {}
        self.total: dict[str, Tensor] = {}
        self.angles: dict[str, list[float]] = defaultdict(list)
        self.bytes: dict[str, list[float]] = defaultdict(list)
        self.divergence: list[float] = []

    def piece(self, batch: SampleBatch, step: int, counts: bool) -> None:
        """Add the gradients of some samples."""
        models = self.models
        with torch.no_grad():
            weight = models.weight(models.teacher)[: models.vocab_size]
            logits = models.hidden(models.teacher, batch) @ weight.t()
        hidden = models.hidden(models.student, batch)
        labels = {FULL: DenseLabels(logits)} | {
            name: self._labels(name, logits, step, batch.sample_ids) for name in self.contenders
        }
        for name, label in labels.items():
            if not counts and (name == FULL or self.contenders[name].control is not None):
                continue
            gradient, result = self._gradient(hidden, label)
            if result.tail_fit is not None:
                self.control[name].add(*result.tail_fit.tolist())
            if name == FULL:
                self.divergence.append(float(result.divergence) / len(logits))
            if counts:
                self.batch[name] = gradient + self.batch.get(name, 0.0)

    def _labels(self, name: str, logits: Tensor, step: int, sample_ids: np.ndarray) -> SparseLabels | DenseLabels:
        contender = self.contenders[name]
        labels, size = sent(logits, contender.settings, step, sample_ids)
        self.bytes[name].append(size)
        sparse = told(labels, self.shard, 1.0, 1.0, torch.device("cpu"))
        assert isinstance(sparse, SparseLabels)
        if contender.renormalise:
            return renormalised(sparse)
        control = self.control[name].control if contender.control is None else contender.control
        return replace(sparse, control=control, shrink=contender.shrink)

    def _gradient(self, hidden: Tensor, label: SparseLabels | DenseLabels) -> tuple[Tensor, HeadResult]:
        """Of all parameters, in one row; and what the head said."""
        module = self.models.student.stage.module
        weight = self.models.weight(self.models.student)
        grad_weight = torch.zeros_like(weight)
        tokens = len(hidden)
        result = run_head(
            hidden.detach(), weight, torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens),
            replace(self.shard, rows=len(weight)), objective=Objective(1.0), labels=label, grad_weight_VD=grad_weight,
            grad_scale=1.0 / BATCH_TOKENS,
        )  # fmt: skip
        inner = [p for p in module.parameters() if p is not module.output_weight]
        gradients = torch.autograd.grad(hidden, inner, result.grad_hidden_ND, retain_graph=True)
        return torch.cat([grad_weight.flatten(), *(gradient.flatten() for gradient in gradients)]), result

    def close_batch(self) -> None:
        """A batch of 8,192 tokens is complete."""
        for name, gradient in self.batch.items():
            if name != FULL:
                self.angles[name].append(angle(gradient, self.batch[FULL]))
            self.total[name] = gradient + self.total.get(name, 0.0)
        self.batch = {}

    def report(self) -> dict[str, Any]:
        """Angles in degrees by contender."""
        rows = {}
        for name, contender in self.contenders.items():
            angles = self.angles[name]
            rows[name] = {
                "batch": math.sqrt(sum(x * x for x in angles) / len(angles)),
                "batch_lowest_highest": [min(angles), max(angles)],
                "mean": angle(self.total[name], self.total[FULL]),
                "norm_ratio": float(self.total[name].norm() / self.total[FULL].norm()),
                "bytes_per_token": sum(self.bytes[name]) / len(self.bytes[name]),
            }
            if contender.control is None and contender.settings.codec == "sampled":
                rows[name]["control"] = self.control[name].control
        return {"kl_to_teacher": sum(self.divergence) / len(self.divergence), "codecs": rows}


def angle(first: Tensor, second: Tensor) -> float:
    """Degrees."""
    a, b = first.double(), second.double()
    return math.degrees(math.acos(min(1.0, float(a @ b / (a.norm() * b.norm())))))


def measure(models: Models, batches: int, more: dict[str, Contender] | None = None) -> dict[str, Any]:
    """Every student under every label."""
    torch.set_num_threads(1)
    pieces = BATCH_TOKENS // (PIECE_SAMPLES * models.length)
    sampler = models.sampler(PIECE_SAMPLES)
    with torch.no_grad():
        first = sampler.batch(0)
        logits = models.hidden(models.teacher, first) @ models.weight(models.teacher)[: models.vocab_size].t()
    names = contenders(random_draws(logits, first.sample_ids, BUDGET_BYTES)) | (more or {})
    found = {}
    for student, step in STUDENTS.items():
        models.load_student(step)
        measured = Measured(models, names)
        for index in range(-WARM_UP_PIECES, batches * pieces):
            measured.piece(sampler.batch(index + WARM_UP_PIECES), index + WARM_UP_PIECES + 1, counts=index >= 0)
            if index >= 0 and index % pieces == pieces - 1:
                measured.close_batch()
        found[student] = {"step": step} | measured.report()
        show(student, found[student])
    return found


def show(student: str, found: dict[str, Any]) -> None:
    """A table of one student."""
    print(f"\n{student}: step {found['step']}, {found['kl_to_teacher']:.3f} nats a token from its teacher")
    print(f"{'':24} {'batch':>8} {'to RS-KD':>9} {'mean of all':>12} {'norm':>6} {'bytes':>6} {'control':>8}")
    for name, row in found["codecs"].items():
        ratio = row["batch"] / found["codecs"]["random (RS-KD)"]["batch"]
        control = f"{row['control']:8.2f}" if "control" in row else ""
        print(
            f"{name:24} {row['batch']:7.2f}° {ratio:9.2f} {row['mean']:11.2f}° {row['norm_ratio']:6.2f}"
            f" {row['bytes_per_token']:6.1f} {control}",
            flush=True,
        )


def draw_picture(students: dict[str, Any]) -> None:
    """Bars by student: a batch, and the mean of all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, len(students), sharey=True)
    for panel, (student, found) in zip(axes, students.items(), strict=True):
        rows = found["codecs"]
        places = np.arange(len(rows))[::-1]
        for shift, key, label in ((0.2, "batch", "batch of 8,192 tokens"), (-0.2, "mean", "mean of all batches")):
            bars = panel.barh(places + shift, [row[key] for row in rows.values()], 0.38, label=label)
            panel.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
        panel.set_yticks(places, list(rows), fontsize=8)
        panel.set_title(f"{student} (step {found['step']}, KL {found['kl_to_teacher']:.2f} nats)", fontsize=9)
        panel.set_xlabel("degrees to full distillation", fontsize=8)
        panel.set_xlim(0, 1.2 * max(row["batch"] for row in rows.values()))
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, default=Path("runs/label_models"), help="folder to keep both models in")
    parser.add_argument("--batches", type=int, default=16, help="of 8,192 tokens; 16 are 64 batches of 2,048")
    options = parser.parse_args()
    students = with_models(options.teacher, measure, options.batches)
    save_result("label_angle", {"budget_bytes": BUDGET_BYTES, "batches": options.batches, "students": students})
    draw_picture(students)


if __name__ == "__main__":
    main()
