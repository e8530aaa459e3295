"""A log made again in another codec, against what the teacher itself would have written."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from tests.codec_teacher import entries_of
from titan.cli.labels import labels_app
from titan.config.distillation import LabelSettings
from titan.distill import recode as recoding
from titan.distill.codec.block import HEADER_BYTES, BlockHeader, LabelBlock, decode_block, encode_block
from titan.distill.codec.raw import RawLabels
from titan.distill.log.manifest import LogManifest, read_manifest, write_manifest
from titan.distill.log.reader import LabelReader
from titan.distill.log.records import Commit
from titan.distill.log.segment import parts_of, segments_of
from titan.distill.log.verify import verify_log
from titan.distill.log.writer import CommitWriter, LabelWriter
from titan.distill.recode import Wanted, _Maker, recode
from titan.distill.tap import label_wish, raw_labels
from titan.errors import LabelError
from titan.ops.label import TailDraws
from titan.ops.look import VocabShard
from titan.ops.says import label_logits
from titan.tasks.sample_labels import SampleLabels
from titan.train.trainer import LabelPart

VOCAB, LENGTH, SAMPLES, WIDTH, SEED = 300, 16, 4, 24, 7
SAMPLED = LabelSettings(bytes_per_token=30.0)
SHARD = VocabShard(0, VOCAB, VOCAB, None)


class StoppedHereError(Exception):
    """Whatever ends a process."""


def manifest(codec: str, temperature: float = 1.0) -> LogManifest:
    return LogManifest("run-1", "teacher", "ab" * 32, VOCAB, LENGTH, SAMPLES, codec, temperature, SEED)


def model(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [S * B, D], rows over (position, sample), and an output weight [V, D]: Zipf-like, with noise."""
    generator = torch.Generator().manual_seed(step)
    hidden = torch.randn(LENGTH * SAMPLES, WIDTH, generator=generator)
    weight = 0.3 * torch.randn(VOCAB, WIDTH, generator=generator)
    weight[:, 0] = -torch.arange(1.0, VOCAB + 1).log()
    hidden[:, 0] = 1.0
    return hidden, weight


def block_of(step: int, first: int, samples: int, labels: RawLabels) -> LabelBlock:
    rows = slice(first, first + samples)
    tokens = np.random.default_rng(step).integers(0, VOCAB, (SAMPLES, LENGTH + 1)).astype(np.int32)[rows]
    return LabelBlock(step, first, np.arange(SAMPLES)[rows] + 50 * step, tokens, labels)


