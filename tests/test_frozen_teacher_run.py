"""Runs whose teacher is a frozen Hugging Face model, as a user starts them: whole, killed, and refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs import kill_tree, processes_under, start_titan, titan, wait_for_step, weights, write_tiny_config
from titan.checkpoint.folder import newest_step
from titan.checkpoint.llama import llama_config
from titan.checkpoint.pretrained import PretrainedWeights, fingerprint, llama_shapes
from titan.config.load import load_config
from titan.config.model import ModelSettings
from titan.data.prepare import prepare_corpus
from titan.data.tokenizer import Tokenizer
from titan.data.tokenizer_json import hugging_face_tokenizer, other_tokenizer
from titan.observe.metrics import StepMetric, read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

MODEL = ModelSettings(layers=4, hidden=128, heads=4, kv_heads=2, ffn=256)
STEPS = 60
FROZEN = 'source = "hf:pretrained"\nlayout = { tp = 2 }'


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `pretrained`, what `titan export` writes, and `frozen.toml`: students of it."""
    folder = tmp_path_factory.mktemp("frozen")
    config = load_config(write_tiny_config(folder))
    corpus = prepare_corpus(config.data, folder / "runs" / "data")
    tokenizer = Tokenizer(corpus / "tokenizer.model")
    theirs = hugging_face_tokenizer(tokenizer.path, 32)
    there = folder / "pretrained"
    there.mkdir()
    ours, _ = llama_config(MODEL, tokenizer.vocab_size, 32, "float32", theirs.end_id, theirs.padding_id)
    for name, content in {"config.json": ours, **theirs.files}.items():
        (there / name).write_text(json.dumps(content))
    shutil.copyfile(tokenizer.path, there / "tokenizer.model")
    generator = torch.Generator().manual_seed(4)
    drawn = {n: torch.randn(s, generator=generator) for n, s in llama_shapes(MODEL, tokenizer.vocab_size).items()}
    tensors = {name: 1 + 0.1 * each if each.dim() == 1 else 0.05 * each for name, each in drawn.items()}
    tensors["model.embed_tokens.weight"] += 0.3  # so that it likes some tokens everywhere, which is soon learned
    tensors["lm_head.weight"] += 0.02 * drawn["lm_head.weight"][:, :1]
    save_file(tensors, there / "model.safetensors")
    head, _, rest = (folder / "tiny.toml").read_text().partition("[teacher]")
    students = rest[rest.index("[[students]]") :].replace("start = { lead = 0.05 }", "distill.features.attention = 0.1")
    students = students.replace(
        "start = { step = 5 }",
        'distill = { schedule = "constant", weight = 1.0 }\noptimizer = { warmup_steps = 4, learning_rate = 0.01 }',
    )
    (folder / "frozen.toml").write_text(
        f"{head}[teacher]\n{FROZEN}\n{students}".replace("steps = 40", f"steps = {STEPS}")
    )
    yield folder
    assert processes_under(folder) == []


def segments(run: Path) -> dict[str, bytes]:
    log = run / "labels" / "teacher"
    return {str(path.relative_to(log)): path.read_bytes() for path in sorted(log.rglob("*.segment"))}


@pytest.fixture(scope="module")
def whole(workplace: Path) -> Path:
    result = titan("run", "frozen.toml", "--set", "run.name=whole", cwd=workplace)
    assert result.returncode == 0, result.stderr
    return workplace / "runs" / "whole"


def test_students_learn_from_a_frozen_model_and_every_label_is_accounted_for(workplace: Path, whole: Path) -> None:
    for command in ("audit", "verify"):
        looked = titan("labels", command, whole, cwd=workplace)
        assert looked.returncode == 0, looked.stdout + looked.stderr
    steps = [metric for metric in read_metrics(whole) if isinstance(metric, StepMetric)]
    of = {role: [metric for metric in steps if metric.role == role] for role in ("teacher", "early", "late")}
    assert [len(each) for each in of.values()] == [STEPS] * 3
    assert all(metric.learning_rate == 0 and metric.grad_norm != metric.grad_norm for metric in of["teacher"])
    learned = [metric.distill_loss for metric in of["early"]]
    assert sum(learned[-10:]) < 0.9 * sum(learned[:10]), "it comes nearer to its teacher"
    summary = json.loads((whole / "summary.json").read_text())["roles"]
    assert summary["late"]["labels_consumed"] == STEPS * 8 and summary["late"]["features_missed"] == 0
    manifest = json.loads((whole / "labels" / "teacher" / "log.json").read_text())
    assert manifest["weights"] == fingerprint(workplace / "pretrained")
    newest = whole / "checkpoints" / "teacher" / f"step-{STEPS:08d}"
    assert sum(path.stat().st_size for path in newest.iterdir()) < 20_000, "no weights"
    assert (whole / "report.html").is_file()


