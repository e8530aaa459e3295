"""Measures what the blocks of a model cost on this device: what a profile is made of.

Every block is run alone as a pipeline stage would run it, in a world of `tp` ranks, with the engine's own operations.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from titan.config.settings import ModelSettings
from titan.model.stage import rope_table
from titan.parallel.live_bytes import kept_for_backward
from titan.parallel.stage import ParallelStage, build_stage
from titan.parallel.world import World
from titan.plan.layout import Layout, Stage

BlockKind = Literal["embedding", "layer", "head"]
KINDS: tuple[BlockKind, ...] = ("embedding", "layer", "head")
LAYERS = 2
"""Layers measured together: with one alone the passes of a small model are mostly the calls around it."""
Head = Callable[[ParallelStage, Tensor], Tensor]
"""Hidden states of the last stage to their gradient; adds to the output weight's gradient."""


@dataclass(frozen=True)
class Measured:
    """One block kind at one tensor degree and micro-batch."""

    block: BlockKind
    tp: int
    samples: int
    forward_s: float
    backward_s: float
    activation_bytes: int
    """Kept from forward to backward of one micro-batch, on each tensor rank."""


def block_layout(kind: BlockKind, layers: int, tp: int) -> Layout:
    """A stage that holds nothing but one kind of block."""
    first, end = {"embedding": (0, 0), "layer": (0, min(layers, LAYERS)), "head": (layers, layers)}[kind]
    stage = Stage(0, first, end, kind == "embedding", kind == "head", tp=tp, dp=1, shard=1, first_rank=0)
    return Layout((stage,), micro_batches=1, sequence_parallel=False, recompute=False)


def measure_block(
    world: World, kind: BlockKind, model: ModelSettings, vocab_size: int, length: int, samples: int,
    dtype: torch.dtype, head: Head, repeats: int,
) -> Measured:  # fmt: skip
    """One block kind in a world of `block_layout`. Medians over repeats, the slowest tensor rank counts.

    model: tied embeddings are measured as untied ones, whose head has a weight of its own
    """
    model = replace_tied(model)
    stage = build_stage(world, model, vocab_size, dtype, seed=1)
    device = world.platform.device
    rope = rope_table(model, length, device)
    tokens = torch.randint(0, vocab_size, (samples, length), device=device)
    gradient = torch.randn(length, samples, model.hidden, device=device, dtype=dtype)
    hidden_bytes = gradient.numel() * gradient.element_size()
    forward_s, backward_s, kept = [], [], 0
    for turn in range(repeats + 2):
        hidden = torch.randn(length, samples, model.hidden, device=device, dtype=dtype, requires_grad=True)
        inputs = {"tokens": tokens, "rope": rope} if kind == "embedding" else {"hidden": hidden, "rope": rope}
        if turn == 0:
            with kept_for_backward(list(stage.module.parameters())) as bytes_kept:
                stage.module(inputs)
            kept = bytes_kept[0] + hidden_bytes * (kind == "head")  # the head makes its gradient at once
        world.sum_over_ranks([0.0])  # tensor ranks begin together
        world.platform.synchronize()
        begin = time.perf_counter()
        produced = stage.module(inputs)["hidden"]
        outgoing = gradient
        if kind == "head":
            with torch.no_grad():
                outgoing = head(stage, produced.detach())
        world.platform.synchronize()
        middle = time.perf_counter()
        produced.backward(outgoing)
        world.platform.synchronize()
        end = time.perf_counter()
        if turn >= 2:
            forward_s.append(middle - begin)
            backward_s.append(end - middle)
        stage.buckets.zero_grad_buffer()
    number = world.place.stage.end_layer - world.place.stage.first_layer if kind == "layer" else 1
    slowest = torch.tensor([statistics.median(forward_s), statistics.median(backward_s)], dtype=torch.float64)
    if world.layout.num_ranks > 1:
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    forward, backward = (float(seconds) / number for seconds in slowest)
    return Measured(kind, world.place.stage.tp, samples, forward, backward, kept // number)


def replace_tied(model: ModelSettings) -> ModelSettings:
    """The model with an output weight of its own."""
    return model.model_copy(update={"tied": False})


def slowest_of(parts: list[Measured]) -> Measured:
    """What tensor ranks measured together: the most of everything."""
    return replace(parts[0], activation_bytes=max(part.activation_bytes for part in parts))
