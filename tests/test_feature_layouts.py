"""Features in every layout: a teacher hands out and a student learns what one process would, to 1e-5."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.worlds import BATCH, GQA, LENGTH, VOCAB, World, make_trainer, run_world, save_checkpoint, tokens_of
from titan.checkpoint.folder import step_folder
from titan.checkpoint.llama import llama_tensors
from titan.checkpoint.load import Checkpoint
from titan.config.distillation import FeatureLabelSettings, LabelSettings
from titan.config.model import LayoutSettings, ModelSettings, OptimizerSettings, StageSettings
from titan.config.settings import DataSettings, RunConfig, RunSettings, TeacherSettings
from titan.distill.features.codec import FeatureLabels, decode_step, rows
from titan.distill.features.losses import FeatureObjective, feature_loss
from titan.distill.features.rank import FeatureLearner, FeatureSender
from titan.distill.features.stream import FeatureReader
from titan.errors import CheckpointError
from titan.model.auxiliary import Auxiliary
from titan.model.capture import Capture, FeatureName, take_features
from titan.model.stage import gradient_buffer
from titan.ops.norm import rms_norm_twin
from titan.ops.objective import Objective
from titan.ops.rope import rope_twin
from titan.train.restore import restore_trainer
from titan.train.trainer import StepResult, Trainer, TrainerSettings

ALONE = LayoutSettings()
LAYOUTS = {
    "tp2": LayoutSettings(tp=2, micro_batches=2),
    "tp2 sequence parallel": LayoutSettings(tp=2, sequence_parallel=True, recompute=True),
    "pp2 dp2": LayoutSettings(pp=2, dp=2, layers=(1, 3), micro_batches=2),
    "tp2 pp2 interleaved": LayoutSettings(tp=2, pp=2, chunks=2, schedule="interleaved", micro_batches=2),
    "unequal replicas of fixed shape": LayoutSettings(
        stages=(StageSettings(layers=(3,), dp=2, shares=(3, 1), static_shapes=True), StageSettings(layers=(1,))),
        micro_batches=2,
    ),
}
RATE, STEPS = 2e-3, 2
TEACHER = ModelSettings(layers=4, hidden=96, heads=6, kv_heads=2, ffn=128)
EVERYTHING: frozenset[FeatureName] = frozenset({"query", "key", "value", "hidden"})
TAUGHT_LAYER = 2
RUN = RunConfig(
    run=RunSettings(name="features", steps=STEPS),
    data=DataSettings(sources=("none",), sequence_length=LENGTH, batch_size=BATCH),
    teacher=TeacherSettings(model=TEACHER),
    labels=LabelSettings(features=FeatureLabelSettings(precision="fp16")),
)
"""A number that two layouts round to neighbours differs by 2^-11 in fp16; in bf16 it would by 2^-8, hiding faults."""


@dataclass(frozen=True)
class Case:
    """A student that learns something from features."""

    layer: int
    objective: FeatureObjective
    auxiliary: Auxiliary


ALL_LOSSES = Case(
    1,
    FeatureObjective(2, query=0.5, key=0.4, value=0.3, attention=1.0, attention_map=2.0, hint=5.0, affinity=0.7),
    Auxiliary(hint_layer=1, hint_width=TEACHER.hidden),
)
OTHER_CASES = {
    "relation heads across tensor ranks": Case(2, FeatureObjective(1, query=1.0, attention=1.0), Auxiliary()),
    "auxiliary layer": Case(GQA.layers, FeatureObjective(2, value=1.0, attention=1.0), Auxiliary(layer=True)),
}


def build(world: World, layout: LayoutSettings, auxiliary: Auxiliary, seed: int = 1, clip: float = 1.0) -> Trainer:
    """A student with auxiliary blocks."""
    optimizer = OptimizerSettings(clip=clip)
    settings = TrainerSettings(GQA, layout, optimizer, "fp32", VOCAB, LENGTH, BATCH, seed, auxiliary)
    return Trainer(world, settings)


def sharpened(trainer: Trainer) -> Trainer:
    """Fresh weights attend to everything alike; these do not, so that losses of features say something."""
    with torch.no_grad():
        for name, weight in trainer.stage.named_parameters().items():
            if "linear_qkv" in name or "embedding" in name:
                weight.mul_(6.0)
    return trainer


def teach(world: World, layout: LayoutSettings, folder: Path) -> bool:
    """Some steps of a teacher that hands out a layer's features, likewise another layer's, and one that hands out none.

    Returns whether all three ended with the same bits.
    """
    ends: list[list[Any]] = []
    for layer in (None, 0, TAUGHT_LAYER):
        trainer, sender = sharpened(make_trainer(world, layout, TEACHER)), None
        if layer is not None:
            sender = FeatureSender(RUN, Capture(layer, EVERYTHING), world, folder / str(layer))
        for step in range(1, STEPS + 1):
            tap = None if sender is None else sender.tap
            result = trainer.step(tokens_of(step), RATE, Objective(), features=tap)
            if sender is not None:
                sender.write(step, np.arange(BATCH) + 100 * step)
        ends.append([result.cross_entropy, result.grad_norm, *trainer.stage.named_parameters().values()])
        if sender is not None:
            sender.close()
    return all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for e in ends[1:] for a, b in zip(ends[0], e, strict=True)
    )


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Label folders of teachers in every layout."""
    folders = {}
    for name, layout in {"alone": ALONE, **LAYOUTS}.items():
        folders[name] = tmp_path_factory.mktemp("teacher")
        assert all(run_world(layout, teach, layout, folders[name])), f"{name}: handing out changes the teacher"
    return folders


