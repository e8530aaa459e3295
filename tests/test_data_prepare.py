"""Preparing a corpus: the shards against a slow obvious version, interruption, repetition, and what is refused."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import titan.data.tokenize
from titan.config.settings import DataSettings
from titan.data.corpus import Corpus
from titan.data.prepare import PrepareProgress, prepare_corpus
from titan.data.shards import Shard, read_shard, token_type, write_shard
from titan.data.sources import iter_documents, list_files
from titan.data.tokenizer import train_tokenizer
from titan.errors import DataError

REPOSITORY = Path(__file__).parent.parent


def write_texts(folder: Path, count: int = 60, seed: int = 1) -> list[str]:
    """Files of made-up words, between 0.2 and 6 kB each."""
    draw = random.Random(seed)
    words = [
        "".join(draw.choices("abcdefghijklmnopqrstuvwxyz\u00e9\u4e2d", k=draw.randrange(2, 8))) for _ in range(400)
    ]
    texts = [" ".join(draw.choices(words, k=draw.randrange(40, 1200))) + "\n" for _ in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_text(text)
    return texts


def settings_for(source: Path | str, **changes: Any) -> DataSettings:
    return DataSettings(
        **{
            "sources": (str(source),),
            "vocab_size": 400,
            "heldout_fraction": 0.2,
            "shard_tokens": 10_000,
            "workers": 1,
            **changes,
        }
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def whole(corpus: Corpus, split: Any) -> np.ndarray[Any, Any]:
    return corpus.tokens(split, 0, corpus.num_tokens(split))


def documents_of(corpus: Corpus, split: Any) -> list[str]:
    """The split's documents, decoded."""
    tokens = whole(corpus, split)
    ends = np.flatnonzero(tokens == corpus.eod_id)
    assert ends[-1] == len(tokens) - 1
    return [corpus.tokenizer.decode(part[:-1] if part[-1] == 2 else part) for part in np.split(tokens, ends[:-1] + 1)]


def test_shards_hold_what_one_loop_over_the_documents_in_memory_gives(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text")
    corpus = Corpus.open(prepare_corpus(settings_for(tmp_path / "text"), tmp_path / "cache"), verify=True)
    heldout = set(documents_of(corpus, "heldout"))
    for split, expected in (
        ("train", [text for text in texts if text not in heldout]),
        ("heldout", [text for text in texts if text in heldout]),
    ):
        ids = [[*corpus.tokenizer.encode(text), corpus.eod_id] for text in expected]
        np.testing.assert_array_equal(whole(corpus, split), np.concatenate(ids))
        assert corpus.num_bytes(split) == sum(len(text.encode()) for text in expected)
        assert corpus.counts[f"{split}_documents"] == len(expected)
    assert 3 <= len(heldout) <= 25


def test_every_shard_but_the_last_of_a_split_is_full(tmp_path: Path) -> None:
    write_texts(tmp_path / "text")
    folder = prepare_corpus(settings_for(tmp_path / "text"), tmp_path / "cache")
    index = json.loads((folder / "index.json").read_text())
    for split in ("train", "heldout"):
        sizes = [shard["tokens"] for shard in index["shards"][split]]
        assert all(size == 10_000 for size in sizes[:-1])
        assert 0 < sizes[-1] <= 10_000
    assert len(index["shards"]["train"]) > 3
    assert read_shard(folder / "train-00000.arrow")[1].dtype == np.uint16


def test_any_slice_across_shards_is_the_slice_of_the_whole_stream(tmp_path: Path) -> None:
    write_texts(tmp_path / "text")
    corpus = Corpus.open(prepare_corpus(settings_for(tmp_path / "text", shard_tokens=777), tmp_path / "cache"))
    stream = np.concatenate([read_shard(path)[1] for path in sorted(corpus.folder.glob("train-*.arrow"))])
    assert len(stream) == corpus.num_tokens("train")
    draw = random.Random(3)
    for start, count in [(0, 0), (776, 2), (777, 777), (0, 5000), (len(stream), 0)] + [
        (start := draw.randrange(len(stream)), draw.randrange(len(stream) - start)) for _ in range(100)
    ]:
        found = corpus.tokens("train", start, count)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, stream[start : start + count])


@pytest.mark.slow
def test_several_processes_write_the_bytes_that_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path / "text")
    one = files_of(prepare_corpus(settings_for(tmp_path / "text"), tmp_path / "one"))
    monkeypatch.setattr(titan.data.tokenize, "_PROCESS_BYTES", 1 << 10)
    monkeypatch.setattr(titan.data.tokenize, "_BATCH_BYTES", 1 << 13)
    three = files_of(prepare_corpus(settings_for(tmp_path / "text", workers=3), tmp_path / "three"))
    assert one == three


