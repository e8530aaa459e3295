"""Checkpoints: any layout loads any other, and another model is refused."""

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.worlds import GQA, TIED, VOCAB, World, make_trainer, run_world, save_checkpoint, tokens_of
from titan.checkpoint.folder import (
    MANIFEST,
    encode_manifest,
    read_manifest,
    step_folder,
)
from titan.checkpoint.load import Checkpoint
from titan.checkpoint.pieces import KINDS, PieceKey
from titan.config.model import LayoutSettings, ModelSettings, Precision
from titan.errors import CheckpointError
from titan.model.parameters import parameter_specs
from titan.ops.objective import Objective
from titan.train.restore import restore_trainer, trainer_pieces

RATE = 2e-3
STEP = 3
LAYOUTS = {
    "alone": LayoutSettings(),
    "tp2-sequence-parallel": LayoutSettings(tp=2, sequence_parallel=True),
    "pp2-uneven": LayoutSettings(pp=2, layers=(1, 3)),
    "dp2": LayoutSettings(dp=2),
    "dp2-sharded": LayoutSettings(dp=2, shard=2),
    "tp2-dp2-sharded": LayoutSettings(tp=2, dp=2, shard=2),
    "pp2-dp2-sharded": LayoutSettings(pp=2, dp=2, shard=2),
}

# --- layouts ---

History = list[tuple[float, float | None]]


def history_of(trainer: Any, steps: range) -> History:
    results = [trainer.step(tokens_of(step), RATE, Objective()) for step in steps]
    return [(result.cross_entropy, result.grad_norm) for result in results]


def weights_of(trainer: Any) -> dict[str, bytes]:
    return {name: p.detach().float().numpy().tobytes() for name, p in trainer.stage.named_parameters().items()}


def train_and_save(
    world: World, layout: LayoutSettings, model: ModelSettings, precision: Precision, folder: Path
) -> Any:
    trainer = make_trainer(world, layout, model, precision)
    history_of(trainer, range(1, STEP + 1))
    save_checkpoint(trainer, folder, STEP)
    history = history_of(trainer, range(STEP + 1, STEP + 4))
    return history, weights_of(trainer), trainer.optimizer.scalar_state()


def load_and_go_on(
    world: World, layout: LayoutSettings, model: ModelSettings, precision: Precision, folder: Path, again: Path
) -> Any:
    trainer = make_trainer(
        world, layout, model, precision, seed=7
    )  # other initial weights: all must come from the file
    restore_trainer(trainer, Checkpoint(step_folder(folder, STEP)))
    save_checkpoint(trainer, again, STEP)
    history = history_of(trainer, range(STEP + 1, STEP + 4))
    return history, weights_of(trainer), trainer.optimizer.scalar_state()


def wholes(folder: Path, model: ModelSettings) -> dict[tuple[str, str], Tensor]:
    checkpoint = Checkpoint(step_folder(folder, STEP))
    specs = parameter_specs(model, VOCAB)
    return {(kind, name): checkpoint.whole(kind, name, specs[name]) for kind in KINDS for name in specs}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """saved(layout name, ...) -> folder of a checkpoint of STEP steps, and how each rank went on."""

    @cache
    def save(name: str, model: ModelSettings = TIED, precision: Precision = "fp32") -> tuple[Path, list[Any]]:
        folder = tmp_path_factory.mktemp(name)
        layout = LAYOUTS[name]
        return folder, run_world(layout, train_and_save, layout, model, precision, folder, model=model)

    yield save


