"""Real gloo worlds for tests: torch and megatron-core are imported once, then every rank is a fork of this process.

Importing this file sets the process up for CPU, so it must come before anything that imports megatron-core.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # torch.optim imports it on first use; here it costs half a second once, not once a rank

from titan.config.model import LayoutSettings, ModelSettings, OptimizerSettings, Precision
from titan.platform.device import prepare_process, select_platform

CPU = select_platform("cpu")
prepare_process(CPU)

from titan.checkpoint.save import CheckpointWriter  # noqa: E402
from titan.errors import WorkerError  # noqa: E402
from titan.parallel import local  # noqa: E402
from titan.parallel.local import GLOO_TIMEOUT_S  # noqa: E402
from titan.parallel.world import World  # noqa: E402
from titan.plan.layout import make_layout  # noqa: E402
from titan.tasks.sample_labels import SampleLabels  # noqa: E402
from titan.train.restore import trainer_pieces, trainer_state  # noqa: E402
from titan.train.trainer import Trainer, TrainerSettings  # noqa: E402

VOCAB, LENGTH, BATCH = 500, 64, 16
GQA = ModelSettings(layers=4, hidden=64, heads=4, kv_heads=2, ffn=128)
TIED = GQA.model_copy(update={"tied": True})


ChildFailureError = WorkerError
"""What a rank that raised, died or hung becomes; the message ends with its traceback."""


def run_world(
    layout: LayoutSettings,
    function: Callable[..., Any],
    *args: Any,
    model: ModelSettings = GQA,
    role: str = "teacher",
    timeout_s: float = 90.0,
) -> list[Any]:
    """Call `function(world, *args)` on every rank of a world of that layout; results in rank order."""
    return run_worlds({role: (layout, model)}, function, *args, timeout_s=timeout_s)[role]


def run_worlds(
    roles: dict[str, tuple[LayoutSettings, ModelSettings]],
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 90.0,
) -> dict[str, list[Any]]:
    """Several roles side by side, each in its own world; results by role, in rank order."""
    layouts = {role: make_layout(model, settings) for role, (settings, model) in roles.items()}
    return local.run_worlds(layouts, CPU, function, *args, timeout_s=timeout_s)


def run_processes(jobs: Sequence[Callable[[], Any]], timeout_s: float = 90.0) -> list[Any]:
    """One forked process a job."""
    return local.run_processes(jobs, timeout_s)


def make_trainer(
    world: World,
    layout: LayoutSettings,
    model: ModelSettings = GQA,
    precision: Precision = "fp32",
    optimizer: OptimizerSettings | None = None,
    batch: int = BATCH,
    seed: int = 1,
) -> Trainer:
    """The tiny trainer that most tests use."""
    settings = TrainerSettings(model, layout, optimizer or OptimizerSettings(), precision, VOCAB, LENGTH, batch, seed)
    torch.manual_seed(1000 + world.place.rank)  # nothing may depend on a rank's own random state
    return Trainer(world, settings)


def tokens_of(step: int, batch: int = BATCH) -> np.ndarray:
    """int64 [batch, LENGTH + 1]: text that a model can learn, so that losses fall and norms move."""
    rng = np.random.default_rng(step)
    start = rng.integers(0, VOCAB, (batch, 1))
    stride = rng.integers(1, 8, (batch, 1))
    clean = (start + stride * np.arange(LENGTH + 1)) % VOCAB
    noise = rng.integers(0, VOCAB, clean.shape)
    return np.where(rng.random(clean.shape) < 0.1, noise, clean)


def labels_of(step: int, batch: int = BATCH, top_k: int = 4) -> SampleLabels:
    """Labels of a made-up teacher: some ids of which it is sure, and two draws from the rest of each token."""
    rng = np.random.default_rng(10_000 + step)
    ids = np.argsort(rng.random((batch, LENGTH, VOCAB)), axis=-1)[..., : top_k + 2]
    probability = rng.dirichlet(np.ones(top_k + 1), (batch, LENGTH))
    head, tail = probability[..., :top_k], probability[..., top_k:]
    drawn = np.log(tail * rng.uniform(0.05, 0.5, (batch, LENGTH, 2)))
    return SampleLabels(
        ids[..., :top_k].astype(np.int32),
        np.log(head).astype(np.float32),
        "bucket",
        ids[..., top_k:].astype(np.int32),
        drawn.astype(np.float32),
        (tail[..., 0] / 2).astype(np.float32),
    )


def save_checkpoint(trainer: Trainer, folder: Path, step: int, keep: int = 9) -> None:
    """What a role saves, without the role."""
    world = trainer.world
    writer = CheckpointWriter(folder, world.place.rank, world.layout.num_ranks, keep, GLOO_TIMEOUT_S)
    settings = trainer.settings
    manifest = {
        "role": world.role,
        "model": settings.model.model_dump(),
        "vocab_size": settings.vocab_size,
        "state": trainer_state(trainer),
    }
    writer.save(step, trainer_pieces(trainer), manifest)
    writer.wait()
    world.sum_over_ranks([0.0])  # complete once every rank is here
