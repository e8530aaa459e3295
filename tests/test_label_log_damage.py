"""The label log in trouble: whatever is torn, flipped, missing or written twice is found and named, or mended."""

import json
import os
from pathlib import Path

import pytest

from tests.label_logs import (
    NearlyFull,
    Producer,
    assert_whole,
    encoded,
    flip,
    only_segment,
    read_all,
    snapshot,
)
from titan.distill.codec.block import HEADER_BYTES
from titan.distill.log.index import index_path
from titan.distill.log.reader import LabelReader
from titan.distill.log.records import COMMITS, Commit, decode_record, encode_record
from titan.distill.log.repair import reopen
from titan.distill.log.segment import part_folder
from titan.errors import LabelError

# --- commit records ---


def test_a_record_that_differs_in_any_bit_from_what_was_written_does_not_pass() -> None:
    """1e-05 and 1E-05 are the same number, so a checksum of the parsed record would let that bit flip pass."""
    line = encode_record(Commit(12, (0, 1), 8, 1e-05))
    assert decode_record(line) == Commit(12, (0, 1), 8, 1e-05)
    for place in range(len(line)):
        for bit in range(8):
            damaged = bytearray(line)
            damaged[place] ^= 1 << bit
            assert decode_record(bytes(damaged)) is None, (place, bit)


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_damaged_commit_record_is_found_and_the_file_and_place_named(tmp_path: Path, line: int) -> None:
    Producer(tmp_path).steps(1, 3)
    path = tmp_path / COMMITS
    lines = path.read_bytes().splitlines(keepends=True)
    start = sum(len(earlier) for earlier in lines[:line])
    flip(path, start + lines[line].index(b'"samples"') + 11)
    before = snapshot(tmp_path)
    for action in (lambda: reopen(tmp_path), lambda: read_all(tmp_path, 3)):
        with pytest.raises(LabelError, match=f"damaged at byte {start}, after step {line}") as caught:
            action()
        assert str(path) in str(caught.value)
    assert snapshot(tmp_path) == before


def test_a_commit_record_with_another_number_in_it_does_not_pass(tmp_path: Path) -> None:
    Producer(tmp_path).steps(1, 2)
    path = tmp_path / COMMITS
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[1]["record"]["samples"] = 2
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(LabelError):
        reopen(tmp_path)


def test_a_commit_record_that_is_missing_in_the_middle_is_found(tmp_path: Path) -> None:
    Producer(tmp_path).steps(1, 4)
    path = tmp_path / COMMITS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + lines[3])
    with pytest.raises(LabelError, match="after step 2"):
        read_all(tmp_path, 4)


def test_a_step_that_skips_one_is_our_own_bug(tmp_path: Path) -> None:
    producer = Producer(tmp_path).steps(1, 1)
    with pytest.raises(AssertionError, match="step 3 after 1"):
        producer.commit(3)
    with pytest.raises(AssertionError, match="a block of step 3 appended as 2"):
        producer.writers[0].append(2, encoded(3))


# --- the first write wins, over crashes ---


def test_reopening_an_empty_or_absent_folder_makes_an_empty_log(tmp_path: Path) -> None:
    for folder in (tmp_path / "there", tmp_path / "a" / "b"):
        assert reopen(folder) == 0
        assert snapshot(folder) == {COMMITS: b""}
        assert reopen(folder) == 0


def test_reopening_a_good_log_changes_no_byte(tmp_path: Path) -> None:
    Producer(tmp_path, 2, segment_bytes=700).steps(1, 8)
    before = snapshot(tmp_path)
    assert reopen(tmp_path) == reopen(tmp_path, needed=5) == 8
    assert snapshot(tmp_path) == before


def test_a_log_that_does_not_reach_the_checkpoint_of_its_producer_is_left_alone(tmp_path: Path) -> None:
    producer = Producer(tmp_path).steps(1, 3)
    producer.append(4)
    before = snapshot(tmp_path)
    with pytest.raises(LabelError, match="ends at step 3, before the producer's checkpoint of step 4"):
        reopen(tmp_path, needed=4)
    assert snapshot(tmp_path) == before