def own_pass(
    step: int, first: int, samples: int, settings: LabelSettings, logits: torch.Tensor | None = None
) -> LabelBlock:
    """What a teacher says of some samples in its own pass, from float32 logits."""
    hidden, weight = model(step)
    logits = hidden @ weight.t() if logits is None else logits
    logits = logits.view(LENGTH, SAMPLES, VOCAB)[:, first : first + samples].reshape(-1, VOCAB)
    wish = label_wish(settings, SEED, step)
    row = torch.arange(len(logits))
    ids = torch.arange(SAMPLES)[first : first + samples] + 50 * step
    draws = TailDraws(wish.draws, wish.seed, ids[row % samples], row // samples, wish.independent)
    says = label_logits(logits, wish.top_k, draws if wish.draws else None, settings.temperature, SHARD, wish.whole)
    return block_of(step, first, samples, raw_labels(settings, LabelPart(first, samples, says), LENGTH))


def hidden_block(step: int, first: int, samples: int) -> LabelBlock:
    hidden, weight = model(step)
    array = hidden.view(LENGTH, SAMPLES, WIDTH).transpose(0, 1)[first : first + samples].numpy()
    labels = RawLabels(
        "hidden", hidden_BSD=array, output_weight_VD=None if first else weight.numpy(), weight_version=step
    )
    return block_of(step, first, samples, labels)


def make_log(run: Path, codec: str, steps: int, temperature: float = 1.0, ended: bool = True) -> Path:
    """A run folder whose teacher has two replicas, with two samples a block."""
    folder = run / "labels" / "teacher"
    write_manifest(folder, manifest(codec, temperature))
    (run / "config.toml").write_text("")
    writers, commits = [LabelWriter(folder, part, 0) for part in (0, 1)], CommitWriter(folder, 0)
    settings = LabelSettings(codec=codec, temperature=temperature)  # type: ignore[arg-type]
    for step in range(1, steps + 1):
        for part, writer in enumerate(writers):
            make = hidden_block if codec == "hidden" else lambda *rows: own_pass(*rows, settings)
            writer.append(step, encode_block(make(step, 2 * part, 2), VOCAB))
        commits.commit(Commit(step, (0, 1), SAMPLES, step / 10))
    if ended:
        commits.end("finished")
    for writer in (*writers, commits):
        writer.close()
    return folder


def titan(*words: object) -> Result:
    return CliRunner().invoke(labels_app, [str(word) for word in words], env={"COLUMNS": "160"})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def blocks_of(folder: Path, step: int) -> list[LabelBlock]:
    reader = LabelReader(folder, 0.0)
    commit = reader.wait_commit(step)
    assert commit is not None and commit.cross_entropy == step / 10 and commit.samples == SAMPLES
    blocks = reader.read(commit)[0]
    reader.close()
    return blocks


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "settings",
    [SAMPLED, LabelSettings(codec="random", draws=20), LabelSettings(codec="top_k", bytes_per_token=20.0)],
    ids=lambda settings: settings.codec,
)
def test_from_the_same_float32_log_probabilities_every_bit_is_that_of_the_teachers_own_pass(
    settings: LabelSettings, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recoding, "CHUNK_ELEMENTS", 20 * VOCAB)  # tokens are said in four pieces
    settings = settings.model_copy(update={"temperature": temperature})
    for step in (1, 9):
        hidden, weight = model(step)
        log_probs = (hidden @ weight.t()).log_softmax(-1)
        dense = log_probs.view(LENGTH, SAMPLES, VOCAB).transpose(0, 1).numpy()
        source = block_of(step, 0, SAMPLES, RawLabels("full", temperature, dense_BSV=dense))
        made = _Maker(settings, False, manifest("full", temperature)).encoded(source, None)
        want = own_pass(step, 0, SAMPLES, settings, log_probs)
        assert made == encode_block(want, VOCAB, settings.bytes_per_token)


def sent(block: LabelBlock) -> SampleLabels:
    """As a reader of the teacher's own log gets it."""
    data = encode_block(block, VOCAB)
    return decode_block(BlockHeader.unpack(data[:HEADER_BYTES]), data[HEADER_BYTES:]).labels.at(1.0)


def shared(ids: np.ndarray, log_prob: np.ndarray, other_ids: np.ndarray, other_log_prob: np.ndarray) -> list[float]:
    """Of each token's entries, the share that another label of it has too."""
    ones, others = entries_of(ids, log_prob), entries_of(other_ids, other_log_prob)
    return [len(one & other) / max(1, len(one), len(other)) for one, other in zip(ones, others, strict=True)]


@pytest.mark.parametrize(("codec", "heads", "draws"), [("full", 0.999, 0.995), ("hidden", 0.99, 0.9)])
def test_a_log_as_it_is_stored_gives_nearly_all_entries_of_the_teachers_own_pass(
    tmp_path: Path, codec: str, heads: float, draws: float
) -> None:
    """Its log-probabilities are rounded, so that entries of nearly one probability change places."""
    every = LabelSettings(bytes_per_token=None)
    made = recode(make_log(tmp_path / "run", codec, 6), tmp_path / "out", Wanted(every))
    same_heads: list[float] = []
    same_draws: list[float] = []
    for step in range(1, 7):
        for block in blocks_of(made.folder, step):
            own, got = sent(own_pass(step, block.first_sample, 2, every)), block.labels.at(1.0)
            same_heads += shared(got.ids_BSK, got.log_prob_BSK, own.ids_BSK, own.log_prob_BSK)
            assert got.draw_ids_BSM is not None and got.draw_log_prob_BSM is not None
            assert own.draw_ids_BSM is not None and own.draw_log_prob_BSM is not None
            same_draws += shared(got.draw_ids_BSM, got.draw_log_prob_BSM, own.draw_ids_BSM, own.draw_log_prob_BSM)
    assert np.mean(same_heads) > heads and np.mean(same_draws) > draws, (np.mean(same_heads), np.mean(same_draws))


