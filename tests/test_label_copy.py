"""A label log and its second copy: each gives the other what a crash or a lost disk took from it."""

import random
import shutil
from pathlib import Path

import pytest

from tests.label_logs import MANIFEST, Producer, assert_whole, read_all, snapshot
from tests.runs import write_tiny_config
from titan.config.load import load_config
from titan.distill.log.manifest import write_manifest
from titan.distill.log.reader import LabelReader
from titan.distill.log.retention import drop_before, first_kept
from titan.distill.log.second_copy import bring_together, copy_folder, vacate_copies
from titan.errors import LabelError, RunError


def committed_last(folder: Path) -> int:
    reader = LabelReader(folder, 0.0)
    reader.poll()
    last = reader.last_committed
    reader.close()
    return last


def tear(folder: Path, draw: random.Random) -> None:
    """What a crash may do to files that were being written: their ends are gone."""
    for path in [folder / "commits.jsonl", *sorted(folder.glob("part-*/*"))[-2:]]:
        if path.name == "commits.jsonl":
            lines = path.read_bytes().splitlines(keepends=True)
            kept = lines[: len(lines) - draw.randrange(3)]
            path.write_bytes(b"".join(kept) + b'{"crc'[: draw.randrange(4)])
        elif draw.random() < 0.3:
            with open(path, "ab") as file:
                file.write(bytes(draw.randrange(40)))


@pytest.mark.parametrize("seed", range(8))
def test_a_log_and_its_copy_give_each_other_what_the_other_lacks(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    log, copy = tmp_path / "log", tmp_path / "copy"
    last = 0
    for _ in range(4):
        dp, more = draw.choice([1, 2]), draw.randrange(1, 9)
        producers = {folder: Producer(folder, dp, segment_bytes=400) for folder in (log, copy)}
        for folder in (log, copy):
            write_manifest(folder, MANIFEST)
        for step in range(last + 1, last + more + 1):
            for folder in (copy, log):
                producers[folder].steps(step, step)
        for producer in producers.values():
            producer.close()
        if draw.random() < 0.5:
            for folder in (log, copy) if draw.random() < 0.5 else (log,):  # the crash may come between the two
                drop_before(folder, max(1, last - draw.randrange(3)))
        harm = draw.choice(["log lost", "copy lost", "torn", "nothing"])
        if harm.endswith("lost"):
            shutil.rmtree(log if harm == "log lost" else copy)
        elif harm == "torn":
            for folder in (log, copy):
                tear(folder, draw)
        expected = max(committed_last(folder) for folder in (log, copy) if folder.exists())
        bring_together(log, copy, MANIFEST.run_id)
        assert committed_last(log) == committed_last(copy) == expected, harm
        if harm == "nothing":
            assert first_kept(copy) >= first_kept(log), "what the log has dropped goes from the copy too"
        last = expected
        first = max(1, first_kept(log), first_kept(copy))
        for folder in (log, copy):
            for step, blocks in read_all(folder, last, first=first).items():
                assert_whole(blocks, step)
            assert (folder / "log.json").read_bytes() == (log / "log.json").read_bytes()
        before = {folder: snapshot(folder) for folder in (log, copy)}
        assert bring_together(log, copy, MANIFEST.run_id) == 0
        assert {folder: snapshot(folder) for folder in (log, copy)} == before, "nothing is left to do"


def test_a_copy_of_another_run_is_left_alone(tmp_path: Path) -> None:
    for folder in (tmp_path / "log", tmp_path / "copy"):
        Producer(folder).steps(1, 2).close()
        write_manifest(folder, MANIFEST)
    before = snapshot(tmp_path)
    with pytest.raises(LabelError, match="is the log of another run"):
        bring_together(tmp_path / "log", tmp_path / "copy", "run-2")
    assert snapshot(tmp_path) == before


def test_a_new_run_wants_a_folder_of_its_own_for_its_second_copy(tmp_path: Path) -> None:
    tiny, run = write_tiny_config(tmp_path / "work"), tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    inside = load_config(tiny, [f"run.dir={run.parent}", f"labels.copy_to={run}"])
    with pytest.raises(RunError, match="would lie in"):
        vacate_copies(inside, run, overwrite=True)
    config = load_config(tiny, [f"run.dir={run.parent}", f"labels.copy_to={tmp_path / 'second'}"])
    log = copy_folder(config, "teacher")
    assert log == tmp_path / "second" / "tiny" / "labels" / "teacher"
    vacate_copies(config, run, overwrite=False)
    Producer(log).steps(1, 2).close()
    with pytest.raises(RunError, match="has the labels of an earlier run"):
        vacate_copies(config, run, overwrite=False)
    with pytest.raises(RunError, match="was not made by titan"):
        vacate_copies(config, run, overwrite=True)
    (tmp_path / "second" / "tiny" / "config.toml").write_text("")
    vacate_copies(config, run, overwrite=True)
    assert not log.exists() and (tmp_path / "second").exists()