def test_the_order_of_sources_and_the_names_of_rows_do_not_change_a_documents_fate(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in reversed(texts))
    (tmp_path / "rows.jsonl").write_text(lines)
    files = Corpus.open(prepare_corpus(settings_for(tmp_path / "text"), tmp_path / "cache"))
    rows = Corpus.open(prepare_corpus(settings_for(tmp_path / "rows.jsonl"), tmp_path / "cache"))
    assert set(documents_of(files, "heldout")) == set(documents_of(rows, "heldout"))
    assert files.tokenizer.path.read_bytes() == rows.tokenizer.path.read_bytes()


def test_equal_documents_are_kept_once_and_empty_ones_not_at_all(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", count=20)
    for number, text in enumerate([*texts[:7], "", ""]):
        (tmp_path / "text" / f"again{number}.txt").write_text(text)
    (tmp_path / "text/binary.txt").write_bytes(b"\0\1\2")
    corpus = Corpus.open(prepare_corpus(settings_for(tmp_path / "text"), tmp_path / "cache"))
    assert sorted(documents_of(corpus, "train") + documents_of(corpus, "heldout")) == sorted(texts)
    kept = corpus.counts["train_documents"] + corpus.counts["heldout_documents"]
    assert (kept, corpus.counts["duplicates"], corpus.counts["empty"], corpus.counts["binary_files"]) == (20, 7, 2, 1)


@pytest.mark.parametrize("fraction", [1e-9, 0.499999])
def test_two_documents_always_give_one_to_each_split(tmp_path: Path, fraction: float) -> None:
    for seed in range(4):
        write_texts(tmp_path / str(seed), count=2, seed=seed)
        settings = settings_for(tmp_path / str(seed), heldout_fraction=fraction, vocab_size=310)
        corpus = Corpus.open(prepare_corpus(settings, tmp_path / "cache"))
        assert corpus.counts["train_documents"] == corpus.counts["heldout_documents"] == 1


def test_a_corpus_of_fewer_than_two_different_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"data.sources: the corpus is empty \(1 read, 1 of them empty.*; add sources"):
        prepare_corpus(settings_for(tmp_path), tmp_path / "cache")
    for name in ("b.txt", "c.txt"):
        (tmp_path / name).write_text("the same")
    with pytest.raises(DataError, match=r"data.sources: the corpus has one document.*; add sources, or cut the text"):
        prepare_corpus(settings_for(tmp_path), tmp_path / "cache")


def test_a_single_large_file_is_corpus_enough(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(write_texts(tmp_path / "text", count=130)))
    assert path.stat().st_size > 256 * 1024
    corpus = Corpus.open(prepare_corpus(settings_for(path), tmp_path / "cache"))
    assert sum(map(corpus.num_bytes, ("train", "heldout"))) == path.stat().st_size
    assert set(documents_of(corpus, "train")).isdisjoint(documents_of(corpus, "heldout"))


def test_a_given_tokenizer_is_copied_and_used(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text")
    model = tmp_path / "my.model"
    model.write_bytes(train_tokenizer(texts[:20], 333))
    folder = prepare_corpus(settings_for(tmp_path / "text", tokenizer=str(model)), tmp_path / "cache")
    assert (folder / "tokenizer.model").read_bytes() == model.read_bytes()
    assert Corpus.open(folder).vocab_size == 333
    with pytest.raises(DataError, match=r"data.tokenizer: cannot read .*none.model: No such file"):
        prepare_corpus(settings_for(tmp_path / "text", tokenizer=str(tmp_path / "none.model")), tmp_path / "cache")


def test_ids_above_sixteen_bits_are_stored_in_thirty_two(tmp_path: Path) -> None:
    assert (token_type(65536), token_type(65537)) == (np.uint16, np.uint32)
    tokens = np.array([70_000, 1, 2], np.uint32)
    shard = Shard("train-00000.arrow", 3, 9, 0, 0, 0)
    write_shard(tmp_path, shard, tokens)
    read, found = read_shard(tmp_path / shard.name)
    assert read == shard
    np.testing.assert_array_equal(found, tokens)


class Killed(BaseException):
    """Stands for a signal."""


def killing_after(shards: int) -> Callable[..., None]:
    """A `write_shard` that fails once so many are written."""
    written = 0

    def write(folder: Path, shard: Shard, tokens: Any) -> None:
        nonlocal written
        if written == shards:
            raise Killed
        written += 1
        write_shard(folder, shard, tokens)

    return write


def test_however_often_it_is_killed_it_ends_with_the_bytes_of_an_undisturbed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path / "text")
    settings = settings_for(tmp_path / "text", shard_tokens=3_000)
    undisturbed = files_of(prepare_corpus(settings, tmp_path / "undisturbed"))
    times: dict[str, int] = {}
    for attempt in range(100):
        monkeypatch.setattr(titan.data.tokenize, "write_shard", killing_after(attempt % 4))
        try:
            folder = prepare_corpus(settings, tmp_path / "cache")
            break
        except Killed:
            for path in (tmp_path / "cache").glob("*/*.arrow"):
                assert times.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    assert attempt > 5
    assert files_of(folder) == undisturbed
    assert len(times) > 10


