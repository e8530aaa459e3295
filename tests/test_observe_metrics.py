"""Metrics, events and summary: what is written is read back, whatever interrupted the writing."""

import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from titan.errors import RunError
from titan.observe.events import EventLog, event_text, read_events
from titan.observe.files import write_whole
from titan.observe.metrics import EvalMetric, MetricsLog, StepMetric, read_metrics, to_line


def step(role: str, number: int, loss: float = 3.0, **student: float) -> StepMetric:
    return StepMetric(role, number, 1000.0 + number, loss, loss, 0.5, 1e-3, 2048, 0.1, **student)  # type: ignore[arg-type]


def student_step(number: int) -> StepMetric:
    return step(
        "small",
        number,
        3.5,
        distill_loss=2.5,
        distill_weight=0.4,
        lag=2,
        lead=0.3,
        label_bytes=70000,
        label_wait_s=0.01,
    )


def write(folder: Path, *metrics: StepMetric | EvalMetric) -> None:
    with MetricsLog(folder) as log:
        for metric in metrics:
            log.write(metric)


def scalars(folder: Path, role: str) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard" / role))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_metrics_come_back_as_they_were_written(tmp_path: Path) -> None:
    metrics = [step("teacher", 1), student_step(1), EvalMetric("teacher", 1, 1001.5, 2.9, 1.8, 4096)]
    write(tmp_path, *metrics)
    assert read_metrics(tmp_path) == metrics


def test_metrics_that_were_not_told_are_added_once(tmp_path: Path) -> None:
    known, untold = step("teacher", 1), step("teacher", 2, math.inf)
    with MetricsLog(tmp_path) as log:
        log.write(known)
        for _ in range(2):
            log.write_missing([to_line(known), to_line(untold)])
    first, second = read_metrics(tmp_path)
    assert first == known and second.step == 2 and math.isnan(second.loss)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_own_steps_within_a_teacher_step_are_told_apart(tmp_path: Path) -> None:
    steps = [step("small", 7, 3.0 + own, own_step=own) for own in (1, 2, 3)]
    write(tmp_path, *steps[:2])
    with MetricsLog(tmp_path) as log:
        log.write_missing([to_line(metric) for metric in steps])
    assert read_metrics(tmp_path) == steps
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3


def test_a_line_can_be_read_before_the_log_is_closed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(step("teacher", 1))
    assert read_metrics(tmp_path) == [step("teacher", 1)]
    log.close()
    log.close()


def test_a_line_is_strict_json_with_a_kind_and_only_the_fields_of_its_role(tmp_path: Path) -> None:
    write(tmp_path, step("teacher", 1, loss=math.nan), student_step(1))
    teacher, student = (
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    )
    assert teacher["kind"] == "step" and teacher["loss"] is None and "lag" not in teacher
    assert student["lag"] == 2


def test_a_loss_that_is_no_number_comes_back_as_nan(tmp_path: Path) -> None:
    write(tmp_path, step("teacher", 1, loss=math.inf))
    (metric,) = read_metrics(tmp_path)
    assert isinstance(metric, StepMetric) and math.isnan(metric.loss) and metric.lag is None


