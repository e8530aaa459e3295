"""Features in every layout: a teacher hands out and a student learns what one process would, to 1e-5."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import titan.train.trainer as trainer_module
from tests.worlds import BATCH, GQA, LENGTH, VOCAB, World, make_trainer, run_world, save_checkpoint, tokens_of
from titan.checkpoint.folder import step_folder
from titan.checkpoint.llama import llama_tensors
from titan.checkpoint.load import Checkpoint
from titan.config.settings import LayoutSettings
from titan.distill.features.codec import FeatureLabels, join, rows
from titan.distill.features.collect import collect_features, feature_labels
from titan.distill.features.losses import FeatureObjective, feature_loss
from titan.errors import CheckpointError
from titan.model.auxiliary import Auxiliary
from titan.model.capture import Capture, take_features
from titan.ops.features.exchange import with_loss
from titan.ops.head import Objective
from titan.ops.norm import rms_norm_twin
from titan.ops.rope import rope_twin
from titan.parallel.stage import build_stage
from titan.train.restore import restore_trainer
from titan.train.trainer import Trainer

ALONE = LayoutSettings()
LAYOUTS = {
    "tp2": LayoutSettings(tp=2, micro_batches=2),
    "tp2 sequence parallel": LayoutSettings(tp=2, sequence_parallel=True, recompute=True),
    "pp2 dp2": LayoutSettings(pp=2, dp=2, layers=(1, 3), micro_batches=2),
    "tp2 pp2 interleaved": LayoutSettings(tp=2, pp=2, chunks=2, schedule="interleaved", micro_batches=2),
}
RATE, STEPS = 2e-3, 2
TEACHER_WIDTH = 96
OBJECTIVE = FeatureObjective(
    2, query=0.5, key=0.4, value=0.3, attention=1.0, attention_map=2.0, hint=0.05, affinity=0.7
)
CASES = {
    "all losses": (Capture(1, OBJECTIVE.names()), OBJECTIVE, Auxiliary(hint_layer=1, hint_width=TEACHER_WIDTH)),
    "relation heads across tensor ranks": (
        Capture(2, frozenset({"query", "key"})), FeatureObjective(1, query=1.0, attention=1.0), Auxiliary()
    ),
    "auxiliary layer": (
        Capture(GQA.layers, frozenset({"query", "key", "value"})),
        FeatureObjective(2, value=1.0, attention=1.0),
        Auxiliary(layer=True),
    ),
}  # fmt: skip


def teacher_features(step: int) -> FeatureLabels:
    """Of a made-up teacher with six heads of 16."""
    generator = torch.Generator().manual_seed(step)

    def draw(*shape: int) -> Tensor:
        return torch.randn(BATCH, LENGTH, *shape, generator=generator).bfloat16()

    shapes: dict[Any, Tensor] = {"query": draw(6, 16), "key": draw(6, 16), "value": draw(6, 16)}
    return FeatureLabels(step, 5, 0, np.arange(BATCH), shapes | {"hidden": draw(TEACHER_WIDTH)})


class Watched:
    """A trainer whose passes hand out features; `learn` says what to do with those of a micro-batch."""

    def __init__(self, trainer: Trainer, capture: Capture):
        self.trainer, self.capture = trainer, capture
        self.seen: list[tuple[int, int, dict[Any, Tensor]]] = []
        self.sums: dict[str, float] = {}
        self.teacher: FeatureLabels | None = None
        self.objective = OBJECTIVE
        self.calls: dict[int, int] = {}
        trainer._run_chunk = self.run_chunk  # type: ignore[method-assign]

    def run_chunk(self, inputs: dict[str, Tensor], chunk: int) -> dict[str, Tensor]:
        trainer = self.trainer
        outputs: dict[str, Tensor] = trainer.stage.module(inputs, chunk, self.capture)
        features = take_features(outputs)
        if not features:
            return outputs
        place, layout = trainer.world.place, trainer.world.layout
        size = BATCH // layout.micro_batches
        start, end = (self.calls.get(chunk, 0) * size + x for x in place.stage.samples(size)[place.replica])
        self.calls[chunk] = self.calls.get(chunk, 0) + 1
        if self.teacher is None:
            self.seen.append((start, end, features))
            return outputs
        result = feature_loss(
            self.objective,
            features,
            rows(self.teacher, start, end, torch.device("cpu")),
            group=trainer.world.groups.tp,
            sequence_parallel=layout.sequence_parallel,
            projection_TD=trainer.stage.module.projection,
        )
        for name, value in result.parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        outputs["hidden"] = with_loss(outputs["hidden"], result.loss, trainer.optimizer.loss_scale / (BATCH * LENGTH))
        return outputs


def build(world: World, layout: LayoutSettings, auxiliary: Auxiliary, seed: int = 1) -> Trainer:
    plain = trainer_module.build_stage
    try:
        trainer_module.build_stage = partial(build_stage, auxiliary=auxiliary)
        return make_trainer(world, layout, seed=seed)
    finally:
        trainer_module.build_stage = plain


def learn(world: World, layout: LayoutSettings) -> dict[str, list[Any]]:
    """Every case: losses, gradient norm and features' losses of some steps."""
    history: dict[str, list[Any]] = {}
    for case, (capture, objective, auxiliary) in CASES.items():
        watched = Watched(build(world, layout, auxiliary), capture)
        watched.objective = objective
        history[case] = []
        for step in range(1, STEPS + 1):
            watched.teacher, watched.sums, watched.calls = teacher_features(step), {}, {}
            result = watched.trainer.step(tokens_of(step), RATE, Objective())
            names = objective.weights()
            sums = world.sum_over_ranks([watched.sums.get(name, 0.0) / (BATCH * LENGTH) for name in names])
            history[case].append((result.cross_entropy, result.grad_norm, dict(zip(names, sums, strict=True))))
    return history


