"""Bytes that a layout needs on each of its ranks, counted as the engine allocates them."""

from dataclasses import dataclass

from titan.config.planning import TaskSettings
from titan.plan.layout import Layout, Stage
from titan.plan.profile import DTYPE_BYTES, BlockKind, Profile, num_layer_parameters, num_vocabulary_parameters
from titan.plan.schedule import Pass

GRADIENT_BYTES = 4
"""A float32 gradient buffer."""
MOMENT_BYTES = 8
"""Two float32 moments."""
MASTER_BYTES = 4
"""A float32 copy of weights in half precision."""


@dataclass(frozen=True)
class Memory:
    """One rank's bytes, by what they are for."""

    state: float
    """Weights, gradients and optimizer."""
    activations: float
    """What micro-batches in flight keep, the edges' tensors included."""
    workspace: float
    """The most that one pass needs for a moment."""
    fixed: float

    @property
    def total(self) -> float:
        """Bytes."""
        return self.state + self.activations + self.workspace + self.fixed


def stage_parameters(task: TaskSettings, stage: Stage) -> float:
    """Weights on each tensor rank; norms are on all of them, but are counted as cut: they are a millionth."""
    count = (stage.end_layer - stage.first_layer) * num_layer_parameters(task)
    tied_copy = task.model.tied and stage.has_head and not stage.has_embedding
    count += num_vocabulary_parameters(task) * (
        stage.has_embedding + (stage.has_head and not task.model.tied) + tied_copy
    )
    return count / stage.tp


def bytes_per_parameter(precision: str, shard: int) -> float:
    """State of one weight on one rank."""
    optimizer = MOMENT_BYTES + (0 if precision == "fp32" else MASTER_BYTES)
    return DTYPE_BYTES[precision] + GRADIENT_BYTES + optimizer / shard


def position_memory(
    profile: Profile, layout: Layout, position: int, kind: str, samples: int, frozen: bool = False
) -> Memory:
    """Bytes of a rank at a position whose replica has `samples` of a micro-batch.

    What is in flight follows from the order of the position's passes alone, whatever their times.
    frozen: weights and no other state, and nothing is kept for a backward pass
    """
    stages = layout.stages[position :: len(layout.positions)]
    task, first = profile.task, stages[0]
    precision = first.precision or task.precision
    edge_bytes = samples * task.sequence_length * task.model.hidden * DTYPE_BYTES[precision]
    each = DTYPE_BYTES[precision] if frozen else bytes_per_parameter(precision, first.shard)
    state = sum(stage_parameters(task, stage) for stage in stages) * each
    kept, workspace = [], 0.0
    for stage in stages:
        layer = profile.block(kind, "layer", first.tp, samples)
        layers = stage.end_layer - stage.first_layer
        kept.append(layers * (edge_bytes if layout.recompute else layer.activation_bytes))
        again = frozen or layout.recompute  # a layer's own activations, for as long as it computes
        workspace = max(workspace, layer.workspace_bytes + again * layer.activation_bytes)
        ends: tuple[tuple[bool, BlockKind], ...] = ((stage.has_embedding, "embedding"), (stage.has_head, "head"))
        for has, name in ends:
            if has:
                block = profile.block(kind, name, first.tp, samples)
                kept[-1] += block.activation_bytes
                workspace = max(workspace, block.workspace_bytes + frozen * block.activation_bytes)
        if not stage.has_head:
            kept[-1] += edge_bytes  # what it produced is held until its gradient has come
    if frozen:  # what goes out may have to wait until the end of the step
        outgoing = edge_bytes * layout.micro_batches * sum(not stage.has_head for stage in stages)
        return Memory(state, outgoing + edge_bytes * (not first.has_embedding), workspace, profile.fixed_bytes(kind))
    now = most = 0.0
    for action in layout.actions(position):
        now += kept[action.chunk] * (1 if action.kind is Pass.FORWARD else -1)
        most = max(most, now)
    incoming = edge_bytes * ((not first.has_embedding) + (not stages[-1].has_head))  # asked for ahead
    return Memory(state, most + incoming, workspace, profile.fixed_bytes(kind))
