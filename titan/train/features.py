"""Features of one layer in a step's passes: who takes them, of which samples they are, and the loss that comes back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from titan.model.capture import Capture, Features, take_features
from titan.ops.features.exchange import with_loss
from titan.parallel.edge import Tensors

TakeFeatures = Callable[[int, Features], tuple[Tensor, Mapping[str, Tensor]] | None]
"""Takes the position in the batch of a micro-batch's first sample, and its features as the layer handed them out.

Returns a loss, summed over tokens, that joins the pass, and the parts that are to be known of it; None for no loss.
"""


@dataclass(frozen=True)
class FeatureTap:
    """What a step does with the features of one layer; every rank of the role has it, or none."""

    capture: Capture
    take: TakeFeatures
    """Called in each forward pass, on the ranks that hold the layer."""
    losses: tuple[str, ...] = ()
    """Names of the parts that `take` returns, alike on all ranks."""


class FeaturePass:
    """The features of one step on one rank."""

    def __init__(self, tap: FeatureTap, size: int, start: int, scale: float):
        """size: samples of a micro-batch;  start: where this replica's begin in it;  scale: of the loss"""
        self.tap, self.size, self.start, self.scale = tap, size, start, scale
        self.sums = torch.zeros(len(tap.losses), dtype=torch.float64)
        """Of the named parts, over this rank's samples."""
        self.passed: dict[int, int] = {}
        """Micro-batches so far, by chunk: a schedule runs those of a chunk in their order."""

    def named_sums(self) -> dict[str, float]:
        """The parts by name: this rank's shares, which over all ranks of the role add up to the whole."""
        return dict(zip(self.tap.losses, self.sums.tolist(), strict=True))

    def join(self, outputs: Tensors, chunk: int) -> Tensors:
        """What goes on to the next stage: the hidden states, with the loss on them if there is one."""
        features = take_features(outputs)
        if not features:
            return outputs
        index = self.passed.get(chunk, 0)
        self.passed[chunk] = index + 1
        taken = self.tap.take(index * self.size + self.start, features)
        if taken is None:
            return outputs
        loss, parts = taken
        self.sums += torch.stack([parts[name].double().cpu() for name in self.tap.losses])
        return outputs | {"hidden": with_loss(outputs["hidden"], loss, self.scale)}
