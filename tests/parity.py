"""Training in a layout beside training in one process, from one checkpoint, and the bounds that hold them together."""

from pathlib import Path

import pytest

from tests.worlds import BATCH, GQA, TIED, World, labels_of, make_trainer, run_world, save_checkpoint, tokens_of
from titan.checkpoint.folder import newest_step, step_folder
from titan.checkpoint.load import Checkpoint
from titan.config.model import LayoutSettings, ModelSettings, Precision
from titan.ops.objective import Objective
from titan.train.restore import restore_trainer

STEPS = 30
RATE = 2e-3
START = 5
MODELS = {"gqa": GQA, "tied": TIED, "mha": GQA.model_copy(update={"kv_heads": None})}
ALONE = LayoutSettings()
SOFT = Objective(weight=0.6, temperature=2.0)
History = list[tuple[float, float, float | None]]
"""Cross-entropy, divergence and gradient norm of every step, then the held-out loss."""


def train(
    world: World, layout: LayoutSettings, model: ModelSettings, precision: Precision, soft: bool, batch: int,
    folder: Path, steps: int, save_to: Path | None = None,
) -> History:  # fmt: skip
    """The rank's whole life in these tests: restore the newest checkpoint, then `steps` steps."""
    trainer = make_trainer(world, layout, model, precision, batch=batch)
    start = newest_step(folder)
    assert start is not None
    restore_trainer(trainer, Checkpoint(step_folder(folder, start)))
    history: History = []
    for step in range(start + 1, start + 1 + steps):
        labels = labels_of(step, batch) if soft else None
        result = trainer.step(tokens_of(step, batch), RATE, SOFT if soft else Objective(), labels)
        history.append((result.cross_entropy, result.divergence, result.grad_norm))
    if save_to is not None:
        save_checkpoint(trainer, save_to, start + steps)
    heldout = trainer.evaluate(tokens_of(0, batch)[:10])
    return [*history, (heldout, 0.0, 0.0)]


def begin(world: World, model: ModelSettings, folder: Path) -> None:
    """A few steps of one process, and its checkpoint: moments are not zero when the layouts take over."""
    trainer = make_trainer(world, ALONE, model)
    for step in range(1, START + 1):
        trainer.step(tokens_of(step), RATE, Objective())
    save_checkpoint(trainer, folder, START)


class Parity:
    """parity(layout, ...) -> (history of every rank of the layout, history of one process), from one checkpoint."""

    def __init__(self, factory: pytest.TempPathFactory):
        self.factory = factory
        self.checkpoints: dict[str, Path] = {}
        self.references: dict[tuple[object, ...], History] = {}

    def checkpoint(self, kind: str) -> Path:
        """Folder with the checkpoint that all layouts of a model begin with."""
        if kind not in self.checkpoints:
            folder = self.checkpoints[kind] = self.factory.mktemp(kind)
            run_world(ALONE, begin, MODELS[kind], folder, model=MODELS[kind])
        return self.checkpoints[kind]

    def alone(self, kind: str, precision: Precision, soft: bool, batch: int, steps: int) -> History:
        """What one process does."""
        key = (kind, precision, soft, batch, steps)
        if key not in self.references:
            arguments = (ALONE, MODELS[kind], precision, soft, batch, self.checkpoint(kind), steps)
            (self.references[key],) = run_world(ALONE, train, *arguments, model=MODELS[kind])
        return self.references[key]

    def __call__(
        self, layout: LayoutSettings, kind: str = "gqa", precision: Precision = "fp32", reference: Precision = "fp32",
        soft: bool = False, batch: int = BATCH, steps: int = STEPS,
    ) -> tuple[list[History], History]:  # fmt: skip
        arguments = (layout, MODELS[kind], precision, soft, batch, self.checkpoint(kind), steps)
        many = run_world(layout, train, *arguments, model=MODELS[kind])
        return many, self.alone(kind, reference, soft, batch, steps)


def assert_same(many: list[History], alone: History) -> None:
    """Losses within 1e-5, gradient norms within 1e-4 relative, on every rank."""
    assert alone[0][0] - alone[-2][0] > 0.02, "the reference learned something"
    for history in many:
        assert history == many[0], "every rank reports the same"
    for step, (got, want) in enumerate(zip(many[0], alone, strict=True), START + 1):
        assert got[0] == pytest.approx(want[0], abs=1e-5), f"cross-entropy of step {step}"
        assert got[1] == pytest.approx(want[1], abs=1e-5), f"divergence of step {step}"
        assert got[2] == pytest.approx(want[2], rel=1e-4), f"gradient norm of step {step}"
