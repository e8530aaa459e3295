"""Features: what a layer is asked to hand out beside its output, in a forward pass that is otherwise the same."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

FeatureName = Literal["query", "key", "value", "hidden"]
HEADS: tuple[FeatureName, ...] = ("query", "key", "value")
NOTHING: frozenset[FeatureName] = frozenset()
Features = dict[FeatureName, Tensor]
"""query [S, B, Hq, D], key and value [S, B, Hkv, D]: this tensor rank's heads as attention takes them, queries and keys
turned by their position. hidden: the layer's output [S, B, hidden]; with sequence parallelism [S / tp, B, hidden].
"""
_PREFIX = "feature."


@dataclass(frozen=True)
class Capture:
    """What to hand out of one layer."""

    layer: int
    """Counted from 0 over the whole model; `model.layers` is the auxiliary layer, which has no hidden states."""
    names: frozenset[FeatureName]

    def names_of(self, layer: int) -> frozenset[FeatureName]:
        """What is asked of a layer; nothing of most."""
        return self.names if layer == self.layer else NOTHING


def named_features(features: Features, capture: Capture) -> dict[str, Tensor]:
    """What was asked for, as it lies beside the outputs of a stage."""
    return {_PREFIX + name: tensor for name, tensor in features.items() if name in capture.names}


def take_features(outputs: dict[str, Tensor]) -> Features:
    """Take the features out of the outputs of a stage, so that the rest can go on; empty if the layer is elsewhere."""
    names: tuple[FeatureName, ...] = (*HEADS, "hidden")
    return {name: outputs.pop(_PREFIX + name) for name in names if _PREFIX + name in outputs}
