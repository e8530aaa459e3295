"""The label log: what was committed is read by whoever comes, whenever, and nothing else is."""

import gc
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.label_logs import (
    MANIFEST,
    Producer,
    assert_whole,
    encoded,
    flip,
    make_block,
    only_segment,
    read_all,
    restore,
    slow_write,
    snapshot,
)
from titan.distill.codec.block import HEADER_BYTES, BlockHeader
from titan.distill.log.index import index_is_whole, index_path, offset_of_step, read_index, repair_index
from titan.distill.log.manifest import check_manifest, read_manifest, write_manifest
from titan.distill.log.reader import LabelReader
from titan.distill.log.records import COMMITS, Commit, End
from titan.distill.log.repair import reopen
from titan.distill.log.segment import first_step_of, scan, segment_path, segments_of
from titan.distill.log.writer import CommitWriter, LabelWriter
from titan.errors import LabelError

# --- reading ---


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("segment_bytes", [1, 700, 1 << 20])
def test_what_was_committed_is_read_in_sample_order(tmp_path: Path, dp: int, segment_bytes: int) -> None:
    Producer(tmp_path, dp, segment_bytes=segment_bytes).steps(1, 9)
    for step, blocks in read_all(tmp_path, 9).items():
        assert_whole(blocks, step)


def test_the_size_of_a_step_is_that_of_its_blocks(tmp_path: Path) -> None:
    Producer(tmp_path, 2, segment_bytes=700).steps(1, 5)
    reader = LabelReader(tmp_path, 1.0)
    commits = [reader.wait_commit(step) for step in range(1, 6)]
    sizes = [reader.read(commit)[1] for commit in commits if commit]
    assert sum(sizes) == sum(path.stat().st_size for part in (0, 1) for path in segments_of(tmp_path, part))


def test_a_reader_gets_the_blocks_of_the_samples_it_asks_for_decoded_or_as_they_are_stored(tmp_path: Path) -> None:
    """Blocks of two samples in parts 0 and 1: samples 0 1 | 4 5 and 2 3 | 6 7."""
    Producer(tmp_path, 2, samples=8).steps(1, 2)
    reader = LabelReader(tmp_path, 1.0)
    commit = reader.wait_commit(2)
    assert commit is not None
    for first in range(9):
        for end in range(9):
            want = [start for start in (0, 2, 4, 6) if any(first <= sample < end for sample in (start, start + 1))]
            blocks, size = reader.read(commit, first, end)
            assert [block.first_sample for block in blocks] == want
            raw = reader.read_raw(commit, first, end)
            assert raw == [encoded(2, start, 2) for start in want] and size == sum(map(len, raw))


def test_a_reader_may_skip_steps_and_go_back(tmp_path: Path) -> None:
    Producer(tmp_path, 2, segment_bytes=700).steps(1, 600)
    reader = LabelReader(tmp_path, 1.0)
    for step in (3, 6, 6, 7, 2, 598, 599, 1, 300, 300, 301):
        commit = reader.wait_commit(step)
        assert commit is not None and commit.step == step
        assert_whole(reader.read(commit)[0], step)


def test_a_step_without_a_commit_is_not_readable(tmp_path: Path) -> None:
    producer = Producer(tmp_path).steps(1, 2)
    producer.append(3)
    reader = LabelReader(tmp_path, 0.1)
    assert reader.wait_commit(2) is not None
    assert reader.wait_commit(3, give_up=lambda: True) is None
    producer.commit(3)
    assert reader.wait_commit(3) is not None


def test_a_reader_follows_the_end_of_the_log_while_it_is_written_in_small_pieces(tmp_path: Path) -> None:
    seen: list[int] = []
    failures: list[BaseException] = []

    def follow() -> None:
        try:
            for step, blocks in read_all(tmp_path, 12, timeout_s=10.0).items():
                assert_whole(blocks, step)
                seen.append(step)
        except BaseException as error:
            failures.append(error)

    producer = Producer(tmp_path, dp=2, segment_bytes=700, write=slow_write)
    thread = threading.Thread(target=follow)
    thread.start()
    producer.steps(1, 12)
    thread.join(20)
    assert not failures and seen == list(range(1, 13))


