"""Soft labels on their way: the codec keeps its bounds, the log keeps its promises, the weights follow the lead."""

import json
import math
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan.config.settings import DistillSettings
from titan.distill.codec import HEADER_BYTES, BlockHeader, LabelBlock, decode_block, encode_block
from titan.distill.lead import LeadTracker, distillation_weight
from titan.distill.log import (
    COMMITS,
    Commit,
    CommitWriter,
    End,
    LabelReader,
    LabelWriter,
    part_path,
    reopen,
)
from titan.errors import LabelError

BOUND = 2.0**-12
FLOOR = 32.0


def make_block(
    step: int = 1, first: int = 0, samples: int = 2, length: int = 5, top_k: int = 3, vocab: int = 500,
    norm: bool = False, deepest: float = 10.0,
) -> LabelBlock:  # fmt: skip
    rng = np.random.default_rng([step, first, samples])
    log_prob = -np.sort(rng.uniform(0.0, deepest, (samples, length, top_k))).astype(np.float32)
    return LabelBlock(
        step,
        first,
        rng.integers(0, 2**40, samples),
        rng.integers(0, vocab, (samples, length + 1)).astype(np.int32),
        rng.integers(0, vocab, (samples, length, top_k)).astype(np.int32),
        log_prob,
        rng.normal(0, 3, (samples, length)).astype(np.float32) if norm else None,
    )


def round_trip(block: LabelBlock, vocab: int) -> LabelBlock:
    data = encode_block(block, vocab)
    return decode_block(BlockHeader.unpack(data[:HEADER_BYTES]), data[HEADER_BYTES:])


def assert_exact_but_probabilities(got: LabelBlock, want: LabelBlock) -> None:
    assert (got.step, got.first_sample) == (want.step, want.first_sample)
    np.testing.assert_array_equal(got.sample_ids_B, want.sample_ids_B)
    np.testing.assert_array_equal(got.tokens_BS1, want.tokens_BS1)
    np.testing.assert_array_equal(got.ids_BSK, want.ids_BSK)
    assert got.ids_BSK.dtype == got.tokens_BS1.dtype == np.int32
    if want.log_norm_BS is None:
        assert got.log_norm_BS is None
    else:
        np.testing.assert_array_equal(got.log_norm_BS, want.log_norm_BS)


# --- codec ---


@settings(max_examples=80, deadline=None)
@given(
    step=st.integers(0, 2**63),
    first=st.integers(0, 2**31),
    samples=st.integers(1, 5),
    length=st.integers(1, 9),
    top_k=st.integers(1, 7),
    vocab=st.sampled_from([300, 65535, 65536, 65537, 200_000, 2**31 - 1]),
    norm=st.booleans(),
    deepest=st.sampled_from([1e-3, 1.0, 30.0, 200.0]),
)
def test_a_block_comes_back_with_log_probabilities_within_the_stated_bound(
    step: int, first: int, samples: int, length: int, top_k: int, vocab: int, norm: bool, deepest: float
) -> None:
    block = make_block(step, first, samples, length, top_k, vocab, norm, deepest)
    got = round_trip(block, vocab)
    assert_exact_but_probabilities(got, block)
    above = block.log_prob_BSK > -31.9
    assert np.abs(got.log_prob_BSK - block.log_prob_BSK)[above].max(initial=0.0) <= BOUND
    ratio = np.exp(got.log_prob_BSK.astype(float)) / np.exp(block.log_prob_BSK.astype(float))
    assert np.abs(ratio - 1)[above].max(initial=0.0) <= 0.00025
    assert (got.log_prob_BSK[~above] >= -FLOOR).all() and (got.log_prob_BSK[~above] < -31.8).all()


