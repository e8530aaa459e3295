"""Real gloo worlds for tests: torch and megatron-core are imported once, then every rank is a fork of this process.

Importing this file sets the process up for CPU, so it must come before anything that imports megatron-core.
"""

import ctypes
import faulthandler
import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # torch.optim imports it on first use; here it costs half a second once, not once a rank
import torch.distributed as dist

from titan.config.settings import LayoutSettings, ModelSettings, OptimizerSettings, Precision
from titan.platform.device import prepare_process, select_platform

CPU = select_platform("cpu")
prepare_process(CPU)

from titan.checkpoint.save import CheckpointWriter  # noqa: E402
from titan.parallel.world import World, join_world  # noqa: E402
from titan.plan.layout import make_layout  # noqa: E402
from titan.tasks.causal_lm import SampleLabels  # noqa: E402
from titan.train.restore import trainer_pieces, trainer_state  # noqa: E402
from titan.train.trainer import Trainer, TrainerSettings  # noqa: E402

VOCAB, LENGTH, BATCH = 500, 64, 16
GQA = ModelSettings(layers=4, hidden=64, heads=4, kv_heads=2, ffn=128)
TIED = GQA.model_copy(update={"tied": True})
GLOO_TIMEOUT_S = 60.0


class ChildFailureError(AssertionError):
    """A rank raised, died or hung; the message ends with its traceback."""


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

    def job(store_path: str, role: str, rank: int) -> Callable[[], Any]:
        def call() -> Any:
            settings, model = roles[role]
            layout = make_layout(model, settings)
            store = dist.FileStore(store_path, layout.num_ranks)
            world = join_world(role, layout, rank, CPU, store, GLOO_TIMEOUT_S)
            result = function(world, *args)
            world.leave()
            return result

        return call

    with tempfile.TemporaryDirectory(prefix="titan-world-") as folder:
        ranks = [(role, rank) for role, (layout, _) in roles.items() for rank in range(layout.ranks)]
        jobs = [job(f"{folder}/{role}.store", role, rank) for role, rank in ranks]
        results = run_processes(jobs, timeout_s)
    return {role: [result for (r, _), result in zip(ranks, results, strict=True) if r == role] for role in roles}


def run_processes(jobs: Sequence[Callable[[], Any]], timeout_s: float = 90.0) -> list[Any]:
    """One forked process a job. The first failure or the time limit kills the rest; every child is reaped."""
    assert not dist.is_initialized(), "the parent of the ranks stays out of every world"
    with tempfile.TemporaryDirectory(prefix="titan-ranks-") as name:
        answers = [Path(name) / f"{index}.pickle" for index in range(len(jobs))]
        running: dict[int, int] = {}
        sys.stdout.flush(), sys.stderr.flush()
        try:
            for index, job in enumerate(jobs):
                pid = os.fork()
                if pid == 0:
                    _be_child(job, answers[index], timeout_s)
                running[pid] = index
            _reap(running, answers, time.monotonic() + timeout_s)
        finally:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return [pickle.loads(answer.read_bytes())[1] for answer in answers]


def _be_child(job: Callable[[], Any], answer: Path, timeout_s: float) -> None:
    """Never returns: the child leaves without the cleaning up that belongs to its parent."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives pytest
        gc.disable()  # nothing of the parent is finalised here
        stacks = open(answer.with_suffix(".stacks"), "w")  # noqa: SIM115
        faulthandler.dump_traceback_later(max(0.5, timeout_s - 1.0), file=stacks)
        try:
            outcome: tuple[bool, Any] = (True, job())
        except BaseException:
            outcome = (False, traceback.format_exc())
        temporary = answer.with_suffix(".tmp")
        temporary.write_bytes(pickle.dumps(outcome))
        temporary.rename(answer)
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(0)


def _reap(running: dict[int, int], answers: Sequence[Path], deadline: float) -> None:
    """Wait for all children; raise for the first that failed."""
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            index = running.pop(pid)
            if not answers[index].exists():
                raise ChildFailureError(f"rank process {index} died with status {status} and no answer")
            good, value = pickle.loads(answers[index].read_bytes())
            if not good:
                raise ChildFailureError(f"rank process {index} failed:\n{value}")
        if time.monotonic() > deadline:
            stacks = [answers[index].with_suffix(".stacks") for index in running.values()]
            seen = "\n".join(path.read_text() for path in stacks if path.exists())
            raise ChildFailureError(f"rank processes {sorted(running.values())} ran out of time:\n{seen}")
        time.sleep(0.002)


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
    """Labels of a made-up teacher: the next token mostly, and a few others."""
    rng = np.random.default_rng(10_000 + step)
    ids = np.argsort(rng.random((batch, LENGTH, VOCAB)), axis=-1)[..., :top_k]
    probability = rng.dirichlet(np.ones(top_k + 1), (batch, LENGTH))[..., :top_k]
    return SampleLabels(ids, np.log(probability).astype(np.float32))


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
