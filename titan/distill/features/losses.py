"""What a student's layer learns from its teacher's: a weighted sum of losses between features, in any layout."""

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from titan.model.capture import FeatureName, Features
from titan.ops.attention import Visibility
from titan.ops.features.exchange import part_of, whole
from titan.ops.features.hidden import affinity_loss, hint_loss
from titan.ops.features.relation import relation_loss, shared_out


@dataclass(frozen=True)
class FeatureObjective:
    """Weights of the losses between features; each loss is a mean over tokens, samples and relation heads."""

    relation_heads: int
    query: float = 0.0
    """Of the relations of queries with queries (arXiv 2012.15828); likewise keys and values."""
    key: float = 0.0
    value: float = 0.0
    attention: float = 0.0
    """Of the KL between attentions, queries with keys (arXiv 2112.12731)."""
    attention_map: float = 0.0
    """Of the squared distance between attentions."""
    hint: float = 0.0
    """Of the squared distance between hidden states (arXiv 1412.6550)."""
    affinity: float = 0.0
    """Of the distance between the cosines of hidden states."""

    def weights(self) -> dict[str, float]:
        """Losses that count, by name."""
        all_weights = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return {name: weight for name, weight in all_weights.items() if weight}

    def names(self) -> frozenset[FeatureName]:
        """The features that both models have to hand out."""
        return frozenset(feature for name in self.weights() for feature in _FEATURES[name])


_FEATURES: dict[str, tuple[FeatureName, ...]] = {
    "query": ("query",),
    "key": ("key",),
    "value": ("value",),
    "attention": ("query", "key"),
    "attention_map": ("query", "key"),
    "hint": ("hidden",),
    "affinity": ("hidden",),
}


@dataclass(frozen=True)
class FeatureLoss:
    """Losses of a micro-batch on one rank, summed over its tokens."""

    loss: Tensor
    """The weighted sum, to differentiate on this rank, whatever other ranks do."""
    parts: dict[str, Tensor]
    """Each loss without its weight: this rank's share, such that shares of all tensor ranks add up to the loss."""


def feature_loss(
    objective: FeatureObjective,
    student: Features,
    teacher: Features,
    *,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    projection_TD: Tensor | None = None,
    visibility: Visibility | None = None,
) -> FeatureLoss:
    """Compare the features of a micro-batch.

    student: as its layer handed them out (titan.model.capture): the heads, or the positions, of this tensor rank
    teacher: all heads and positions of the same samples
    group:   the student's tensor ranks, None for one
    projection_TD: of the hint (titan.model.stage.StageModel.projection)
    """
    if group is not None and group.size() == 1:
        group = None
    seen = visibility or Visibility()
    cut = sequence_parallel and group is not None
    total: Tensor | None = None
    parts: dict[str, Tensor] = {}
    for name, weight in objective.weights().items():
        if name in ("hint", "affinity"):
            loss = _hidden_loss(name, student["hidden"], teacher["hidden"], group if cut else None, projection_TD, seen)
            shared = cut and name == "hint"
        else:
            left, right = _FEATURES[name][0], _FEATURES[name][-1]
            loss = relation_loss(
                (student[left], student[right]), (teacher[left], teacher[right]), objective.relation_heads, seen,
                rule="squared" if name == "attention_map" else "kl", group=group,
            )  # fmt: skip
            shared = shared_out(objective.relation_heads, group)
        # what is not shared out every rank has in full, so it is counted once
        counts = shared or group is None or group.rank() == 0
        parts[name] = loss.detach() if counts else torch.zeros_like(loss)
        total = weight * loss if total is None else total + weight * loss
    assert total is not None, "an objective has a loss with a weight"
    return FeatureLoss(total, parts)


def _hidden_loss(
    name: str, student: Tensor, teacher: Tensor, group: dist.ProcessGroup | None, projection_TD: Tensor | None,
    visibility: Visibility,
) -> Tensor:  # fmt: skip
    """group: tensor ranks that hold slices of the sequence; None where each has all of it."""
    if name == "hint":
        return hint_loss(student, teacher if group is None else part_of(teacher, 0, group), projection_TD)
    return affinity_loss(student if group is None else whole(student, 0, group), teacher, visibility)