def test_a_log_that_ended_says_so_to_whoever_waits(tmp_path: Path) -> None:
    producer = Producer(tmp_path).steps(1, 2)
    producer.commits.end("stopped")
    reader = LabelReader(tmp_path, 5.0)
    assert reader.wait_commit(2) is not None, "what was committed before stays readable"
    assert reader.wait_commit(3) is None
    assert reader.ended == End("stopped")


def test_a_restarted_run_goes_on_after_the_end_record_also_for_who_stood_before_it(tmp_path: Path) -> None:
    Producer(tmp_path).steps(1, 2).commits.end("stopped")
    reader = LabelReader(tmp_path, 0.1)
    assert reader.wait_commit(3) is None and reader.ended == End("stopped")
    again = Producer(tmp_path)
    assert again.last == 2
    assert reader.wait_commit(3, give_up=lambda: True) is None and reader.ended is None
    again.steps(3, 4)
    commit = reader.wait_commit(3)
    assert commit is not None and commit.step == 3
    assert set(read_all(tmp_path, 4)) == {1, 2, 3, 4}


def test_a_reader_gives_up_with_a_message_that_says_what_it_waited_for(tmp_path: Path) -> None:
    Producer(tmp_path).steps(1, 2)
    begin = time.monotonic()
    with pytest.raises(LabelError, match=r"waited 0 s for labels of step 3, the last committed is 2") as caught:
        LabelReader(tmp_path, 0.2).wait_commit(3)
    assert 0.2 <= time.monotonic() - begin < 2.0
    assert str(tmp_path) in str(caught.value) and "cluster.step_timeout_s" in str(caught.value)


def test_commits_of_other_steps_put_the_deadline_off(tmp_path: Path) -> None:
    producer = Producer(tmp_path)

    def slowly() -> None:
        for step in range(1, 7):
            time.sleep(0.15)
            producer.steps(step, step)

    thread = threading.Thread(target=slowly)
    thread.start()
    assert LabelReader(tmp_path, 0.45).wait_commit(6) is not None, "0.9 s after the start, but never 0.45 s of silence"
    thread.join()


def test_a_reader_may_come_before_the_log(tmp_path: Path) -> None:
    reader = LabelReader(tmp_path / "later", 5.0)
    reader.poll()
    assert (reader.first_step, reader.last_committed) == (0, 0)
    Producer(tmp_path / "later").steps(1, 1)
    assert reader.wait_commit(1) is not None


