"""A producer that dies at any moment, for real and by cutting files, leaves a log that is repaired and goes on."""

import errno
import multiprocessing
import os
import random
import signal
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.label_logs import MANIFEST, Producer, assert_whole, encoded, only_segment, read_all, restore, snapshot
from titan.distill.codec.block import FORMAT_VERSION, HEADER_BYTES
from titan.distill.log.ledger import Ledger, Place, ledger_path, read_ledger
from titan.distill.log.manifest import write_manifest
from titan.distill.log.reader import LabelReader
from titan.distill.log.records import COMMITS
from titan.distill.log.repair import reopen
from titan.distill.log.segment import scan, segments_of
from titan.distill.log.verify import verify_log
from titan.errors import LabelError
from titan.observe.files import was_replaced

FORK = multiprocessing.get_context("fork")


def write_in_pieces(descriptor: int, data: bytes) -> None:
    """Many small writes, so that most kills hit in the middle of a block or record."""
    while data:
        data = data[os.write(descriptor, data[:23]) :]


def produce(folder: Path, dp: int) -> None:
    """What a restarted teacher does: repair, then go on as fast as it can, until it is killed."""
    producer = Producer(folder, dp, segment_bytes=1500, write=write_in_pieces)
    step = producer.last
    while True:
        step += 1
        producer.steps(step, step)


def kill_after(process: "multiprocessing.process.BaseProcess", seconds: float) -> None:
    time.sleep(seconds)
    assert process.pid is not None and process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_producer_killed_forty_times_loses_and_repeats_nothing_and_a_follower_notices_nothing(tmp_path: Path) -> None:
    """The follower lives through all kills and repairs; afterwards the log is byte for byte that of a calm life."""
    calm, chaos = tmp_path / "calm", tmp_path / "chaos"
    chaos.mkdir()
    write_manifest(chaos, MANIFEST)
    seen: list[int] = []
    done = threading.Event()
    failures: list[BaseException] = []

    def follow() -> None:
        try:
            reader = LabelReader(chaos, 60.0)
            while (commit := reader.wait_commit(len(seen) + 1, done.is_set)) is not None:
                assert_whole(reader.read(commit)[0], commit.step)
                reader.forget(commit.step)
                seen.append(commit.step)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=follow)
    dice = random.Random(5)
    torn, kills, thread_started, last = 0, 0, False, 0
    while kills < 40 or (torn < 10 and kills < 400):  # on a busy machine many come before the first write
        kills += 1
        process = FORK.Process(target=produce, args=(chaos, 2))
        process.start()
        if not thread_started:
            thread.start()
            thread_started = True
        kill_after(process, 0.05 + dice.random() * 0.1)
        before = snapshot(chaos)
        again = reopen(chaos)
        assert again >= last
        torn, last = torn + (before != snapshot(chaos)), again
        assert verify_log(chaos).findings == ()
    deadline = time.monotonic() + 20
    while len(seen) < last and not failures and time.monotonic() < deadline:
        time.sleep(0.01)
    done.set()
    thread.join(20)
    assert not failures and seen == list(range(1, last + 1))
    assert torn >= 10, "most kills left something half-written"
    assert last >= 40
    write_manifest(calm, MANIFEST)
    Producer(calm, 2, segment_bytes=1500).steps(1, last)
    assert snapshot(chaos) == snapshot(calm)


def keep_ledger(folder: Path) -> None:
    """A student that notes every step and makes a checkpoint of its place, a file, at every fifth."""
    ledger = Ledger(folder, "small")
    checkpoint = folder / "own_step"
    own = int(checkpoint.read_text()) if checkpoint.exists() else 0
    ledger.rewind(own)
    while True:
        own += 1
        if own % 3 == 0:
            ledger.note(own, Place(2 * own - 1, 0), Place(2 * own, 0), "skipped", "too old")
            ledger.note(own, Place(2 * own, 0), Place(2 * own + 1, 0), "consumed")
        else:
            ledger.note(own, Place(2 * own - 1, 0), Place(2 * own + 1, 0), "consumed")
        if own % 5 == 0:
            ledger.make_durable()
            draft = folder / f"draft-{os.getpid()}"
            draft.write_text(str(own))
            draft.replace(checkpoint)