def test_a_layer_hands_out_the_same_features_in_any_layout(taught: dict[str, Path]) -> None:
    """All heads and positions of every sample, once, from whichever rank."""
    for layer in (0, TAUGHT_LAYER):
        wants = [FeatureReader(taught["alone"] / str(layer)).read(step, BATCH) for step in range(1, STEPS + 1)]
        for name, folder in taught.items():
            reader = FeatureReader(folder / str(layer))
            for step, want in enumerate(wants, start=1):
                got = reader.read(step, BATCH)
                assert got is not None and want is not None, (name, step)
                rings = [ring.read(step) for _, ring in reader.rings.values()]
                blocks = [block for data in rings if data is not None for block in decode_step(data)]
                assert sum(block.samples for block in blocks) == BATCH, f"{name}: every sample comes from one rank"
                assert got.sample_ids_B.tolist() == [100 * step + index for index in range(BATCH)]
                for feature, tensor in got.tensors.items():
                    told = want.tensors[feature].float()
                    assert tensor.shape == told.shape and told.abs().mean() > 0.01
                    assert (tensor.float() - told).abs().max() <= 2.0**-10 * told.abs().max(), (name, layer, feature)


def learn(world: World, layout: LayoutSettings, folders: dict[str, Path]) -> dict[str, list[StepResult]]:
    """Some steps of a student of each teacher, and of students that learn other things of the first."""
    history: dict[str, list[StepResult]] = {}
    first = next(iter(folders.values()))
    cases = {name: (ALL_LOSSES, folder) for name, folder in folders.items()}
    for name, (case, folder) in (cases | {name: (case, first) for name, case in OTHER_CASES.items()}).items():
        trainer, source = sharpened(build(world, layout, case.auxiliary)), FeatureReader(folder / str(TAUGHT_LAYER))
        learner = FeatureLearner(case.objective, case.layer, Capture(TAUGHT_LAYER, EVERYTHING), trainer, source)
        history[name] = []
        for step in range(1, STEPS + 1):
            tap = learner.tap(step, BATCH, weight=0.5)
            assert tap is not None
            history[name].append(trainer.step(tokens_of(step), RATE, Objective(), features=tap))
        learner.close()
    return history


@pytest.fixture(scope="module")
def alone(taught: dict[str, Path]) -> dict[str, list[StepResult]]:
    return run_world(ALONE, learn, ALONE, {"alone": taught["alone"]})[0]  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_student_learns_from_features_as_one_process_does(
    layout: str, taught: dict[str, Path], alone: dict[str, list[StepResult]]
) -> None:
    """From a teacher in any layout: losses of features, and what their gradients did to the model: the norm now and the
    next step's loss.
    """
    for history in run_world(LAYOUTS[layout], learn, LAYOUTS[layout], taught):
        for name, steps in history.items():
            for got, want in zip(steps, alone[name if name in OTHER_CASES else "alone"], strict=True):
                assert got.cross_entropy == pytest.approx(want.cross_entropy, abs=1e-5), name
                assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-5), name
                rounded_alike = name == "alone" or name in OTHER_CASES
                close = {"rel": 1e-5, "abs": 1e-7} if rounded_alike else {"rel": 0.0, "abs": 1e-5}
                assert got.features == pytest.approx(want.features, **close), name
                assert min(want.features.values()) > 1e-3


