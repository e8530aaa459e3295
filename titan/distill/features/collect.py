"""A teacher's features of a micro-batch, from the tensor ranks that hold their heads or positions to one of them."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from titan.distill.features.codec import WIRE_TYPES, FeatureLabels, WireType
from titan.model.capture import HEADS, Features


def collect_features(
    features: Features, wire: WireType, group: dist.ProcessGroup | None, sequence_parallel: bool
) -> Features | None:
    """All heads and positions as [B, S, ...] of the wire's type on tensor rank 0; None on the others.

    features: as a layer handed them out (titan.model.capture). Every tensor rank calls it.
    """
    alone = group is None or group.size() == 1
    collected: Features = {}
    for name, tensor in features.items():
        small = tensor.detach().to(WIRE_TYPES[wire])  # rounded first: half the bytes to gather
        small = small.transpose(0, 1).contiguous()
        dim = 2 if name in HEADS else 1
        if not alone and (name in HEADS or sequence_parallel):
            assert group is not None
            gathered = _gather(small, dim, group)
            if gathered is not None:
                collected[name] = gathered
        else:
            collected[name] = small
    return collected if alone or (group is not None and group.rank() == 0) else None


def feature_labels(
    step: int, layer: int, parts: Sequence[tuple[int, Features]], sample_ids: np.ndarray
) -> list[FeatureLabels]:
    """Blocks of a step, one a micro-batch.

    parts:      (position of the first sample in the batch, collected features) of each micro-batch
    sample_ids: int64, of the whole batch
    """
    blocks = []
    for first, tensors in parts:
        samples = len(next(iter(tensors.values())))
        blocks.append(FeatureLabels(step, layer, first, sample_ids[first : first + samples], tensors))
    return blocks


def _gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor | None:
    """Parts of all ranks along a dimension on the first of them; as bytes, which every backend carries."""
    bits = x.view(torch.uint8)
    parts = [torch.empty_like(bits) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(bits, parts, group=group, group_dst=0)
    return None if parts is None else torch.cat(parts, dim=dim).view(x.dtype)
