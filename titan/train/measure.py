"""Measures what the blocks of a model cost on this device: what a profile is made of.

Every block is run alone as a pipeline stage would run it, in a world of `tp` ranks, with the engine's own operations.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titan.config.model import OptimizerSettings
from titan.config.planning import BlockSettings, ShapeSettings, TaskSettings
from titan.model.stage import gradient_buffer, rope_table
from titan.ops.objective import Objective
from titan.parallel.edge import Tensors
from titan.parallel.link import LinkTime, measure_transport
from titan.parallel.live_bytes import LiveBytes, kept_for_backward
from titan.parallel.local import run_worlds
from titan.parallel.stage import ParallelStage, build_stage
from titan.parallel.world import World
from titan.plan.layout import Layout, Stage
from titan.plan.profile import BlockKind
from titan.platform.device import Platform
from titan.tasks.causal_lm import MicroBatch, run_task_head, vocab_shard
from titan.train.optimizer import RoleOptimizer
from titan.train.trainer import DTYPES

KINDS: tuple[BlockKind, ...] = ("embedding", "layer", "head")
LAYERS = 2
"""Layers measured together: with one alone the passes of a small model are mostly the calls around it."""
LEAST_REPEATS, WARM_UP, MEASURE_S = 8, 3, 0.4
TIMEOUT_S = 300.0


def block_layout(kind: BlockKind, layers: int, tp: int) -> Layout:
    """A stage that holds nothing but one kind of block."""
    first, end = {"embedding": (0, 0), "layer": (0, min(layers, LAYERS)), "head": (layers, layers)}[kind]
    stage = Stage(0, first, end, kind == "embedding", kind == "head", tp=tp, dp=1, shard=1, first_rank=0)
    return Layout((stage,), micro_batches=1, sequence_parallel=False, recompute=False)


def measure_shape(
    platform: Platform, kind: str, task: TaskSettings, tensor: Sequence[int], samples: Sequence[int], together: int = 1
) -> tuple[ShapeSettings, float]:
    """All blocks of a role's model on this device, and the gigabytes a second that an optimizer's update goes through.

    kind: what to call this device;  tensor: degrees;  samples: sizes of a replica's micro-batch
    together: devices of this host that compute at the same time, as they will in a run: they share memory and power
    """
    blocks = []
    update_gb_per_s = 0.0
    for tp, block in itertools.product(tensor, KINDS):
        layouts = {str(index): block_layout(block, task.model.layers, tp) for index in range(max(1, together // tp))}
        answers = run_worlds(layouts, platform, _measure_all, block, task, tuple(samples), timeout_s=TIMEOUT_S)
        everyone = [answer for world in answers.values() for answer in world]
        ranks = zip(*(costs for costs, _ in everyone), strict=True)
        blocks += [_settings(kind, block, tp, costs) for costs in ranks]
        if block == "layer" and tp == tensor[0]:
            update_gb_per_s = min(speed for _, speed in everyone)
    model = task.model
    shape = ShapeSettings(
        hidden=model.hidden, heads=model.heads, kv_heads=model.num_kv_heads, ffn=model.ffn, vocab_size=task.vocab_size,
        sequence_length=task.sequence_length, precision=task.precision, blocks=tuple(blocks),
    )  # fmt: skip
    return shape, update_gb_per_s


@dataclass(frozen=True)
class Measured:
    """One block at one micro-batch on one tensor rank."""

    samples: int
    forward_s: float
    backward_s: float
    activation_bytes: int
    workspace_bytes: int


def _settings(kind: str, block: BlockKind, tp: int, costs: Sequence[Measured]) -> BlockSettings:
    """What ranks measured at the same time: their mean seconds, and the most bytes."""
    return BlockSettings(
        kind=kind,
        block=block,
        tp=tp,
        samples=costs[0].samples,
        forward_s=statistics.mean(cost.forward_s for cost in costs),
        backward_s=statistics.mean(cost.backward_s for cost in costs),
        activation_bytes=max(cost.activation_bytes for cost in costs),
        workspace_bytes=max(cost.workspace_bytes for cost in costs),
    )


def _measure_all(
    world: World, block: BlockKind, task: TaskSettings, samples: tuple[int, ...]
) -> tuple[list[Measured], float]:
    """On one tensor rank: a block at every micro-batch, and how fast its optimizer goes through its state."""
    dtype = DTYPES[task.precision]
    # a tied model is measured as an untied one, whose head has a weight of its own
    model = task.model.model_copy(update={"tied": False})
    stage = build_stage(world, model, task.vocab_size, dtype, seed=1)
    costs = [_measure(world, stage, block, task, count, dtype) for count in samples]
    return costs, _update_speed(stage, dtype)


def _measure(
    world: World, stage: ParallelStage, block: BlockKind, task: TaskSettings, samples: int, dtype: torch.dtype
) -> Measured:
    device, length, width = world.platform.device, task.sequence_length, task.model.hidden
    tokens = torch.randint(0, task.vocab_size, (samples, length), device=device)
    gradient = torch.randn(length, samples, width, device=device, dtype=dtype)
    shard = vocab_shard(stage.module, task.vocab_size, world.groups.tp) if block == "head" else None
    batch = MicroBatch(tokens, tokens, torch.ones(samples, length, device=device), None)
    inputs: Tensors = {"tokens": tokens, "rope": rope_table(task.model, length, device)}
    if block != "embedding":
        inputs["hidden"] = torch.randn(length, samples, width, device=device, dtype=dtype, requires_grad=True)

    def forward() -> tuple[Tensor, Tensor]:
        produced = stage.module(inputs)["hidden"]
        if shard is None:
            return produced, gradient
        with torch.no_grad():
            result = run_task_head(stage.module, produced.detach(), batch, shard, Objective(), grad_scale=1.0)
        assert result.grad_hidden_ND is not None
        return produced, result.grad_hidden_ND

    kept, workspace = _bytes(stage, forward, block == "head")
    forward_s: list[float] = []
    backward_s: list[float] = []
    begin_all = time.perf_counter()
    while len(forward_s) < LEAST_REPEATS or world.sum_over_ranks([time.perf_counter() - begin_all < MEASURE_S])[0]:
        world.platform.synchronize()
        begin = time.perf_counter()
        produced, outgoing = forward()
        world.platform.synchronize()
        middle = time.perf_counter()
        torch.autograd.backward(produced, outgoing)
        world.platform.synchronize()
        forward_s.append(middle - begin)
        backward_s.append(time.perf_counter() - middle)
    stage.buckets.zero_grad_buffer()
    layers = len(stage.module.layers) if block == "layer" else 1
    forward_s, backward_s = forward_s[WARM_UP:], backward_s[WARM_UP:]
    return Measured(
        samples=samples,
        forward_s=statistics.median(forward_s) / layers,
        backward_s=statistics.median(backward_s) / layers,
        activation_bytes=kept // layers,
        workspace_bytes=workspace,
    )


def _bytes(stage: ParallelStage, forward: Callable[[], tuple[Tensor, Tensor]], is_head: bool) -> tuple[int, int]:
    """What a forward pass keeps, and the most that either pass needs beside it."""
    with kept_for_backward(list(stage.module.parameters())) as kept:
        produced, outgoing = forward()
    held = kept[0] + is_head * outgoing.numel() * outgoing.element_size()  # the head makes its gradient at once
    torch.autograd.backward(produced, outgoing)
    del produced, outgoing
    parameters = list(stage.module.parameters())
    with LiveBytes([*parameters, *(gradient_buffer(parameter) for parameter in parameters)]) as live:
        produced, outgoing = forward()
        torch.autograd.backward(produced, outgoing)
        del produced, outgoing
    return held, max(0, live.peak - held)


def _update_speed(stage: ParallelStage, dtype: torch.dtype) -> float:
    """Gigabytes of weights, gradients and moments a second; state as titan.plan.memory counts it."""
    optimizer = RoleOptimizer(stage, OptimizerSettings(), dtype)
    state = sum(p.numel() for p in stage.module.parameters()) * (16.0 if dtype == torch.float32 else 18.0)
    seconds = []
    for _ in range(LEAST_REPEATS):
        begin = time.perf_counter()
        optimizer.zero_gradients()
        optimizer.step(1e-6)
        stage.world.platform.synchronize()
        seconds.append(time.perf_counter() - begin)
    return state / statistics.median(seconds[WARM_UP:]) / 1e9


def measure_link(platform: Platform) -> tuple[float, float]:
    """Seconds before the first byte arrives and gigabytes a second, between two ranks here by host transport."""
    ends = tuple(Stage(i, i, i + 1, i == 0, i == 1, tp=1, dp=1, shard=1, first_rank=i) for i in range(2))
    layout = Layout(ends, micro_batches=1, sequence_parallel=False, recompute=False, transport="host")
    found = run_worlds({"link": layout}, platform, _measure_link, timeout_s=TIMEOUT_S)["link"][0]
    return found.latency_s, found.bytes_per_s / 1e9


def _measure_link(world: World) -> LinkTime:
    return measure_transport(world.transport, world.place.rank, world.platform.device)