def check_loads(
    saved: Any, source: str, target: str, tmp_path: Path, model: ModelSettings = TIED, precision: Precision = "fp32"
) -> None:
    folder, went_on = saved(source, model, precision)
    layout = LAYOUTS[target]
    ranks = run_world(layout, load_and_go_on, layout, model, precision, folder, tmp_path / target, model=model)
    before, after = wholes(folder, model), wholes(tmp_path / target, model)
    for key, value in before.items():
        assert torch.equal(value, after[key]), f"{key} is not what was saved"
        assert key[0] == "weight" or value.any(), f"{key} was never filled"
    if source == target:
        assert ranks == went_on, "the same layout goes on to the same bits"
    for (loss, norm), (other_loss, other_norm) in zip(ranks[0][0], went_on[0][0], strict=True):
        assert loss == pytest.approx(other_loss, abs=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", ["alone", "tp2-dp2-sharded", "pp2-dp2-sharded"])
def test_any_layout_goes_on_from_any_other(saved: Any, source: str, target: str, tmp_path: Path) -> None:
    check_loads(saved, source, target, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["tp2-sequence-parallel", "pp2-uneven", "dp2", "dp2-sharded"])
def test_the_same_layout_goes_on_to_the_same_bits(saved: Any, source: str, tmp_path: Path) -> None:
    check_loads(saved, source, source, tmp_path, model=GQA)


def test_one_process_goes_on_to_the_same_bits(saved: Any, tmp_path: Path) -> None:
    check_loads(saved, "alone", "alone", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["dp2", "dp2-sharded"])
def test_half_precision_goes_on_to_the_same_bits_with_its_masters_and_its_loss_scale(
    saved: Any, name: str, precision: Precision, tmp_path: Path
) -> None:
    check_loads(saved, name, name, tmp_path, precision=precision)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [("dp2", "dp2-sharded"), ("dp2-sharded", "dp2")])
def test_a_half_precision_model_takes_its_masters_into_another_layout(
    saved: Any, source: str, target: str, tmp_path: Path
) -> None:
    check_loads(saved, source, target, tmp_path, precision="bf16")


def keys_of(world: World, layout: LayoutSettings, model: ModelSettings) -> list[PieceKey]:
    return [piece.key for piece in trainer_pieces(make_trainer(world, layout, model))]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("model", [GQA, TIED], ids=["gqa", "tied"])
def test_every_element_of_every_parameter_is_saved_exactly_once(layout: LayoutSettings, model: ModelSettings) -> None:
    specs = parameter_specs(model, VOCAB)
    count = {(kind, name): torch.zeros(spec.shape) for kind in KINDS for name, spec in specs.items()}
    for keys in run_world(layout, keys_of, layout, model, model=model):
        for key in keys:
            part = torch.zeros(specs[key.name].local_shape(key.tp)).view(-1)
            part[key.start : key.end] = 1
            whole = torch.zeros(specs[key.name].shape)
            specs[key.name].paste(whole, part, key.tensor, key.tp)
            count[key.kind, key.name] += whole
    for where, times in count.items():
        assert (times == 1).all(), f"{where}: elements saved {sorted(set(times.view(-1).tolist()))} times"


# --- another model ---

OTHERS = {
    "hidden": GQA.model_copy(update={"hidden": 32}),
    "layers": GQA.model_copy(update={"layers": 3}),
    "tied": TIED,
    "kv_heads": GQA.model_copy(update={"kv_heads": 4}),
    "rope_theta": GQA.model_copy(update={"rope_theta": 5000.0}),
}


def try_to_restore(world: World, model: ModelSettings, folder: Path, step: int) -> str:
    try:
        restore_trainer(make_trainer(world, LAYOUTS["alone"], model), Checkpoint(step_folder(folder, step)))
    except CheckpointError as error:
        return str(error)
    return "it loaded"


@pytest.mark.parametrize("field", OTHERS)
def test_a_checkpoint_of_another_model_is_refused_and_says_what_differs(saved: Any, field: str) -> None:
    folder, _ = saved("alone", GQA)
    (message,) = run_world(LAYOUTS["alone"], try_to_restore, OTHERS[field], folder, STEP, model=OTHERS[field])
    assert str(folder) in message and field in message and str(getattr(OTHERS[field], field)) in message


def test_a_checkpoint_of_another_vocabulary_is_refused_though_padded_shapes_agree(saved: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(saved("alone", GQA)[0], tmp_path / "copy")
    place = step_folder(folder, STEP)
    (place / MANIFEST).write_bytes(encode_manifest(read_manifest(place) | {"vocab_size": VOCAB + 1}))
    (message,) = run_world(LAYOUTS["alone"], try_to_restore, GQA, folder, STEP)
    assert str(folder) in message and f"vocab_size {VOCAB + 1} there, {VOCAB} here" in message
