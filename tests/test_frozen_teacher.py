"""A frozen Hugging Face model as the teacher: its labels are those of its own forward pass, whatever the layout."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity import ALONE
from tests.test_plan_cost import HIDDEN_BYTES, LAYER, costs_of, predict
from tests.test_plan_cost import VOCAB as VOCAB_WEIGHTS
from tests.worlds import BATCH, GQA, LENGTH, TIED, VOCAB, make_trainer, run_world, save_checkpoint, tokens_of
from titan.checkpoint.folder import step_folder
from titan.checkpoint.llama import llama_config, llama_parameter, llama_tensors
from titan.checkpoint.load import Checkpoint
from titan.checkpoint.pretrained import PretrainedWeights, fingerprint, llama_shapes
from titan.cluster.planning import plan_run
from titan.cluster.replan import replan_gain
from titan.config.distillation import LabelSettings
from titan.config.load import check_config, dump_config
from titan.config.model import LayoutSettings, ModelSettings, OptimizerSettings, StageSettings
from titan.config.pretrained import read_pretrained
from titan.distill.codec.block import LabelBlock, encode_block
from titan.distill.tap import label_wish, raw_labels
from titan.errors import CheckpointError, ConfigError
from titan.model.capture import Capture, Features
from titan.model.parameters import parameter_specs
from titan.ops.objective import Objective
from titan.parallel.world import World
from titan.train.features import FeatureTap
from titan.train.restore import load_pretrained, restore_trainer, trainer_pieces, trainer_state
from titan.train.trainer import LabelPart, Trainer, TrainerSettings

MODELS = {"gqa": GQA, "tied": TIED}
IDS = np.arange(BATCH) * 7 + 3
STEP = 2
UNLIKE = (StageSettings(layers=1, dp=2, shares=(3, 1)), StageSettings(layers=3, tp=2))
LAYOUTS = {
    "tp 2, pp 2": ("gqa", LayoutSettings(tp=2, pp=2, sequence_parallel=True)),
    "unlike stages": ("gqa", LayoutSettings(stages=UNLIKE, micro_batches=4)),
    "interleaved": ("gqa", LayoutSettings(pp=2, chunks=2, schedule="interleaved")),
    "tied ends apart": ("tied", LayoutSettings(pp=2, dp=2)),
}


def train(world: World, model: ModelSettings, folder: Path) -> None:
    """A few large steps, so that no parameter is what it was drawn as."""
    trainer = make_trainer(world, ALONE, model)
    for step in range(1, STEP + 1):
        trainer.step(tokens_of(step), 0.02, Objective())
    save_checkpoint(trainer, folder, STEP)


def write_folder(folder: Path, checkpoint: Checkpoint, model: ModelSettings, positions: int = LENGTH) -> Path:
    """What `titan export` writes, without a tokenizer."""
    folder.mkdir(parents=True)
    config, _ = llama_config(model, VOCAB, positions, "float32", 2, 0)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone() for name, tensor in llama_tensors(checkpoint, model, VOCAB)}, folder / FILE)
    return folder


FILE = "model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By model: a folder with its checkpoints, and `hf` in it."""
    places = {}
    for name, model in MODELS.items():
        place = places[name] = tmp_path_factory.mktemp(name)
        run_world(ALONE, train, model, place, model=model)
        write_folder(place / "hf", Checkpoint(step_folder(place, STEP)), model)
    return places


def frozen_trainer(world: World, layout: LayoutSettings, model: ModelSettings, folder: Path) -> Trainer:
    settings = TrainerSettings(model, layout, OptimizerSettings(), "fp32", VOCAB, LENGTH, BATCH, 1, frozen=True)
    trainer = Trainer(world, settings)
    load_pretrained(trainer, PretrainedWeights(folder))
    return trainer