def test_all_steps_samples_and_the_manifest_are_those_of_the_source(tmp_path: Path) -> None:
    source = make_log(tmp_path / "run", "hidden", 5)
    shown: list[tuple[int, int]] = []
    made = recode(source, tmp_path / "out", Wanted(SAMPLED), lambda done, total: shown.append((done, total)))
    assert (made.first_step, made.last_step, made.steps, made.ended) == (1, 5, 5, True)
    assert shown == [(step, 5) for step in range(1, 6)]
    assert read_manifest(made.folder) == replace(read_manifest(source), codec="sampled")
    assert verify_log(made.folder).findings == () and verify_log(made.folder).steps == 5
    for step in range(1, 6):
        for own, got in zip(blocks_of(source, step), blocks_of(made.folder, step), strict=True):
            assert own.first_sample == got.first_sample and got.labels.codec == "sampled"
            np.testing.assert_array_equal(own.tokens_BS1, got.tokens_BS1)
            np.testing.assert_array_equal(own.sample_ids_B, got.sample_ids_B)
    for command in ("ls", "verify", "stats", "audit"):
        result = titan(command, tmp_path / "out")
        assert result.exit_code == 0, result.output
    tokens = 5 * SAMPLES * LENGTH
    assert 30 < sum(path.stat().st_size for path in segments_of(made.folder, 0)) / tokens < 30 + 9 / 8 * 2 + 9
    assert parts_of(made.folder) == [0]
    reader = LabelReader(made.folder, 0.0)
    commit = reader.wait_commit(5)
    assert commit is not None and commit.parts == (0,)
    assert reader.ended is not None and reader.ended.reason == "finished"
    reader.close()


def test_a_renormalised_label_has_the_entries_of_top_k_and_nothing_else(tmp_path: Path) -> None:
    source = make_log(tmp_path / "run", "full", 2)
    top_k = LabelSettings(codec="top_k", bytes_per_token=20.0)
    plain, whole = (recode(source, tmp_path / str(flag), Wanted(top_k, flag)).folder for flag in (False, True))
    for step in (1, 2):
        for one, two in zip(blocks_of(plain, step), blocks_of(whole, step), strict=True):
            first, second = one.labels, two.labels
            assert first.log_prob_BSK is not None and second.log_prob_BSK is not None
            np.testing.assert_array_equal(first.ids_BSK, second.ids_BSK)
            mass = np.exp(first.log_prob_BSK).sum(-1, keepdims=True)
            np.testing.assert_allclose(np.exp(second.log_prob_BSK).sum(-1), 1.0, atol=2e-6)
            present = first.log_prob_BSK > -np.inf
            error = np.abs(second.log_prob_BSK - (first.log_prob_BSK - np.log(mass)))[present]
            assert mass.min() < 0.8 and error.max() < 0.3 and error.mean() < 0.03, "8 bits each"


def test_stopped_anywhere_it_goes_on_and_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_log(tmp_path / "run", "hidden", 6)
    want = files(recode(source, tmp_path / "whole", Wanted(SAMPLED)).folder)

    def stop_at(step: int) -> None:
        def show(done: int, total: int) -> None:
            if done == step:
                raise StoppedHereError

        with pytest.raises(StoppedHereError):
            recode(source, tmp_path / "out", Wanted(SAMPLED), show)

    stop_at(2)
    encoded, calls = recoding._Maker.encoded, []

    def dies_in_the_middle_of_a_step(self: _Maker, *block: object) -> bytes:
        calls.append(block)
        if len(calls) == 4:
            raise StoppedHereError
        return encoded(self, *block)  # type: ignore[arg-type]

    monkeypatch.setattr(recoding._Maker, "encoded", dies_in_the_middle_of_a_step)
    with pytest.raises(StoppedHereError):
        recode(source, tmp_path / "out", Wanted(SAMPLED))
    monkeypatch.undo()
    made = recode(source, tmp_path / "out", Wanted(SAMPLED))
    assert made.steps == 3, "two and one were made before"
    assert files(made.folder) == want
    again = recode(source, tmp_path / "out", Wanted(SAMPLED))
    assert again.steps == 0 and files(made.folder) == want


