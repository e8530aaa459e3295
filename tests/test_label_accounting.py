"""Every published sample is learned once or skipped with a reason, and files alone prove it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.label_logs import MANIFEST, Producer, flip
from titan.checkpoint.folder import MANIFEST as CHECKPOINT
from titan.checkpoint.folder import encode_manifest, step_folder
from titan.distill.log.audit import Audit, Published, audit, published
from titan.distill.log.ledger import Entry, Ledger, Place, ledger_path, read_ledger
from titan.distill.log.manifest import write_manifest
from titan.distill.log.records import Commit
from titan.distill.log.retention import Retention, retain, write_place
from titan.distill.log.writer import CommitWriter
from titan.errors import LabelError

SAMPLES = 4


def place_of(number: int) -> Place:
    """Sample `number` of a log of steps of four, from step 1 on."""
    return Place(1 + number // SAMPLES, number % SAMPLES)


@dataclass
class Student:
    """A student without a model: it takes so many samples a step, and keeps ledger and checkpoint as it should."""

    run: Path
    name: str = "small"
    producer: str = "teacher"
    start: int = 0
    """Number of its first sample."""
    number: int = 0
    own_step: int = 0
    counts: dict[str, int] = field(default_factory=lambda: {"consumed": 0, "skipped": 0})

    def __post_init__(self) -> None:
        self.number = self.start
        self.ledger = Ledger(self.run, self.name)

    def take(self, samples: int, kind: str = "consumed") -> "Student":
        self.own_step += 1
        end = place_of(self.number + samples)
        self.ledger.note(self.own_step, place_of(self.number), end, kind, "" if kind == "consumed" else "too old")
        self.number += samples
        self.counts[kind] += samples
        return self

    def checkpoint(self, **changes: Any) -> "Student":
        state = {
            "start_place": place_of(self.start), "place": place_of(self.number), "counts": dict(self.counts),
            "producer": self.producer, "own_step": self.own_step,
        }  # fmt: skip
        folder = step_folder(self.run / "checkpoints" / self.name, self.own_step)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CHECKPOINT).write_bytes(encode_manifest({"state": state | changes}))
        return self


def run_of(folder: Path, steps: int = 10, producer: str = "teacher") -> Path:
    log = folder / "labels" / producer
    write_manifest(log, MANIFEST)
    Producer(log).steps(1, steps).close()
    return folder


def says(result: Audit) -> str:
    return "\n".join(result.findings)


# --- the ledger ---


def test_what_was_noted_is_read_back(tmp_path: Path) -> None:
    student = Student(tmp_path, start=6).take(4).take(3, "skipped").take(5)
    assert list(read_ledger(student.ledger.path)) == [
        Entry(1, Place(2, 2), Place(3, 2), "consumed"),
        Entry(2, Place(3, 2), Place(4, 1), "skipped", "too old"),
        Entry(3, Place(4, 1), Place(5, 2), "consumed"),
    ]


def test_a_gap_an_overlap_and_an_empty_range_are_our_own_bugs(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "small")
    ledger.note(3, Place(1, 0), Place(2, 0), "consumed")
    for own, start, end in [
        (4, Place(2, 1), Place(3, 0)), (4, Place(1, 3), Place(3, 0)), (4, Place(2, 0), Place(2, 0)),
        (2, Place(2, 0), Place(3, 0)),
    ]:  # fmt: skip
        with pytest.raises(AssertionError):
            ledger.note(own, start, end, "consumed")
    assert len(list(read_ledger(ledger.path))) == 1


def test_a_ledger_torn_at_any_byte_is_repaired_on_opening(tmp_path: Path) -> None:
    ledger = Student(tmp_path).take(4).take(4).ledger
    data = ledger.path.read_bytes()
    first = data.index(b"\n") + 1
    for cut in range(len(data)):
        ledger.path.write_bytes(data[:cut])
        again = Ledger(tmp_path, "small")
        assert ledger.path.read_bytes() == data[: first if cut >= first else 0]
        assert (again.last is None) == (cut < first)


@pytest.mark.parametrize("own_step", range(7))
def test_rewinding_forgets_what_came_after_a_checkpoint_and_the_ledger_goes_on(tmp_path: Path, own_step: int) -> None:
    student = Student(tmp_path)
    for _ in range(6):
        student.take(2, "skipped")
    before = list(read_ledger(student.ledger.path))
    ledger = Ledger(tmp_path, "small")
    ledger.rewind(own_step)
    assert list(read_ledger(ledger.path)) == before[:own_step]
    ledger.note(own_step + 1, place_of(2 * own_step), place_of(2 * own_step + 3), "consumed")
    assert len(list(read_ledger(ledger.path))) == own_step + 1


def test_a_ledger_that_does_not_reach_the_checkpoint_says_so(tmp_path: Path) -> None:
    ledger = Student(tmp_path).take(4).take(4).ledger
    with pytest.raises(LabelError, match="ends at step 2 of the student, before its checkpoint of step 3"):
        ledger.rewind(3)
    assert len(list(read_ledger(ledger.path))) == 2


def test_any_flipped_bit_of_a_ledger_is_found(tmp_path: Path) -> None:
    path = Student(tmp_path).take(4).take(4, "skipped").ledger.path
    data = path.read_bytes()
    for place in range(len(data) - 1):  # without the last line end, a line is torn and not damaged
        flip(path, place, bit=place % 8)
        with pytest.raises(LabelError, match="is damaged at byte"):
            list(read_ledger(path))
        path.write_bytes(data)


# --- the row of published samples ---


@given(st.integers(1, 50), st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_a_place_and_its_number_are_inverse(first: int, sizes: list[int]) -> None:
    row = [Place(first + step, sample) for step, size in enumerate(sizes) for sample in range(size)]
    before = tuple(sum(sizes[:count]) for count in range(len(sizes) + 1))
    log = Published(first, before)
    assert [log.number(place) for place in row] == list(range(len(row)))
    assert [log.place(number) for number in range(len(row))] == row
    assert log.number(Place(log.last + 1, 0)) == len(row)
    for outside in (Place(first - 1, 0), Place(log.last + 1, 1), Place(first, -1), Place(first, sizes[0] + 1)):
        assert log.number(outside) is None


def test_what_is_published_is_what_the_commit_records_say(tmp_path: Path) -> None:
    commits = CommitWriter(tmp_path, 6)
    for step, samples in ((7, 4), (8, 2), (9, 5)):
        commits.commit(Commit(step, (0,), samples, 1.0))
    assert published(tmp_path) == Published(7, (0, 4, 6, 11))
    assert published(tmp_path / "absent") == Published()


# --- the audit ---


def test_students_that_learn_skip_regroup_and_start_late_are_clean(tmp_path: Path) -> None:
    run_of(tmp_path)
    run_of(tmp_path, 6, "mid")
    Student(tmp_path, "same").take(4).take(4).take(4).checkpoint()
    Student(tmp_path, "regroups").take(7).take(7).take(7, "skipped").take(7).checkpoint()
    Student(tmp_path, "late", start=20).take(6).checkpoint().take(6)
    Student(tmp_path, "of-mid", "mid").take(24).checkpoint()
    Student(tmp_path, "no-checkpoint").take(5)
    result = audit(tmp_path)
    assert result.clean, says(result)
    found = {student.student: student for student in result.students}
    assert set(found) == {"same", "regroups", "late", "of-mid", "no-checkpoint"}
    balance = {
        name: (entry.published, entry.consumed, entry.skipped, entry.since, entry.ahead)
        for name, entry in found.items()
    }
    assert balance == {
        "same": (12, 12, 0, 0, 28), "regroups": (28, 21, 7, 0, 12), "late": (6, 6, 0, 6, 14),
        "of-mid": (24, 24, 0, 0, 0), "no-checkpoint": (5, 5, 0, 0, 35),
    }  # fmt: skip
    assert found["of-mid"].producer == "mid" and found["late"].start == Place(6, 0)


def test_a_student_that_crashed_and_rewound_is_clean_and_one_that_did_not_rewind_is_not(tmp_path: Path) -> None:
    run_of(tmp_path)
    student = Student(tmp_path).take(4).take(4).checkpoint().take(4).take(4)
    student.ledger.rewind(2)
    student.own_step, student.number = 2, 8
    student.counts["consumed"] = 8
    student.take(6).take(6).checkpoint()
    assert audit(tmp_path).clean
    lines = ledger_path(tmp_path, "small").read_bytes().splitlines(keepends=True)
    ledger_path(tmp_path, "small").write_bytes(b"".join([*lines, lines[2]]))
    assert "samples from step 3 sample 0 up to step 4 sample 2 are accounted for twice, in own steps" in says(
        audit(tmp_path)
    )


def test_dropped_segments_do_not_matter_to_the_audit(tmp_path: Path) -> None:
    log = tmp_path / "labels" / "teacher"
    log.mkdir(parents=True)
    Producer(log, segment_bytes=400).steps(1, 10).close()
    Student(tmp_path).take(20).take(20).checkpoint()
    write_place(log, "small", 10)
    assert retain(log, Retention("needed")).dropped_bytes > 0
    assert audit(tmp_path).clean


def without_line(path: Path, number: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    del lines[number]
    path.write_bytes(b"".join(lines))


def cut_commits(run: Path) -> None:
    path = run / "labels/teacher/commits.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))


@pytest.mark.parametrize(
    ("wrong", "finding"),
    [
        (lambda s: without_line(s.ledger.path, 1), "up to step 4 sample 1 were neither consumed nor skipped"),
        (lambda s: without_line(s.ledger.path, 0), "from step 1 sample 0 up to step 2 sample 2 were neither"),
        (lambda s: without_line(s.ledger.path, 2), "from step 4 sample 1 up to step 5 sample 3 were neither"),
        (lambda s: s.ledger.path.unlink(), "small.jsonl is missing"),
        (lambda s: flip(s.ledger.path, 30), "is damaged at byte 0"),
        (lambda s: s.checkpoint(counts={"consumed": 13, "skipped": 7}), "says 13 samples consumed, its ledger"),
        (lambda s: s.checkpoint(counts={"consumed": 12, "skipped": 6}), "says 6 samples skipped, its ledger"),
        (lambda s: s.checkpoint(place=[5, 2]), "consumed 6 and skipped 7 samples, published were 18"),
        (lambda s: s.checkpoint(place=[6, 0]), "from step 5 sample 3 up to step 6 sample 0 were neither"),
        (lambda s: s.checkpoint(place=[12, 0]), "step 12 sample 0 is not in the log, which has steps 1 to 10"),
        (lambda s: s.checkpoint(start_place=[1, 1]), "up to step 1 sample 1 are accounted for before its start"),
        (lambda s: s.checkpoint(producer="mid"), "learns from mid, which has no log"),
        (lambda s: cut_commits(s.run), "which is no part of the log"),
        (lambda s: flip(s.run / "labels/teacher/commits.jsonl", 30), "commits.jsonl is damaged at byte 0"),
        (lambda s: flip(next((s.run / "checkpoints").rglob(CHECKPOINT)), 30), "manifest.json is damaged"),
    ],
)
def test_whatever_is_wrong_is_found_and_said(tmp_path: Path, wrong: Callable[[Student], object], finding: str) -> None:
    student = Student(run_of(tmp_path)).take(6).take(7, "skipped").take(6).checkpoint()
    assert audit(tmp_path).clean
    wrong(student)
    result = audit(tmp_path)
    assert not result.clean and finding in says(result), says(result)


def test_a_long_list_of_findings_is_cut(tmp_path: Path) -> None:
    run_of(tmp_path, 60)
    student = Student(tmp_path)
    for _ in range(60):
        student.take(4)
    student.checkpoint()
    lines = student.ledger.path.read_bytes().splitlines(keepends=True)
    student.ledger.path.write_bytes(b"".join(lines[::2]))
    assert len(audit(tmp_path).findings) < 15 and "and 20 more like this" in says(audit(tmp_path))


def brute_clean(
    samples: int, start: int, until: int, ranges: list[tuple[int, int, str]], counts: tuple[int, int]
) -> bool:
    """Sample by sample."""
    times = [0] * samples
    learned = {"consumed": 0, "skipped": 0}
    for low, high, kind in ranges:
        for number in range(low, high):
            times[number] += 1
        if high <= until:
            learned[kind] += high - low
    once = all(times[number] == 1 for number in range(start, until))
    rest = all(times[number] <= 1 for number in range(until, samples)) and not any(times[:start])
    whole = not any(low < until < high for low, high, _ in ranges)
    return once and rest and whole and (learned["consumed"], learned["skipped"]) == counts


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_audit_agrees_with_counting_sample_by_sample(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A good ledger, and one with a range dropped, repeated or moved, or a checkpoint that says something else."""
    run = tmp_path_factory.mktemp("run")
    (run / "labels/teacher").mkdir(parents=True)
    commits = CommitWriter(run / "labels/teacher", 0)
    for step in range(1, 7):
        commits.commit(Commit(step, (0,), SAMPLES, 1.0))
    start = data.draw(st.integers(0, 6))
    student = Student(run, start=start)
    ranges: list[tuple[int, int, str]] = []
    for _ in range(data.draw(st.integers(1, 5))):
        size, kind = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(["consumed", "skipped"]))
        ranges.append((student.number, student.number + size, kind))
        student.take(size, kind)
    until, counts = student.number, dict(student.counts)
    lines = student.ledger.path.read_bytes().splitlines(keepends=True)
    match data.draw(st.sampled_from(["good", "dropped", "repeated", "count", "place", "start"])):
        case "dropped":
            gone = data.draw(st.integers(0, len(lines) - 1))
            del lines[gone], ranges[gone]
        case "repeated":
            again = data.draw(st.integers(0, len(lines) - 1))
            lines.append(lines[again])
            ranges.append(ranges[again])
        case "count":
            counts["consumed"] += data.draw(st.integers(-2, 2))
        case "place":
            until = data.draw(st.integers(start, 24))
        case "start":
            start = data.draw(st.integers(0, until))
    student.ledger.path.write_bytes(b"".join(lines))
    student.checkpoint(start_place=place_of(start), place=place_of(until), counts=counts)
    commits.close()
    want = brute_clean(24, start, until, ranges, (counts["consumed"], counts["skipped"]))
    assert audit(run).clean == want, says(audit(run))
