"""A disk that is nearly full: labels are dropped, the teacher waits, or the run saves and ends, as it was told to."""

import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.label_logs import MANIFEST, Producer
from tests.runs import kill_tree, processes_under, start_titan, titan, wait_for_events, wait_for_step, write_tiny_config
from titan.cluster import disk as module
from titan.cluster.disk import DiskWatch, free_bytes
from titan.cluster.launch import _disk_errors
from titan.cluster.role_group import Phase
from titan.config.load import load_config
from titan.distill.log.manifest import write_manifest
from titan.distill.log.retention import Retention, first_kept, retain
from titan.distill.log.segment import segments_of
from titan.errors import RunError
from titan.observe.events import EventLog, read_events
from titan.observe.files import Record, read_lines

FLOOR = 24 << 20
NOTICED_S = 10.0


class Group:
    """What the watch sees of a role."""

    def __init__(self, role: str):
        self.role, self.phase, self.heard = role, Phase.TRAIN, list[bool]()

    def heed_disk(self, low: bool) -> None:
        self.heard.append(low)


@pytest.mark.parametrize(
    ("when_full", "share", "heard", "must_stop"),
    [
        ("wait", 2.0, [], False),
        ("wait", 0.9, [True], False),
        ("drop", 0.9, [True], False),
        ("wait", 0.4, [True], True),
        ("stop", 0.9, [], True),
    ],
)
def test_who_makes_labels_hears_of_a_low_disk_and_below_half_of_the_floor_or_on_request_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when_full: str, share: float, heard: list[bool], must_stop: bool
) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda folder: int(share * FLOOR))
    sets = ["labels.wait_s=50", f"labels.when_full={when_full}", f"recovery.min_free_bytes={FLOOR}"]
    config = load_config(write_tiny_config(tmp_path / "work"), sets)
    teacher, late = Group("teacher"), Group("late")
    watch = DiskWatch(config, tmp_path, EventLog(tmp_path))
    watch.look([teacher, late])  # type: ignore[list-item]
    assert (teacher.heard, late.heard, watch.must_stop) == (heard, [], must_stop)
    assert [one["event"] for one in read_events(tmp_path)] == (["disk_low"] if share < 1 else [])
    monkeypatch.setattr(module, "free_bytes", lambda folder: 3 * FLOOR)
    monkeypatch.setattr(module.time, "monotonic", lambda: 1e12)
    watch.look([teacher, late])  # type: ignore[list-item]
    assert teacher.heard == [*heard, *([False] if heard else [])]
    assert isinstance(watch.error(), RunError) and str(tmp_path) in str(watch.error())


def test_a_folder_of_copies_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "copies").mkdir()
    sets = [f"labels.copy_to={tmp_path / 'copies'}", "recovery.min_free_bytes=1"]
    watch = DiskWatch(load_config(write_tiny_config(tmp_path / "work"), sets), tmp_path, EventLog(tmp_path))
    (tmp_path / "copies").rmdir()
    with pytest.raises(RunError, match=r"cannot look at .*copies, which the run writes to: No such file"):
        watch.look([])


def test_without_a_floor_nobody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda folder: pytest.fail("looked"))
    config = load_config(write_tiny_config(tmp_path / "work"), [])
    watch = DiskWatch(config, tmp_path, EventLog(tmp_path))
    watch.look([])
    assert not watch.low and not watch.must_stop


def test_a_full_disk_costs_the_oldest_file_of_labels_and_no_more_at_a_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    write_manifest(log, MANIFEST)
    Producer(log, segment_bytes=600).steps(1, 20)
    before = segments_of(log, 0)
    assert len(before) > 4
    for gone in (1, 2):
        retain(log, Retention("all", None, "drop", free_bytes=1))
        assert segments_of(log, 0) == before[gone:] and first_kept(log) > 0
    retain(log, Retention("all", None, "drop"))
    assert segments_of(log, 0) == before[2:]


def test_a_thread_that_meets_a_full_disk_prints_no_traceback_and_other_failures_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: said.append(args.exc_value))

    def fail(error: Exception) -> None:
        raise error

    full, other = OSError(errno.ENOSPC, "No space left on device"), ValueError("a bug")
    with _disk_errors(tmp_path):
        for error in (full, other):
            thread = threading.Thread(target=fail, args=(error,))
            thread.start()
            thread.join()
    assert said == [other]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96m", "titan-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, timeout=10).returncode:
        pytest.skip("this machine permits no mounts")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=10)


def fill(disk: Path, leave: int) -> None:
    """Until so many bytes are free."""
    with (disk / "filler").open("ab") as file:
        while (more := free_bytes(disk) - leave) > 0:
            file.write(bytes(min(more, 1 << 20)))
            file.flush()


def told(run: Path, event: str) -> list[Record]:
    return [one for one in read_events(run) if one["event"] == event]


def teacher_step(run: Path) -> int:
    return max((one["step"] for one in read_lines(run / "metrics.jsonl") if one["role"] == "teacher"), default=0)


def start(disk: Path, *words: str, cwd: Path) -> "subprocess.Popen[str]":
    sets = ("run.steps=100000", f"run.dir={disk}", "data.cache=cache", f"recovery.min_free_bytes={FLOOR}", *words[2:])
    return start_titan(*words[:2], *(part for one in sets for part in ("--set", one)), cwd=cwd)


def until(true: Any, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120.0
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_run_waits_for_room_or_saves_and_ends_before_there_is_none_or_drops_labels(
    tmp_path: Path, small_disk: Path
) -> None:
    write_tiny_config(tmp_path / "work")
    run, work = small_disk / "tiny", tmp_path / "work"
    process = start(small_disk, "run", "tiny.toml", "labels.when_full=wait", "labels.wait_s=50", cwd=work)
    try:
        wait_for_step(run, "teacher", 12, process)
        fill(small_disk, FLOOR - (2 << 20))
        begin = time.monotonic()
        wait_for_events(run, "disk_low", 1, process, NOTICED_S)
        noticed_s = time.monotonic() - begin
        time.sleep(3.0)
        paused_at = teacher_step(run)
        time.sleep(3.0)
        assert teacher_step(run) == paused_at, "the teacher waits"
        (small_disk / "filler").unlink()
        until(lambda: teacher_step(run) > paused_at + 5, process)

        fill(small_disk, FLOOR // 3)
        _, error = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
    (line,) = error.splitlines()
    assert process.returncode == 1 and "every role has saved; make room" in line and "min_free_bytes" in line
    does = [one["does"] for one in told(run, "disk_low")]
    assert does[0] == "wait" and does[-1] == "stop" and noticed_s < NOTICED_S
    saved = {role: max(one.name for one in (run / "checkpoints" / role).iterdir()) for role in ("teacher", "early")}
    assert int(saved["teacher"][-8:]) == teacher_step(run), "no step is lost"
    assert titan("labels", "audit", run, cwd=work).returncode == 0

    (small_disk / "filler").unlink()
    fill(small_disk, FLOOR - (2 << 20))
    process = start(small_disk, "resume", str(run), "labels.when_full=drop", "labels.segment_bytes=50000", cwd=work)
    try:
        wait_for_events(run, "labels_dropped", 3, process)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
    assert process.returncode == 130 and teacher_step(run) > paused_at
    assert titan("labels", "audit", run, cwd=work).returncode == 0
    assert processes_under(work) == []