def test_a_killed_run_goes_on_to_the_same_bits(workplace: Path, whole: Path) -> None:
    plain = ("--set", "run.name=cut", "--set", "students.late.distill.features.attention=0.0")
    run = workplace / "runs" / "cut"
    with start_titan("run", "frozen.toml", *plain, cwd=workplace) as process:
        wait_for_step(run, "teacher", 13, process, timeout_s=180.0)
        kill_tree(process.pid)
    newest = newest_step(run / "checkpoints" / "teacher") or 0
    assert newest < STEPS, "it was killed on the way"
    result = titan("resume", run, cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert segments(run) == segments(whole)
    one, other = weights(run, "early", STEPS), weights(whole, "early", STEPS)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert titan("labels", "audit", run, cwd=workplace).returncode == 0


def test_other_weights_are_no_way_to_go_on(workplace: Path, whole: Path) -> None:
    """Also: what a checkpoint without weights is asked for."""
    shutil.copytree(whole, workplace / "runs" / "changed")
    (workplace / "runs" / "changed" / "summary.json").unlink()
    kept = (workplace / "pretrained" / "model.safetensors").read_bytes()
    tensors = load_file(workplace / "pretrained" / "model.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in tensors.items()}, workplace / "pretrained" / "model.safetensors")
    try:
        result = titan("resume", "runs/changed", cwd=workplace)
    finally:
        (workplace / "pretrained" / "model.safetensors").write_bytes(kept)
    assert result.returncode == 1 and "its teacher was frozen with other weights" in result.stderr, result.stderr
    asked = titan("export", whole, "--out", "copy", cwd=workplace)
    assert asked.returncode == 2 and "was not trained; copy that folder" in asked.stderr, asked.stderr


def test_what_titan_exports_fits(workplace: Path, whole: Path) -> None:
    result = titan("export", whole, "--student", "early", "--out", "exported", "--dtype", "bf16", cwd=workplace)
    assert result.returncode == 0, result.stderr
    config = load_config(workplace / "frozen.toml", [f"teacher.source=hf:{workplace / 'exported'}"])
    student = config.students[0].model
    assert config.teacher.model == student.model_copy(update={"kv_heads": student.num_kv_heads})
    tokenizer = Tokenizer(Path(config.data.tokenizer or ""))
    assert PretrainedWeights(workplace / "exported").mistakes(student, tokenizer.vocab_size) == []
    assert other_tokenizer(workplace / "exported", workplace / "pretrained" / "tokenizer.model") == ""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["teacher.source=hf:nowhere"], "teacher.source: cannot read nowhere/config.json: No such file"),
        (["teacher.source=hf:text"], "teacher.source: cannot read text/config.json"),
        (["data.sequence_length=64"], "was made for at most 32 positions"),
        (["data.tokenizer=other.model"], "tokenizer.model is another tokenizer than that of the corpus"),
        (["teacher.source=hf:few"], "it has 448 rows of vocabulary, the tokenizer 512 pieces"),
        (["teacher.source=hf:torn"], "model.safetensors is no safetensors file"),
        (
            ["teacher.model={layers=2,hidden=128,heads=4,kv_heads=2,ffn=256}"],
            "teacher.model.layers is 2, pretrained has 4",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    workplace: Path, settings: list[str], said: str
) -> None:
    for name in ("few", "torn"):
        if not (workplace / name).exists():
            shutil.copytree(workplace / "pretrained", workplace / name)
    content = json.loads((workplace / "pretrained" / "config.json").read_text())
    (workplace / "few" / "config.json").write_text(json.dumps(content | {"vocab_size": 448}))
    (workplace / "torn" / "model.safetensors").write_bytes(b"torn")
    (workplace / "other.model").write_bytes((workplace / "pretrained" / "tokenizer.model").read_bytes() + b"\x12\x00")
    overrides = [part for one in ("run.name=refused", *settings) for part in ("--set", one)]
    result = titan("run", "frozen.toml", *overrides, cwd=workplace)
    assert result.returncode in (1, 2) and said in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and not (workplace / "runs" / "refused").exists()


def test_a_tokenizer_that_transformers_saved_is_known_again(workplace: Path, tmp_path: Path) -> None:
    """Without the SentencePiece model, and written anew."""
    transformers = pytest.importorskip("transformers")
    own = workplace / "pretrained" / "tokenizer.model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(workplace / "pretrained", local_files_only=True)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "tokenizer.model").exists()
    assert other_tokenizer(tmp_path / "saved", own) == ""
    path = tmp_path / "saved" / "tokenizer.json"
    saved = json.loads(path.read_text())
    for change, differs in (
        ({"normalizer": {"type": "NFC"}}, "normalizer differ"),
        ({"model": saved["model"] | {"merges": saved["model"]["merges"][1:]}}, "model.merges differ"),
    ):
        path.write_text(json.dumps(saved | change))
        assert differs in other_tokenizer(tmp_path / "saved", own)
    path.unlink()
    assert "neither tokenizer.model nor tokenizer.json" in other_tokenizer(tmp_path / "saved", own)
