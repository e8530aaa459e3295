"""Which layouts roles start with where there is not yet room for all, and how changes of layout are drawn."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.runs import write_tiny_config
from titan.cluster import room as module
from titan.cluster.planning import Planned
from titan.cluster.room import RoomFinder
from titan.config.load import load_config
from titan.config.settings import RunConfig
from titan.errors import ConfigError
from titan.observe.marks import Mark, marks_of

WIDE = ("recovery.start_smaller=true", "teacher.layout.tp=1", "teacher.layout.dp=4")
"""Four replicas of the teacher, two stages of `early`, one rank of `late`."""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(write_tiny_config(tmp_path / "work"), list(WIDE))


def start(config: RunConfig, slots: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Ranks that each role starts with, where nodes have room for so many."""
    monkeypatch.setattr(module, "free_slots", lambda config, used: dict(slots))
    groups: list[Any] = [SimpleNamespace(role=name, wanted=role) for name, role in config.roles.items()]
    return {role: layout.ranks for role, layout in RoomFinder(Planned(config)).layouts_to_start(groups).items()}


@pytest.mark.parametrize(
    ("slots", "ranks"),
    [
        ({"a": 4, "b": 4}, {"teacher": 4, "early": 2, "late": 1}),
        ({"a": 3, "b": 3}, {"teacher": 4, "early": 1, "late": 1}),
        ({"a": 5}, {"teacher": 2, "early": 2, "late": 1}),
        ({"a": 1, "b": 1, "c": 1}, {"teacher": 1, "early": 1, "late": 1}),
    ],
)
def test_roles_start_as_large_as_there_is_room_and_leave_the_others_theirs(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, slots: dict[str, int], ranks: dict[str, int]
) -> None:
    assert start(config, slots, monkeypatch) == ranks


def test_a_tensor_parallel_group_that_no_node_has_room_for_is_made_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_tiny_config(tmp_path / "work"), ["recovery.start_smaller=true"])
    assert start(config, {"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}, monkeypatch)["teacher"] == 1


def test_too_little_room_for_even_the_smallest_is_one_line(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"the smallest layouts of teacher, early, late do not fit into the 2 ranks"):
        start(config, {"a": 2}, monkeypatch)


def test_starting_smaller_without_ever_shrinking_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recovery.start_smaller is true, but recovery.policy is 'wait'"):
        load_config(write_tiny_config(tmp_path / "work"), ["recovery.start_smaller=true", "recovery.policy=wait"])


def test_starts_and_changes_of_layout_become_one_mark_each() -> None:
    events = [
        {"event": "layout", "role": "teacher", "step": 0, "before": 6, "ranks": 4},
        {"event": "restarting", "role": "late", "from_step": 20},
        {"event": "restarting", "role": "teacher", "from_step": 40},
        {"event": "layout", "role": "teacher", "step": 40, "before": 4, "ranks": 2},
        {"event": "layout", "role": "late", "before": 2, "ranks": 1},  # of an older titan, which did not tell the step
    ]
    expected = [Mark("teacher", 0, "6 to 4 ranks"), Mark("late", 20, ""), Mark("teacher", 40, "4 to 2 ranks")]
    assert marks_of(events) == expected
