"""megatron-core's silent traps on CPU, one test each: what goes wrong without our care, and that we take it."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import titan
from tests.worlds import (
    BATCH,
    CPU,
    GQA,
    LENGTH,
    TIED,
    VOCAB,
    World,
    make_trainer,
    run_processes,
    run_world,
    run_worlds,
    save_checkpoint,
    tokens_of,
)
from titan.checkpoint.folder import step_folder
from titan.checkpoint.load import Checkpoint
from titan.config.model import LayoutSettings, OptimizerSettings
from titan.model.layer_spec import RMSNorm, transformer_config
from titan.model.parameters import initial_value, parameter_specs
from titan.ops.objective import Objective
from titan.platform import megatron_on_cpu
from titan.train.restore import restore_trainer
from titan.train.trainer import Trainer

ALONE, SHARDED = LayoutSettings(), LayoutSettings(dp=2, shard=2)
ROOT = Path(titan.__file__).parent


def train(trainer: Trainer, first: int, last: int) -> list[float]:
    steps = range(first, last + 1)
    return [trainer.step(tokens_of(step), 2e-3, Objective()).cross_entropy for step in steps]


# --- one `step` tensor for all parameters ---


def sharded_run(world: World, folder: Path) -> list[float]:
    trainer = make_trainer(world, SHARDED)
    train(trainer, 1, 3)
    save_checkpoint(trainer, folder, 3)
    return train(trainer, 4, 8)


def resumed_run(world: World, layout: LayoutSettings, folder: Path, share_steps: bool) -> tuple[list[float], int, int]:
    """Losses after a restore, and how many step tensors and parameters; `share_steps` is how megatron-core loads."""
    trainer = make_trainer(world, layout)
    restore_trainer(trainer, Checkpoint(step_folder(folder, 3)))
    kept = list(trainer.optimizer.parameter_states())
    if share_steps:
        for state in kept:
            state.state["step"] = kept[0].state["step"]
    own = len({id(state.state["step"]) for state in kept})
    return train(trainer, 4, 8), own, len(kept)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [SHARDED, ALONE], ids=["sharded", "alone"])
def test_every_parameter_has_a_step_of_its_own_after_loading_a_sharded_optimizer(
    layout: LayoutSettings, tmp_path: Path
) -> None:
    went_on = run_world(SHARDED, sharded_run, tmp_path)[0]
    good, distinct, parameters = run_world(layout, resumed_run, layout, tmp_path, False)[0]
    assert distinct == parameters > 10
    assert good == pytest.approx(went_on, abs=1e-5)
    bad, distinct, _ = run_world(layout, resumed_run, layout, tmp_path, True)[0]
    assert distinct == 1
    assert max(abs(a - b) for a, b in zip(bad, went_on, strict=True)) > 1e-3, "sharing diverges, and silently"


# --- what must be installed ---


def test_psutil_is_declared_and_there_because_megatron_saves_hang_without_it() -> None:
    declared = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    assert any(line.split(">")[0].strip() == "psutil" for line in declared)
    assert importlib.import_module("psutil").Process().is_running()


# --- groups ---


def use_no_global_group(world: World, role_layouts: dict[str, LayoutSettings]) -> tuple[float, list[list[int]]]:
    """A step while megatron-core's global state is as it was born; ranks of every group there is in this process."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    trainer = make_trainer(world, role_layouts[world.role], TIED)
    (loss,) = train(trainer, 1, 1)
    assert not parallel_state.is_initialized()
    assert parallel_state._TENSOR_MODEL_PARALLEL_GROUP is None
    with pytest.raises(AssertionError, match="not initialized"):  # what we must not use, because it looks there
        vocab_parallel_cross_entropy(torch.zeros(2, 1, 8), torch.zeros(2, 1, dtype=torch.int64))
    known = dist.distributed_c10d._world.pg_group_ranks.values()
    return loss, sorted(sorted(ranks) for ranks in known)


@pytest.mark.slow
def test_two_roles_train_side_by_side_without_a_global_or_common_group() -> None:
    layouts = {"teacher": LayoutSettings(tp=2, pp=2), "student": LayoutSettings(dp=2)}
    worlds = run_worlds({role: (layout, TIED) for role, layout in layouts.items()}, use_no_global_group, layouts)
    assert [len(ranks) for ranks in worlds.values()] == [4, 2]
    losses = {loss for ranks in worlds.values() for loss, _ in ranks}
    assert max(losses) - min(losses) < 1e-5
    for role, ranks in worlds.items():
        for _, groups in ranks:
            assert max(max(group) for group in groups) == layouts[role].ranks - 1, "a group has ranks of its role alone"
            assert len(groups) > 4


