"""Between a trainer and a checkpoint: its state as pieces, and back from any layout."""

from collections.abc import Sequence
from typing import Any

import torch

from titan.checkpoint.llama import llama_parameter
from titan.checkpoint.load import Checkpoint
from titan.checkpoint.pieces import Piece, PieceKey
from titan.checkpoint.pretrained import PretrainedWeights
from titan.errors import CheckpointError
from titan.train.optimizer import MOMENTS
from titan.train.trainer import Trainer


def trainer_pieces(trainer: Trainer) -> list[Piece]:
    """What this rank contributes to a checkpoint: every element of every parameter comes from exactly one rank.

    Of a frozen model nothing: its weights stay where they came from.
    """
    place, stage = trainer.world.place, trainer.stage
    pieces: list[Piece] = []
    if trainer.settings.frozen:
        return pieces
    for kept in trainer.optimizer.parameter_states():
        cut = stage.specs[kept.name].axis is not None
        replicated = (place.stage.shard == 1 and place.replica > 0) or (not cut and place.tensor > 0)
        if replicated or stage.is_copy(kept.name):
            continue
        tensor, tp = (place.tensor, place.stage.tp) if cut else (0, 1)
        for kind, values in (("weight", kept.master), *((moment, kept.state[moment]) for moment in MOMENTS)):
            key = PieceKey(kind, kept.name, tensor, tp, kept.start, kept.end)
            pieces.append(Piece(key, values.view(-1)))
    return pieces


def trainer_state(trainer: Trainer) -> dict[str, Any]:
    """What belongs to no parameter: the optimizer's own step count and the loss scale; of a frozen model nothing."""
    if trainer.settings.frozen:
        return {}
    steps = {float(kept.state["step"]) for kept in trainer.optimizer.parameter_states()}
    assert len(steps) <= 1, f"parameters were stepped {steps} times; they share a step tensor"
    return {"optimizer_step": max(steps, default=0.0), "scaler": trainer.optimizer.scalar_state()}


def start_from(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Load weights alone, for a fresh optimizer. Raises CheckpointError for another model."""
    _check_model(trainer, checkpoint)
    _load(trainer, checkpoint, ("weight",))


def load_pretrained(trainer: Trainer, weights: PretrainedWeights) -> None:
    """Give a frozen model its weights, those of a Hugging Face folder that was found to fit."""
    model, vocab_size, place = trainer.settings.model, trainer.settings.vocab_size, trainer.world.place
    with torch.no_grad():
        for name, parameter in trainer.stage.named_parameters().items():
            whole = llama_parameter(name, weights.read, model, vocab_size)
            parameter.copy_(trainer.stage.specs[name].cut(whole, place.tensor, place.stage.tp))


def restore_trainer(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Load weights and optimizer state, whatever layout wrote them. Raises CheckpointError for another model."""
    _check_model(trainer, checkpoint)
    _load(trainer, checkpoint, ("weight", *MOMENTS))
    with torch.no_grad():
        for kept in trainer.optimizer.parameter_states():
            kept.state["step"].fill_(checkpoint.state["optimizer_step"])
    trainer.optimizer.load_scalar_state(checkpoint.state["scaler"])


def _load(trainer: Trainer, checkpoint: Checkpoint, kinds: Sequence[str]) -> None:
    place = trainer.world.place
    with torch.no_grad():
        for kept in trainer.optimizer.parameter_states():
            spec = trainer.stage.specs[kept.name]
            for kind in kinds:
                target = kept.master if kind == "weight" else kept.state[kind]
                whole = checkpoint.whole(kind, kept.name, spec)
                part = spec.cut(whole, place.tensor, place.stage.tp).reshape(-1)[kept.start : kept.end]
                target.view(-1).copy_(part)
    trainer.optimizer.publish_masters()


def _check_model(trainer: Trainer, checkpoint: Checkpoint) -> None:
    saved = checkpoint.manifest["model"] | {"vocab_size": checkpoint.manifest["vocab_size"]}
    own = trainer.settings.model.model_dump() | {"vocab_size": trainer.settings.vocab_size}
    if saved != own:
        different = ", ".join(
            f"{key} {saved.get(key)} there, {own[key]} here" for key in own if saved.get(key) != own[key]
        )
        raise CheckpointError(f"{checkpoint.folder} is of another model: {different}")