def encoded(trainer: Trainer, settings: LabelSettings, heard: list[Features] | None = None) -> dict[int, Any]:
    """By first sample: what a step's labels are, as bytes, and whole ones as log-probabilities."""
    found: dict[int, Any] = {}
    tokens = tokens_of(9)

    def take(parts: list[LabelPart]) -> None:
        for part in parts:
            rows = slice(part.start, part.start + part.samples)
            raw = raw_labels(settings, part, LENGTH)
            block = LabelBlock(9, part.start, IDS[rows], tokens[rows].astype(np.int32), raw)
            found[part.start] = raw.dense_BSV if settings.codec == "full" else encode_block(block, VOCAB, 36.0)

    def hear(_: int, features: Features) -> None:
        assert heard is not None
        heard.append({name: tensor.detach().clone() for name, tensor in features.items()})

    tap = None if heard is None else FeatureTap(Capture(2, frozenset(("query", "hidden"))), hear)
    before = [parameter.detach().clone() for parameter in trainer.stage.module.parameters()]
    result = trainer.step(
        tokens, 0.0, Objective(), wish=label_wish(settings, 5, 9), sample_ids=IDS, on_labels=take, features=tap
    )
    if trainer.settings.frozen:
        assert result.grad_norm is None and result.tokens == BATCH * LENGTH
        parameters = list(trainer.stage.module.parameters())
        assert all(torch.equal(was, now) for was, now in zip(before, parameters, strict=True))
        assert all(p.grad is None and not hasattr(p, "main_grad") for p in parameters), "no memory for gradients"
        assert trainer.trained is None and trainer_pieces(trainer) == [] and trainer_state(trainer) == {}
    found["cross_entropy"] = result.cross_entropy  # type: ignore[index]
    return found


def whole_labels(world: World, layout: LayoutSettings, model: ModelSettings, folder: Path) -> dict[int, Any]:
    return encoded(frozen_trainer(world, layout, model, folder), LabelSettings(codec="full"))


def own_forward(world: World, model: ModelSettings, place: Path) -> dict[str, Any]:
    """Of the checkpoint itself: log-probabilities without head, labels or layout; labels that training makes."""
    trainer = make_trainer(world, ALONE, model)
    restore_trainer(trainer, Checkpoint(step_folder(place, STEP)))
    tokens = torch.from_numpy(tokens_of(9).astype(np.int64))
    with torch.no_grad():
        hidden_SBD = trainer.stage.module({"tokens": tokens[:, :-1], "rope": trainer.rope})["hidden"]
    logits = hidden_SBD.double() @ trainer.stage.module.output_weight[:VOCAB].detach().double().t()
    log_probs = logits.transpose(0, 1).log_softmax(-1)
    trained_heard: list[Features] = []
    frozen_heard: list[Features] = []
    settings = LabelSettings()
    return {
        "truth": log_probs.numpy(),
        "cross_entropy": float(-log_probs.gather(-1, tokens[:, 1:, None]).mean()),
        "trained": encoded(trainer, settings, trained_heard),
        "frozen": encoded(frozen_trainer(world, ALONE, model, place / "hf"), settings, frozen_heard),
        "heard": (trained_heard, frozen_heard),
    }