def test_the_executor_is_our_own_so_batched_messages_cannot_meet_interleaving() -> None:
    """batch_p2p with two stages and interleaving gives wrong gradients without an error."""
    for path in ROOT.rglob("*.py"):
        assert "batch_isend_irecv" not in path.read_text(), f"{path} batches its messages"
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = getattr(node, "module", None) or ""
            for name in (module, *(f"{module}.{name}" for name in names), *names):
                from_megatron = module.startswith("megatron") or name.startswith("megatron")
                assert "pipeline_parallel" not in name, f"{path} imports {name}"
                assert not (from_megatron and "schedules" in name), f"{path} imports {name}"


# --- gradients ---


def gradient_alias(world: World, careful: bool) -> tuple[list[float | None], bool]:
    """Gradient norms at a learning rate of zero; whether .grad was the buffer itself after a step."""
    trainer = make_trainer(world, ALONE)
    if not careful:
        trainer.optimizer.zero_gradients = trainer.stage.buckets.zero_grad_buffer  # type: ignore[method-assign]
    norms: list[float | None] = []
    alias = False
    for _ in range(3):
        norms.append(trainer.step(tokens_of(1), 0.0, Objective()).grad_norm)
        parameters = trainer.stage.module.parameters()
        alias = any(p.grad is not None and p.grad.data_ptr() == p.main_grad.data_ptr() for p in parameters)
    return norms, alias


def test_a_gradient_that_aliases_its_buffer_does_not_count_twice() -> None:
    ((norms, alias),) = run_world(ALONE, gradient_alias, True)
    assert alias, "the fp32 optimizer still lets .grad be the buffer"
    assert norms[0] == norms[1] == norms[2]
    ((norms, _),) = run_world(ALONE, gradient_alias, False)
    assert norms[1] is not None and norms[0] is not None
    assert norms[1] > 1.5 * norms[0], "without clearing .grad the second step's gradient is wrong"


def whole_gradient_norm() -> float:
    """One process, by hand, from the gradients themselves."""

    def norm(world: World) -> float:
        trainer = make_trainer(world, ALONE, TIED)
        trainer.step(tokens_of(1), 0.0, Objective())
        squares = [p.main_grad.double().square().sum() for p in trainer.stage.module.parameters()]
        return float(torch.stack(squares).sum().sqrt())

    return run_world(ALONE, norm, model=TIED)[0]


def counted(world: World, layout: LayoutSettings, forget: bool) -> tuple[float | None, dict[str, tuple[bool, bool]]]:
    """The optimizer's gradient norm, and what megatron-core is told of each parameter."""
    trainer = make_trainer(world, layout, TIED)
    named = trainer.stage.named_parameters()
    told = {name: (p.tensor_model_parallel, p.shared) for name, p in named.items()}
    if forget:
        for parameter in named.values():
            parameter.tensor_model_parallel, parameter.shared = True, False
    return trainer.step(tokens_of(1), 0.0, Objective()).grad_norm, told


@pytest.mark.parametrize(
    "layout",
    [LayoutSettings(tp=2), LayoutSettings(pp=2), LayoutSettings(tp=2, dp=2, shard=2), LayoutSettings(pp=2, dp=2)],
    ids=["tp2", "pp2", "tp2-dp2-sharded", "pp2-dp2"],
)
def test_the_gradient_norm_counts_every_parameter_once(layout: LayoutSettings) -> None:
    want = whole_gradient_norm()
    specs = parameter_specs(TIED, VOCAB)
    for rank, (norm, told) in enumerate(run_world(layout, counted, layout, False, model=TIED)):
        assert norm == pytest.approx(want, rel=1e-5)
        last_stage = layout.pp > 1 and rank >= layout.ranks // 2
        replicated = layout.shard == 1 and rank // layout.tp % layout.dp > 0
        for name, (is_slice, is_copy) in told.items():
            assert is_slice == (specs[name].axis is not None)
            assert is_copy == (replicated or (name == "embedding.weight" and last_stage))


@pytest.mark.parametrize("layout", [LayoutSettings(tp=2), LayoutSettings(dp=2)], ids=["norms", "replicas"])
def test_without_being_told_megatron_counts_copies_twice(layout: LayoutSettings) -> None:
    norm, _ = run_world(layout, counted, layout, True, model=TIED)[0]
    assert norm is not None and norm > 1.0001 * whole_gradient_norm()


def norm_scales(world: World, decay: float) -> dict[str, Tensor]:
    trainer = make_trainer(world, ALONE, optimizer=OptimizerSettings(weight_decay=decay))
    plain = trainer.optimizer.step

    def step(rate: float) -> float | None:
        for parameter in trainer.stage.module.parameters():
            parameter.main_grad.zero_()
        return plain(rate)

    trainer.optimizer.step = step  # type: ignore[method-assign]
    trainer.step(tokens_of(1), 0.1, Objective())
    return {name: value.detach() for name, value in trainer.stage.named_parameters().items()}