@given(st.lists(st.floats(-31.875, 0.0, width=32), min_size=1, max_size=50))
def test_the_bound_holds_for_any_log_probability(values: list[float]) -> None:
    log_prob = np.array(values, dtype=np.float32)[None, None]
    block = LabelBlock(1, 0, np.zeros(1), np.zeros((1, 2)), np.zeros(log_prob.shape), log_prob, None)
    assert np.abs(round_trip(block, 300).log_prob_BSK - log_prob).max() <= BOUND


@given(st.integers(1, 16), st.floats(1e-7, 1.0), st.integers(0, 1000))
def test_the_mass_of_the_tail_is_kept_to_a_fortieth_of_a_percent_of_the_whole(k: int, tail: float, seed: int) -> None:
    """1 - P is what a student makes of the rest: its error is at most the sum of those of the head."""
    head = np.random.default_rng(seed).dirichlet(np.ones(k)) * (1 - tail)
    log_prob = np.log(np.maximum(head, 1e-30)).astype(np.float32)[None, None]
    block = LabelBlock(1, 0, np.zeros(1), np.zeros((1, 2)), np.zeros(log_prob.shape), log_prob, None)
    got = 1 - np.exp(round_trip(block, 300).log_prob_BSK.astype(float)).sum()
    assert got == pytest.approx(tail, abs=0.00025)


def test_rounding_noise_above_zero_and_an_impossible_entry_stay_log_probabilities() -> None:
    log_prob = np.array([[[1e-7, 0.0, -np.inf, -1e30]]], dtype=np.float32)
    block = LabelBlock(1, 0, np.zeros(1), np.zeros((1, 2)), np.zeros(log_prob.shape), log_prob, None)
    np.testing.assert_allclose(round_trip(block, 300).log_prob_BSK[0, 0], [0, 0, -65535 / 2048, -65535 / 2048])


def test_ids_take_two_bytes_up_to_65536_entries_and_four_beyond() -> None:
    for vocab, size in ((65536, 2), (65537, 4)):
        block = make_block(vocab=vocab)
        block.ids_BSK[0, 0, 0] = block.tokens_BS1[0, 0] = vocab - 1
        data = encode_block(block, vocab)
        assert BlockHeader.unpack(data[:HEADER_BYTES]).id_bytes == size
        assert len(data) == HEADER_BYTES + 2 * 8 + size * (2 * 6 + 2 * 5 * 3) + 2 * (2 * 5 * 3)
        assert_exact_but_probabilities(round_trip(block, vocab), block)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 8.0])
def test_norms_give_the_tempered_probabilities_of_the_whole_vocabulary(temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 4, 50))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    tempered = p ** (1 / temperature)
    ids = np.argsort(-p, axis=-1)[..., :6]
    block = LabelBlock(
        1, 0, np.arange(2), np.zeros((2, 5)), ids,
        np.log(np.take_along_axis(p, ids, -1)).astype(np.float32), np.log(tempered.sum(-1)).astype(np.float32),
    )  # fmt: skip
    want = np.log(np.take_along_axis(tempered / tempered.sum(-1, keepdims=True), ids, -1))
    got = round_trip(block, 50).log_prob_at(temperature)
    assert got.dtype == np.float32
    assert np.abs(got - want).max() <= BOUND / temperature + 1e-5
    with pytest.raises(AssertionError):
        round_trip(make_block(), 500).log_prob_at(temperature)


def test_any_flipped_bit_of_a_block_is_found() -> None:
    data = bytearray(encode_block(make_block(samples=1, length=2, top_k=2), 500))
    for place in range(len(data)):
        data[place] ^= 1 << place % 8
        with pytest.raises(LabelError, match="damaged"):
            decode_block(BlockHeader.unpack(bytes(data[:HEADER_BYTES])), bytes(data[HEADER_BYTES:]))
        data[place] ^= 1 << place % 8


# --- log ---


