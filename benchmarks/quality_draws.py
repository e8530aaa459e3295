"""How many draws of RS-KD fit the bytes, on a teacher's own log of hidden states."""

from pathlib import Path
from statistics import mean

import torch

from benchmarks.label_models import random_draws
from titan.distill.log.reader import LabelReader
from titan.errors import LabelError


def draws_within(log: Path, steps: list[int], budget_bytes: float) -> int:
    """The mean over these steps of the most draws whose labels keep to so many bytes a token."""
    reader = LabelReader(log, timeout_s=0.0)
    found = []
    try:
        for step in steps:
            commit = reader.wait_commit(step)
            if commit is None:
                raise LabelError(f"{log} has no step {step}; make it anew")
            block = reader.read(commit)[0][0]  # the first has the output weight
            labels = block.labels
            assert labels.hidden_BSD is not None and labels.output_weight_VD is not None
            hidden_ND = torch.from_numpy(labels.hidden_BSD).transpose(0, 1).flatten(0, 1)
            logits_NV = hidden_ND @ torch.from_numpy(labels.output_weight_VD).t()
            found.append(random_draws(logits_NV, block.sample_ids_B, budget_bytes))
    finally:
        reader.close()
    return round(mean(found))