def test_a_ledger_of_a_student_killed_twenty_times_lies_end_to_end(tmp_path: Path) -> None:
    dice = random.Random(6)
    for _ in range(20):
        process = FORK.Process(target=keep_ledger, args=(tmp_path,))
        process.start()
        kill_after(process, 0.02 + dice.random() * 0.03)
    Ledger(tmp_path, "small").rewind(int((tmp_path / "own_step").read_text()))
    entries = list(read_ledger(ledger_path(tmp_path, "small")))
    assert len(entries) > 100 and entries[0].start == Place(1, 0)
    assert all(before.end == after.start for before, after in pairwise(entries))
    assert {entry.kind for entry in entries if entry.own_step % 3 == 0} == {"consumed", "skipped"}


# --- the same by cutting ---


@pytest.mark.parametrize("segment_bytes", [1, 1 << 20])
def test_a_commit_line_torn_at_any_byte_is_dropped_with_its_blocks_and_the_log_goes_on(
    tmp_path: Path, segment_bytes: int
) -> None:
    source = tmp_path / "source"
    producer = Producer(source, segment_bytes=segment_bytes).steps(1, 2)
    two = snapshot(source)
    producer.steps(3, 3)
    three = snapshot(source)
    lines = three[COMMITS]
    for cut in range(len(two[COMMITS]), len(lines)):
        folder = tmp_path / str(cut)
        restore(folder, three | {COMMITS: lines[:cut]})
        assert reopen(folder) == 2, f"cut after byte {cut}"
        assert snapshot(folder) == two
        again = Producer(folder, segment_bytes=segment_bytes).steps(3, 3)
        assert snapshot(folder) == three
        again.close()


@pytest.mark.parametrize("segment_bytes", [1, 1 << 20])
def test_a_block_torn_at_any_byte_is_dropped(tmp_path: Path, segment_bytes: int) -> None:
    producer = Producer(tmp_path, segment_bytes=segment_bytes).steps(1, 2)
    two = snapshot(tmp_path)
    producer.append(3)
    producer.close()
    path = segments_of(tmp_path, 0)[-1]
    data, start = path.read_bytes(), len(two.get(str(path.relative_to(tmp_path)), b""))
    for cut in range(start, len(data), 7):
        path.write_bytes(data[:cut])
        assert reopen(tmp_path) == 2
        assert snapshot(tmp_path) == two


def test_uncommitted_blocks_of_some_parts_are_dropped(tmp_path: Path) -> None:
    producer = Producer(tmp_path, 2).steps(1, 2)
    two = snapshot(tmp_path)
    producer.writers[1].append(3, encoded(3))
    producer.writers[1].append(4, encoded(4))
    assert reopen(tmp_path) == 2
    assert snapshot(tmp_path) == two