class Producer:
    """A teacher without a model: `dp` writers, and a commit for every step."""

    def __init__(self, folder: Path, dp: int = 1, samples: int = 4):
        self.folder, self.dp, self.samples = folder, dp, samples
        self.last = reopen(folder)
        self.writers = [LabelWriter(folder, part, self.last) for part in range(dp)]
        self.commits = CommitWriter(folder, self.last)

    def append(self, step: int, version: int = 0) -> None:
        share = self.samples // self.dp
        for part, writer in enumerate(self.writers):
            for half in range(2):  # two micro-batches
                first = part * share // 2 + half * self.samples // 2
                block = make_block(step, first, share // 2)
                block.ids_BSK[:] = version
                writer.append(step, encode_block(block, 500))

    def commit(self, step: int) -> bool:
        return self.commits.commit(Commit(step, tuple(range(self.dp)), self.samples, step / 10))

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.append(step)
            self.commit(step)

    def close(self) -> None:
        for writer in self.writers:
            writer.file.close()
        self.commits.file.close()


def read_all(folder: Path, last: int, timeout_s: float = 1.0) -> dict[int, list[LabelBlock]]:
    reader = LabelReader(folder, timeout_s)
    found = {}
    try:
        for step in range(1, last + 1):
            commit = reader.wait_commit(step)
            assert commit is not None and commit.step == step and commit.cross_entropy == step / 10
            found[step], _ = reader.read(commit)
            reader.forget(step)
    finally:
        reader.close()
    return found


def assert_whole(blocks: list[LabelBlock], step: int, samples: int = 4) -> None:
    """Every sample of the step once, in order."""
    covered = [block.first_sample + index for block in blocks for index in range(len(block.sample_ids_B))]
    assert covered == list(range(samples))
    for block in blocks:
        assert block.step == step
        np.testing.assert_array_equal(
            block.tokens_BS1, make_block(step, block.first_sample, len(block.ids_BSK)).tokens_BS1
        )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dp", [1, 2])
def test_what_was_committed_is_read_in_sample_order(tmp_path: Path, dp: int) -> None:
    Producer(tmp_path, dp).steps(1, 5)
    for step, blocks in read_all(tmp_path, 5).items():
        assert_whole(blocks, step)


def test_the_size_of_a_step_is_that_of_its_blocks(tmp_path: Path) -> None:
    Producer(tmp_path, 2).steps(1, 3)
    reader = LabelReader(tmp_path, 1.0)
    sizes = [reader.read(commit)[1] for step in (1, 2, 3) if (commit := reader.wait_commit(step))]
    assert sum(sizes) == sum(part_path(tmp_path, part).stat().st_size for part in range(2))


def test_a_reader_may_skip_steps(tmp_path: Path) -> None:
    Producer(tmp_path, 2).steps(1, 6)
    reader = LabelReader(tmp_path, 1.0)
    for step in (3, 6):
        commit = reader.wait_commit(step)
        assert commit is not None
        assert_whole(reader.read(commit)[0], step)


def test_a_step_without_a_commit_is_not_readable(tmp_path: Path) -> None:
    producer = Producer(tmp_path)
    producer.steps(1, 2)
    producer.append(3)
    reader = LabelReader(tmp_path, 0.1)
    assert reader.wait_commit(2) is not None
    assert reader.wait_commit(3, give_up=lambda: True) is None
    producer.commit(3)
    assert reader.wait_commit(3) is not None


def test_a_reader_follows_the_end_of_the_log_while_it_is_written_in_small_pieces(tmp_path: Path) -> None:
    """The writer is slowed to single bytes, so that every torn state of both files is on show."""
    producer = Producer(tmp_path, dp=2)
    seen: list[int] = []
    failures: list[BaseException] = []

    def follow() -> None:
        try:
            for step, blocks in read_all(tmp_path, 12, timeout_s=10.0).items():
                assert_whole(blocks, step)
                seen.append(step)
        except BaseException as error:
            failures.append(error)

    class Slow:
        def __init__(self, file: object):
            self.file = file

        def write(self, data: bytes) -> int:
            piece = bytes(data[: max(1, len(data) // 3)])
            time.sleep(0.0005)
            return self.file.write(piece)  # type: ignore[attr-defined,no-any-return]

    for writer in (*producer.writers, producer.commits):
        writer.file = Slow(writer.file)  # type: ignore[assignment]
    thread = threading.Thread(target=follow)
    thread.start()
    producer.steps(1, 12)
    thread.join(20)
    assert not failures and seen == list(range(1, 13))


def test_a_log_that_ended_says_so_to_whoever_waits(tmp_path: Path) -> None:
    producer = Producer(tmp_path)
    producer.steps(1, 2)
    producer.commits.end("stopped")
    reader = LabelReader(tmp_path, 5.0)
    assert reader.wait_commit(2) is not None, "what was committed before stays readable"
    assert reader.wait_commit(3) is None
    assert reader.ended == End("stopped")


def test_a_restarted_run_goes_on_after_the_end_record(tmp_path: Path) -> None:
    producer = Producer(tmp_path)
    producer.steps(1, 2)
    producer.commits.end("stopped")
    again = Producer(tmp_path)
    assert again.last == 2
    reader = LabelReader(tmp_path, 0.1)
    assert reader.wait_commit(3, give_up=lambda: True) is None and reader.ended is None
    again.steps(3, 4)
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
    Producer(tmp_path / "later").steps(1, 1)
    assert reader.wait_commit(1) is not None


def test_reopening_an_empty_or_absent_folder_makes_an_empty_log(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "a" / "b"):
        assert reopen(folder) == 0
        assert snapshot(folder) == {COMMITS: b""} or folder == tmp_path
        assert reopen(folder) == 0


def test_reopening_a_good_log_changes_no_byte(tmp_path: Path) -> None:
    Producer(tmp_path, 2).steps(1, 4)
    before = snapshot(tmp_path)
    assert reopen(tmp_path) == 4
    assert snapshot(tmp_path) == before


def test_a_commit_line_torn_at_any_byte_is_dropped_with_its_blocks_and_the_log_goes_on(tmp_path: Path) -> None:
    source = tmp_path / "source"
    producer = Producer(source)
    producer.steps(1, 2)
    two = snapshot(source)
    producer.steps(3, 3)
    three = snapshot(source)
    lines = three[COMMITS]
    for cut in range(len(two[COMMITS]), len(lines)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        for name, data in three.items():
            (folder / name).write_bytes(data[:cut] if name == COMMITS else data)
        assert reopen(folder) == 2, f"cut after byte {cut}"
        assert snapshot(folder) == two
        again = Producer(folder)
        again.steps(3, 3)
        assert snapshot(folder) == three
        again.close()
    producer.close()


def test_a_block_torn_at_any_byte_is_dropped(tmp_path: Path) -> None:
    producer = Producer(tmp_path)
    producer.steps(1, 2)
    two = snapshot(tmp_path)
    producer.append(3)
    producer.close()
    path = part_path(tmp_path, 0)
    data = path.read_bytes()
    for cut in range(len(two[path.name]), len(data), 7):
        path.write_bytes(data[:cut])
        assert reopen(tmp_path) == 2
        assert snapshot(tmp_path) == two


def test_uncommitted_blocks_of_some_parts_are_dropped(tmp_path: Path) -> None:
    producer = Producer(tmp_path, 2)
    producer.steps(1, 2)
    two = snapshot(tmp_path)
    producer.writers[1].append(3, encode_block(make_block(3), 500))
    producer.writers[1].append(4, encode_block(make_block(4), 500))
    assert reopen(tmp_path) == 2
    assert snapshot(tmp_path) == two


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
    versions = {step: int(blocks[0].ids_BSK.max()) for step, blocks in read_all(tmp_path, 4).items()}
    assert versions == {1: 0, 2: 0, 3: 0, 4: 9}


def test_a_step_that_skips_one_is_our_own_bug(tmp_path: Path) -> None:
    producer = Producer(tmp_path)
    producer.steps(1, 1)
    with pytest.raises(AssertionError, match="step 3 after 1"):
        producer.commit(3)


def test_part_files_of_an_older_layout_stay_readable(tmp_path: Path) -> None:
    first = Producer(tmp_path, dp=2)
    first.steps(1, 3)
    first.append(4)  # never committed
    Producer(tmp_path, dp=1).steps(4, 6)
    Producer(tmp_path, dp=2).steps(7, 8)
    for step, blocks in read_all(tmp_path, 8).items():
        assert_whole(blocks, step)
    reader = LabelReader(tmp_path, 1.0)
    commit = reader.wait_commit(5)
    assert commit is not None and commit.parts == (0,)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def test_a_flipped_bit_of_a_payload_is_found_by_the_reader_and_the_file_named(tmp_path: Path) -> None:
    Producer(tmp_path, 2).steps(1, 3)
    flip(part_path(tmp_path, 1), HEADER_BYTES + 20)
    with pytest.raises(LabelError, match=r"labels of step 1, samples from \d, are damaged") as caught:
        read_all(tmp_path, 3)
    assert str(part_path(tmp_path, 1)) in str(caught.value)


@pytest.mark.parametrize("which", ["first", "last"])
def test_a_flipped_bit_of_a_committed_header_is_found_and_nothing_is_thrown_away(tmp_path: Path, which: str) -> None:
    Producer(tmp_path, 2).steps(1, 3)
    path = part_path(tmp_path, 1)
    block = len(encode_block(make_block(1, 0, 1), 500))
    place = 10 if which == "first" else path.stat().st_size - block + 10
    flip(path, place)
    before = snapshot(tmp_path)
    for action in (lambda: reopen(tmp_path), lambda: read_all(tmp_path, 3)):
        with pytest.raises(LabelError) as caught:
            action()
        assert f"{path} (intact up to byte {place - 10})" in str(caught.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_part_file_that_lost_committed_labels_is_named(tmp_path: Path, damage: str) -> None:
    Producer(tmp_path, 2).steps(1, 3)
    path = part_path(tmp_path, 0)
    if damage == "truncated":
        os.truncate(path, path.stat().st_size - 5)
    else:
        path.unlink()
    with pytest.raises(LabelError) as caught:
        reopen(tmp_path)
    assert str(path) in str(caught.value)
    with pytest.raises(LabelError) as caught:
        read_all(tmp_path, 3)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_damaged_commit_record_is_found_and_the_file_and_place_named(tmp_path: Path, line: int) -> None:
    Producer(tmp_path).steps(1, 3)
    path = tmp_path / COMMITS
    lines = path.read_bytes().splitlines(keepends=True)
    start = sum(len(earlier) for earlier in lines[:line])
    flip(path, start + lines[line].index(b'"samples"') + 11)
    before = snapshot(tmp_path)
    with pytest.raises(LabelError, match=f"damaged at byte {start}") as caught:
        reopen(tmp_path)
    assert str(path) in str(caught.value)
    assert snapshot(tmp_path) == before
    with pytest.raises(LabelError, match=f"damaged after step {line}"):
        read_all(tmp_path, 3)


def test_a_commit_record_with_another_number_in_it_does_not_pass(tmp_path: Path) -> None:
    Producer(tmp_path).steps(1, 2)
    path = tmp_path / COMMITS
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[1]["record"]["samples"] = 2
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(LabelError):
        reopen(tmp_path)


class NearlyFull:
    """A file on a disk with room for so many bytes: it takes what fits, and only then complains, as write(2) does."""

    def __init__(self, file: object, room: int):
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        piece = bytes(data[: self.room])
        self.room -= len(piece)
        return self.file.write(piece)  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("room", [0, 1, 100])
def test_a_full_disk_is_an_error_even_when_a_part_of_the_block_fits(tmp_path: Path, room: int) -> None:
    producer = Producer(tmp_path)
    producer.steps(1, 2)
    two = snapshot(tmp_path)
    producer.writers[0].file = NearlyFull(producer.writers[0].file, room)  # type: ignore[assignment]
    with pytest.raises(LabelError, match="No space left on device") as caught:
        producer.append(3)
    assert str(part_path(tmp_path, 0)) in str(caught.value)
    producer.commits.file = NearlyFull(producer.commits.file, min(room, 50))  # type: ignore[assignment]
    with pytest.raises(LabelError, match="No space left on device"):
        producer.commit(3)
    assert reopen(tmp_path) == 2 and snapshot(tmp_path) == two


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_whatever_a_crash_leaves_of_the_unfinished_steps_is_repaired(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Committed steps in both files, and any prefix of what would have come next in each of them."""
    folder = tmp_path_factory.mktemp("crash")
    dp = data.draw(st.sampled_from([1, 2]))
    producer = Producer(folder, dp)
    committed = data.draw(st.integers(0, 3))
    producer.steps(1, committed)
    good = snapshot(folder)
    producer.steps(committed + 1, committed + 2)
    producer.close()
    for path in sorted(folder.iterdir()):
        now, before = path.read_bytes(), good[path.name]
        extra = len(now) - len(before)
        most = min(extra, now[len(before) :].index(b"\n")) if path.name == COMMITS else extra
        path.write_bytes(now[: len(before) + data.draw(st.integers(0, most))])
    assert reopen(folder) == committed
    assert snapshot(folder) == good


# --- how much labels count ---


def brute_lead(pairs: list[tuple[float, float]]) -> float:
    """Weighted mean with weights 0.95^age."""
    weights = [0.95 ** (len(pairs) - 1 - index) for index in range(len(pairs))]
    return sum(w * (student - teacher) for w, (teacher, student) in zip(weights, pairs, strict=True)) / sum(weights)


@given(st.lists(st.tuples(st.floats(0, 12), st.floats(0, 12)), min_size=1, max_size=60))
def test_the_lead_is_the_mean_difference_of_losses_with_recent_steps_counting_most(
    pairs: list[tuple[float, float]],
) -> None:
    tracker = LeadTracker()
    assert tracker.lead == 0.0
    for teacher, student in pairs:
        tracker.add(teacher, student)
    assert tracker.lead == pytest.approx(brute_lead(pairs), abs=1e-9)


def test_a_constant_schedule_has_one_weight() -> None:
    constant = DistillSettings(weight=0.7, schedule="constant")
    assert {distillation_weight(constant, lead, step, 100) for lead in (-1.0, 0.0, 2.0) for step in (1, 100)} == {0.7}


def test_a_ramp_rises_linearly_to_its_weight_and_stays() -> None:
    ramp = DistillSettings(weight=0.8, schedule="ramp", ramp_fraction=0.5)
    weights = [distillation_weight(ramp, 5.0, step, 100) for step in range(1, 101)]
    np.testing.assert_allclose(weights, [0.8 * min(1.0, step / 50) for step in range(1, 101)])
    assert weights[24] == pytest.approx(0.4) and weights[49] == weights[99] == 0.8


@given(st.floats(-20, 20))
def test_a_weight_by_lead_follows_it_between_nothing_and_the_whole(lead: float) -> None:
    by_lead = DistillSettings(weight=0.9, schedule="lead", full_lead=0.3)
    weight = distillation_weight(by_lead, lead, 1, 10)
    assert 0.0 <= weight <= 0.9
    if lead <= 0:
        assert weight == 0.0
    elif lead >= 0.3:
        assert weight == 0.9
    else:
        assert weight == pytest.approx(3.0 * lead)


def test_a_control_never_looks_at_labels() -> None:
    for schedule in ("lead", "constant", "ramp"):
        assert distillation_weight(DistillSettings(weight=0.0, schedule=schedule), 3.0, 9, 10) == 0.0
    assert math.isfinite(distillation_weight(DistillSettings(schedule="ramp"), 0.0, 1, 1))
