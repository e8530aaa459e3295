"""Worlds on this machine without Ray: every rank is a fork of this process, which has imported torch once.

For measuring a profile, benchmarks and tests. titan.platform.device.prepare_process must have set the process up.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from titan.errors import WorkerError
from titan.parallel.world import join_world
from titan.plan.layout import Layout
from titan.platform.device import Platform

Job = Callable[[], Any]
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG
GLOO_TIMEOUT_S = 60.0


def run_worlds(
    layouts: Mapping[str, Layout], platform: Platform, function: Callable[..., Any], *args: Any, timeout_s: float
) -> dict[str, list[Any]]:
    """Call `function(world, *args)` on every rank of several roles, each in its own world.

    returns: results by role, in rank order
    raises:  WorkerError with the traceback of the first rank that failed, died or ran out of time
    """

    def job(store_path: str, role: str, rank: int) -> Job:
        def call() -> Any:
            layout = layouts[role]
            store = FileStore(store_path, layout.num_ranks)
            world = join_world(role, layout, rank, platform, store, min(timeout_s, GLOO_TIMEOUT_S))
            result = function(world, *args)
            world.leave()
            return result

        return call

    with tempfile.TemporaryDirectory(prefix="titan-world-") as folder:
        ranks = [(role, rank) for role, layout in layouts.items() for rank in range(layout.num_ranks)]
        jobs = [job(f"{folder}/{role}.store", role, rank) for role, rank in ranks]
        results = run_processes(jobs, timeout_s)
    return {role: [result for (r, _), result in zip(ranks, results, strict=True) if r == role] for role in layouts}


def run_processes(jobs: Sequence[Job], timeout_s: float) -> list[Any]:
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


def _be_child(job: Job, answer: Path, timeout_s: float) -> NoReturn:
    """Never returns: the child leaves without the cleaning up that belongs to its parent."""
    try:
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
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
                raise WorkerError(f"rank process {index} died with status {status} and no answer")
            good, value = pickle.loads(answers[index].read_bytes())
            if not good:
                raise WorkerError(f"rank process {index} failed:\n{value}")
        if time.monotonic() > deadline:
            stacks = [answers[index].with_suffix(".stacks") for index in running.values()]
            seen = "\n".join(path.read_text() for path in stacks if path.exists())
            raise WorkerError(f"rank processes {sorted(running.values())} ran out of time:\n{seen}")
        time.sleep(0.002)