@pytest.mark.timeout(120)
def test_after_sigkill_it_goes_on(tmp_path: Path) -> None:
    source = make_log(tmp_path / "run", "hidden", 60)
    want = files(recode(source, tmp_path / "whole", Wanted(SAMPLED)).folder)
    words = ["recode", str(tmp_path / "run"), str(tmp_path / "out"), "--codec", "sampled", "--bytes-per-token", "30"]
    code = "import sys, time\nfrom titan.distill import recode as r\nencoded = r._Maker.encoded\n"
    code += "def slow(*block):\n    time.sleep(0.01)\n    return encoded(*block)\nr._Maker.encoded = slow\n"
    code += f"from titan.cli.labels import labels_app\nlabels_app({words!r})"
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stderr=subprocess.DEVNULL)
    commits = tmp_path / "out" / "labels" / "teacher" / "commits.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (commits.exists() and commits.read_bytes().count(b"\n") > 5):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=10)
    assert 5 < commits.read_bytes().count(b"\n") < 60
    result = titan(*words)
    assert result.exit_code == 0 and "steps 1 to 60" in result.output, result.output
    assert files(tmp_path / "out" / "labels" / "teacher") == want


def test_a_source_that_goes_on_is_followed_when_asked_again(tmp_path: Path) -> None:
    source = make_log(tmp_path / "run", "hidden", 2, ended=False)
    assert "repeat this" in titan("recode", tmp_path / "run", tmp_path / "out", "--codec", "sampled").output
    commits = CommitWriter(source, 2)
    writer = LabelWriter(source, 0, 2)
    writer.append(3, encode_block(hidden_block(3, 0, 4), VOCAB))
    commits.commit(Commit(3, (0,), SAMPLES, 0.3))
    commits.end("finished")
    result = titan("recode", tmp_path / "run", tmp_path / "out", "--codec", "sampled")
    assert "steps 1 to 3, 1 step made now" in result.output and "repeat" not in result.output
    for file in (commits, writer):
        file.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--codec", "hidden"), "hidden cannot be made from a log"),
        (("--codec", "random", "--top-k", "4"), "--top-k is given, but --codec random has no use for it"),
        (("--codec", "sampled", "--renormalise"), "--renormalise is given, but --codec sampled has no use for it"),
        (("--codec", "sampled", "--bytes-per-token", "2"), "--bytes-per-token is 2; give at least 4"),
        (("--codec", "top_k", "--top-k", "301"), "--top-k 301 is more than the log's vocabulary (300)"),
    ],
)
def test_what_cannot_be_is_refused_in_words(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    make_log(tmp_path / "run", "hidden", 1)
    result = titan("recode", tmp_path / "run", tmp_path / "out", *options)
    assert isinstance(result.exception, LabelError) and said in str(result.exception), result.output
    assert not (tmp_path / "out").exists()


def test_other_sources_and_other_folders_are_refused(tmp_path: Path) -> None:
    source = make_log(tmp_path / "run", "full", 2)
    out = tmp_path / "out"
    made = recode(source, out, Wanted(SAMPLED))
    with pytest.raises(LabelError, match="codec 'sampled', from which no others"):
        recode(made.folder, tmp_path / "two", Wanted(SAMPLED))
    with pytest.raises(LabelError, match="was begun with labels"):
        recode(source, out, Wanted(LabelSettings(bytes_per_token=20.0)))
    with pytest.raises(LabelError, match="was begun with source"):
        recode(make_log(tmp_path / "other", "full", 2), out, Wanted(SAMPLED))
    with pytest.raises(LabelError, match="is not empty"):
        recode(source, tmp_path / "run", Wanted(SAMPLED))
    with pytest.raises(LabelError, match="is a file"):
        recode(source, tmp_path / "run" / "config.toml", Wanted(SAMPLED))
    assert not (tmp_path / "run" / recoding.LOCK).exists()
    with recoding._hold(out), pytest.raises(LabelError, match="another `titan labels recode`"):
        recode(source, out, Wanted(SAMPLED))
    (tmp_path / "empty" / "labels" / "teacher").mkdir(parents=True)
    write_manifest(tmp_path / "empty" / "labels" / "teacher", manifest("full"))
    with pytest.raises(LabelError, match="has no step yet"):
        recode(tmp_path / "empty" / "labels" / "teacher", tmp_path / "three", Wanted(SAMPLED))
