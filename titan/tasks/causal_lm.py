"""The causal pre-training task: samples to micro-batches, and hidden states to loss, gradients and labels."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from titan.model.stage import StageModel, gradient_buffer
from titan.ops.head import HeadResult, Objective, run_head
from titan.ops.label import SparseLabels
from titan.ops.look import VocabShard


@dataclass(frozen=True)
class SampleLabels:
    """Labels of whole samples, as they come from the log."""

    ids_BSK: np.ndarray
    """integer vocabulary ids."""
    log_prob_BSK: np.ndarray
    """float32 log-probabilities at the temperature of the loss."""


@dataclass(frozen=True)
class MicroBatch:
    """What one replica needs of one micro-batch."""

    tokens_BS: Tensor
    targets_BS: Tensor
    weight_BS: Tensor
    """float32: 0 for tokens that do not count (padding samples)."""
    labels: SampleLabels | None


def make_micro_batch(
    tokens: np.ndarray, weight: np.ndarray, labels: SampleLabels | None, device: torch.device
) -> MicroBatch:
    """Predict every token from those before it.

    tokens: int [B, S + 1];  weight: float [B], a sample's weight
    """
    both = torch.from_numpy(tokens.astype(np.int64)).to(device)
    weight_B = torch.from_numpy(weight.astype(np.float32)).to(device)
    weight_BS = weight_B[:, None].expand(-1, both.shape[1] - 1)
    return MicroBatch(both[:, :-1], both[:, 1:], weight_BS, labels)


def vocab_shard(module: StageModel, vocab_size: int, group: dist.ProcessGroup) -> VocabShard:
    """Which rows of the output weight this tensor rank holds."""
    rows = module.output_weight.shape[0]
    return VocabShard(group.rank() * rows, rows, vocab_size, group if group.size() > 1 else None)


def run_task_head(
    module: StageModel,
    hidden: Tensor,
    batch: MicroBatch,
    shard: VocabShard,
    objective: Objective,
    *,
    grad_scale: float | None,
    top_k: int = 0,
) -> HeadResult:
    """Loss of a micro-batch on the last stage; in training the output weight's gradient joins the gradient buffer.

    hidden:     [S, B, D], or [S / tp, B, D] with sequence parallelism
    grad_scale: as in titan.ops.head; None only looks
    returns:    `grad_hidden_ND` reshaped like `hidden`; label rows run over (sample, position)
    """
    cut = module.config.sequence_parallel and shard.group is not None
    whole = _whole_sequence(hidden, shard) if cut else hidden
    steps, batch_size, width = whole.shape
    device = whole.device
    sparse = None
    if batch.labels is not None:
        ids = torch.from_numpy(batch.labels.ids_BSK.astype(np.int64)).to(device)
        log_prob = torch.from_numpy(batch.labels.log_prob_BSK.astype(np.float32)).to(device)
        sparse = SparseLabels(_by_position(ids), _by_position(log_prob))
    weight = module.output_weight
    result = run_head(
        whole.reshape(-1, width),
        weight.detach(),
        _by_position(batch.targets_BS),
        _by_position(batch.weight_BS),
        shard,
        objective=objective,
        labels=sparse,
        grad_weight_VD=None if grad_scale is None else gradient_buffer(weight),
        grad_scale=grad_scale or 0.0,
        top_k=top_k,
    )
    if result.grad_hidden_ND is not None:
        gradient = result.grad_hidden_ND.view(steps, batch_size, width)
        result.grad_hidden_ND = _own_part(gradient, shard) if cut else gradient
    return result


def _by_position(x: Tensor) -> Tensor:
    """[B, S, ...] to [S * B, ...]: the order of hidden states."""
    return x.transpose(0, 1).reshape(-1, *x.shape[2:])


def _whole_sequence(hidden: Tensor, shard: VocabShard) -> Tensor:
    """Gather the slices of the sequence from the tensor ranks."""
    assert shard.group is not None
    parts = [torch.empty_like(hidden) for _ in range(shard.group.size())]
    dist.all_gather(parts, hidden.contiguous(), group=shard.group)
    return torch.cat(parts)


def _own_part(gradient: Tensor, shard: VocabShard) -> Tensor:
    """This rank's slice of the sequence."""
    assert shard.group is not None
    return gradient.chunk(shard.group.size())[shard.group.rank()]
