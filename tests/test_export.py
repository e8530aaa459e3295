"""An exported folder is the trained model with the tokenizer of its training, for any Hugging Face client."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.worlds import run_world, run_worlds
from titan.checkpoint.export import _rounded, export_role
from titan.checkpoint.folder import step_folder
from titan.checkpoint.load import Checkpoint
from titan.checkpoint.save import CheckpointWriter
from titan.cli.main import main
from titan.config.load import dump_config
from titan.config.model import LayoutSettings, ModelSettings, OptimizerSettings
from titan.config.settings import DataSettings, RunConfig, RunSettings, StudentSettings, TeacherSettings
from titan.data.corpus import Corpus
from titan.data.prepare import prepare_corpus
from titan.data.tokenizer import Tokenizer
from titan.data.tokenizer_json import hugging_face_tokenizer
from titan.errors import CheckpointError, ConfigError, DataError, RunError
from titan.model.parameters import num_parameters
from titan.observe.events import EventLog
from titan.ops.objective import Objective
from titan.parallel.world import World
from titan.train.restore import restore_trainer, trainer_pieces, trainer_state
from titan.train.trainer import Trainer, TrainerSettings

VOCAB, LENGTH, BATCH = 500, 48, 8
TOLERANCE = 1e-4
PROMPTS = ["the quick", "天地 def f(x):\n\t"]
MODELS = {
    "teacher": ModelSettings(layers=4, hidden=64, heads=4, kv_heads=2, ffn=96),
    "tied": ModelSettings(layers=2, hidden=48, heads=3, ffn=64, tied=True, rope_theta=5000.0, norm_eps=1e-3),
    "grouped": ModelSettings(layers=2, hidden=64, heads=8, kv_heads=2, ffn=80),
}
LAYOUTS = {"teacher": LayoutSettings(tp=2, pp=2), "tied": LayoutSettings(), "grouped": LayoutSettings()}
SCRIPTS = (
    "the quick brown fox, jumps over; it's 1234.5 lazy dogs!",
    "Съешь же ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "天地玄黄 宇宙洪荒 日月盈昃 辰宿列张",
    "いろはにほへと ちりぬるを 키스의 고유조건은",
    "نص حكيم له سر قاطع وذو شأن عظيم",
    "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "\U0001f600\U0001f469\u200d\U0001f680 ok \u2764\ufe0f",
)
SPELLINGS = ("\u2581", "<s>", "</s>", "<unk>", "<0x0A>", "\ufffd", "\ufeff", "    ", "\t\t", "\r\n", "\n\n", *SCRIPTS)
mixed_text = st.lists(st.one_of(st.sampled_from(SPELLINGS), st.text(st.characters(codec="utf-8"))), max_size=8).map(
    "".join
)


@dataclass(frozen=True)
class TrainedRun:
    folder: Path
    corpus: Corpus
    logits: dict[str, torch.Tensor]
    """Of each role on `probe`, by titan itself: [samples, LENGTH, VOCAB]."""
    probe: np.ndarray


def tiny_corpus(folder: Path) -> Corpus:
    draw = np.random.default_rng(1)
    (folder / "text").mkdir()
    for number in range(40):
        words = " ".join(SCRIPTS).split()
        lines = ["\t" * int(draw.integers(3)) + "  " * int(draw.integers(4)) + " ".join(draw.choice(words, 9))]
        lines += [f"def f(x):\n\treturn [x] * {draw.integers(99)}", *draw.choice(SCRIPTS, 4), ""]
        (folder / "text" / f"{number}.txt").write_text("\n".join(map(str, lines)))
    data = DataSettings(sources=(str(folder / "text"),), vocab_size=VOCAB, workers=1, heldout_fraction=0.2)
    return Corpus.open(prepare_corpus(data, folder / "runs" / "data"))


def trainer_of(world: World) -> Trainer:
    model, layout = MODELS[world.role], LAYOUTS[world.role] if world.layout.num_ranks > 1 else LayoutSettings()
    return Trainer(world, TrainerSettings(model, layout, OptimizerSettings(), "fp32", VOCAB, LENGTH, BATCH, 1))


def train_and_save(world: World, run: Path, corpus_name: str) -> None:
    """Two large steps, each with a checkpoint as a role writes it."""
    trainer = trainer_of(world)
    writer = CheckpointWriter(run / "checkpoints" / world.role, world.place.rank, world.layout.num_ranks, 2, 30.0)
    draw = np.random.default_rng(2)
    for step in (1, 2):
        trainer.step(draw.integers(0, VOCAB, (BATCH, LENGTH + 1)), 0.03, Objective())
        manifest = {"role": world.role, "model": trainer.settings.model.model_dump(), "vocab_size": VOCAB}
        manifest |= {"precision": "fp32", "corpus": corpus_name, "state": trainer_state(trainer)}
        writer.save(step, trainer_pieces(trainer), manifest)
        writer.wait()


def own_logits(world: World, run: Path, step: int, tokens: np.ndarray) -> np.ndarray:
    trainer = trainer_of(world)
    restore_trainer(trainer, Checkpoint(step_folder(run / "checkpoints" / world.role, step)))
    module = trainer.stage.module
    with torch.no_grad():
        hidden_SBD = module({"tokens": torch.from_numpy(tokens), "rope": trainer.rope})["hidden"]
        logits: np.ndarray = (hidden_SBD.transpose(0, 1) @ module.output_weight.t())[..., :VOCAB].numpy()
    return logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    folder = tmp_path_factory.mktemp("export")
    corpus = tiny_corpus(folder)
    run = folder / "runs" / "tiny"
    students = tuple(StudentSettings(name=name, model=MODELS[name]) for name in ("tied", "grouped"))
    config = RunConfig(
        run=RunSettings(name="tiny", dir=str(folder / "runs"), steps=2),
        data=DataSettings(sources=(str(folder / "text"),), vocab_size=VOCAB, sequence_length=LENGTH, batch_size=BATCH),
        teacher=TeacherSettings(model=MODELS["teacher"], layout=LAYOUTS["teacher"]),
        students=(*students, StudentSettings(name="unborn", model=MODELS["tied"])),
    )
    with EventLog(run) as events:
        events.emit("data_ready", corpus=str(corpus.folder))
    (run / "config.toml").write_text(dump_config(config))
    run_worlds({role: (LAYOUTS[role], MODELS[role]) for role in MODELS}, train_and_save, run, corpus.folder.name)
    probe = np.random.default_rng(3).integers(0, VOCAB, (4, LENGTH))
    logits = {}
    for role, model in MODELS.items():
        (own,) = run_world(LayoutSettings(), own_logits, run, 2, probe, model=model, role=role)
        logits[role] = torch.from_numpy(own)
    return TrainedRun(run, corpus, logits, probe)


@pytest.fixture(scope="module")
def exported(trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders: each role as it is, and the options that change what the files hold."""
    folder = tmp_path_factory.mktemp("folders")
    for role in MODELS:
        export_role(trained.folder, None if role == "teacher" else role, folder / role)
    for dtype in ("bf16", "fp16"):
        export_role(trained.folder, "grouped", folder / dtype, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titan.checkpoint.export.SHARD_BYTES", 150_000)
        export_role(trained.folder, "tied", folder / "sharded")
    return {path.name: path for path in folder.iterdir()}


CLIENT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
probe, prompts = torch.load(sys.argv[1])
answers = {}
for folder in sys.argv[3:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        answers[folder] = {
            "wrong": {key: list(names) for key, names in info.items() if names},
            "dtype": model.dtype,
            "logits": model(probe).logits.float(),
            "generated": model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False),
            "unprompted": model.generate(max_new_tokens=4, do_sample=False),
        }
torch.save(answers, sys.argv[2])
"""


@pytest.fixture(scope="module")
def answers(trained: TrainedRun, exported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What transformers, in a process that never saw titan, computes from each folder."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("client")
    torch.save((torch.from_numpy(trained.probe), PROMPTS), folder / "question.pt")
    command = [sys.executable, "-c", CLIENT, folder / "question.pt", folder / "answers.pt", *exported.values()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = torch.load(folder / "answers.pt")
    return {role: said[str(path)] for role, path in exported.items()}


def load_tokenizer(folder: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder, local_files_only=True)


def largest_difference(answer: dict[str, Any], ours: torch.Tensor) -> float:
    assert answer["wrong"] == {}
    assert answer["logits"].shape == ours.shape == (4, LENGTH, VOCAB)
    return float((answer["logits"] - ours).abs().max())


@pytest.mark.parametrize("role", [*MODELS, "sharded"])
def test_hugging_face_computes_our_logits(trained: TrainedRun, answers: Any, role: str) -> None:
    ours = trained.logits["tied" if role == "sharded" else role]
    assert ours.std() > 0.1, "logits near zero would agree by themselves"
    difference = largest_difference(answers[role], ours)
    print(f"{role}: logits up to {ours.abs().max():.2f} differ by at most {difference:.2e}")
    assert difference < TOLERANCE


def test_weights_are_those_of_the_model_and_no_padding(trained: TrainedRun, exported: dict[str, Path]) -> None:
    for role in MODELS:
        tensors = load_file(exported[role] / "model.safetensors")
        assert sum(tensor.numel() for tensor in tensors.values()) == num_parameters(MODELS[role], VOCAB)
        assert tensors["model.embed_tokens.weight"].shape == (VOCAB, MODELS[role].hidden)
        assert ("lm_head.weight" in tensors) != MODELS[role].tied
        norms = [tensor for name, tensor in tensors.items() if name.endswith("norm.weight")]
        assert len(norms) == 2 * MODELS[role].layers + 1
        assert all((norm != 1.0).any() for norm in norms), "a trained norm is not its initial value"


def test_an_exported_student_generates_text(trained: TrainedRun, exported: dict[str, Path], answers: Any) -> None:
    generated = answers["tied"]["generated"]
    tokenizer = cached_tokenizer(exported["tied"])
    assert generated.shape == (2, 8 + max(len(trained.corpus.tokenizer.encode(prompt)) for prompt in PROMPTS))
    texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, PROMPTS, strict=True))
    assert answers["tied"]["unprompted"][0, 0] == trained.corpus.eod_id


@settings(max_examples=200)
@given(text=mixed_text)
@example("")
@example("\u2581\u2581 \u2581a \u2581")
@example(" \n \x00\x7f\r\u2028\u00a0\u3000e\u0301\U0001f469\u200d\U0001f680 ")
@example("<p>a</p> <s>struck</s>" + "\t" * 20 + " " * 70)
def test_tokenizers_agree_on_any_text(trained: TrainedRun, exported: dict[str, Path], text: str) -> None:
    assert_agree(trained, exported, text)


def test_tokenizers_agree_on_the_corpus_and_on_code(trained: TrainedRun, exported: dict[str, Path]) -> None:
    texts = [path.read_text() for path in (trained.folder.parents[1] / "text").iterdir()]
    code = Path(json.__file__).parent
    for text in [*texts, *(path.read_text() for path in code.glob("*.py"))]:
        assert_agree(trained, exported, text)


def assert_agree(trained: TrainedRun, exported: dict[str, Path], text: str) -> None:
    tokenizer = cached_tokenizer(exported["teacher"])
    ids = trained.corpus.tokenizer.encode(text).tolist()
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == trained.corpus.tokenizer.decode(ids) == text


LOADED: dict[Path, Any] = {}


def cached_tokenizer(folder: Path) -> Any:
    if folder not in LOADED:
        LOADED[folder] = load_tokenizer(folder)
    return LOADED[folder]


def test_special_ids_are_those_of_training(trained: TrainedRun, exported: dict[str, Path]) -> None:
    tokenizer = cached_tokenizer(exported["teacher"])
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == trained.corpus.eod_id
    assert len(tokenizer) == VOCAB
    ids = [*trained.corpus.tokenizer.encode("a b"), trained.corpus.eod_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a b"


def test_a_unigram_model_of_the_users_own_translates_too(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    ours = Tokenizer(own_model(tmp_path, "unigram"))
    content = hugging_face_tokenizer(ours.path, 32).files["tokenizer.json"]
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    theirs.encode_special_tokens = True
    draw = np.random.default_rng(4)
    pieces = [ours.decode([number]) for number in range(ours.vocab_size)]
    for _ in range(500):
        text = "".join(draw.choice([*pieces, *SPELLINGS], 20))
        assert theirs.encode(text).ids == ours.encode(text).tolist()


def test_a_model_without_an_equivalent_is_refused(tmp_path: Path) -> None:
    path = own_model(tmp_path, "bpe", user_defined_symbols=["<think>"])
    with pytest.raises(DataError, match="cannot become a Hugging Face tokenizer: only BPE and unigram"):
        hugging_face_tokenizer(path, 32)


def own_model(folder: Path, kind: str, **options: Any) -> Path:
    model, text = io.BytesIO(), Path(json.__file__).with_name("decoder.py").read_text()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines(True)), model_writer=model, vocab_size=400, model_type=kind,

        required_chars="<>/0123456789ABCDEFsuxnk", byte_fallback=True, normalization_rule_name="identity",
        add_dummy_prefix=False, minloglevel=2,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, **options,
    )  # fmt: skip
    (folder / "own.model").write_bytes(model.getvalue())
    return folder / "own.model"


def test_shards_have_an_index(exported: dict[str, Path]) -> None:
    folder = exported["sharded"]
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert shards == [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    assert len(shards) > 1
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * num_parameters(MODELS["tied"], VOCAB)
    assert sorted(set(index["weight_map"].values())) == shards


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_can_be_rounded(exported: dict[str, Path], answers: Any, dtype: str, torch_dtype: torch.dtype) -> None:
    whole = load_file(exported["grouped"] / "model.safetensors")
    rounded = load_file(exported[dtype] / "model.safetensors")
    assert whole.keys() == rounded.keys()
    assert all(torch.equal(rounded[name], whole[name].to(torch_dtype)) for name in whole)
    assert answers[dtype]["dtype"] == torch_dtype


def test_a_weight_that_fp16_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--dtype fp16: big has values up to 1e\+05, fp16 ends at 65504; use bf16"):
        list(_rounded([("big", torch.tensor([1.0, -1e5]))], "fp16"))


def test_an_older_step_can_be_chosen_and_the_command_says_what_it_wrote(
    trained: TrainedRun, exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "new" / "out"
    arguments = ["export", trained.folder, "--student", "tied", "--format", "llama", "--out", out, "--step", 1]
    monkeypatch.setattr(sys, "argv", ["titan", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (None, 0)
    assert capsys.readouterr().out == f"{out}: tied of step 1, 61,104 parameters, fp32, as llama\n"
    assert (out / "model.safetensors").read_bytes() != (exported["tied"] / "model.safetensors").read_bytes()
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~current_umask()}


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_mistakes_are_one_line_with_a_remedy_and_leave_nothing_behind(trained: TrainedRun, tmp_path: Path) -> None:
    run, out = trained.folder, tmp_path / "out"
    with pytest.raises(ConfigError, match=r"--student tide: no such student, students are tied, grouped, unborn; "):
        export_role(run, "tide", out)
    with pytest.raises(CheckpointError, match=r"unborn has no complete checkpoint; there is one every 200 steps"):
        export_role(run, "unborn", out)
    with pytest.raises(CheckpointError, match=r"--step 7: .*teacher has checkpoints of steps 1, 2; name one"):
        export_role(run, None, out, step=7)
    with pytest.raises(RunError, match=r"is not a run folder"):
        export_role(tmp_path / "absent", None, out)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out .*file is a file; name a folder that is empty or does not exist"):
        export_role(run, None, tmp_path / "file")
    with pytest.raises(ConfigError, match=r"--out .* holds files already; name a folder"):
        export_role(run, None, tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot write .*file/out: Not a directory"):
        export_role(run, None, tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_folder_may_be_given(trained: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_role(trained.folder, "tied", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_checkpoint_and_a_lost_corpus_are_named(trained: TrainedRun, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "copy"
    shutil.copytree(trained.folder, run)
    (run / "events.jsonl").unlink()
    with pytest.raises(DataError, match=rf"the corpus {trained.corpus.folder.name} of .*copy is not in .*runs/data; "):
        export_role(run, "tied", tmp_path / "out")
    shutil.copytree(trained.corpus.folder, tmp_path / "runs" / "data" / trained.corpus.folder.name)
    export_role(run, "tied", tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    (file,) = step_folder(run / "checkpoints" / "tied", 2).glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank-00000.*safetensors is damaged \(checksum"):
        export_role(run, "tied", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
