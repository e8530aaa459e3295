"""Summary, verdict, picture and page of a run, finished or not, of any shape."""

import base64
import json
import math
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from titan.config.settings import RunConfig
from titan.errors import RunError
from titan.observe import figure
from titan.observe.events import EventLog
from titan.observe.files import read_config
from titan.observe.metrics import EvalMetric, MetricsLog, StepMetric, read_metrics
from titan.observe.report import write_report
from titan.observe.summary import RoleResult, compare, write_summary
from titan.observe.verdict import verdict

SHAPES = {
    "small": "layers = 2\nhidden = 64\nheads = 4\nffn = 128",
    "tiny": "layers = 1\nhidden = 32\nheads = 2\nffn = 64",
}
STUDENTS = (("small", "small", 0.9), ("control", "small", 0.0), ("tiny", "tiny", 0.9))
FINAL_BITS = {"teacher": 1.7, "small": 1.873, "control": 1.902, "tiny": 2.1}


def config_text(students: tuple[tuple[str, str, float], ...] = STUDENTS, steps: int = 60, more: str = "") -> str:
    """A run.toml; a student is (name, shape, distill weight)."""
    text = f'[run]\nname = "night"\nsteps = {steps}\n[data]\nsources = ["python-stdlib"]\n'
    text += "[teacher.model]\nlayers = 4\nhidden = 128\nheads = 8\nkv_heads = 4\nffn = 256\n[teacher.layout]\ntp = 2\n"
    text += "[teacher.optimizer]\nwarmup_steps = 0\n"
    for name, shape, weight in students:
        text += f'[[students]]\nname = "{name}"\n[students.model]\n{SHAPES[shape]}\n'
        text += f"[students.distill]\nweight = {weight}\n[students.optimizer]\nwarmup_steps = 0\n"
    return text + more


