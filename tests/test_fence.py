"""Ranks that were given up and come back: a newer generation has taken over, so they write nothing and say why."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.label_logs import encoded
from titan.checkpoint.fence import Fence, fence_path, read_generation, take_over
from titan.checkpoint.folder import MANIFEST, complete_steps, remove_partial
from titan.checkpoint.pieces import Piece, PieceKey
from titan.checkpoint.save import CheckpointWriter
from titan.config.load import check_config
from titan.config.settings import TEACHER, RunConfig
from titan.data.prepare import prepare_corpus
from titan.distill.build import make_rank
from titan.distill.log.ledger import Ledger, Place
from titan.distill.log.reader import LabelReader
from titan.distill.log.records import STOPPED, Commit
from titan.distill.log.repair import reopen
from titan.distill.log.writer import CommitWriter, LabelWriter
from titan.distill.rank import RankSpec
from titan.errors import OvertakenError
from titan.observe.files import write_whole

ROLE = "early"
FORK = multiprocessing.get_context("fork")
WAIT_S = 120.0


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def start(run: Path) -> Fence:
    return Fence(fence_path(run, ROLE), take_over(run, ROLE))


def save(writer: CheckpointWriter, step: int) -> None:
    writer.save(step, [Piece(PieceKey("weight", "w", 0, 1, 0, 2), torch.ones(2))], {})
    writer.wait()


class Writers:
    """All that one generation writes with, each having written step 1."""

    def __init__(self, run: Path, fence: Fence, segment_bytes: int = 1):
        reopen(run / "labels")
        self.fence = fence
        self.labels = LabelWriter(run / "labels", 0, 0, segment_bytes, fence=fence)
        self.commits = CommitWriter(run / "labels", 0, fence=fence)
        self.ledger = Ledger(run, ROLE, fence)
        self.checkpoints = CheckpointWriter(run / "checkpoints", 0, 1, 1, 5.0, fence)
        for write in self.each(1).values():
            write()

    def each(self, step: int) -> dict[str, Callable[[], Any]]:
        return {
            "labels": lambda: self.labels.append(step, encoded(step)),
            "commit": lambda: self.commits.commit(Commit(step, (0,), 2, 1.0)),
            "ledger": lambda: self.ledger.note(step, Place(step, 0), Place(step + 1, 0), "consumed"),
            "checkpoint": lambda: save(self.checkpoints, step),
        }


def test_writers_of_a_generation_before_the_last_change_no_file_and_those_of_the_last_go_on(tmp_path: Path) -> None:
    old = Writers(tmp_path, start(tmp_path))
    take_over(tmp_path, "late")  # another role's ranks are nothing to them
    for write in old.each(2).values():
        write()
    new = start(tmp_path)
    before = files_of(tmp_path)
    late = {**old.each(3), "end": lambda: old.commits.end(STOPPED), "rewind": lambda: old.ledger.rewind(1)}
    late["opened anew"] = lambda: Ledger(tmp_path, ROLE, old.fence)
    for name, write in late.items():
        with pytest.raises(OvertakenError, match=r"generation 1 of early writes nothing more: generation 2 has taken"):
            write()
        assert files_of(tmp_path) == before, name
    CommitWriter(tmp_path / "labels", 2, fence=new).commit(Commit(3, (0,), 2, 1.0))
    Ledger(tmp_path, ROLE, new).rewind(1)
    save(CheckpointWriter(tmp_path / "checkpoints", 0, 1, 1, 5.0, new), 3)
    assert complete_steps(tmp_path / "checkpoints") == [3]


@pytest.mark.parametrize(("name", "segment_bytes"), [("labels", 1), ("labels", 1 << 20), ("commit", 1), ("ledger", 1)])
def test_a_write_that_looked_at_the_fence_just_before_another_took_over_goes_nowhere(
    name: str, segment_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Writers(tmp_path, start(tmp_path), segment_bytes)
    old.each(2)["labels"]()
    old.each(2)["commit"]()
    write = old.each(2 if name == "ledger" else 3)[name]
    look, looks, last_look = Fence.check, 0, 2 if name == "ledger" or (name, segment_bytes) == ("labels", 1) else 1
    before: dict[str, bytes] = {}

    def check(fence: Fence) -> None:
        nonlocal looks
        look(fence)
        if fence == old.fence:
            looks += 1
            if looks == last_look:
                new = start(tmp_path)
                assert reopen(tmp_path / "labels") == 2
                Ledger(tmp_path, ROLE, new)
                before.update(files_of(tmp_path))

    monkeypatch.setattr(Fence, "check", check)
    write()
    assert looks == last_look and files_of(tmp_path) == before


def test_a_checkpoint_that_was_on_its_way_is_not_committed_nor_old_ones_deleted(tmp_path: Path) -> None:
    fence, place = start(tmp_path), tmp_path / "checkpoints"
    save(CheckpointWriter(place, 0, 1, 1, 5.0, fence), 1)
    lead = CheckpointWriter(place, 0, 2, 1, WAIT_S, fence)  # waits for the receipt of a second rank
    lead.save(2, [Piece(PieceKey("weight", "w", 0, 1, 0, 2), torch.ones(2))], {})
    partial = place / "step-00000002.partial"
    while not (partial / "rank-00000.json").exists():
        time.sleep(0.01)
    take_over(tmp_path, ROLE)
    write_whole(partial / "rank-00001.json", json.dumps({"name": "other", "bytes": 0, "crc32": 0}).encode())
    with pytest.raises(OvertakenError):
        lead.wait()
    assert complete_steps(place) == [1] and not (partial / MANIFEST).exists()


def test_a_run_that_took_the_folder_of_another_is_told_from_it(tmp_path: Path) -> None:
    old = start(tmp_path)
    fence_path(tmp_path, ROLE).unlink()
    with pytest.raises(OvertakenError, match="the run folder is gone"):
        old.check()
    new = start(tmp_path)
    assert new.mine.number == old.mine.number == 1 and read_generation(tmp_path, ROLE) == new.mine
    new.check()
    with pytest.raises(OvertakenError):
        old.check()


def config_of(folder: Path) -> RunConfig:
    text = folder / "text.jsonl"
    numbers = [f"line {n} has {n * n % 97} words and {n % 7} of {n % 11} letters" for n in range(3000)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in numbers))
    model = {"layers": 1, "hidden": 32, "heads": 2, "ffn": 64}
    return check_config({
        "run": {"name": "r", "dir": str(folder), "steps": 1000000},
        "data": {"sources": [str(text)], "vocab_size": 320, "sequence_length": 32, "batch_size": 4, "workers": 1},
        "teacher": {"model": model},
        "students": [{"name": "s", "model": model}],
        "checkpoint": {"every_steps": 20, "keep": 2},
        "cluster": {"device": "cpu", "step_timeout_s": 30.0},
    })  # fmt: skip


def teach(spec: RankSpec, said: Path) -> None:
    """A teacher of one rank, as its actor has it, until it cannot go on."""
    rank = make_rank(spec)
    rank.join("127.0.0.1", rank.open_store("127.0.0.1"))
    try:
        rank.train()
    except Exception as error:
        said.write_text(f"{type(error).__name__}: {error}")


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, f"no {what} in {WAIT_S:.0f} s"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_teacher_that_was_stopped_given_up_and_continued_writes_nothing_and_says_why(tmp_path: Path) -> None:
    config, run, said = config_of(tmp_path), tmp_path / "r", tmp_path / "said"
    corpus = prepare_corpus(config.data, tmp_path / "data")
    log, checkpoints = run / "labels" / TEACHER, run / "checkpoints" / TEACHER
    run.mkdir()
    started: list[Any] = []
    try:
        for number in (1, 2):
            mine = take_over(run, TEACHER)
            remove_partial(checkpoints)  # as the driver does before it starts ranks
            reopen(log, needed=max(complete_steps(checkpoints), default=0))
            before = files_of(run)
            if started:
                os.kill(started[0].pid, signal.SIGCONT)
                wait_until(said.exists, "word of the teacher that was given up")
                assert files_of(run) == before
                assert said.read_text().startswith("OvertakenError: generation 1 of teacher writes nothing more")
                said.unlink()
            spec = RankSpec(config, TEACHER, 0, run, corpus, generation=mine)
            started.append(FORK.Process(target=teach, args=(spec, said)))
            started[-1].start()
            wait_until(lambda last=20 * number: max(complete_steps(checkpoints), default=0) >= last, "checkpoint")
            os.kill(started[-1].pid, signal.SIGSTOP)
    finally:
        for process in started:
            process.kill()
            process.join()
    reader = LabelReader(log, 0.0)
    reader.poll()
    assert reader.last_committed >= max(complete_steps(checkpoints))
    assert not said.exists(), said.read_text()
