"""Labels of Zipf teachers whose students are as far away as wanted: our gradient's angle as a share of RS-KD's.

    python -m benchmarks.label_zipf [--tokens 4096]

V 16,000 and width 64; a student's logits are its teacher's plus h dW of standard deviation s. The gradient is the
output weight's, under forward KL alone; both labels go through the codec at 36 bytes a token. Every chunk is learned
with the control of those before it, as steps of a student are. Writes benchmarks/results/label_zipf.json.
"""

import argparse
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.figures import save_result
from benchmarks.label_models import random_draws, sent
from titan.config.distillation import LabelSettings
from titan.distill.control import ControlTracker
from titan.ops.head import run_head
from titan.ops.label import DenseLabels, SparseLabels
from titan.ops.look import VocabShard
from titan.ops.objective import Objective
from titan.tasks.causal_lm import told

BUDGET_BYTES = 36.0
VOCAB, WIDTH, LENGTH, CHUNK, KINDS = 16_000, 64, 128, 256, 64
EXPONENTS, DISTANCES = (1.0, 1.2, 1.5, 2.0), (1.0, 0.5, 0.25)
SHARD = VocabShard(0, VOCAB, VOCAB, None)
OURS, RANDOM, FULL = "sampled", "random", "full"


class Tokens:
    """Chunks of tokens of one Zipf exponent, of 64 kinds: a kind has an order of the vocabulary and a hidden state."""

    def __init__(self, exponent: float, distance: float):
        self.generator = torch.Generator().manual_seed(0)
        self.base_V = -exponent * torch.arange(1, VOCAB + 1).log()
        self.orders = torch.stack([torch.randperm(VOCAB, generator=self.generator) for _ in range(KINDS)])
        self.centres = self._normal(KINDS, WIDTH)
        self.change_VD = self._normal(VOCAB, WIDTH) * distance / math.sqrt(WIDTH)

    def chunk(self) -> tuple[Tensor, Tensor]:
        """The teacher's logits and the hidden states."""
        kind_N = torch.randint(0, KINDS, (CHUNK,), generator=self.generator)
        hidden_ND = self.centres[kind_N] * 0.8 + self._normal(CHUNK, WIDTH) * 0.6
        logits_NV = self.base_V + 0.5 * self._normal(CHUNK, VOCAB)
        return torch.zeros(CHUNK, VOCAB).scatter_(1, self.orders[kind_N], logits_NV), hidden_ND

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def gradient(student_NV: Tensor, hidden_ND: Tensor, labels: SparseLabels | DenseLabels) -> tuple[Tensor, Tensor | None]:
    """[V, D] of the output weight, and what the draws told of the control."""
    whole_VE = torch.zeros(VOCAB, CHUNK)  # the student's logits are a head's whose weight they are, one row a token
    result = run_head(
        torch.eye(CHUNK), student_NV.t().contiguous(), torch.zeros(CHUNK, dtype=torch.int64), torch.ones(CHUNK), SHARD,
        objective=Objective(1.0), labels=labels, grad_weight_VD=whole_VE,
    )  # fmt: skip
    return whole_VE @ hidden_ND, result.tail_fit


def measure(exponent: float, distance: float, tokens: int) -> dict[str, Any]:
    """Angles of both labels, and bytes."""
    made, tracker = Tokens(exponent, distance), ControlTracker()
    total: dict[str, Tensor] = {}
    size: dict[str, float] = {}
    settings: dict[str, LabelSettings] = {}
    for index in range(tokens // CHUNK):
        teacher_NV, hidden_ND = made.chunk()
        student_NV = teacher_NV + hidden_ND @ made.change_VD.t()
        ids_B = np.arange(CHUNK // LENGTH) + index * (CHUNK // LENGTH)
        if not settings:
            draws = random_draws(teacher_NV, ids_B, BUDGET_BYTES)
            settings = {OURS: LabelSettings(bytes_per_token=BUDGET_BYTES)}
            settings[RANDOM] = LabelSettings(codec="random", draws=draws)
        labels: dict[str, SparseLabels | DenseLabels] = {FULL: DenseLabels(teacher_NV)}
        for name, each in settings.items():
            read, size[name] = sent(teacher_NV, each, 1, ids_B)
            label = told(read, SHARD, 1.0, 1.0, torch.device("cpu"))
            assert isinstance(label, SparseLabels)
            labels[name] = replace(label, control=tracker.control)
        for name, label in labels.items():
            part, fit = gradient(student_NV, hidden_ND, label)
            total[name] = part + total.get(name, 0.0)
            if fit is not None:
                tracker.add(*fit.tolist())
    angles = {name: _angle(total[name], total[FULL]) for name in (OURS, RANDOM)}
    return {
        "exponent": exponent, "distance": distance, "degrees": angles, "bytes_per_token": size,
        "share": angles[OURS] / angles[RANDOM], "control": tracker.control,
    }  # fmt: skip


def _angle(first: Tensor, second: Tensor) -> float:
    """Degrees."""
    a, b = first.flatten().double(), second.flatten().double()
    return math.degrees(math.acos(min(1.0, float(a @ b / (a.norm() * b.norm())))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for exponent in EXPONENTS:
        for distance in DISTANCES:
            row = measure(exponent, distance, options.tokens)
            rows.append(row)
            ours, random = (
                f"{row['degrees'][name]:5.2f}° ({row['bytes_per_token'][name]:.1f} B)" for name in (OURS, RANDOM)
            )
            print(f"Zipf {exponent} s {distance}: {ours}, RS-KD {random}, share {row['share']:.2f}", flush=True)
    save_result("label_zipf", {"budget_bytes": BUDGET_BYTES, "tokens": options.tokens, "rows": rows})


if __name__ == "__main__":
    main()