@pytest.fixture(scope="module")
def alone() -> dict[str, list[Any]]:
    return run_world(ALONE, learn, ALONE)[0]  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_student_learns_from_features_as_one_process_does(layout: str, alone: dict[str, list[Any]]) -> None:
    """Losses of features, and what their gradients did to the model: the norm now and the next step's loss."""
    for history in run_world(LAYOUTS[layout], learn, LAYOUTS[layout]):
        for case, steps in alone.items():
            for got, want in zip(history[case], steps, strict=True):
                assert got[0] == pytest.approx(want[0], abs=1e-5), case
                assert got[1] == pytest.approx(want[1], rel=1e-5), case
                assert got[2] == pytest.approx(want[2], rel=1e-5, abs=1e-7), case
                assert min(want[2].values()) > 1e-3


def hand_out(world: World, layout: LayoutSettings) -> Any:
    """A step of a teacher that hands out two layers' features, and one that does not."""
    found, ends = {}, []
    for layer in (None, 0, 2):
        trainer = make_trainer(world, layout)
        names = frozenset({"query", "key", "value", "hidden"})
        watched = Watched(trainer, Capture(-1 if layer is None else layer, names))  # type: ignore[arg-type]
        result = trainer.step(tokens_of(1), RATE, Objective())
        ends.append([result.cross_entropy, result.grad_norm, *trainer.stage.named_parameters().values()])
        parts = []
        for start, end, features in watched.seen:
            whole = collect_features(features, "bf16", world.groups.tp, layout.sequence_parallel)
            if whole is not None:
                assert all(len(x) == end - start for x in whole.values())
                parts.append((start, whole))
        if layer is not None:
            blocks = feature_labels(1, layer, parts, np.arange(BATCH))
            found[layer] = [
                (x.first_sample, x.sample_ids_B, {k: v.float().numpy() for k, v in x.tensors.items()}) for x in blocks
            ]
    same = all(a == b if not isinstance(a, Tensor) else torch.equal(a, b) for e in ends[1:] for a, b in zip(ends[0], e))  # noqa: B905
    return found, same


def test_a_layer_hands_out_the_same_features_in_any_layout() -> None:
    """All heads and positions of every sample, once, from whichever rank, and the same weights."""
    wholes: dict[str, dict[int, FeatureLabels]] = {}
    for name, layout in {"alone": ALONE, **LAYOUTS}.items():
        ranks = run_world(layout, hand_out, layout)
        assert all(same for _, same in ranks), name
        wholes[name] = {}
        for layer in (0, 2):
            blocks = [
                FeatureLabels(1, layer, first, ids, {k: torch.from_numpy(v) for k, v in tensors.items()})
                for found, _ in ranks
                for first, ids, tensors in found[layer]
            ]
            assert sum(block.samples for block in blocks) == BATCH, f"{name}: every sample comes from one rank"
            joined = join(blocks, BATCH)
            assert joined is not None
            wholes[name][layer] = joined
            for feature, tensor in joined.tensors.items():
                want = wholes["alone"][layer].tensors[feature]
                assert tensor.shape == want.shape and want.abs().mean() > 0.01
                assert (tensor - want).abs().max() <= 2.0**-7 * want.abs().max(), (name, layer, feature)


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
        got = take_features(trainer.stage.module(inputs, 0, CASES["auxiliary layer"][0]))
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
    auxiliary = Auxiliary(layer=True, hint_layer=1, hint_width=TEACHER_WIDTH)
    saved = build(world, layout, auxiliary)
    Watched(saved, Capture(GQA.layers, frozenset({"query"})))
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