@pytest.mark.parametrize("start", [1, 17, 10**9])
def test_a_log_may_start_at_any_step(tmp_path: Path, start: int) -> None:
    """A producer that began from a checkpoint of step `start`."""
    write_manifest(tmp_path, replace(MANIFEST, start_step=start))
    assert reopen(tmp_path, needed=start) == start
    Producer(tmp_path, 2, segment_bytes=700).steps(start + 1, start + 5)
    assert reopen(tmp_path, needed=start + 5) == start + 5
    reader = LabelReader(tmp_path, 1.0)
    commit = reader.wait_commit(1)
    assert commit is not None and commit.step == reader.first_step == start + 1
    for step, blocks in read_all(tmp_path, start + 5, first=start + 1).items():
        assert_whole(blocks, step)
    (tmp_path / COMMITS).write_bytes(b"".join((tmp_path / COMMITS).read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(LabelError, match=f"begins with step {start + 2}, log.json says {start + 1}"):
        reopen(tmp_path)


def memory() -> tuple[int, int]:
    """Living objects, and resident bytes of this process."""
    gc.collect()
    return len(gc.get_objects()), int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_stays_the_same_while_ten_thousand_small_blocks_are_followed(tmp_path: Path) -> None:
    """Following each block as it is committed, and catching up from the start afterwards; segments of 64 kB."""
    template = encoded(1, 0, 1)
    header = BlockHeader.unpack(template[:HEADER_BYTES])
    writer, commits = LabelWriter(tmp_path, 0, 0, segment_bytes=1 << 16), CommitWriter(tmp_path, 0)
    live, marks = LabelReader(tmp_path, 1.0), []
    for step in range(1, 10_001):
        writer.append(step, replace(header, step=step).pack() + template[HEADER_BYTES:], sample_ids=(step,))
        commits.commit(Commit(step, (0,), 1, step / 10))
        commit = live.wait_commit(step)
        assert commit is not None and live.read(commit)[0][0].step == step
        live.forget(step)
        if step in (1_500, 10_000):
            marks.append(memory())
    late = LabelReader(tmp_path, 1.0)
    for step in range(1, 10_001):
        commit = late.wait_commit(step)
        assert commit is not None and late.read(commit)[0][0].step == step  # a student that never forgets
        if step in (1_500, 10_000):
            marks.append(memory())
    for before, after in (marks[:2], marks[2:]):
        assert after[0] - before[0] < 1_000, "objects: one a step would be 8,500"
        assert after[1] - before[1] < 4 << 20, "bytes: all commits and headers would be some 5 MB"
    assert len(segments_of(tmp_path, 0)) > 10 and len(live.commits) <= 1


# --- segments and their index ---


def test_a_segment_ends_with_a_step_once_it_is_large_enough_and_is_named_by_its_first(tmp_path: Path) -> None:
    block = len(encoded(1, 0, 2))
    Producer(tmp_path, segment_bytes=3 * block).steps(1, 7)  # two blocks a step: full in the middle of every second
    paths = segments_of(tmp_path, 0)
    assert [path.name for path in paths] == [f"{step:010d}.segment" for step in (1, 3, 5, 7)]
    assert [path.stat().st_size // block for path in paths] == [4, 4, 4, 2]
    assert [[found.header.step for found in scan(path)] for path in paths] == [
        [1, 1, 2, 2], [3, 3, 4, 4], [5, 5, 6, 6], [7, 7],
    ]  # fmt: skip


def test_a_restarted_producer_goes_on_in_the_segment_it_was_in(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    Producer(whole, 2, segment_bytes=900).steps(1, 20)
    for first in (1, 4, 9, 15):
        producer = Producer(broken, 2, segment_bytes=900)
        producer.steps(first, {1: 3, 4: 8, 9: 14, 15: 20}[first])
        producer.append(producer.commits.committed + 1, version=5)
        producer.close()
    assert reopen(broken) == 20
    assert snapshot(broken) == snapshot(whole)


def test_the_index_says_of_every_block_what_the_slow_scan_finds(tmp_path: Path) -> None:
    Producer(tmp_path, 2, segment_bytes=900).steps(1, 12)
    paths = [path for part in (0, 1) for path in segments_of(tmp_path, part)]
    assert len(paths) > 4
    for path in paths:
        entries, blocks = read_index(path), list(scan(path))
        assert len(entries) == len(blocks) and index_is_whole(path)
        for entry, block in zip(entries, blocks, strict=True):
            assert entry.describes(block)
            want = make_block(block.header.step, block.header.first_sample, block.header.samples)
            assert entry.sample_ids == tuple(want.sample_ids_B)


@pytest.mark.parametrize("damage", ["missing", "empty", "torn", "flipped", "another's", "longer"])
def test_a_damaged_index_hinders_nobody_and_is_made_again(tmp_path: Path, damage: str) -> None:
    Producer(tmp_path, 2, segment_bytes=900).steps(1, 12)
    before = snapshot(tmp_path)
    path = index_path(segments_of(tmp_path, 0)[1])
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        flip(path, 20)
    else:
        other = index_path(segments_of(tmp_path, 0)[0]).read_bytes()
        path.write_bytes({"empty": b"", "torn": data[:-9], "another's": other, "longer": data + data[:40]}[damage])
    for step, blocks in read_all(tmp_path, 12, first=6).items():
        assert_whole(blocks, step)
    assert reopen(tmp_path) == 12
    assert snapshot(tmp_path) == before


def test_an_index_torn_at_any_byte_is_made_again(tmp_path: Path) -> None:
    Producer(tmp_path).steps(1, 3)
    path = only_segment(tmp_path)
    data = index_path(path).read_bytes()
    for cut in range(len(data)):
        index_path(path).write_bytes(data[:cut])
        for step in (1, 2, 3):
            assert offset_of_step(path, step) <= next(b.offset for b in scan(path) if b.header.step == step)
        assert repair_index(path, list(scan(path)))
        assert index_path(path).read_bytes() == data
    assert not repair_index(path, list(scan(path)))


# --- what a log is ---


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    for use in ("write", "follow", "offline"):
        assert check_manifest(tmp_path, MANIFEST, use) == MANIFEST


@pytest.mark.parametrize(
    ("change", "says", "uses"),
    [
        ({"run_id": "run-2"}, "the log of another run (run_id run-2, wanted run-1)", "write follow"),
        ({"producer": "mid"}, "made by another role", "write follow"),
        ({"tokenizer_sha256": "cd" * 32}, "those of another tokenizer", "write follow offline"),
        ({"vocab_size": 9}, "over another vocabulary (vocab_size 9, wanted 6)", "write follow offline"),
        ({"sequence_length": 5}, "a sample's context never changes", "write follow offline"),
        ({"batch_size": 5}, "another number of samples", "write"),
        ({"codec": "top_k"}, "encoded in another way", "write follow"),
        ({"temperature": 2.0}, "at another temperature", "write follow"),
        ({"seed": 8}, "another seed", "write follow"),
        ({"start_step": 4}, "another step", "write"),
        ({"weights": "ef" * 32}, "frozen with other weights", "write"),
    ],
)
def test_a_log_that_does_not_fit_is_refused_with_the_reason(
    tmp_path: Path, change: dict[str, object], says: str, uses: str
) -> None:
    write_manifest(tmp_path, replace(MANIFEST, **change))
    for use in ("write", "follow", "offline"):
        if use in uses:
            with pytest.raises(LabelError) as caught:
                check_manifest(tmp_path, MANIFEST, use)
            assert says in str(caught.value) and str(tmp_path) in str(caught.value)
            assert "\n" not in str(caught.value)
        else:
            check_manifest(tmp_path, MANIFEST, use)


def test_every_reason_has_its_line(tmp_path: Path) -> None:
    write_manifest(tmp_path, replace(MANIFEST, run_id="x", vocab_size=9, seed=1))
    with pytest.raises(LabelError) as caught:
        check_manifest(tmp_path, MANIFEST, "follow")
    assert len(str(caught.value).splitlines()) == 3


def test_a_newer_missing_or_damaged_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=r"is no label log: it has no log.json"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, replace(MANIFEST, format_version=3))
    with pytest.raises(LabelError, match="format version 3, this titan reads up to 2; update titan"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, MANIFEST)
    data = (tmp_path / "log.json").read_bytes()
    for place in range(len(data)):
        flip(tmp_path / "log.json", place, bit=place % 7)
        with pytest.raises(LabelError, match=r"log.json is damaged"):
            read_manifest(tmp_path)
        (tmp_path / "log.json").write_bytes(data)


def test_a_segment_is_found_by_any_of_its_steps(tmp_path: Path) -> None:
    files = snapshot(Producer(tmp_path / "a", 1, segment_bytes=900).steps(1, 12).folder)
    restore(tmp_path / "b", files)
    starts = [first_step_of(path) for path in segments_of(tmp_path / "b", 0)]
    assert [segment_path(tmp_path / "b", 0, start).exists() for start in starts] == [True] * len(starts)
    for step in range(12, 0, -1):
        assert_whole(read_all(tmp_path / "b", step, first=step)[step], step)
