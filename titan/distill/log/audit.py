"""What became of every label, proved from the files of a run alone.

Three files say it independently: the commit records what was published, the ledger what a student did with each range,
and the student's newest checkpoint what it believes to have learned.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan.checkpoint.folder import newest_step, read_manifest, step_folder
from titan.config.settings import TEACHER
from titan.distill.log.ledger import LEDGER, Entry, Place, ledger_path, read_ledger
from titan.distill.log.records import Commit, CommitCursor
from titan.errors import LabelError, TitanError

MOST = 10
"""Findings of one kind that are listed."""


@dataclass(frozen=True)
class StudentAudit:
    """A student's balance. Counts are samples up to its newest checkpoint, or of the whole ledger without one."""

    student: str
    producer: str
    start: Place | None
    """First sample after its start; None before it started."""
    place: Place | None
    """First sample that it has not dealt with."""
    published: int
    """From its start to its place."""
    consumed: int
    skipped: int
    since: int
    """Noted in the ledger after the checkpoint: learned again, or made up for, after a crash."""
    ahead: int
    """Published behind its place."""
    findings: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """All students of a run."""

    students: tuple[StudentAudit, ...]
    findings: tuple[str, ...]
    """Of all students and logs, one line each."""

    @property
    def clean(self) -> bool:
        """Whether every sample is accounted for."""
        return not self.findings


@dataclass(frozen=True)
class Published:
    """A log's samples in one row: sample s of step n has number `before[n - first] + s`."""

    first: int = 1
    before: tuple[int, ...] = (0,)
    """Samples before each step, and last those of all steps."""

    @property
    def last(self) -> int:
        """The newest step."""
        return self.first + len(self.before) - 2

    @property
    def begin(self) -> Place:
        """The log's first sample."""
        return Place(self.first, 0)

    def number(self, place: Place) -> int | None:
        """Number of a place; that behind the newest step counts, others that do not exist have None."""
        if place == (self.last + 1, 0):
            return self.before[-1]
        if not self.first <= place.step <= self.last or place.sample < 0:
            return None
        number = self.before[place.step - self.first] + place.sample
        return number if number <= self.before[place.step - self.first + 1] else None

    def place(self, number: int) -> Place:
        """Inverse of `number`."""
        index = bisect_right(self.before, number) - 1
        return Place(self.first + index, number - self.before[index])


@dataclass
class _Balance:
    """Filled while a ledger is read."""

    findings: list[str] = field(default_factory=list)
    ranges: list[tuple[int, int, Entry]] = field(default_factory=list)
    """Numbers of the first sample and of that behind the last, and the entry."""


def audit(run_folder: Path) -> Audit:
    """Check every student of a run: consumed plus skipped is what was published, and nothing counts twice."""
    findings: list[str] = []
    logs: dict[str, Published] = {}
    for commits in sorted(run_folder.glob("labels/*/commits.jsonl")):
        try:
            logs[commits.parent.name] = published(commits.parent)
        except LabelError as error:
            findings.append(str(error))
            logs[commits.parent.name] = Published()
    students = tuple(_audit_student(run_folder, name, logs) for name in students_of(run_folder))
    findings += [f"{student.student}: {finding}" for student in students for finding in student.findings]
    return Audit(students, tuple(findings))


def students_of(run_folder: Path) -> list[str]:
    """Roles with a ledger, and roles other than the teacher with a checkpoint."""
    ledgers = {path.stem for path in (run_folder / LEDGER).glob("*.jsonl")}
    checkpoints = run_folder / "checkpoints"
    roles = {path.name for path in checkpoints.iterdir() if newest_step(path)} if checkpoints.is_dir() else set()
    return sorted(ledgers | (roles - {TEACHER}))


def published(folder: Path) -> Published:
    """What a log has committed, dropped steps included. Raises LabelError for a damaged record."""
    first, before = 1, [0]
    for commit in _commits(folder):
        if len(before) == 1:
            first = commit.step
        before.append(before[-1] + commit.samples)
    return Published(first, tuple(before))


def _commits(folder: Path) -> Iterator[Commit]:
    cursor = CommitCursor(folder)
    try:
        while commits := cursor.next():
            yield from commits
    finally:
        cursor.close()