def test_a_shard_that_a_kill_left_damaged_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path / "text")
    settings = settings_for(tmp_path / "text", shard_tokens=3_000)
    undisturbed = files_of(prepare_corpus(settings, tmp_path / "undisturbed"))
    monkeypatch.setattr(titan.data.tokenize, "write_shard", killing_after(6))
    with pytest.raises(Killed):
        prepare_corpus(settings, tmp_path / "cache")
    monkeypatch.undo()
    folder = next((tmp_path / "cache").iterdir())
    flip(folder / "train-00002.arrow")
    (folder / "train-00009.arrow.123.tmp").write_bytes(b"half")
    assert files_of(prepare_corpus(settings, tmp_path / "cache")) == undisturbed


def test_an_unchanged_corpus_is_not_prepared_again_and_a_changed_one_is(tmp_path: Path) -> None:
    write_texts(tmp_path / "text")
    said: list[PrepareProgress] = []
    settings = settings_for(tmp_path / "text")
    first = prepare_corpus(settings, tmp_path / "cache", said.append)
    assert {progress.phase for progress in said} == {"reading", "tokenizer", "tokenizing"}
    for phase in ("reading", "tokenizer", "tokenizing"):
        steps = [progress for progress in said if progress.phase == phase]
        assert [step.done for step in steps] == sorted(step.done for step in steps)
        assert steps[-1].done == steps[-1].total > 0
    said.clear()
    same = settings.model_copy(update={"sequence_length": 64, "batch_size": 2, "workers": 2, "cache": "elsewhere"})
    assert prepare_corpus(same, tmp_path / "cache", said.append) == first
    assert said == []
    for change in ({"vocab_size": 401}, {"heldout_fraction": 0.3}, {"shard_tokens": 999}):
        assert prepare_corpus(settings.model_copy(update=change), tmp_path / "cache") != first
    os.utime(tmp_path / "text/0000.txt", ns=(0, 0))
    assert prepare_corpus(settings, tmp_path / "cache") != first


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    settings = settings_for("python-stdlib", vocab_size=1000, heldout_fraction=0.02, shard_tokens=4_000_000)
    return Corpus.open(prepare_corpus(settings, tmp_path_factory.mktemp("built-in")))


def test_the_built_in_corpus_is_skipped_in_under_a_second(built_in: Corpus) -> None:
    settings = settings_for("python-stdlib", vocab_size=1000, heldout_fraction=0.02, shard_tokens=4_000_000)
    started = time.perf_counter()
    assert prepare_corpus(settings, built_in.folder.parent) == built_in.folder
    assert time.perf_counter() - started < 1


def test_the_built_in_corpus_trains_on_millions_of_tokens_and_holds_some_out(built_in: Corpus) -> None:
    corpus = built_in
    assert corpus.num_tokens("train") > 2e6
    assert 0 < corpus.num_bytes("heldout") < 0.1 * corpus.num_bytes("train")


def test_sources_that_change_meanwhile_are_refused(tmp_path: Path) -> None:
    write_texts(tmp_path / "text")

    def touch(progress: PrepareProgress) -> None:
        if progress.phase == "tokenizing":
            (tmp_path / "text/new.txt").write_text("new")

    with pytest.raises(DataError, match=r"data.sources: .*changed while .*; run again"):
        prepare_corpus(settings_for(tmp_path / "text"), tmp_path / "cache", touch)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write_texts(tmp_path / "text")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"data.cache: cannot write .*cache.*; make room or choose another folder"):
        prepare_corpus(settings_for(tmp_path / "text"), tmp_path / "cache")