def gradients(world: World, folder: Path) -> Any:
    """Of a step on text, of one on text and features in micro-batches, and of the features' losses alone by hand."""
    answers, reader = {}, FeatureReader(folder)
    for name, micro_batches in (("text", 1), ("both", 4), ("hand", 1)):
        trainer = build(world, LayoutSettings(micro_batches=micro_batches), ALL_LOSSES.auxiliary, clip=1e9)
        sharpened(trainer)
        capture, objective = Capture(TAUGHT_LAYER, EVERYTHING), ALL_LOSSES.objective
        tap = FeatureLearner(objective, ALL_LOSSES.layer, capture, trainer, reader).tap(1, BATCH, weight=0.5)
        if name == "hand":
            labels = reader.read(1, BATCH)
            assert labels is not None
            trainer.optimizer.zero_gradients()
            inputs = {"tokens": torch.from_numpy(tokens_of(1)[:, :-1]), "rope": trainer.rope}
            features = take_features(trainer.stage.module(inputs, 0, Capture(ALL_LOSSES.layer, EVERYTHING)))
            told, projection = rows(labels, 0, BATCH, torch.device("cpu")), trainer.stage.module.projection
            loss = feature_loss(objective, features, told, projection_TD=projection).loss
            (0.5 * loss / (BATCH * LENGTH)).backward()
        else:
            trainer.step(tokens_of(1), 0.0, Objective(), features=tap if name == "both" else None)
        weights = trainer.stage.named_parameters()
        answers[name] = {key: gradient_buffer(weight).numpy().copy() for key, weight in weights.items()}
    return answers


def test_a_gradient_is_that_of_the_text_and_of_the_weighted_mean_losses(taught: dict[str, Path]) -> None:
    (answers,) = run_world(ALONE, gradients, taught["alone"] / str(TAUGHT_LAYER))
    for name, both in answers["both"].items():
        by_hand = answers["hand"][name]
        np.testing.assert_allclose(both, answers["text"][name] + by_hand, rtol=1e-4, atol=1e-7, err_msg=name)
        if name.startswith(("layers.0", "layers.1.self_attention.linear_qkv", "auxiliary")):
            assert np.abs(by_hand).max() > 1e-5, f"{name}: features say something here"


@dataclass
class Forgetful:
    """Features that are gone on one rank, were overwritten while another read them, or are of another layer."""

    source: FeatureReader
    rank: int

    def read(self, step: int, samples: int) -> FeatureLabels | None:
        """Nothing in step 1 on rank 2."""
        return None if step == 1 and self.rank == 2 else self.source.read(step, samples)

    def close(self) -> None:
        """As its source."""
        self.source.close()


def miss(world: World, layout: LayoutSettings, folder: Path) -> Any:
    """What ranks agree on when one finds nothing, when all find something, and when it is not what they asked for."""
    trainer, source = build(world, layout, Auxiliary()), Forgetful(FeatureReader(folder), world.place.rank)
    objective = FeatureObjective(2, query=1.0)
    taps = [
        FeatureLearner(objective, 1, Capture(layer, frozenset({"query"})), trainer, source).tap(step, BATCH, 1.0)
        for step, layer in ((1, TAUGHT_LAYER), (2, TAUGHT_LAYER), (2, 1), (STEPS + 1, TAUGHT_LAYER))
    ]
    return [tap is not None for tap in taps], trainer.step(tokens_of(1), RATE, Objective(), features=taps[0]).features


def test_ranks_agree_whether_features_are_there(taught: dict[str, Path]) -> None:
    """One rank that comes late decides for all; nobody waits for what is gone."""
    layout = LAYOUTS["pp2 dp2"]
    for found, features in run_world(layout, miss, layout, taught["alone"] / str(TAUGHT_LAYER)):
        assert found == [False, True, False, False] and features == {}