def _audit_student(run_folder: Path, name: str, logs: dict[str, Published]) -> StudentAudit:
    balance = _Balance()
    state = _checkpoint_state(run_folder, name, balance)
    producer = str((state or {}).get("producer", TEACHER))
    log = logs.get(producer)
    if log is None:
        balance.findings.append(f"it learns from {producer}, which has no log")
        log = Published()
    path = ledger_path(run_folder, name)
    entries: list[Entry] = []
    if path.exists():
        try:
            entries.extend(read_ledger(path))
        except LabelError as error:
            balance.findings.append(str(error))
    elif state is not None and state.get("counts", {}).get("consumed", 0):
        balance.findings.append(f"{path} is missing; restore it from a copy of the run")
    _place_entries(log, entries, balance)
    start = _start(state, entries, log)
    place = _place(state, entries, balance)
    begin, end = (log.number(point) if point else 0 for point in (start, place))
    for point, number in ((start, begin), (place, end)):
        if number is None:
            balance.findings.append(f"{_words(point)} is not in the log, which has steps {log.first} to {log.last}")
    until = end if end is not None else log.before[-1]
    _check_rows(log, begin or 0, until, start, balance)
    within = [(low, high, entry) for low, high, entry in balance.ranges if high <= until]
    consumed = sum(high - low for low, high, entry in within if entry.kind == "consumed")
    skipped = sum(high - low for low, high, entry in within if entry.kind == "skipped")
    since = sum(high - low for low, high, _ in balance.ranges) - consumed - skipped
    between = max(0, until - (begin or 0)) if start else 0
    if consumed + skipped != between:
        balance.findings.append(f"consumed {consumed} and skipped {skipped} samples, published were {between}")
    if state is not None:
        _check_counts(state, consumed, skipped, balance)
    ahead = log.before[-1] - until if place else 0
    findings = tuple(balance.findings)
    return StudentAudit(name, producer, start, place, between, consumed, skipped, since, ahead, findings)


def _checkpoint_state(run_folder: Path, name: str, balance: _Balance) -> dict[str, Any] | None:
    """What the student's newest checkpoint says of labels; None without a checkpoint."""
    role_folder = run_folder / "checkpoints" / name
    step = newest_step(role_folder)
    if step is None:
        return None
    try:
        return dict(read_manifest(step_folder(role_folder, step))["state"])
    except TitanError as error:
        balance.findings.append(str(error))
        return None


def _place_entries(log: Published, entries: Sequence[Entry], balance: _Balance) -> None:
    """Give every entry its numbers in the log's row of samples; those that have none are findings."""
    outside = []
    for entry in entries:
        low, high = log.number(entry.start), log.number(entry.end)
        if low is None or high is None or high <= low:
            outside.append(
                f"own step {entry.own_step} {entry.kind} {_span(entry.start, entry.end)}, which is no part of the log"
            )
        else:
            balance.ranges.append((low, high, entry))
    balance.findings += _some(outside)


def _start(state: dict[str, Any] | None, entries: Sequence[Entry], log: Published) -> Place | None:
    """First sample after the student's start: what its checkpoint says, else where its ledger begins."""
    if state is not None and state.get("start_place") is not None:
        return Place(*state["start_place"])
    if state is not None and state.get("start_step") is not None:
        return max(Place(int(state["start_step"]) + 1, 0), log.begin)
    return entries[0].start if entries else None


def _place(state: dict[str, Any] | None, entries: Sequence[Entry], balance: _Balance) -> Place | None:
    if state is None:
        return entries[-1].end if entries else None
    if "place" not in state:
        balance.findings.append("its checkpoint does not say its place in the log; it is of an older titan")
        return entries[-1].end if entries else None
    return Place(*state["place"]) if state["place"] is not None else None


def _check_rows(log: Published, begin: int, until: int, start: Place | None, balance: _Balance) -> None:
    """Every sample of the row from the student's start to its place once, and none behind it twice."""
    gaps, twice = [], []
    reached, reached_by = begin, 0
    for low, high, entry in sorted(balance.ranges, key=lambda row: (row[0], row[1])):
        if low > reached and reached < until:
            gaps.append(f"{_span(log.place(reached), log.place(min(low, until)))} were neither consumed nor skipped")
        if low < reached:
            how = f"twice, in own steps {reached_by} and {entry.own_step}" if reached_by else "before its start"
            twice.append(f"{_span(entry.start, log.place(min(high, reached)))} are accounted for {how}")
        if high > reached:
            reached, reached_by = high, entry.own_step
    if start is not None and reached < until:
        gaps.append(f"{_span(log.place(reached), log.place(until))} were neither consumed nor skipped")
    balance.findings += _some(twice) + _some(gaps)


def _check_counts(state: dict[str, Any], consumed: int, skipped: int, balance: _Balance) -> None:
    """The checkpoint's own counts."""
    for what, found in (("consumed", consumed), ("skipped", skipped)):
        said = state.get("counts", {}).get(what, 0)
        if said != found:
            balance.findings.append(f"its checkpoint says {said} samples {what}, its ledger up to there {found}")


def _some(findings: list[str]) -> list[str]:
    rest = len(findings) - MOST
    return findings if rest <= 0 else [*findings[:MOST], f"and {rest} more like this"]


def _span(start: Place, end: Place) -> str:
    return f"samples from {_words(start)} up to {_words(end)}"


def _words(place: Place | None) -> str:
    return "nowhere" if place is None else f"step {place.step} sample {place.sample}"
