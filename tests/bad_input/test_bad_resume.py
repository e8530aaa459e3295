"""Mistakes in resuming, row by row, and what is no mistake: one line each with its remedy, and nothing is lost."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.bad_input.places import (
    STEP,
    Place,
    Row,
    SetUp,
    check_row,
    checkpoint_of,
    content_of,
    damage,
    hold,
    labels_of,
    rewrite,
    run_main,
    sets,
    small_disk,
    source,
    spoil,
)
from titan.checkpoint.folder import step_folder
from titan.distill.log.records import COMMITS
from titan.distill.log.segment import segment_path


def other_model(place: Place) -> None:
    shutil.rmtree(checkpoint_of(place))
    shutil.copytree(checkpoint_of(place, "late"), checkpoint_of(place))


def other_sources(place: Place) -> None:
    """The corpus is gone, and what the sources give now has another name."""
    rewrite(place.old / "events.jsonl", place.corpus.name, "0123456789abcdef")


def cut_log(place: Place) -> None:
    lines = (labels_of(place) / COMMITS).read_bytes().splitlines(keepends=True)
    (labels_of(place) / COMMITS).write_bytes(b"".join(lines[:4]))


def resumes(name: str, says: tuple[str, ...], set_up: SetUp = lambda place: None, more: str = "") -> Row:
    return Row(f"resuming {name}", f"resume runs/old {more}", says, set_up)


RESUME = [
    Row("resuming what is not there", "resume runs/no", ("runs/no is no run folder", "give the folder")),
    Row("resuming a folder that is no run", "resume runs/data", ("runs/data is no run folder", "config.toml")),
    resumes(
        "with a damaged config",
        ("config.toml is not what titan wrote", "restore it"),
        lambda place: place.write("runs/old/config.toml", "[run]\nname = "),
    ),
    Row(
        "resuming with changes that may not be",
        "resume runs/old --set run.steps=99 --set teacher.model.hidden=32 --set data.batch_size=16 "
        "--set students.late.batch_size=4",
        (
            "run.steps cannot change when a run is resumed",
            "teacher.model.hidden cannot change",
            "data.batch_size cannot change",
            "students.late.batch_size cannot change",
            "start a new run",
        ),
        exit_code=2,
        mistakes=4,
    ),
    resumes("a run that is training", ("in use by another titan",), lambda place: hold(place)),
    resumes(
        "where a rank's file was cut short",
        ("rank-00000.safetensors has", "bytes instead of", "the checkpoint before it"),
        lambda place: damage(checkpoint_of(place) / "rank-00000.safetensors", "cut"),
    ),
    resumes(
        "where a rank's file is gone",
        ("rank-00000.safetensors is missing", "the checkpoint before it"),
        lambda place: damage(checkpoint_of(place, "late") / "rank-00000.safetensors", "gone"),
    ),
    resumes(
        "from a damaged manifest",
        ("manifest.json is damaged", "the checkpoint before it"),
        lambda place: damage(checkpoint_of(place) / "manifest.json", "cut"),
    ),
    resumes("from a checkpoint of another model", ("is of another model", "hidden 32 there, 64"), other_model),
    resumes(
        "with a damaged label record",
        ("commits.jsonl is damaged at byte", "restore it"),
        lambda place: damage(labels_of(place) / COMMITS, "flipped"),
    ),
    resumes("with a label log cut short", ("ends at step 4", f"of step {STEP}", "restore it"), cut_log),
    resumes(
        "without the label log",
        ("ends at step 0", "restore it"),
        lambda place: (labels_of(place) / COMMITS).unlink(),
    ),
    resumes(
        "with labels that are gone",
        ("part-000", "restore the part files"),
        lambda place: segment_path(labels_of(place), 0, 1).unlink(),
    ),
    resumes(
        "with labels that are damaged",
        ("part-000/0000000001.segment (intact up to byte 0)", "restore the part files"),
        lambda place: damage(segment_path(labels_of(place), 0, 1), "flipped", 10),
    ),
    resumes("on a corrupt shard", ("train-00000.arrow is damaged", "delete"), spoil("train-00000.arrow", "flipped")),
    resumes("on other sources", ("the run began with corpus", "put the folder or the sources back"), other_sources),
    resumes(
        "with damaged metrics",
        ("line 1 of runs/old/metrics.jsonl is damaged",),
        lambda place: place.write("runs/old/metrics.jsonl", "{\n"),
    ),
]


ROWS = RESUME


@pytest.mark.parametrize("row", ROWS, ids=[row.name.replace(" ", "-") for row in ROWS])
def test_a_mistake_is_one_line_and_loses_nothing(row: Row, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    check_row(row, place, capsys)


# --- what is not a row: no mistake, or more than one command ---


def test_a_run_that_could_not_start_leaves_no_folder_in_the_way_of_the_next(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_main(monkeypatch, sets(source("nowhere"))) == 1
    assert not (place.folder / "runs/tiny").exists()
    small_disk(place, "disk")
    assert run_main(monkeypatch, sets(f"run.dir={place.folder}/disk", "data.cache=runs/data")) == 1
    assert not (place.folder / "disk/tiny").exists()


def test_resuming_a_finished_run_says_so_and_starts_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for role in ("teacher", "early", "late"):
        checkpoint_of(place, role).rename(step_folder(place.old / "checkpoints" / role, 40))
    place.write("runs/old/summary.json", json.dumps({"status": "finished"}))
    before = content_of(place.folder)
    assert run_main(monkeypatch, "resume runs/old") in (0, None)
    out, err = capsys.readouterr()
    assert "runs/old is finished, step 40 of 40: nothing is left to do" in out and not err
    assert content_of(place.folder) == before


def test_a_resumed_run_needs_no_sources_while_its_corpus_is_there(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(place.old / "config.toml", "/text", "/gone")
    with pytest.raises(AssertionError, match="Ray was to be started"):
        run_main(monkeypatch, "resume runs/old")
    events = [json.loads(line) for line in (place.old / "events.jsonl").read_text().splitlines()]
    assert {event["corpus"] for event in events if event["event"] == "data_ready"} == {f"runs/data/{place.corpus.name}"}


def test_a_run_that_fails_leaves_a_summary_and_a_report_that_say_so(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match="Ray was to be started"):
        run_main(monkeypatch, "run tiny.toml")
    run = place.folder / "runs/tiny"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["roles"]) == ("failed", {})
    assert "This run is not finished (failed)" in (run / "report.html").read_text()
    assert run_main(monkeypatch, "status runs/tiny") in (0, None)


def test_a_script_without_a_main_guard_is_told_so_instead_of_hanging(place: Place) -> None:
    place.write(
        "script.py",
        "from pathlib import Path\nimport titan.data.tokenize\nfrom titan.config.load import load_config\n"
        "from titan.data.prepare import prepare_corpus\ntitan.data.tokenize._PROCESS_BYTES = 1\n"
        "config = load_config(Path('tiny.toml'), ['data.workers=2', 'data.vocab_size=600'])\n"
        "prepare_corpus(config.data, Path('cache'))\n",
    )
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "DataError: prepare_corpus is called while the script is imported" in done.stderr
    assert "put the call under `if __name__ == '__main__':`" in done.stderr


def test_a_plan_shows_every_stage_and_starts_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content_of(place.folder)
    assert run_main(monkeypatch, "plan tiny.toml") in (0, None)
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert [
        "teacher",
        "0",
        "embedding",
        "+",
        "0-1",
        "+",
        "head",
        "2",
        "1",
        "0-1",
        "74,048",
        os.uname().nodename,
    ] in rows
    assert ["1", "1", "+", "head", "1", "1", "1", "26,720", os.uname().nodename] in rows
    assert not err
    assert run_main(monkeypatch, "plan tiny.toml --json") in (0, None)
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_ranks"] == 5 and list(plan["roles"]) == ["teacher", "early", "late"]
    assert content_of(place.folder) == before