def test_the_first_write_of_a_step_wins_after_a_restart(tmp_path: Path) -> None:
    """A teacher that fell back to step 1 repeats 2 and 3 and says something else; students see what it said first."""
    Producer(tmp_path).steps(1, 3)
    three = snapshot(tmp_path)
    again = Producer(tmp_path)
    for step in (2, 3):
        again.append(step, version=9)
        assert not again.commit(step)
    assert snapshot(tmp_path) == three
    again.append(4, version=9)
    assert again.commit(4)
    versions = {step: int(blocks[0].sample_ids_B[0]) // 1_000_000 for step, blocks in read_all(tmp_path, 4).items()}
    assert versions == {1: 0, 2: 0, 3: 0, 4: 9}


def test_parts_of_an_older_layout_stay_readable(tmp_path: Path) -> None:
    first = Producer(tmp_path, dp=2).steps(1, 3)
    first.append(4)  # never committed
    Producer(tmp_path, dp=1).steps(4, 6)
    Producer(tmp_path, dp=2).steps(7, 8)
    for step, blocks in read_all(tmp_path, 8).items():
        assert_whole(blocks, step)
    reader = LabelReader(tmp_path, 1.0)
    commit = reader.wait_commit(5)
    assert commit is not None and commit.parts == (0,)


def test_a_log_of_the_old_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "part-000.labels").write_bytes(b"TLB1")
    with pytest.raises(LabelError, match=r"part-000.labels is of a label log of format 1"):
        reopen(tmp_path)


# --- damage ---


@pytest.mark.parametrize("first", [1, 2])
def test_a_flipped_bit_of_a_payload_is_found_by_the_reader_and_file_byte_and_step_named(
    tmp_path: Path, first: int
) -> None:
    Producer(tmp_path, 2).steps(1, 3)
    path = only_segment(tmp_path, 1)
    block = len(encoded(1, 0, 1))
    flip(path, 2 * block + HEADER_BYTES + 20)
    with pytest.raises(LabelError, match=r"labels of step 2, samples from \d, are damaged") as caught:
        read_all(tmp_path, 3, first=first)
    assert f"{path}, block at byte {2 * block}: " in str(caught.value)
    with pytest.raises(LabelError, match=f"block at byte {2 * block}: the labels of step 2"):
        reopen(tmp_path, needed=1)
    assert reopen(tmp_path, needed=2) == 3, "made durable by the checkpoint of step 2: left to readers and verify"


@pytest.mark.parametrize("which", ["first", "last"])
def test_a_flipped_bit_of_a_committed_header_is_found_and_nothing_is_thrown_away(tmp_path: Path, which: str) -> None:
    Producer(tmp_path, 2).steps(1, 3)
    path = only_segment(tmp_path, 1)
    place = 10 if which == "first" else path.stat().st_size - len(encoded(1, 0, 1)) + 10
    flip(path, place)
    before = snapshot(tmp_path)
    for action in (lambda: reopen(tmp_path), lambda: read_all(tmp_path, 3)):
        with pytest.raises(LabelError) as caught:
            action()
        assert f"{path} (intact up to byte {place - 10})" in str(caught.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("damage", ["truncated", "missing", "all missing"])
def test_a_segment_that_lost_committed_labels_is_named(tmp_path: Path, damage: str) -> None:
    Producer(tmp_path, 2).steps(1, 3)
    path = only_segment(tmp_path, 0)
    if damage == "truncated":
        os.truncate(path, path.stat().st_size - 5)
    else:
        path.unlink()
    if damage == "all missing":
        index_path(path).unlink()
        path.parent.rmdir()
    where = str(path) if damage == "truncated" else str(part_folder(tmp_path, 0))
    for action in (lambda: reopen(tmp_path), lambda: read_all(tmp_path, 3)):
        with pytest.raises(LabelError, match=r"is committed with 4 samples, but [23] are intact") as caught:
            action()
        assert where in str(caught.value)


def test_a_step_with_a_sample_twice_is_not_whole(tmp_path: Path) -> None:
    producer = Producer(tmp_path)
    for _ in range(2):
        producer.writers[0].append(1, encoded(1, 0, 2))
    producer.commit(1)
    for action in (lambda: reopen(tmp_path), lambda: read_all(tmp_path, 1)):
        with pytest.raises(LabelError, match="step 1 is committed with 4 samples"):
            action()


# --- full disks ---


@pytest.mark.parametrize("room", [0, 1, 100, 250, 330, 380])
def test_a_full_disk_is_an_error_and_leaves_no_half_of_a_block(tmp_path: Path, room: int) -> None:
    """Two blocks of 252 bytes or so with their index: a part of either fits."""
    producer = Producer(tmp_path).steps(1, 2)
    two = snapshot(tmp_path)
    producer.writers[0].write = NearlyFull(room)
    with pytest.raises(LabelError, match="No space left on device") as caught:
        producer.append(3)
    assert str(only_segment(tmp_path)) in str(caught.value)
    sizes = only_segment(tmp_path).stat().st_size, index_path(only_segment(tmp_path)).stat().st_size
    assert sizes == (producer.writers[0].size_bytes, producer.writers[0].index_bytes)
    producer.commits.write = NearlyFull(min(room, 50))
    with pytest.raises(LabelError, match="No space left on device"):
        producer.commit(3)
    assert (tmp_path / COMMITS).read_bytes() == two[COMMITS]
    assert reopen(tmp_path) == 2 and snapshot(tmp_path) == two