def flip(path: Path, at: int = 2000) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_damaged_corpus_is_refused_by_the_name_of_its_file(tmp_path: Path) -> None:
    write_texts(tmp_path / "text")
    folder = prepare_corpus(settings_for(tmp_path / "text"), tmp_path / "cache")
    good = files_of(folder)

    def spoil(name: str, content: bytes | None) -> None:
        for other, bytes_of_other in good.items():
            (folder / other).write_bytes(bytes_of_other)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    remedy = "; delete the folder and run again$"
    spoil("train-00001.arrow", good["train-00001.arrow"][:-100])
    with pytest.raises(DataError, match=rf"train-00001.arrow is damaged: it has \d+ bytes instead of \d+{remedy}"):
        Corpus.open(folder)
    spoil("heldout-00000.arrow", None)
    with pytest.raises(DataError, match=rf"heldout-00000.arrow is missing{remedy}"):
        Corpus.open(folder)
    spoil("train-00001.arrow", good["train-00001.arrow"])
    flip(folder / "train-00001.arrow")
    Corpus.open(folder)
    with pytest.raises(DataError, match=rf"train-00001.arrow is damaged: its checksum differs{remedy}"):
        Corpus.open(folder, verify=True)
    spoil("train-00001.arrow", bytes(len(good["train-00001.arrow"])))
    with pytest.raises(DataError, match=rf"train-00001.arrow is damaged: .*{remedy}"):
        Corpus.open(folder).tokens("train", 10_000, 5)
    spoil("train-00001.arrow", good["train-00002.arrow"])
    with pytest.raises(DataError, match=rf"train-00001.arrow is damaged: it belongs to another corpus{remedy}"):
        Corpus.open(folder).tokens("train", 10_000, 5)
    spoil("tokenizer.model", good["tokenizer.model"] + b"\n")
    with pytest.raises(DataError, match=rf"tokenizer.model is damaged: its checksum differs{remedy}"):
        Corpus.open(folder, verify=True)
    for content in (b"{", b"{}", b"[]", b'{"fingerprint": 1}'):
        spoil("index.json", content)
        with pytest.raises(DataError, match=rf"index.json is damaged: .*{remedy}"):
            Corpus.open(folder)
    spoil("index.json", None)
    with pytest.raises(DataError, match=r"index.json does not exist: the corpus was never finished; prepare it again"):
        Corpus.open(folder)


PREPARE = """
import sys
from pathlib import Path
from titan.config.settings import DataSettings
from titan.data.prepare import prepare_corpus
import titan.data.tokenize
titan.data.tokenize._BATCH_BYTES = 1 << 16
print(prepare_corpus(DataSettings.model_validate_json(sys.argv[1]), Path(sys.argv[2])))
"""


def start(settings: DataSettings, cache: Path) -> "subprocess.Popen[str]":
    arguments = [sys.executable, "-c", PREPARE, settings.model_dump_json(), str(cache)]
    return subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_kill_leaves_finished_shards_and_no_process_behind(tmp_path: Path) -> None:
    settings = settings_for("python-stdlib", vocab_size=1000, shard_tokens=50_000, workers=2)
    process = start(settings, tmp_path / "cache")
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "cache").glob("*/train-*.arrow"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert len(children) >= 2
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert (len(gone), alive) == (len(children), [])
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/*.arrow")}
    folder = prepare_corpus(settings, tmp_path / "cache")
    assert all(path.stat().st_mtime_ns == written for path, written in shards.items())
    assert files_of(folder) == files_of(prepare_corpus(settings, tmp_path / "fresh"))
    Corpus.open(folder, verify=True)


@pytest.mark.slow
def test_two_processes_that_prepare_the_same_corpus_take_turns(tmp_path: Path) -> None:
    write_texts(tmp_path / "text", count=200)
    settings = settings_for(tmp_path / "text", shard_tokens=1000)
    processes = [start(settings, tmp_path / "cache") for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert files_of(Path(outputs[0][0].strip())) == files_of(prepare_corpus(settings, tmp_path / "alone"))


def test_the_counts_of_the_built_in_corpus_are_those_of_its_documents(built_in: Corpus) -> None:
    files = list_files(["python-stdlib"])
    found = [document.text for file in files for document in iter_documents(file, "text") or ()]
    counts = built_in.counts
    assert sum(counts.values()) == len(found)
    assert counts["empty"] == found.count("")
    assert counts["duplicates"] == len(found) - counts["empty"] - len(set(found) - {""})