def test_a_torn_last_line_is_left_out_when_reading_and_cut_off_when_appending(tmp_path: Path) -> None:
    write(tmp_path, step("teacher", 1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "role": "tea')
    assert read_metrics(tmp_path) == [step("teacher", 1)]
    write(tmp_path, step("teacher", 2))
    assert read_metrics(tmp_path) == [step("teacher", 1), step("teacher", 2)]


def test_a_torn_line_longer_than_a_read_block_is_cut_off_whole(tmp_path: Path) -> None:
    write(tmp_path, step("teacher", 1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("x" * 200_000)
    write(tmp_path, step("teacher", 2))
    assert [metric.step for metric in read_metrics(tmp_path)] == [1, 2]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    write(tmp_path, step("teacher", 1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("garbage\n")
    with pytest.raises(RunError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        read_metrics(tmp_path)


def test_the_later_of_two_lines_about_one_step_counts(tmp_path: Path) -> None:
    write(tmp_path, step("teacher", 1, 5.0), step("teacher", 2), step("teacher", 1, 4.0))
    assert read_metrics(tmp_path) == [step("teacher", 2), step("teacher", 1, 4.0)]


def test_lines_and_fields_of_a_newer_version_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, step("teacher", 1))
    path = tmp_path / "metrics.jsonl"
    line = json.loads(path.read_text()) | {"invented_later": 1}
    path.write_text(json.dumps(line) + "\n" + '{"kind": "invented_later"}\n')
    assert read_metrics(tmp_path) == [step("teacher", 1)]


def test_a_line_that_lacks_a_field_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "role": "teacher", "step": 1}\n')
    with pytest.raises(RunError, match=r"another version of titan.*use that version"):
        read_metrics(tmp_path)


def test_rewind_drops_what_each_role_said_beyond_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, *(step(role, number) for number in range(1, 7) for role in ("teacher", "small", "other")))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"torn')
    MetricsLog.rewind(tmp_path, {"teacher": 4, "small": 0})
    kept = [(metric.role, metric.step) for metric in read_metrics(tmp_path)]
    assert [number for role, number in kept if role == "teacher"] == [1, 2, 3, 4]
    assert [number for role, number in kept if role == "small"] == []
    assert [number for role, number in kept if role == "other"] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")


def test_a_resumed_run_has_every_step_once_in_the_file_and_in_tensorboard(tmp_path: Path) -> None:
    write(tmp_path, *(step("teacher", number, 9.0) for number in range(1, 7)))
    MetricsLog.rewind(tmp_path, {"teacher": 4})
    write(tmp_path, *(step("teacher", number, 2.0) for number in range(5, 9)))
    want = [(number, 9.0 if number <= 4 else 2.0) for number in range(1, 9)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == want
    assert scalars(tmp_path, "teacher")["train/loss"] == want


def test_rewind_of_a_run_without_metrics_does_nothing(tmp_path: Path) -> None:
    MetricsLog.rewind(tmp_path, {"teacher": 4})
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_a_folder_a_role_and_a_scalar_a_number(tmp_path: Path) -> None:
    write(tmp_path, step("teacher", 3), student_step(3), EvalMetric("small", 3, 1003.0, 2.9, 1.75, 4096))
    assert "train/lag" not in scalars(tmp_path, "teacher")
    found = scalars(tmp_path, "small")
    assert found["train/lag"] == [(3, 2.0)] and found["eval/heldout_bits_per_byte"] == [(3, 1.75)]
    assert not any("time_s" in tag or "role" in tag for tag in found)


def test_a_folder_that_is_no_run_is_an_error_that_names_the_runs_there(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.toml").touch()
    for folder in (tmp_path / "frist", tmp_path):
        with pytest.raises(RunError, match=r"is not a run folder.*runs in .*: first") as caught:
            read_metrics(folder)
        assert "\n" not in str(caught.value)


def test_events_come_back_in_order_with_a_time(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        log.emit("run_started", pid=7, host="here")
        log.emit("checkpoint", role="small", step=4, seconds=0.25, path=Path("a/b"), loss=math.nan)
    first, second = read_events(tmp_path)
    assert first["event"] == "run_started" and first["time"].endswith("+00:00")
    assert second["path"] == "a/b" and second["loss"] is None and second["seconds"] == 0.25


def test_an_event_is_echoed_as_one_readable_line(tmp_path: Path) -> None:
    said: list[str] = []
    with EventLog(tmp_path, said.append) as log:
        log.emit("student_started", role="small", step=41, reason="lead 0.31\nreached 0.3", lead=0.312345)
    assert said == ["student started: role small, step 41, reason lead 0.31 reached 0.3, lead 0.3123"]
    assert event_text("drained", {"rank": None}) == "drained"
    assert event_text("failed", {"trace": "x" * 9000}).endswith("xxx…")


def test_an_event_may_not_overwrite_its_own_time(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log, pytest.raises(AssertionError, match="may not set time"):
        log.emit("odd", time=3)


def test_a_resumed_event_log_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        log.emit("first")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": "20')
    with EventLog(tmp_path) as log:
        log.emit("second")
    assert [event["event"] for event in read_events(tmp_path)] == ["first", "second"]


def test_an_event_that_a_full_disk_took_half_of_is_not_there(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        log.emit("first")
        size, limits = (tmp_path / "events.jsonl").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
        try:
            with pytest.raises(OSError, match="too large"):
                log.emit("lost")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        log.emit("second")
    assert [event["event"] for event in read_events(tmp_path)] == ["first", "second"]


def test_a_whole_file_is_replaced_or_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_whole(path, b"old")
    with pytest.raises(TypeError):
        write_whole(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_importing_the_floor_imports_neither_torch_nor_a_drawing_library() -> None:
    modules = "events, figure, live, metrics, progress, report, status, summary, verdict"
    heavy = {"torch", "matplotlib", "tensorboard", "jinja2"}
    code = f"import sys; from titan.observe import {modules}; print({heavy} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_writing_metrics_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from titan.observe.metrics import *\n"
        f"log = MetricsLog(Path({str(tmp_path)!r})); log.write(EvalMetric('a', 1, 1.0, 1.0, 1.0, 1))\n"
        "print('torch' in sys.modules, 'tensorflow' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
