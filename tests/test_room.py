"""Roles on named kinds of devices: what the planner says they do without some of them, and when they take them back."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.runs import TINY, write_tiny_config
from tests.test_planned_run import SHAPE, blocks_of
from titan.cluster import room as module
from titan.cluster.planning import Planned, plan_run
from titan.cluster.role_group import Phase
from titan.cluster.room import RoomFinder, devices_of
from titan.config.load import load_config
from titan.config.model import LayoutSettings
from titan.config.planning import SearchSettings
from titan.observe.events import EventLog, read_events
from titan.plan.layout import make_layout
from titan.plan.search.role import plan_role

INVENTORY = """
nodes = [
  { name = "fast", kind = "fast", devices = 2, memory_gb = 2.0, paced = false },
  { name = "slow", kind = "slow", devices = 2, count = 2, memory_gb = 2.0 },
]
links = [
  { between = ["fast", "slow"], gb_per_s = 1.0, latency_s = 2e-4 },
  { between = ["fast", "fast"], gb_per_s = 1.0 },
  { between = ["slow", "slow"], gb_per_s = 1.0 },
]
"""
NODES = {"f": ("fast", 2), "s": ("slow", 2), "t": ("slow", 2), "h": ("", 4)}
"""Kind and devices; each has room for as many ranks, and the last for any."""


class Cluster:
    """What Ray would say of these nodes."""

    def __init__(self) -> None:
        self.lost: set[str] = set()
        self.more = 0
        """Ranks that each node has room for beyond its devices."""

    def slots(self, _: object, used: list[str]) -> dict[str, int]:
        there = {node: number + self.more for node, (_, number) in NODES.items() if node not in self.lost}
        return {node: number - used.count(node) for node, number in there.items()}

    def devices(self, kind: str, used: list[str]) -> dict[str, int]:
        there = {node: number for node, (of, number) in NODES.items() if of == kind and node not in self.lost}
        return {node: number - used.count(node) for node, number in there.items()}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(module, "free_slots", made.slots)
    monkeypatch.setattr(module, "free_devices", made.devices)
    return made


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    return plan_tiny(tmp_path)


def plan_tiny(tmp_path: Path, *overrides: str) -> Planned:
    """A teacher of six layers that is planned, beside it students of no kind."""
    path = write_tiny_config(tmp_path / "work")
    text = TINY.format(text=tmp_path / "work/text").replace("layers = 2, hidden = 64", "layers = 6, hidden = 64")
    path.write_text(
        text.replace("layout = { tp = 2 }", 'layout = { planned = true, recompute = true, transport = "host" }')
    )
    (tmp_path / "inventory.toml").write_text(INVENTORY)
    profile = SHAPE.format(blocks=f"{blocks_of('fast', 0.002)},{blocks_of('slow', 0.005)}")
    (tmp_path / "profile.toml").write_text(profile)
    files = [f"cluster.{name}={tmp_path / name}.toml" for name in ("inventory", "profile")]
    return plan_run(load_config(path, [*files, "cluster.address=10.0.0.1:6379", *overrides]), 512)


def group(planned: Planned, role: str, phase: Phase, nodes: str = "", layout: LayoutSettings | None = None) -> Any:
    """A role with its ranks on these nodes, one a letter."""
    wanted = planned.config.roles[role]
    made = make_layout(wanted.model, layout or wanted.layout)
    places = [SimpleNamespace(node_id=node) for node in nodes]
    return SimpleNamespace(
        role=role, wanted=wanted, layout=made, num_ranks=made.num_ranks, places=places, phase=phase, is_starting=False
    )


def expected(planned: Planned, **devices: int) -> dict[str, int]:
    """Of the best plan on so many devices, searched alone."""
    costs = planned.costs["teacher"]
    left = costs.fleet.without({name: kind.devices - devices[name] for name, kind in costs.fleet.kinds.items()})
    found = plan_role(type(costs)(costs.task, left, costs.profile), SearchSettings(recompute=True))
    return devices_of(found.settings)


def test_a_role_goes_on_with_what_the_planner_makes_of_what_is_left_and_takes_the_rest_back(
    planned: Planned, cluster: Cluster
) -> None:
    finder, teacher = RoomFinder(planned), group(planned, "teacher", Phase.IDLE)
    assert finder.kinds == ["fast", "slow"]
    wanted = teacher.wanted.layout
    assert devices_of(wanted) == expected(planned, fast=2, slow=4) and "fast" in devices_of(wanted)
    assert finder.layout_for(teacher, [teacher]) == wanted
    cluster.lost = {"f"}
    without = finder.layout_for(teacher, [teacher])
    assert devices_of(without) == expected(planned, fast=0, slow=4) and set(devices_of(without)) == {"slow"}
    assert without.recompute and without.transport == "host"
    cluster.lost = {"s", "t"}
    assert devices_of(finder.layout_for(teacher, [teacher])) == expected(planned, fast=2, slow=0) == {"fast": 2}
    cluster.lost = {"f", "s", "t"}
    assert finder.layout_for(teacher, [teacher]) == wanted, "there is nothing to go on with, so its own is waited for"
    cluster.lost = set()
    assert finder.layout_for(teacher, [teacher]) == wanted


def test_devices_of_other_roles_are_not_free(planned: Planned, cluster: Cluster) -> None:
    finder, teacher = RoomFinder(planned), group(planned, "teacher", Phase.IDLE)
    cluster.lost = {"f"}
    stage = {"layers": (2,), "dp": 2, "device": "slow"}
    other = group(planned, "early", Phase.TRAIN, "ss", LayoutSettings.model_validate({"stages": (stage,)}))
    assert devices_of(finder.layout_for(teacher, [teacher, other])) == expected(planned, fast=0, slow=2)
    unnamed = group(planned, "early", Phase.TRAIN, "st")
    assert devices_of(finder.layout_for(teacher, [teacher, unnamed])) == expected(planned, fast=0, slow=2), "no slots"
    cluster.more = 2
    assert devices_of(finder.layout_for(teacher, [teacher, other])) == expected(planned, fast=0, slow=2)
    assert devices_of(finder.layout_for(teacher, [teacher, unnamed])) == expected(planned, fast=0, slow=4)
    cluster.more = 0
    crowd = group(planned, "early", Phase.TRAIN, "sstt", LayoutSettings(pp=2, dp=2))
    assert finder.layout_for(teacher, [teacher, crowd]) == teacher.wanted.layout
    roles = [teacher, crowd]
    assert finder.who_must_give_way(teacher, roles) is crowd
    cluster.lost = {"f", "s", "t"}
    assert finder.who_must_give_way(teacher, roles) is None, "its room would not do"
    cluster.lost = set()
    assert finder.who_must_give_way(teacher, roles) is None


def test_roles_that_start_with_less_do_not_count_on_the_same_devices(tmp_path: Path, cluster: Cluster) -> None:
    one = plan_tiny(
        tmp_path, "recovery.start_smaller=true", "students.early.layout={stages=[{layers=2,device='slow'}]}"
    )
    finder = RoomFinder(one)
    groups = [group(one, role, Phase.IDLE) for role in one.config.roles]
    everything = finder.layouts_to_start(groups)
    assert everything == {role: settings.layout for role, settings in one.config.roles.items()}
    cluster.lost = {"s"}
    chosen = finder.layouts_to_start(groups)
    assert devices_of(chosen["early"]) == {"slow": 1} and chosen["late"].ranks == 1
    assert devices_of(chosen["teacher"]) == expected(one, fast=2, slow=1)
    cluster.lost = {"f", "s"}
    assert devices_of(finder.layouts_to_start(groups)["teacher"]) == {"slow": 1}


def test_the_loss_of_a_node_is_planned_while_all_is_well(
    planned: Planned, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("threading.Thread.start", lambda thread: thread.run())
    finder, teacher = RoomFinder(planned), group(planned, "teacher", Phase.IDLE)
    with EventLog(tmp_path) as events:
        finder.prepare(events)
    (told,) = read_events(tmp_path)
    assert told["event"] == "planned_for_loss" and told["role"] == "teacher"
    own_s = planned.predictions["teacher"].step_s
    assert all(step_s >= round(own_s, 4) for step_s in told["step_s_without_a_node"].values())

    def must_not_search(*_: object) -> None:
        raise AssertionError("it was to be looked up")

    monkeypatch.setattr("titan.cluster.fallback.plan_role", must_not_search)
    for lost, devices in (({"f"}, {"fast": 0, "slow": 4}), ({"t"}, {"fast": 2, "slow": 2})):
        cluster.lost = lost
        assert devices_of(finder.layout_for(teacher, [teacher])) == expected(planned, **devices)


def test_who_is_not_to_shrink_waits_and_prepares_nothing(
    planned: Planned, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("threading.Thread.start", lambda thread: thread.run())
    recovery = planned.config.recovery.model_copy(update={"policy": "wait"})
    finder = RoomFinder(Planned(planned.config.model_copy(update={"recovery": recovery}), costs=planned.costs))
    teacher = group(planned, "teacher", Phase.IDLE)
    cluster.lost = {"f"}
    assert finder.layout_for(teacher, [teacher]) == teacher.wanted.layout
    assert finder.who_must_give_way(teacher, [teacher]) is None
    with EventLog(tmp_path) as events:
        finder.prepare(events)
    assert read_events(tmp_path) == []
