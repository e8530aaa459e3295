"""Students of another run's labels: late, live, and what is refused. Compared with students of the same run."""

import json
import shutil
from pathlib import Path

import psutil
import pytest
import torch

from tests.runs import (
    processes_under,
    rank_processes,
    start_titan,
    titan,
    wait_for_events,
    wait_for_step,
    weights,
    write_tiny_config,
)
from titan.distill.log.ledger import read_ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run `tiny`, and `late.toml`: the same students, taught by its log."""
    folder = tmp_path_factory.mktemp("source")
    write_tiny_config(folder)
    result = titan("run", "tiny.toml", cwd=folder)
    assert result.returncode == 0, result.stderr
    head, _, rest = (folder / "tiny.toml").read_text().partition("[teacher]")
    students = rest[rest.index("[[students]]") :]
    text = head + '[teacher]\nsource = "log:runs/tiny"\n' + students
    (folder / "late.toml").write_text(text.replace('name = "tiny"', 'name = "late"'))
    return folder


def test_students_of_a_finished_log_end_as_those_that_learned_live(workplace: Path) -> None:
    result = titan("run", "late.toml", cwd=workplace)
    assert result.returncode == 0, result.stderr
    run = workplace / "runs" / "late"
    for role in ("early", "late"):
        live, later = weights(workplace / "runs" / "tiny", role, 40), weights(run, role, 40)
        assert all(torch.equal(live[key], later[key]) for key in live), role
    assert list(json.loads((run / "summary.json").read_text())["roles"]) == ["early", "late"]
    for command in ("audit", "verify", "ls", "stats"):
        looked = titan("labels", command, "runs/late", cwd=workplace)
        assert looked.returncode == 0, looked.stdout + looked.stderr
    assert (run / "report.html").is_file()
    assert "early" in titan("status", "runs/late", cwd=workplace).stdout


def test_students_join_a_teacher_that_still_trains(workplace: Path) -> None:
    text = (workplace / "tiny.toml").read_text()
    head, _, rest = text.partition("[[students]]")
    alone = head.replace('name = "tiny"', 'name = "alone"').replace("steps = 40", "steps = 150")
    (workplace / "alone.toml").write_text(alone + "[labels]\nwithout_students = true\n" + rest[rest.index("[check") :])
    teacher = start_titan("run", "alone.toml", cwd=workplace)
    wait_for_step(workplace / "runs" / "alone", "teacher", 3, teacher)
    settings = ("run.name=join", "run.steps=150", "teacher.source=log:runs/alone")
    settings += ("students.early.start.now=true", "students.late.start.step=0")
    text = (workplace / "late.toml").read_text().replace("start = { step = 5 }\n", "").replace("start = { lead", "#")
    (workplace / "join.toml").write_text(text)
    stopped = [psutil.Process(teacher.pid), *rank_processes(teacher.pid)]
    for process in stopped:  # the driver first: it counts no silence from a time when it was away itself
        process.suspend()
    with start_titan(
        "run", "join.toml", *(part for one in settings for part in ("--set", one)), cwd=workplace
    ) as joined:
        wait_for_events(workplace / "runs" / "join", "placed", 2, joined)
        for process in stopped:
            process.resume()
        _, err = joined.communicate(timeout=120)
    assert joined.returncode == 0, err
    _, err = teacher.communicate(timeout=60)
    assert teacher.returncode == 0, err
    run = workplace / "runs" / "join"
    starts = {role: next(iter(read_ledger(run / "ledger" / f"{role}.jsonl"))).start for role in ("early", "late")}
    assert starts["late"] == (1, 0)
    assert starts["early"].step > 3, "it begins where the log was when it came"
    assert titan("labels", "audit", "runs/join", cwd=workplace).returncode == 0
    assert processes_under(workplace) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["teacher.source=log:nowhere"], "teacher.source is 'log:nowhere', but there is no label log"),
        (["teacher.source=disk"], "teacher.source is 'disk'; use 'train', 'log:' and"),
        (["run.steps=41"], "run.steps is 41, the log ends with step 40"),
        (["data.batch_size=4"], "data.batch_size is 4, the log has 8 samples a step"),
        (["data.batch_size=4", "students.late.batch_size=8"], "data.batch_size is 4, the log has 8 samples a step"),
        (["labels.temperature=2.0"], "labels.temperature is 2, the log's is 1"),
        (["data.sequence_length=16"], "its samples have another length"),
        (["data.vocab_size=400"], "its token ids are those of another tokenizer"),
        (["students.early.distill.loss=jsd"], "students.early.distill.loss is 'jsd', the log's labels are 'sampled'"),
        (["students.early.start.now=true"], "students.early.start has step (5) and now (True); keep one"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    workplace: Path, settings: list[str], said: str
) -> None:
    overrides = [part for one in ("run.name=refused", *settings) for part in ("--set", one)]
    result = titan("run", "late.toml", *overrides, cwd=workplace)
    assert result.returncode in (1, 2) and said in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert not (workplace / "runs" / "refused").exists()


def test_a_log_of_a_later_format_is_refused(workplace: Path) -> None:
    shutil.copytree(workplace / "runs" / "tiny" / "labels", workplace / "labels")
    path = workplace / "labels" / "teacher" / "log.json"
    from titan.distill.log.manifest import _encode

    found = json.loads(path.read_text())
    found.pop("crc32")
    path.write_bytes(_encode(found | {"format_version": 99}))
    overrides = ("--set", "run.name=newer", "--set", "teacher.source=log:labels/teacher")
    result = titan("run", "late.toml", *overrides, cwd=workplace)
    assert result.returncode == 1 and "format version 99" in result.stderr, result.stderr
