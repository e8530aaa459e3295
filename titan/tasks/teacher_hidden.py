"""What a teacher says when students make its logits themselves: last hidden states, and the weight they meet.

Shape letters: N tokens of a micro-batch, S tokens of a sample, B samples, D hidden width, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from titan.model.stage import StageModel
from titan.ops.look import VocabShard
from titan.tasks.causal_lm import whole_sequence


@dataclass(frozen=True)
class TeacherHidden:
    """Label parts of one micro-batch, before encoding.

    bfloat16: each number is at most 2^-9 of itself off, and not at all if the teacher computes in bfloat16. A logit,
    a sum of D products, is then off by about 2^-9 times the root of the sum of the products' squares.
    """

    hidden_ND: Tensor
    """Rows over (position, sample)."""
    weight_VD: Tensor | None
    """The output weight of the step, without padding; None where another micro-batch of the step has it."""


def teacher_hidden(module: StageModel, hidden: Tensor, shard: VocabShard, with_weight: bool) -> TeacherHidden:
    """Copies of the last hidden states, and of the output weight from all tensor ranks, before it is updated.

    hidden: [S, B, D], or [S / tp, B, D] with sequence parallelism
    Every tensor rank calls it.
    """
    cut = module.config.sequence_parallel and shard.group is not None
    whole = whole_sequence(hidden, shard) if cut else hidden
    hidden_ND = whole.detach().flatten(0, 1).to(torch.bfloat16, copy=True)
    return TeacherHidden(hidden_ND, _whole_weight(module, shard) if with_weight else None)


def _whole_weight(module: StageModel, shard: VocabShard) -> Tensor:
    """[V, D]; tensor ranks hold equally many rows."""
    own = module.output_weight.detach().to(torch.bfloat16, copy=True)
    if shard.group is None:
        return own[: shard.size]
    parts = [torch.empty_like(own) for _ in range(shard.group.size())]
    dist.all_gather(parts, own, group=shard.group)
    return torch.cat(parts)[: shard.size]
