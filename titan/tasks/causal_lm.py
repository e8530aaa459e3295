"""The causal pre-training task: samples to micro-batches, and hidden states to loss, gradients and labels."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from titan.errors import LabelError
from titan.model.stage import StageModel, gradient_buffer
from titan.ops.head import HeadResult, run_head
from titan.ops.label import DenseLabels, SparseLabels, TailDraws
from titan.ops.look import VocabShard
from titan.ops.objective import Objective
from titan.tasks.sample_labels import SampleLabels

Told = SparseLabels | DenseLabels


@dataclass(frozen=True)
class LabelWish:
    """What a teacher is to say of every token."""

    top_k: int = 0
    """Most likely entries."""
    draws: int = 0
    """Entries drawn from the rest."""
    independent: bool = False
    """Draw from the whole distribution, each draw on its own."""
    whole: bool = False
    """All log-probabilities."""
    hidden: bool = False
    """The last hidden states, and once a step the output weight, instead (titan.tasks.teacher_hidden)."""
    seed: int = 0
    """64 bits, of the run and the teacher's step: draws are a function of it, the sample's id and the position."""


@dataclass(frozen=True)
class MicroBatch:
    """What one replica needs of one micro-batch."""

    tokens_BS: Tensor
    targets_BS: Tensor
    weight_BS: Tensor
    """float32: 0 for tokens that do not count (padding samples)."""
    labels: SampleLabels | None
    sample_ids_B: Tensor | None = None
    """int64; needed where labels are drawn."""


def make_micro_batch(
    tokens: np.ndarray, weight: np.ndarray, labels: SampleLabels | None, device: torch.device,
    sample_ids: np.ndarray | None = None,
) -> MicroBatch:  # fmt: skip
    """Predict every token from those before it.

    tokens: int [B, S + 1];  weight: float [B], a sample's weight
    """
    both = torch.from_numpy(tokens.astype(np.int64)).to(device)
    weight_B = torch.from_numpy(weight.astype(np.float32)).to(device)
    weight_BS = weight_B[:, None].expand(-1, both.shape[1] - 1)
    ids_B = None if sample_ids is None else torch.from_numpy(sample_ids.astype(np.int64)).to(device)
    return MicroBatch(both[:, :-1], both[:, 1:], weight_BS, labels, ids_B)


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
    wish: LabelWish | None = None,
    shrink: float = 1.0,
    control: float = 1.0,
) -> HeadResult:
    """Loss of a micro-batch on the last stage; in training the output weight's gradient joins the gradient buffer.

    hidden:     [S, B, D], or [S / tp, B, D] with sequence parallelism
    grad_scale: as in titan.ops.head; None only looks
    shrink, control: how far draws correct the bucket, and against what (titan.ops.label.SparseLabels)
    returns:    `grad_hidden_ND` reshaped like `hidden`; label rows run over (sample, position)
    """
    cut = module.config.sequence_parallel and shard.group is not None
    whole = whole_sequence(hidden, shard) if cut else hidden
    steps, batch_size, width = whole.shape
    device = whole.device
    wish = wish or LabelWish()
    weight = module.output_weight
    labels = None
    if batch.labels is not None:
        labels = told(batch.labels, shard, objective.temperature, shrink, device, control)
    result = run_head(
        whole.reshape(-1, width),
        weight.detach(),
        _by_position(batch.targets_BS),
        _by_position(batch.weight_BS),
        shard,
        objective=objective,
        labels=labels,
        grad_weight_VD=None if grad_scale is None else gradient_buffer(weight),
        grad_scale=grad_scale or 0.0,
        top_k=wish.top_k,
        draws=_draws(wish, batch) if wish.draws else None,
        whole=wish.whole,
    )
    if result.grad_hidden_ND is not None:
        gradient = result.grad_hidden_ND.view(steps, batch_size, width)
        result.grad_hidden_ND = _own_part(gradient, shard) if cut else gradient
    return result


def told(
    labels: SampleLabels, shard: VocabShard, temperature: float, shrink: float,
    device: torch.device, control: float = 1.0,
) -> Told:  # fmt: skip
    """Labels of samples, at the temperature of the loss, as the head takes them; rows over (position, sample)."""

    def on_device(array: np.ndarray, kind: type) -> Tensor:
        return _by_position(torch.from_numpy(array.astype(kind, copy=False)).to(device))

    own = slice(shard.start, min(shard.start + shard.rows, shard.size))
    if labels.dense_BSV is not None:
        logits_NV = on_device(np.ascontiguousarray(labels.dense_BSV[..., own]), np.float32)
        return DenseLabels(logits_NV=logits_NV * temperature)  # T log p_T: logits up to a constant a token
    if labels.hidden_BSD is not None:
        if labels.output_weight_VD is None:
            raise LabelError("the labels of a step are hidden states without an output weight; restore the label log")
        weight_VD = torch.from_numpy(labels.output_weight_VD[own]).to(device)
        return DenseLabels(hidden_ND=on_device(labels.hidden_BSD, np.float32), weight_VD=weight_VD)
    entries = on_device(labels.ids_BSK, np.int64), on_device(labels.log_prob_BSK, np.float32)
    if labels.draw_ids_BSM is None or labels.draw_log_prob_BSM is None or labels.draw_mass_BS is None:
        return SparseLabels(*entries, labels.tail)
    draws = on_device(labels.draw_ids_BSM, np.int64), on_device(labels.draw_log_prob_BSM, np.float32)
    mass_N = on_device(labels.draw_mass_BS, np.float32)
    return SparseLabels(*entries, labels.tail, *draws, shrink, control, mass_N)


def _draws(wish: LabelWish, batch: MicroBatch) -> TailDraws:
    """The draws of every token of a micro-batch, in the order of hidden states."""
    assert batch.sample_ids_B is not None, "draws are seeded by sample ids"
    samples, length = batch.tokens_BS.shape
    sample_BS = batch.sample_ids_B[:, None].expand(samples, length)
    position_BS = torch.arange(length, device=batch.tokens_BS.device).expand(samples, length)
    return TailDraws(wish.draws, wish.seed, _by_position(sample_BS), _by_position(position_BS), wish.independent)


def _by_position(x: Tensor) -> Tensor:
    """[B, S, ...] to [S * B, ...]: the order of hidden states."""
    return x.transpose(0, 1).flatten(0, 1)


def whole_sequence(hidden: Tensor, shard: VocabShard) -> Tensor:
    """Gather the slices of the sequence from the tensor ranks."""
    assert shard.group is not None
    parts = [torch.empty_like(hidden) for _ in range(shard.group.size())]
    dist.all_gather(parts, hidden.contiguous(), group=shard.group)
    return torch.cat(parts)


def _own_part(gradient: Tensor, shard: VocabShard) -> Tensor:
    """This rank's slice of the sequence."""
    assert shard.group is not None
    return gradient.chunk(shard.group.size())[shard.group.rank()]