@pytest.fixture(scope="module")
def truth(trained: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {kind: run_world(ALONE, own_forward, MODELS[kind], trained[kind], model=MODELS[kind])[0] for kind in MODELS}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_labels_in_any_layout_are_those_of_the_checkpoints_own_forward_pass(
    name: str, trained: dict[str, Path], truth: dict[str, dict[str, Any]]
) -> None:
    kind, layout = LAYOUTS[name]
    model = MODELS[kind]
    ranks = run_world(layout, whole_labels, layout, model, trained[kind] / "hf", model=model)
    parts = {start: said for rank in ranks for start, said in rank.items() if start != "cross_entropy"}
    said = np.concatenate([parts[start] for start in sorted(parts)])
    expected = truth[kind]
    assert said.shape == (BATCH, LENGTH, VOCAB)
    assert np.abs(said - expected["truth"]).max() < 1e-5
    assert {rank["cross_entropy"] for rank in ranks} == {ranks[0]["cross_entropy"]}
    assert ranks[0]["cross_entropy"] == pytest.approx(expected["cross_entropy"], abs=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_labels_and_features_are_bit_for_bit_those_of_a_teacher_that_trains(
    kind: str, truth: dict[str, dict[str, Any]]
) -> None:
    found = truth[kind]
    assert found["trained"].keys() == found["frozen"].keys() and found["trained"][0] == found["frozen"][0]
    trained, frozen = found["heard"]
    assert len(trained) == len(frozen) == 1 and trained[0].keys() == {"query", "hidden"} == frozen[0].keys()
    assert all(torch.equal(trained[0][name], frozen[0][name]) for name in trained[0])


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_comes_back_with_the_vocabulary_padded_as_ours(kind: str, trained: dict[str, Path]) -> None:
    """Also from a folder whose own padding is another, and in several files."""
    place, model = trained[kind], MODELS[kind]
    checkpoint = Checkpoint(step_folder(place, STEP))
    tensors = load_file(place / "hf" / FILE)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == llama_shapes(model, VOCAB)
    padded = place / "padded"
    shutil.copytree(place / "hf", padded)
    (padded / FILE).unlink()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = torch.cat([tensors[name], torch.full((11, model.hidden), 7.0)])
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, of in files.items():
        save_file({name: tensors[name] for name in of}, padded / file)
    index = {"weight_map": {name: file for file, of in files.items() for name in of}}
    (padded / f"{FILE}.index.json").write_text(json.dumps(index))
    for folder in (place / "hf", padded):
        weights = PretrainedWeights(folder)
        assert weights.mistakes(model, VOCAB) == []
        for name, spec in parameter_specs(model, VOCAB).items():
            whole, back = checkpoint.whole("weight", name, spec), llama_parameter(name, weights.read, model, VOCAB)
            if name in ("embedding.weight", "head"):
                assert not back[VOCAB:].any() and back.shape == whole.shape
                whole, back = whole[:VOCAB], back[:VOCAB]
            assert torch.equal(whole, back), (folder.name, name)


def test_weights_that_do_not_fit_are_named(trained: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(trained["gqa"] / "hf" / FILE)

    def said(**changed: torch.Tensor | None) -> str:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        both = {name: tensor for name, tensor in (tensors | changed).items() if tensor is not None}
        save_file(both, folder / FILE)
        return "\n".join(PretrainedWeights(folder).mistakes(GQA, VOCAB))

    layer = "model.layers.1.self_attn"
    assert said() == ""
    assert f"{layer}.k_proj.weight is missing, the model wants [32, 64]" in said(**{f"{layer}.k_proj.weight": None})
    wide = {f"{layer}.k_proj.weight": torch.zeros(64, 64)}
    assert f"{layer}.k_proj.weight is [64, 64], the model wants [32, 64]" in said(**wide)
    assert "lm_head.weight is [499, 64]" in said(**{"lm_head.weight": torch.zeros(499, 64)})
    assert f"{layer}.q_proj.bias has no place" in said(**{f"{layer}.q_proj.bias": torch.zeros(64)})
    assert said(**{f"{layer}.rotary_emb.inv_freq": torch.zeros(8)}) == ""
    with pytest.raises(CheckpointError, match=r"has no model.safetensors; weights must be safetensors"):
        PretrainedWeights(tmp_path)


def test_a_fingerprint_is_of_the_content_alone(trained: dict[str, Path], tmp_path: Path) -> None:
    here = trained["gqa"] / "hf"
    shutil.copytree(here, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(here)
    tensors = load_file(here / FILE)
    tensors["model.layers.3.mlp.down_proj.weight"] *= 1.001
    save_file(tensors, tmp_path / "copy" / FILE)
    assert fingerprint(tmp_path / "copy") != fingerprint(here)


# --- settings ---


def run_values(folder: Path, **teacher: Any) -> dict[str, Any]:
    return {
        "run": {"name": "x", "steps": 3},
        "data": {"sources": ["."], "sequence_length": LENGTH},
        "teacher": {"source": f"hf:{folder}", **teacher},
        "students": [{"name": "small", "model": {"layers": 1, "hidden": 32, "heads": 2, "ffn": 64}}],
    }


def test_a_folder_says_its_model_and_its_tokenizer(trained: dict[str, Path], tmp_path: Path) -> None:
    for kind, model in MODELS.items():
        config = check_config(run_values(trained[kind] / "hf"))
        assert config.teacher.model == model and config.data.tokenizer is None
        assert config.roles["teacher"].frozen and not config.roles["small"].frozen and config.makes_labels
        assert check_config(json.loads(json.dumps(config.model_dump()))) == config, "as it is resumed"
    shutil.copytree(trained["gqa"] / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"pieces")
    config = check_config(run_values(tmp_path / "hf"))
    assert config.data.tokenizer == str(tmp_path / "hf" / "tokenizer.model")
    assert f'tokenizer = "{config.data.tokenizer}"' in dump_config(config)


def test_what_transformers_leaves_out_has_its_defaults(tmp_path: Path) -> None:
    """Names of transformers 4, and values that are those of LlamaConfig, which save_pretrained does not write."""
    said = {"model_type": "llama", "num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps(said | {"rope_scaling": None, "max_position_embeddings": 8192}))
    found = read_pretrained(tmp_path)
    assert found.model == ModelSettings(
        layers=32, hidden=4096, heads=32, kv_heads=8, ffn=11008, rope_theta=500000.0, norm_eps=1e-6
    )
    assert (found.vocab_size, found.positions) == (128256, 8192)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaConfig()
    assert (theirs.num_hidden_layers, theirs.hidden_size, theirs.intermediate_size) == (32, 4096, 11008)
    assert (theirs.num_attention_heads, theirs.vocab_size, theirs.max_position_embeddings) == (32, 32000, 2048)
    assert (theirs.rms_norm_eps, theirs.tie_word_embeddings, theirs.hidden_act) == (1e-6, False, "silu")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; titan has only plain Llama"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"head_dim": 32}, "head_dim is 32, not hidden_size / num_attention_heads (16)"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "its rotary positions are 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "its rotary positions are 'linear'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is given"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is nothing that a model can have"),
        ({"vocab_size": None}, "vocab_size is nothing that a model can have"),
    ],
)
def test_a_model_that_titan_has_not_is_refused_in_one_line(
    change: dict[str, Any], says: str, trained: dict[str, Path], tmp_path: Path
) -> None:
    said = json.loads((trained["gqa"] / "hf" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(said | change))
    with pytest.raises(ConfigError) as caught:
        check_config(run_values(tmp_path))
    assert says in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ({"optimizer": {"learning_rate": 0.1}}, "teacher.optimizer.learning_rate is set, but teacher.source is 'hf:"),
        ({"layout": {"recompute": True}}, "teacher.layout.recompute is for backward passes"),
        ({"layout": {"dp": 2, "shard": 2}}, "teacher.layout.shard cuts optimizer state"),
        ({"layout": {"pp": 9}}, "teacher.layout.pp is 9, more stages than layers (4)"),
        ({"layout": {"planned": True}}, "teacher.layout.planned plans for training"),
    ],
)
def test_what_a_frozen_teacher_has_no_use_for_is_refused(
    teacher: dict[str, Any], says: str, trained: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(run_values(trained["gqa"] / "hf", **teacher))
    assert says in str(caught.value)


def test_a_frozen_teacher_without_anybody_to_teach_is_refused(trained: dict[str, Path]) -> None:
    values = run_values(trained["gqa"] / "hf") | {"students": []}
    with pytest.raises(ConfigError, match="but nobody wants labels; add"):
        check_config(values)
    assert check_config(values | {"labels": {"without_students": True}}).makes_labels


# --- planning ---


def test_a_frozen_role_takes_the_memory_of_its_weights_and_the_time_of_its_forward_passes() -> None:
    """Two stages, 4 micro-batches of 2 samples: by hand, as tests/test_plan_cost.py does for training."""
    costs = replace(costs_of(), frozen=True)
    stages = (StageSettings(layers=3, device="fast"), StageSettings(layers=1, device="slow"))
    found = predict(costs, *stages, micro_batches=4)
    first_s, second_s = 3 * 1.0 * 3 + 0.1 * 3, 3 * (1.0 * 3 + 3.0 * 3 / 3)
    edge_s = 0.03 + 2 * HIDDEN_BYTES / 0.25e9
    assert found.step_s == pytest.approx(first_s + edge_s + 4 * second_s) and second_s > first_s
    first, second = found.memory
    assert first.state == 4 * (3 * LAYER + VOCAB_WEIGHTS) and second.state == 4 * (LAYER + VOCAB_WEIGHTS)
    assert first.activations == 4 * 2 * HIDDEN_BYTES, "what goes out"
    assert second.activations == 2 * HIDDEN_BYTES, "what comes in"
    assert found.busy_s == pytest.approx((4 * first_s, 4 * second_s))
    trained = predict(costs_of(), *stages, micro_batches=4)
    assert trained.memory[0].state == 4 * first.state, "weights, gradients and two moments"
    assert all(pace.update_s == 0 and not any(pace.backward_s) for pace in found.paces)


def test_a_runs_plan_knows_its_frozen_teacher(trained: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "devices.toml").write_text('nodes = [{ name = "n", kind = "fast", devices = 4, memory_gb = 1 }]\n')
    (tmp_path / "costs.toml").write_text('peaks = [{ kind = "fast", tflops = 1 }]\n')
    cluster = {"inventory": str(tmp_path / "devices.toml"), "profile": str(tmp_path / "costs.toml")}
    config = check_config(run_values(trained["gqa"] / "hf", layout={"tp": 2}) | {"cluster": cluster})
    planned = plan_run(config, VOCAB)
    frozen = planned.predictions["teacher"]
    assert planned.costs["teacher"].frozen and not planned.costs["small"].frozen
    per_rank = 4 * LAYER + 2 * 512 * 64  # weights, cut over two ranks: half of 4 bytes each
    assert frozen.memory[0].state == 2 * per_rank and frozen.timeline.tail_s == (0.0,)
    assert planned.predict("teacher", frozen.layout) == frozen
    assert planned.predictions["small"].timeline.tail_s[0] > 0
    assert replan_gain(planned.costs["teacher"], frozen, 0, 2.0) is None