def test_a_repair_that_is_itself_interrupted_is_repaired(tmp_path: Path) -> None:
    """Commit records are cut first, so any state between is one that a crash of the producer could have left."""
    producer = Producer(tmp_path, 2, segment_bytes=700).steps(1, 4)
    four = snapshot(tmp_path)
    producer.append(5)
    producer.append(6)
    with open(tmp_path / COMMITS, "ab") as file:
        file.write(b'{"crc32":12')
    half = snapshot(tmp_path)
    touched = [name for name in half if half[name] != four.get(name)]
    assert len(touched) >= 5
    for count in range(len(touched) + 1):
        restore(tmp_path, {name: four.get(name, b"") for name in touched[:count]})
        assert reopen(tmp_path) == 4
        assert snapshot(tmp_path) == four
        restore(tmp_path, half)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_a_crash_leaves_of_the_unfinished_steps_is_repaired(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Committed steps in all files, and any prefix of what would have come next in each of them."""
    folder = tmp_path_factory.mktemp("crash")
    dp = data.draw(st.sampled_from([1, 2]))
    producer = Producer(folder, dp, segment_bytes=data.draw(st.sampled_from([1, 500, 1 << 20])))
    committed = data.draw(st.integers(0, 3))
    producer.steps(1, committed)
    good = snapshot(folder)
    producer.steps(committed + 1, committed + 2)
    producer.close()
    for name, now in snapshot(folder).items():
        before = good.get(name, b"")
        extra = len(now) - len(before)
        most = min(extra, now[len(before) :].index(b"\n")) if name == COMMITS else extra
        (folder / name).write_bytes(now[: len(before) + data.draw(st.integers(0, most))])
    assert reopen(folder) == committed
    assert snapshot(folder) == good
    again = Producer(folder, dp).steps(committed + 1, committed + 1)
    assert_whole(read_all(folder, committed + 1, first=committed + 1)[committed + 1], committed + 1)
    again.close()


@pytest.mark.parametrize("segment_bytes", [1, 1 << 20])
def test_who_still_has_the_files_open_writes_to_nothing_and_readers_follow_who_took_over(
    tmp_path: Path, segment_bytes: int
) -> None:
    write_manifest(tmp_path, MANIFEST)
    given_up = Producer(tmp_path, 2, segment_bytes=segment_bytes).steps(1, 2)
    reader = LabelReader(tmp_path, 1.0)

    def learn(step: int) -> None:
        commit = reader.wait_commit(step)
        assert commit is not None and commit.step == step
        assert_whole(reader.read(commit)[0], step)

    learn(1)
    learn(2)
    given_up.append(3)
    again = Producer(tmp_path, 2, segment_bytes=segment_bytes)
    assert again.last == 2
    given_up.writers[0].append(3, encoded(3))
    given_up.commit(3)
    reader.poll()
    assert reader.last_committed == 2
    again.steps(3, 4)
    given_up.commit(4)
    for step in (3, 2, 4):
        learn(step)
    assert verify_log(tmp_path).findings == ()
    reader.close()


def test_a_file_that_nfs_calls_stale_was_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.touch()

    def stale(_: int) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with path.open("rb") as file:
        assert not was_replaced(path, file.fileno())
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", stale)
            replaced = was_replaced(path, file.fileno())
            path.unlink()
            dropped = not was_replaced(path, file.fileno())
    assert replaced and dropped, "who has a dropped file open reads on"


def test_a_producer_that_dies_between_two_files_leaves_one_step_at_most(tmp_path: Path) -> None:
    producer = Producer(tmp_path).steps(1, 2)
    producer.append(3)
    assert verify_log(tmp_path).steps == 2
    assert reopen(tmp_path) == 2
    assert only_segment(tmp_path).stat().st_size == 4 * len(encoded(1))


def test_a_block_of_another_version_is_no_damage_and_is_not_cut_off(tmp_path: Path) -> None:
    """Whoever reads or repairs the log says which titan it takes, and leaves it as it was."""
    write_manifest(tmp_path, MANIFEST)
    producer = Producer(tmp_path, dp=1)
    producer.steps(1, 3)
    producer.close()
    path = only_segment(tmp_path, 0)
    last = list(scan(path))[-1]
    data = bytearray(path.read_bytes())
    data[last.offset : last.offset + HEADER_BYTES] = replace(last.header, version=FORMAT_VERSION + 1).pack()
    path.write_bytes(data)
    message = rf"{path}, block at byte {last.offset}: .* format version {FORMAT_VERSION + 1}, .*; update titan"
    reader = LabelReader(tmp_path, 0.0)
    commit = reader.wait_commit(3)
    assert commit is not None
    for action in (lambda: reader.read(commit), lambda: reopen(tmp_path)):
        with pytest.raises(LabelError, match=message):
            action()
    reader.close()
    assert path.read_bytes() == data
