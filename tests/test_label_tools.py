"""`titan labels`: every flipped bit is found and named, tables and JSON say what there is, exports match."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from tests.label_logs import LENGTH, MANIFEST, VOCAB, Producer, flip, make_block, snapshot, whole_log
from tests.test_label_accounting import Student
from titan.cli.labels import labels_app
from titan.distill.codec.block import LabelBlock, encode_block
from titan.distill.codec.raw import RawLabels
from titan.distill.log import verify
from titan.distill.log.index import index_path
from titan.distill.log.manifest import write_manifest
from titan.distill.log.records import COMMITS
from titan.distill.log.retention import Retention, retain, write_place
from titan.distill.log.segment import scan, segments_of
from titan.distill.log.verify import verify_ledgers, verify_log
from titan.errors import LabelError
from titan.observe.metrics import MetricsLog, StepMetric

STEPS = 9


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody writes the files of these tests, so there is no need to watch them for long."""
    monkeypatch.setattr(verify, "GROWING_S", 0.0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a log of several segments, a student and its ledger."""
    whole_log(tmp_path / "labels/teacher", STEPS)
    (tmp_path / "config.toml").write_text("")
    Student(tmp_path).take(6).take(7, "skipped").take(6).checkpoint()
    write_place(tmp_path / "labels/teacher", "small", 4)
    return tmp_path


def titan(*words: object) -> Result:
    return CliRunner().invoke(labels_app, [str(word) for word in words], env={"COLUMNS": "160"})


# --- verify ---


def test_a_good_log_is_intact(run: Path) -> None:
    found = verify_log(run / "labels/teacher")
    assert found.findings == () and found.steps == STEPS and found.blocks == 4 * STEPS
    sizes = [path.stat().st_size for part in (0, 1) for path in segments_of(run / "labels/teacher", part)]
    assert found.size_bytes == sum(sizes) and len(sizes) > 4
    assert verify_ledgers(run) == []


def test_flipped_bits_at_random_places_are_all_found_and_the_file_named(run: Path) -> None:
    """1,500 single bits over all bytes of all files: segments, indexes, commits, manifest, places, ledger."""
    dice = random.Random(3)
    log = run / "labels/teacher"
    write_place(log, "tiny", 5)
    retain(log, Retention("needed"))  # also a kept.json
    files = [path for path in [*log.rglob("*"), *run.glob("ledger/*")] if path.is_file()]
    assert {path.name for path in files} >= {COMMITS, "log.json", "kept.json", "small.json", "small.jsonl"}
    sizes = [path.stat().st_size for path in files]
    tried = dict.fromkeys(files, 0)
    for path in [*files, *dice.choices(files, sizes, k=1_500 - len(files))]:
        place, bit = dice.randrange(path.stat().st_size), dice.randrange(8)
        flip(path, place, bit)
        findings = [*verify_log(log).findings, *verify_ledgers(run)]
        assert any(str(path) in str(finding) for finding in findings), (path, place, bit, findings)
        flip(path, place, bit)
        tried[path] += 1
    assert min(tried.values()) >= 1 and verify_log(log).findings == ()


def test_a_flipped_bit_of_any_byte_of_a_block_is_named_by_file_byte_and_step(run: Path) -> None:
    path = segments_of(run / "labels/teacher", 1)[1]
    blocks = list(scan(path))
    for block in (blocks[0], blocks[2], blocks[-1]):
        for place in range(block.offset, block.end, 3):
            flip(path, place, place % 8)
            findings = verify_log(run / "labels/teacher").findings
            assert [(f.path, f.offset, f.step) for f in findings] == [(path, block.offset, block.header.step)]
            flip(path, place, place % 8)


def test_several_damages_are_all_named(run: Path) -> None:
    paths = [path for part in (0, 1) for path in segments_of(run / "labels/teacher", part)]
    for path in paths:
        blocks = list(scan(path))
        flip(path, blocks[0].offset + 8)
        flip(path, blocks[1].end - 1)
    findings = verify_log(run / "labels/teacher").findings
    assert [(finding.path, finding.problem.split()[1]) for finding in findings] == [
        (path, what) for path in paths for what in ("header", "of")
    ]


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:-size])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda log: cut(segments_of(log, 0)[-1], 5), "the block is cut short"),
        (lambda log: segments_of(log, 0)[1].unlink(), "committed with 4 samples, 2 are intact"),
        (lambda log: index_path(segments_of(log, 0)[1]).unlink(), "the index is missing"),
        (lambda log: cut(index_path(segments_of(log, 0)[1]), 5), "the index is damaged"),
        (lambda log: cut(index_path(segments_of(log, 0)[1]), 44), "the index does not describe the block at byte"),
        (lambda log: cut(log / COMMITS, 3), "the last record is torn"),
        (lambda log: (log / "log.json").unlink(), "it has no log.json"),
        (
            lambda log: (log / COMMITS).write_bytes(b"".join(lines_of(log, list(range(4)) + list(range(5, 10))))),
            "step 6 follows step 4",
        ),
        (
            lambda log: (log / COMMITS).write_bytes(b"".join(lines_of(log, [*range(8), 9, 8]))),
            "a record stands behind the log's end",
        ),
    ],
)
def test_what_is_cut_missing_or_misplaced_is_found(run: Path, wrong: Callable[[Path], object], says: str) -> None:
    wrong(run / "labels/teacher")
    assert any(says in finding.problem for finding in verify_log(run / "labels/teacher").findings)


def lines_of(log: Path, order: list[int]) -> list[bytes]:
    lines = (log / COMMITS).read_bytes().splitlines(keepends=True)
    return [lines[number] for number in order]


def test_what_a_producer_has_not_committed_yet_is_no_damage_but_its_torn_end_is_named(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    producer = Producer(tmp_path, 2).steps(1, 3)
    producer.append(4)
    assert verify_log(tmp_path).findings == ()
    path = segments_of(tmp_path, 0)[0]
    for size in range(1, 115, 9):
        whole = path.read_bytes()
        cut(path, size)
        (finding,) = verify_log(tmp_path).findings
        assert finding.path == path and "never committed is torn" in finding.problem
        path.write_bytes(whole)


# --- the commands ---


def test_ls_lists_every_segment_and_readers(run: Path) -> None:
    printed = titan("ls", run)
    assert printed.exit_code == 0, printed.output
    for part in (0, 1):
        for path in segments_of(run / "labels/teacher", part):
            assert path.name in printed.output
    assert "teacher: steps 1 to 9, finished" in printed.output and "small at step 4" in printed.output
    (log,) = json.loads(titan("ls", run, "--json").output)
    assert sum(segment["blocks"] for segment in log["segments"]) == 4 * STEPS
    assert sum(segment["samples"] for segment in log["segments"]) == 4 * STEPS
    assert log["readers"] == {"small": 4} and (log["first_step"], log["last_step"]) == (1, STEPS)


def test_verify_prints_and_exits_with_one_when_something_is_wrong(run: Path) -> None:
    good = titan("verify", run)
    assert good.exit_code == 0 and "teacher: 9 steps, 36 blocks, 0.0 MB: all intact" in good.output
    assert json.loads(titan("verify", run, "--json").output)["intact"] is True
    path = segments_of(run / "labels/teacher", 0)[0]
    flip(path, list(scan(path))[1].offset + 90)
    bad = titan("verify", run)
    assert bad.exit_code == 1 and f"{path}, byte {list(scan(path))[1].offset}, step 1: " in bad.output
    record = json.loads(titan("verify", run, "--json").output)
    assert titan("verify", run, "--json").exit_code == 1
    assert record["intact"] is False and record["findings"][0]["step"] == 1
    flip(path, list(scan(path))[1].offset + 90)
    flip(run / "ledger/small.jsonl", 5)
    assert titan("verify", run).exit_code == 1


def test_stats_are_those_of_the_files(run: Path) -> None:
    with MetricsLog(run) as metrics:
        for step in range(1, STEPS + 1):
            metrics.write(StepMetric("teacher", step, 100.0 + 0.5 * step, 1.0, 1.0, 1.0, 1e-3, 12, 0.4))
    (row,) = json.loads(titan("stats", run, "--json").output)
    size = sum(len(data) for name, data in snapshot(run / "labels/teacher").items() if name.startswith("part-"))
    tokens = STEPS * 4 * LENGTH
    assert (row["steps"], row["samples"], row["tokens"], row["size_bytes"]) == (STEPS, 4 * STEPS, tokens, size)
    assert row["bytes_per_token"] == pytest.approx(size / tokens)
    assert row["steps_per_s"] == pytest.approx(2.0) and row["bytes_per_s"] == pytest.approx(2.0 * size / STEPS)
    printed = titan("stats", run)
    assert printed.exit_code == 0 and "2.00" in printed.output and f"{size / tokens:.2f}" in printed.output


def test_audit_exits_with_one_unless_every_sample_is_accounted_for(run: Path) -> None:
    good = titan("audit", run)
    assert good.exit_code == 0 and "every published sample is accounted for" in good.output
    record = json.loads(titan("audit", run, "--json").output)
    assert record["clean"] and record["students"][0]["consumed"] == 12 and record["students"][0]["skipped"] == 7
    Student(run, "tiny").take(4).checkpoint(counts={"consumed": 3, "skipped": 0})
    bad = titan("audit", run)
    assert bad.exit_code == 1 and "tiny: its checkpoint says 3 samples consumed, its ledger up to there 4" in bad.output
    assert titan("audit", run, "--json").exit_code == 1


def test_export_writes_what_the_teacher_said(run: Path) -> None:
    out = run / "labels.parquet"
    done = titan("export", run, "--out", out, "--first", 3, "--last", 5)
    assert done.exit_code == 0 and "36 tokens of steps 3 to 5" in done.output, done.output
    table = pq.read_table(out)
    assert table.num_rows == 3 * 4 * LENGTH
    rows = table.to_pylist()
    assert [(row["step"], row["sample"], row["position"]) for row in rows] == [
        (step, sample, position) for step in (3, 4, 5) for sample in range(4) for position in range(LENGTH)
    ]
    for row in rows:
        block = make_block(row["step"], row["sample"], 1)
        assert row["sample_id"] == block.sample_ids_B[0]
        assert row["token"] == block.tokens_BS1[0, row["position"]]
        assert row["next_token"] == block.tokens_BS1[0, row["position"] + 1]
        assert block.labels.dense_BSV is not None
        np.testing.assert_allclose(row["dense_log_prob"], block.labels.dense_BSV[0, row["position"]], atol=2**-11)
    assert titan("export", run, "--out", out).exit_code == 0 and pq.read_table(out).num_rows == STEPS * 4 * LENGTH


def test_export_leaves_absent_entries_of_sparse_labels_out(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    log = tmp_path / "labels/teacher"
    write_manifest(log, replace(MANIFEST, codec="top_k"))
    ids = np.array([[[2, 5, 1], [4, 0, 3]]], np.int32)
    log_prob = np.log(np.array([[[0.5, 0.3, 0.1], [0.9, 0.05, 0.01]]])).astype(np.float32)
    log_prob[0, 1, 1:] = -np.inf
    labels = RawLabels("top_k", ids_BSK=ids, log_prob_BSK=log_prob)
    block = LabelBlock(1, 0, np.array([77]), np.array([[1, 2, 3]], np.int32), labels)
    producer = Producer(log, samples=1)
    producer.writers[0].append(1, encode_block(block, VOCAB))
    producer.commit(1)
    assert titan("export", tmp_path, "--out", tmp_path / "out.parquet").exit_code == 0
    first, second = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert sorted(first["ids"]) == [1, 2, 5] and second["ids"] == [4]
    np.testing.assert_allclose(np.exp(second["log_prob"]), [0.9], rtol=0.05)


def test_export_of_steps_that_are_not_there_is_refused(run: Path) -> None:
    for first, last in ((0, 3), (3, 10), (5, 4)):
        done = titan("export", run, "--out", run / "x.parquet", "--first", first or -1, "--last", last)
        assert isinstance(done.exception, LabelError) and "has steps 1 to 9" in str(done.exception)
        assert not (run / "x.parquet").exists()


@pytest.mark.parametrize("command", ["ls", "verify", "stats", "export"])
def test_a_run_without_labels_or_without_that_role_is_an_error(tmp_path: Path, command: str) -> None:
    more = ("--out", tmp_path / "x.parquet") if command == "export" else ()
    assert "is not a run folder" in str(titan(command, tmp_path, *more).exception)
    (tmp_path / "config.toml").write_text("")
    assert "has no labels" in str(titan(command, tmp_path, *more).exception)
    whole_log(tmp_path / "labels/teacher", 2)
    whole_log(tmp_path / "labels/mid", 2)
    assert "has logs of mid, teacher" in str(titan(command, tmp_path, "--producer", "x", *more).exception)
    assert titan(command, tmp_path, "--producer", "mid", *more).exit_code == 0


def test_no_command_changes_a_log(run: Path) -> None:
    before = snapshot(run)
    for command in ("ls", "verify", "stats", "audit"):
        assert titan(command, run).exit_code == 0
    assert snapshot(run) == before