def test_norms_do_not_decay_though_megatron_leaves_that_to_a_scheduler_that_we_do_not_use() -> None:
    """Without a gradient a step is decay alone."""
    (weights,) = run_world(ALONE, norm_scales, 0.5)
    for name, spec in parameter_specs(GQA, VOCAB).items():
        shrunk = 1.0 if spec.std is None else 1.0 - 0.1 * 0.5
        torch.testing.assert_close(weights[name], initial_value(name, spec, 1) * shrunk, rtol=1e-6, atol=1e-8)


# --- norms ---


def test_our_norm_works_on_a_slice_of_the_sequence_and_megatrons_refuses() -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = transformer_config(GQA, torch.float32, 2, sequence_parallel=True)
    assert config.sequence_parallel
    with pytest.raises(AssertionError):
        WrappedTorchNorm(config, GQA.hidden, eps=1e-5)
    ours = RMSNorm(config, GQA.hidden, 1e-5)
    theirs = WrappedTorchNorm(transformer_config(GQA, torch.float32, 1, False), GQA.hidden, eps=1e-5)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(GQA.hidden))
        theirs.weight.copy_(ours.weight)
    x = torch.randn(LENGTH, 3, GQA.hidden) * 7
    want = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * ours.weight
    for normed in (ours(x, None)[0], theirs(x)):
        torch.testing.assert_close(normed, want, rtol=1e-5, atol=1e-5)
    slices = torch.cat([ours(part, None)[0] for part in x.chunk(2)])
    assert torch.equal(slices, ours(x, None)[0])


def norm_gradients(world: World, layout: LayoutSettings) -> dict[str, Tensor]:
    trainer = make_trainer(world, layout)
    trainer.step(tokens_of(1), 0.0, Objective())
    named = trainer.stage.named_parameters()
    return {name: p.main_grad.clone() for name, p in named.items() if trainer.stage.specs[name].axis is None}


def test_the_norms_of_a_cut_sequence_have_the_gradient_of_the_whole() -> None:
    (want,) = run_world(ALONE, norm_gradients, ALONE)
    layout = LayoutSettings(tp=2, sequence_parallel=True)
    for gradients in run_world(layout, norm_gradients, layout):
        assert set(gradients) == set(want)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-6)


# --- the adapter ---


def patched_names() -> dict[str, int]:
    cuda: Any = torch.cuda
    names = {f"torch.{name}": id(getattr(torch, name)) for name in megatron_on_cpu._FACTORIES}
    for name in (
        "current_device",
        "synchronize",
        "set_device",
        "empty_cache",
        "stream",
        "manual_seed",
        "get_rng_state",
    ):
        names[f"torch.cuda.{name}"] = id(getattr(cuda, name))
    return names | {"type": id(torch.Tensor.type), "Tensor.cuda": id(torch.Tensor.cuda)}


def test_installing_twice_is_harmless() -> None:
    before = patched_names()
    megatron_on_cpu.install()
    megatron_on_cpu.install()
    assert patched_names() == before, "no wrapper around a wrapper"
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2).type() == "torch.cuda.FloatTensor"


FRESH = """
import torch
from titan.platform.device import prepare_process, select_platform
prepare_process(select_platform("cpu"))
with torch.device("cpu"):
    assert torch.zeros(2, device="cuda").device.type == torch.ones(2).device.type == "cpu"
with torch.device("meta"):
    assert torch.zeros(2).device.type == "meta"
import titan.train.trainer
"""


@pytest.mark.slow
def test_a_process_that_has_imported_nothing_but_torch_can_be_prepared() -> None:
    """As a rank's is: this one has torch._dynamo and more, which hides what the adapter forgets to import."""
    command = [sys.executable, "-W", "ignore", "-c", FRESH]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr


def test_replaced_functions_are_distinct_objects() -> None:
    """torch.compile asserts that no two torch functions are one object."""
    identities = list(patched_names().values())
    assert len(set(identities)) == len(identities)


def compile_something() -> tuple[bool, bool]:
    calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    def function(x: Tensor) -> Tensor:
        return torch.zeros_like(x) + torch.ones(3) * x.sin()

    x = torch.randn(3)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    return torch.allclose(compiled(x), function(x)), len(calls) == 1


def test_torch_compile_is_itself_again_and_works() -> None:
    assert torch.compile.__module__ == "torch"
    assert run_processes([compile_something])[0] == (True, True)


def test_a_cpu_process_has_random_states_that_come_back() -> None:
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    assert CPU.kind == "cpu" and BATCH == 16