class Operations(TorchDispatchMode):
    """Names of everything that torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def passes(world: World) -> Any:
    """Operations and numbers of a forward and backward pass: not asked, asked for heads, for hidden states."""
    module, answers = make_trainer(world, ALONE), {}
    inputs = {"tokens": torch.from_numpy(tokens_of(1)[:2, :-1]), "rope": module.rope}
    asked = {
        "nothing": None,
        "another layer": Capture(9, frozenset({"query", "hidden"})),
        "heads": Capture(1, frozenset({"query", "key", "value"})),
        "hidden": Capture(1, frozenset({"hidden"})),
    }
    for name, capture in asked.items():
        module.optimizer.zero_gradients()
        with Operations() as operations:
            outputs = module.stage.module(inputs, 0, capture)
            outputs["hidden"].square().sum().backward()
        gradients = [parameter.main_grad.numpy().copy() for parameter in module.stage.named_parameters().values()]
        answers[name] = (sorted(outputs), operations.names, outputs["hidden"].detach().numpy(), gradients)
    return answers


def test_a_layer_that_is_not_asked_does_nothing_more_and_heads_cost_nothing() -> None:
    """Operation by operation, forward and backward; hidden states cost one addition. Numbers are the same bits."""
    (answers,) = run_world(ALONE, passes)
    keys, plain, hidden, gradients = answers["nothing"]
    assert keys == ["hidden"] and answers["another layer"][0] == ["hidden"]
    assert answers["heads"][0] == ["feature.key", "feature.query", "feature.value", "hidden"]
    assert answers["another layer"][1] == plain and answers["heads"][1] == plain
    more = list(answers["hidden"][1])
    more.remove("aten.add.Tensor")
    assert sorted(more) == sorted(plain)
    for _, _, other, other_gradients in answers.values():
        assert other.tobytes() == hidden.tobytes()
        assert all(a.tobytes() == b.tobytes() for a, b in zip(gradients, other_gradients, strict=True))


def auxiliary_heads(world: World) -> Any:
    """What the auxiliary layer hands out, and what it should, of the last layer's output."""
    trainer = build(world, ALONE, Auxiliary(layer=True))
    inputs = {"tokens": torch.from_numpy(tokens_of(1)[:2, :-1]), "rope": trainer.rope}
    weights = trainer.stage.named_parameters()
    with torch.no_grad():
        weights["auxiliary.layer.input_layernorm.weight"].mul_(torch.linspace(0.5, 1.5, GQA.hidden))
        last = Capture(GQA.layers - 1, frozenset({"hidden"}))
        hidden = take_features(trainer.stage.module(inputs, 0, last))["hidden"]
        got = take_features(trainer.stage.module(inputs, 0, Capture(GQA.layers, frozenset({"query", "key", "value"}))))
        normed = rms_norm_twin(hidden, weights["auxiliary.layer.input_layernorm.weight"], GQA.norm_eps)
        rows_of = weights["auxiliary.layer.self_attention.linear_qkv.weight"].view(2, 4, 16, GQA.hidden)
        grouped = torch.einsum("sbd,ghwd->sbghw", normed, rows_of)  # a key head's two queries, its key, its value
    want = {"query": grouped[:, :, :, :2].flatten(2, 3), "key": grouped[:, :, :, 2], "value": grouped[:, :, :, 3]}
    for name in ("query", "key"):
        want[name] = rope_twin(want[name], trainer.rope)
    return [(got[name].numpy(), want[name].numpy()) for name in want]  # type: ignore[index]


def test_the_auxiliary_layer_stands_on_the_output_of_the_last() -> None:
    """Not on its norm, which belongs to the head."""
    (pairs,) = run_world(ALONE, auxiliary_heads)
    for got, want in pairs:
        assert np.abs(want).mean() > 0.01
        np.testing.assert_allclose(got, want, atol=1e-5)


def checkpoints(world: World, layout: LayoutSettings, folder: Path) -> Any:
    """A student with auxiliary blocks saves; others restore."""
    auxiliary = Auxiliary(layer=True, hint_layer=1, hint_width=TEACHER.hidden)
    saved = build(world, layout, auxiliary)
    saved.step(tokens_of(1), RATE, Objective())
    save_checkpoint(saved, folder / "auxiliary", 1)
    plain = make_trainer(world, layout)
    plain.step(tokens_of(1), RATE, Objective())
    save_checkpoint(plain, folder / "plain", 1)
    checkpoint = Checkpoint(step_folder(folder / "auxiliary", 1))
    again, bare = build(world, layout, auxiliary, seed=9), make_trainer(world, layout, seed=9)
    restore_trainer(again, checkpoint)
    restore_trainer(bare, checkpoint)
    try:
        restore_trainer(again, Checkpoint(step_folder(folder / "plain", 1)))
        refused = ""
    except CheckpointError as error:
        refused = str(error)
    trainers = {"saved": saved, "again": again, "bare": bare, "plain": plain}
    return refused, {
        name: {key: p.detach().numpy().copy() for key, p in trainer.stage.named_parameters().items()}
        for name, trainer in trainers.items()
    }


def test_auxiliary_blocks_are_in_checkpoints_and_not_in_exports(tmp_path: Path) -> None:
    layout = LayoutSettings(tp=2)
    ranks = run_world(layout, checkpoints, layout, tmp_path)
    auxiliary = {
        "auxiliary.layer.input_layernorm.weight",
        "auxiliary.layer.self_attention.linear_qkv.weight",
        "auxiliary.projection",
    }
    for refused, weights in ranks:
        assert set(weights["saved"]) - set(weights["plain"]) == auxiliary
        for name, value in weights["saved"].items():
            assert np.array_equal(weights["bare" if name not in auxiliary else "again"].get(name), value), name
        assert "holds 0 of 6144 elements of weight of auxiliary.projection" in refused
    exported = {
        kind: dict(llama_tensors(Checkpoint(step_folder(tmp_path / kind, 1)), GQA, VOCAB))
        for kind in ("auxiliary", "plain")
    }
    assert exported["auxiliary"].keys() == exported["plain"].keys()
    for name, tensor in exported["plain"].items():
        assert torch.equal(tensor, exported["auxiliary"][name]), "nothing was learned from the auxiliary layer here"