def make_run(
    folder: Path,
    text: str | None = None,
    upto: int | None = None,
    finish: bool = True,
    loss: Callable[[str, int], float] = lambda role, step: 3.0 + 4.0 / step,
) -> RunConfig:
    """A synthetic run folder: every role made `upto` steps, and was evaluated at the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(text or config_text())
    config = read_config(folder)
    upto = config.run.steps if upto is None else upto
    roles = ["teacher", *(student.name for student in config.students)]
    with EventLog(folder) as events, MetricsLog(folder) as log:
        events.emit("run_started", pid=os.getpid(), host=socket.gethostname(), version="0.1.0")
        for step in range(1, upto + 1):
            for role in roles:
                value = loss(role, step)
                metric = StepMetric(role, step, 1000.0 + 0.1 * step, value, value, 1.0, 1e-3, 2048, 0.1)
                if role != "teacher":
                    labels = {"label_bytes": 2048 * 34, "label_wait_s": 0.01, "lag": 1}
                    metric = replace(metric, distill_loss=2.0, distill_weight=0.5, lead=0.2, **labels)
                log.write(metric)
        for role in roles if upto else []:
            log.write(EvalMetric(role, upto, 1000.0 + 0.1 * upto, 2.0, FINAL_BITS.get(role, 2.0), 4096))
        if finish:
            events.emit("run_finished", status="finished", wall_s=12.0)
    if finish:
        write_summary(folder, config, {role: result(role, upto) for role in roles}, 12.0, "finished")
    return config


def result(role: str, steps: int) -> RoleResult:
    labels = (steps, 0, 0, 3) if role != "teacher" else (None, None, None, None)
    bytes_per_token = 34.0 if role != "teacher" else None
    return RoleResult(1_230_000, steps * 2048, 20480.0, FINAL_BITS.get(role, 2.0), steps, *labels, bytes_per_token)


def page_and_picture(folder: Path) -> tuple[str, bytes]:
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(), (folder / "report.png").read_bytes()


def test_the_summary_says_what_each_role_came_to(tmp_path: Path) -> None:
    make_run(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: summary[name] for name in ("status", "wall_s", "seed", "steps")} == {
        "status": "finished", "wall_s": 12.0, "seed": 1, "steps": 60,
    }  # fmt: skip
    assert list(summary["roles"]) == ["teacher", "small", "control", "tiny"]
    assert summary["roles"]["small"]["labels_missed"] == 0 and summary["roles"]["small"]["max_lag_steps"] == 3
    assert not any("label" in name or "lag" in name for name in summary["roles"]["teacher"])


def test_the_summary_compares_each_student_with_the_control_of_its_shape(tmp_path: Path) -> None:
    make_run(tmp_path)
    (pair,) = json.loads((tmp_path / "summary.json").read_text())["distillation"]
    assert (pair["student"], pair["control"], pair["differs_in"]) == ("small", "control", [])
    assert pair["heldout_bits_per_byte_gain"] == pytest.approx(0.029)
    assert pair["gap_to_teacher_closed"] == pytest.approx(0.029 / 0.202)


@pytest.mark.parametrize("teacher", [None, math.nan, 1.902, 2.5])
def test_there_is_no_share_of_a_gap_that_is_none(tmp_path: Path, teacher: float | None) -> None:
    (pair,) = compare(make_run(tmp_path, upto=0), FINAL_BITS | {"teacher": teacher})
    assert pair.gap_to_teacher_closed is None and pair.heldout_bits_per_byte_gain == pytest.approx(0.029)


def test_a_loss_that_is_no_number_gives_no_gain_and_a_null(tmp_path: Path) -> None:
    config = make_run(tmp_path, upto=0)
    roles = {"small": replace(result("small", 9), heldout_bits_per_byte=math.nan), "control": result("control", 9)}
    write_summary(tmp_path, config, roles, 1.0, "stopped")
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["roles"]["small"]["heldout_bits_per_byte"] is None
    assert summary["distillation"][0]["heldout_bits_per_byte_gain"] is None


def evaluated(config: RunConfig, step: int, **bits: float) -> list[EvalMetric]:
    return [EvalMetric(role, step, 1.0, 2.0, value, 4096) for role, value in bits.items()]


def test_the_verdict_says_by_how_much_distillation_helped(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    assert verdict(config, read_metrics(tmp_path), finished=True) == [
        "`small` ends at 1.873 held-out bits per byte, its control without labels `control` at 1.902: "
        "distillation helped by 0.029 (14 % of the control's gap to the teacher).",
        "One seed: differences of this size vary from seed to seed.",
        "Whether distillation helped `tiny` cannot be told: there is no control, "
        "a student of the same shape with distill.weight = 0.",
    ]


@pytest.mark.parametrize(
    ("student", "sentence"),
    [
        (1.95, "distillation did not help, the student is 0.048 worse."),
        (1.9021, "distillation made no difference that three digits show."),
        (1.5, "distillation helped by 0.402 (199 % of the control's gap to the teacher)."),
        (math.nan, "no comparison, a loss is not a finite number."),
    ],
)
def test_the_verdict_does_not_flatter(tmp_path: Path, student: float, sentence: str) -> None:
    config = make_run(tmp_path, upto=0)
    said = verdict(config, evaluated(config, 60, teacher=1.7, small=student, control=1.902), finished=True)
    assert said[0].endswith(f": {sentence}")


def test_the_verdict_compares_at_one_step_only(tmp_path: Path) -> None:
    config = make_run(tmp_path, upto=0)
    early = evaluated(config, 20, teacher=2.0, small=2.4, control=2.5)
    said = verdict(config, early + evaluated(config, 40, teacher=1.8, small=2.0), finished=False)
    assert said[0].startswith("After step 20 `small` is at 2.400") and "helped by 0.100 (20 %" in said[0]
    assert "cannot be compared" in verdict(config, evaluated(config, 40, small=2.0), finished=False)[0]


def test_the_verdict_tells_what_else_a_student_and_its_control_differ_in(tmp_path: Path) -> None:
    text = config_text(students=STUDENTS[:2], more="[students.start]\nstep = 30\n")
    config = make_run(tmp_path, text, upto=0)
    said = verdict(config, evaluated(config, 60, small=1.8, control=1.9), finished=True)
    assert "(They also differ in start.)" in said[0]


def test_the_report_is_one_page_with_its_picture_inside(tmp_path: Path) -> None:
    make_run(tmp_path)
    page, picture = page_and_picture(tmp_path)
    assert picture.startswith(b"\x89PNG") and base64.b64encode(picture).decode() in page
    assert int.from_bytes(picture[16:20]) == 1400 and int.from_bytes(picture[20:24]) == 900
    assert "<code>small</code> ends at 1.873" in page and "1.23M" in page and "2 ranks: tp 2" in page
    assert "not finished" not in page and "http://" not in page and "https://" not in page
    assert not list(tmp_path.glob(".*"))


def test_the_report_of_an_unfinished_run_says_so_and_ignores_a_summary_of_an_earlier_part(tmp_path: Path) -> None:
    make_run(tmp_path, upto=20)
    os.utime(tmp_path / "summary.json", (1.0, 1.0))
    with EventLog(tmp_path) as events:
        events.emit("run_started", pid=os.getpid(), host=socket.gethostname(), version="0.1.0")
        events.emit("resumed", steps={"teacher": 20})
    page, _ = page_and_picture(tmp_path)
    assert "This run is not finished (running)." in page and "step 20 of 60" in page and "1.23M" not in page


@pytest.mark.parametrize("steps", [0, 1, 2, 31])
@pytest.mark.parametrize("students", [(), STUDENTS[:1], tuple((f"s{n}", "tiny", 0.1 * (n % 3)) for n in range(10))])
def test_a_run_of_any_shape_has_a_report(
    tmp_path: Path, steps: int, students: tuple[tuple[str, str, float], ...]
) -> None:
    make_run(tmp_path, config_text(students), upto=steps, finish=False)
    page, picture = page_and_picture(tmp_path)
    assert picture.startswith(b"\x89PNG") and "not finished" in page


def test_losses_that_are_no_numbers_are_told_and_drawn_around(tmp_path: Path) -> None:
    make_run(tmp_path, loss=lambda role, step: math.nan if role == "small" and step > 40 else 3.0)
    page, _ = page_and_picture(tmp_path)
    assert "The loss of <code>small</code> was not a finite number in 20 steps, the first of them step 41." in page
    make_run(tmp_path / "all", loss=lambda role, step: math.inf)
    assert "not a finite number in 60 steps" in page_and_picture(tmp_path / "all")[0]


def test_what_a_run_says_cannot_break_the_page(tmp_path: Path) -> None:
    make_run(tmp_path)
    with EventLog(tmp_path) as events:
        events.emit("failed", role="small", error="<script>alert(1)</script>")
    page, _ = page_and_picture(tmp_path)
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_the_timeline_shows_the_newest_fifty_events(tmp_path: Path) -> None:
    make_run(tmp_path)
    with EventLog(tmp_path) as events:
        for number in range(70):
            events.emit("noted", number=number)
    page, _ = page_and_picture(tmp_path)
    assert "The last 50 of 72" in page and "number 69" in page and "number 19<" not in page


def test_a_report_without_a_config_names_the_remedy(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "config.toml").unlink()
    with pytest.raises(RunError, match=r"config\.toml is missing"):
        write_report(tmp_path)
    (tmp_path / "config.toml").write_text("[run]\nname = 3\n")
    with pytest.raises(RunError, match=r"is not what titan wrote.*restore it") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_running_mean_is_the_mean_of_the_finite_values_around() -> None:
    values = [1.0, math.nan, 4.0, 7.0, math.inf, 2.0, 3.0]
    for width in (1, 3, 5):
        for index, mean in enumerate(figure.running_mean(values, width)):
            around = [
                value for value in values[max(0, index - width // 2) : index + width // 2 + 1] if math.isfinite(value)
            ]
            assert mean == pytest.approx(sum(around) / len(around)) if around else math.isnan(mean)


def test_a_thinned_curve_keeps_its_ends() -> None:
    steps = list(range(1, 100_001))
    at, values = figure.thinned(steps, [float(step) for step in steps])
    assert (
        len(at) < 2 * figure.MOST_POINTS and at[0] == 1 and at[-1] == 100_000 and values == [float(step) for step in at]
    )


def test_the_pause_of_a_restart_is_not_slowness() -> None:
    def at(step: int, time_s: float) -> StepMetric:
        return StepMetric("teacher", step, time_s, 1.0, 1.0, 1.0, 1.0, 100, 0.5)

    metrics = [at(step, step + (3600.0 if step > 5 else 0.0)) for step in range(1, 11)]
    assert figure.speeds(metrics)[6:] == [pytest.approx(100.0)] * 4
    assert min(figure.speeds(metrics)) == pytest.approx(100.0)
