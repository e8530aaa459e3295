"""Simulated runs against the theory of checkpoints; ten thousand devices, files, pictures, and bad input."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.simulations import PIPELINE, config_of
from titan.cli.simulate import PART_WORDS, show_simulation
from titan.config.section import Section
from titan.config.simulation import SimulationConfig, load_simulation
from titan.errors import ConfigError
from titan.observe.gantt import MOST_ROWS, chosen_rows, draw_gantt
from titan.plan.schedule import make_schedule
from titan.plan.simulate.failures import DAY_S, Failure, fleet_mtbf_s
from titan.plan.simulate.goodput import daly_s, expected_goodput, mean_of, scaled, try_intervals, weak_scaling, young_s
from titan.plan.simulate.replay import World, make_worlds, replay
from titan.plan.timeline import StageTimes, timeline

CONFIGS = Path(__file__).parent.parent / "configs" / "simulations"
PNG = b"\x89PNG\r\n\x1a\n"


# Theory ---------------------------------------------------------------------------------------------------------------


def failing(**changes: Any) -> SimulationConfig:
    """1,000 devices, a failure every 6.25 hours; nodes are back at once."""
    return config_of(
        days=60.0,
        repeats=12,
        fleet=[{"kind": "H100", "nodes": 125, "device_mtbf_hours": 6250.0, "repair_hours": 0.0}],
        checkpoint={"every_steps": 60, "stall_s": 30.0},
        recovery={"detect_s": 60.0, "rebuild_s": 120.0, "reload_s": 120.0},
        **changes,
    )


def test_goodput_is_that_of_the_theory_of_checkpoints() -> None:
    config = failing()
    got = mean_of([replay(world) for world in make_worlds(config)])
    expected = expected_goodput(600.0, 30.0, 300.0, fleet_mtbf_s(config))
    assert got.goodput_error < 0.002
    assert abs(got.goodput - expected) < 4 * got.goodput_error


def test_each_failure_loses_half_an_interval_and_a_recovery() -> None:
    """With failures far apart, a failure finds a run in the middle of the interval on average."""
    config = failing()
    got = mean_of([replay(world) for world in make_worlds(config)])
    recovery_s = sum(got.parts_s[part] for part in ("detect", "rebuild", "reload"))
    assert recovery_s / got.num_failures == pytest.approx(300.0, rel=0.03)
    assert got.parts_s["lost"] / got.num_failures == pytest.approx(0.5 * 600.0, rel=0.1)
    assert got.num_failures == pytest.approx(60 * DAY_S / fleet_mtbf_s(config), rel=0.1)


def test_the_best_interval_is_near_young_and_daly() -> None:
    config = failing()
    intervals = try_intervals(make_worlds(config)[:3])
    best = max(intervals, key=lambda interval: interval.goodput)
    young = young_s(30.0, fleet_mtbf_s(config))
    assert young == pytest.approx(math.sqrt(2 * 30 * 22_500), rel=1e-9)
    assert young / 1.5 < best.interval_s < young * 1.5
    assert daly_s(30.0, 22_500.0) == pytest.approx(
        max(range(300, 4000, 5), key=lambda interval: expected_goodput(interval, 30.0, 300.0, 22_500.0)), rel=0.02
    )
    assert intervals[0].goodput < best.goodput > intervals[-1].goodput


def test_a_late_checkpoint_costs_more_when_it_takes_long_to_write() -> None:
    quick, slow = (
        mean_of([replay(world) for world in make_worlds(failing())[:4]]).parts_s["lost"],
        mean_of([replay(world) for world in make_worlds(with_write(failing(), 300.0))[:4]]).parts_s["lost"],
    )
    assert slow / quick == pytest.approx((300 + 300) / 300, rel=0.15), "half an interval, and the time of the write"


def with_write(config: SimulationConfig, write_s: float) -> SimulationConfig:
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"write_s": write_s})})


def test_goodput_falls_as_the_fleet_grows() -> None:
    config = failing(weak_scaling=[100, 1000, 8000])
    curve = weak_scaling(config)
    assert [scale.num_devices for scale in curve] == [96, 1000, 8000]
    shares = [scale.goodput.goodput for scale in curve]
    assert shares[0] > shares[1] > shares[2]
    for scale, share in zip(curve, shares, strict=True):
        expected = expected_goodput(600.0, 30.0, 300.0, 6250 * 3600 / scale.num_devices)
        assert share == pytest.approx(expected, abs=0.01)


def test_a_fleet_scaled_to_its_own_size_is_itself() -> None:
    config = load_simulation(CONFIGS / "ten-thousand.toml")
    assert scaled(config, config.num_devices) == config


@pytest.mark.parametrize(("policy", "part"), [("wait", "waiting"), ("shrink", "shrunk"), ("stop", "stopped")])
def test_what_is_done_without_a_spare_node(policy: str, part: str) -> None:
    config = config_of(recovery={"without_spare": policy, "shrink_efficiency": 0.9})
    world = make_worlds(config)[0]
    struck = World(
        config, 10.0, (Failure(3600.0, 0, 0.5),), world.pace_start_s, world.pace_s, world.jitter_sums
    )  # fmt: skip
    outcome = replay(struck)
    assert [each for each in ("waiting", "shrunk", "stopped") if outcome.parts_s[each] > 0] == [part]
    if policy == "shrink":
        whole, short = 60 / 64, 60 / (60 / (0.9 * 0.75) + 4)
        assert outcome.goodput == pytest.approx((whole + short) / 2, abs=0.005), "a node is gone for one of two days"
        longest = max(s.end_s - s.start_s for s in outcome.stretches if s.steps == 6)
        assert longest == pytest.approx(60 / (0.9 * 0.75))
    if policy == "wait":
        assert outcome.parts_s["waiting"] == pytest.approx(24 * 3600 - 60.0)


# Ten thousand devices, files, pictures --------------------------------------------------------------------------------


def test_one_run_of_ten_thousand_devices_for_a_month_takes_seconds() -> None:
    import time

    config = load_simulation(CONFIGS / "ten-thousand.toml").model_copy(update={"repeats": 1, "weak_scaling": ()})
    started = time.process_time()
    outcome = replay(make_worlds(config)[0])
    assert time.process_time() - started < 10.0
    assert config.num_devices == 10_000
    assert outcome.wall_s == pytest.approx(30 * DAY_S)
    assert 0.8 < outcome.goodput < 0.95


@pytest.mark.parametrize("name", ["thousand.toml", "ten-thousand.toml"])
def test_the_simulations_that_come_with_titan_can_be_read(name: str) -> None:
    assert load_simulation(CONFIGS / name).days == 30.0


def test_docs_list_every_setting() -> None:
    text = (CONFIGS.parent.parent / "docs" / "simulate.md").read_text(encoding="utf-8")
    sections: list[type[Section]] = [SimulationConfig]
    while sections:
        for name, field in sections.pop().model_fields.items():
            assert f"| `{name}` |" in text, name
            kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
            sections += [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]


def test_table_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = failing(weak_scaling=[100, 400]).model_copy(update={"repeats": 2, "days": 3.0})
    picture = tmp_path / "run.png"
    show_simulation(config, Console(width=120), False, picture)
    shown = capsys.readouterr().out
    for words in ("1,000 devices", "useful steps", "lost steps", "goodput", "Young", "weak scaling", "run.png"):
        assert words in shown
    assert picture.read_bytes().startswith(PNG)
    show_simulation(config, Console(), True, None)
    found = json.loads(capsys.readouterr().out)
    assert found["devices"] == 1000 and len(found["weak_scaling"]) == 2
    assert sum(found["parts_s"].values()) == pytest.approx(found["wall_s"])
    assert set(found["parts_s"]) == set(PART_WORDS)
    assert found["checkpoint"]["best_interval_s"] and found["checkpoint"]["young_s"]
    useful = sum(point["goodput"] for point in found["curve"]) / len(found["curve"])
    assert useful == pytest.approx(replay(make_worlds(config)[0]).goodput)


def test_nothing_fails_and_no_sizes_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_simulation(config_of(repeats=1), Console(width=120), False, tmp_path / "quiet.png")
    assert "failures" not in capsys.readouterr().out
    show_simulation(config_of(repeats=1), Console(), True, None)
    found = json.loads(capsys.readouterr().out)
    assert found["mtbf_s"] is None and found["checkpoint"]["young_s"] is None and found["weak_scaling"] == []


@pytest.mark.parametrize(("positions", "rows"), [(1, 1), (4, 4), (30, 30), (64, 64), (200, MOST_ROWS)])
def test_a_gantt_picture_of_any_number_of_positions(positions: int, rows: int) -> None:
    schedules = [make_schedule("1f1b", position, positions, 1, 6) for position in range(positions)]
    got = timeline(schedules, 1, [StageTimes(0.1, 0.2)] * positions, [0.1] * positions)
    labels = [f"stage {position} · H100 x8" for position in range(positions)]
    assert draw_gantt("one step", labels, got.spans, got.tail_s).startswith(PNG)
    busy = [1.0] * positions
    busy[positions // 3] = 2.0
    chosen = chosen_rows(busy)
    assert len(chosen) in (rows, rows - 1) and {0, positions // 3, positions - 1} <= set(chosen)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"days": -1.0}, "days is -1.0; want greater than 0"),
        ({"fleet": []}, r"fleet is \[\]; want at least 1"),
        ({"fleet": [{"kind": "H100", "nodes": 0}]}, "fleet.0.nodes is 0; want greater than 0"),
        ({"fleet": [{"kind": "H100", "nodes": 1.5}]}, "fleet.0.nodes is 1.5; want a valid integer"),
        ({"fleet": [{"kind": "H100", "nodes": 1}] * 2}, "fleet names a kind twice"),
        ({"fleet": [{"kind": "H100", "nodes": 1, "repair_hours": -2.0}]}, "repair_hours is -2.0; want greater"),
        ({"step": {"seconds": -3.0}}, "step.seconds is -3.0; want greater than 0"),
        ({"step": {}}, "step has neither of seconds and positions; give one"),
        ({"step": PIPELINE | {"seconds": 1.0}}, "step has both of seconds and positions; give one"),
        ({"step": PIPELINE | {"chunks": 2}}, 'step.chunks is 2; want 1, or step.schedule = "interleaved"'),
        ({"step": PIPELINE | {"schedule": "interleaved", "micro_batches": 6}}, "want a multiple of the 4 positions"),
        ({"step": PIPELINE | {"schedule": "2f2b"}}, "step.schedule is '2f2b'; want '1f1b', 'interleaved' or"),
        ({"step": {"positions": [PIPELINE["positions"][0] | {"kind": "B200"}]}}, "the fleet has H100"),
        ({"step": {"positions": [PIPELINE["positions"][0] | {"devices": 7}]}}, "use 28 H100, the fleet has 32"),
        ({"step": {"positions": [PIPELINE["positions"][0] | {"forward_s": -1.0}]}}, "forward_s is -1.0; want greater"),
        ({"step": {"positions": [PIPELINE["positions"][0] | {"weight_s": 1.0}]}}, 'unless schedule "zero-bubble"'),
        ({"stragglers": {"facter": 2.0}}, "stragglers.facter is no setting; did you mean factor?"),
        ({"stragglers": {"factor": 0.5}}, "stragglers.factor is 0.5; want greater than or equal to 1"),
        ({"recovery": {"without_spare": "pray"}}, "recovery.without_spare is 'pray'; want 'wait', 'shrink' or 'stop'"),
        ({"checkpoint": {}}, "checkpoint.every_steps is missing and has no default"),
        ({"weak_scaling": [8, 0]}, "weak_scaling.1 is 0; want greater than 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace("?", r"\?")) as caught:
        config_of(**changes)
    assert len(str(caught.value).splitlines()) == 1, caught.value


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(days=0.0, step={"secnds": 1.0}, checkpoint={"every_steps": 0})
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and "did you mean seconds?" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fleet": [{"kind": "H100", "nodes": 9, "node_mtbf_hours": 1e-6}]}, "432,000,000 failures, more than"),
        ({"stragglers": {"every_hours": 1e-6}}, "slow spells, .* raise stragglers.every_hours"),
        ({"step": {"seconds": 1e-6}}, "checkpoints, .* raise checkpoint.every_steps"),
    ],
)  # fmt: skip
def test_a_run_of_too_many_events_is_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_worlds(config_of(**changes))
    assert len(str(caught.value).splitlines()) == 1


def test_a_picture_without_a_folder_is_refused_before_anything_is_simulated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--picture is .*no folder .*make it"):
        show_simulation(config_of(), Console(), False, tmp_path / "none" / "run.png")


@pytest.mark.parametrize(("text", "message"), [(None, "cannot read"), ("a = [", "is no TOML"), ("x = 1", "no setting")])
def test_files_that_are_no_simulations(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "sim.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_simulation(path)
