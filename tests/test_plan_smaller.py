"""Layouts to fall back on, against every layout there is."""

import itertools

import pytest

from titan.config.check_layout import layout_mistakes
from titan.config.model import LayoutSettings, ModelSettings, OptimizerSettings
from titan.config.settings import DataSettings, Role
from titan.plan.layout import make_layout
from titan.plan.smaller import Room, fits, largest_that_fits, left_beside, smaller_layouts

MODEL = ModelSettings(layers=4, hidden=64, heads=4, ffn=128)
DATA = DataSettings(sources=("x",), batch_size=16)


def role(**layout: object) -> Role:
    settings = LayoutSettings.model_validate(layout)
    return Role("teacher", "teacher", MODEL, settings, OptimizerSettings(), "fp32", DATA.batch_size)


@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2, "pp": 2, "dp": 4},
        {"tp": 4, "dp": 2, "shard": 2},
        {"pp": 4, "schedule": "1f1b", "micro_batches": 4},
        {"tp": 2, "sequence_parallel": True, "recompute": True},
    ],
)
def test_all_of_them_are_valid_smaller_and_in_order(layout: dict[str, object]) -> None:
    own = role(**layout)
    found = smaller_layouts(own, DATA)
    ranks = [each.ranks for each in found]
    assert ranks == sorted(ranks, reverse=True) and ranks[-1] == 1
    assert all(number < own.layout.ranks for number in ranks)
    for each in found:
        assert not list(layout_mistakes("", role(**each.model_dump(exclude_none=True)), DATA))
        assert each.recompute == own.layout.recompute
        assert each.num_micro_batches == own.layout.num_micro_batches
        make_layout(MODEL, each)


def test_replicas_go_first_then_stages_then_tensor_ranks() -> None:
    found = [(each.tp, each.pp, each.dp) for each in smaller_layouts(role(tp=2, pp=2, dp=2), DATA)]
    assert found == [(2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 1)]


def test_stages_one_by_one_become_alike() -> None:
    stages = ({"layers": (3,), "dp": 2, "device": "fast"}, {"layers": (1,), "tp": 2, "device": "slow"})
    found = smaller_layouts(role(stages=stages, micro_batches=4), DATA)
    assert {each.num_micro_batches for each in found} == {4}
    assert all(each.stages is None for each in found) and found[-1].ranks == 1


def room_by_trying(groups: list[tuple[int, str | None]], room: Room) -> bool:
    """Every way to put groups on nodes."""
    for places in itertools.product(room.slots, repeat=len(groups)):
        left = dict(room.slots)
        devices = {(kind, node): number for kind, nodes in room.kinds.items() for node, number in nodes.items()}
        for (size, kind), place in zip(groups, places, strict=True):
            left[place] -= size
            if kind in room.kinds:
                devices[str(kind), place] = devices.get((str(kind), place), 0) - size
        if min(left.values()) >= 0 and min(devices.values(), default=0) >= 0:
            return True
    return False


@pytest.mark.parametrize("slots", [{"a": 4}, {"a": 2, "b": 2}, {"a": 3, "b": 1}, {"a": 1, "b": 1}, {"a": 0, "b": 5}])
def test_what_fits_has_a_place_for_every_tensor_group(slots: dict[str, int]) -> None:
    for layout in ({"tp": 2, "pp": 2}, {"tp": 4}, {"dp": 4}, {"tp": 2, "dp": 2}, {"pp": 3}, {}):
        made = make_layout(MODEL, role(**layout).layout)
        groups: list[tuple[int, str | None]] = [(stage.tp, None) for stage in made.positions for _ in range(stage.dp)]
        assert fits(made, Room(slots)) == room_by_trying(groups, Room(slots)), layout


@pytest.mark.parametrize("fast", [{}, {"a": 1}, {"a": 2}, {"a": 1, "b": 1}, {"b": 4}])
@pytest.mark.parametrize("slow", [{"b": 1}, {"b": 2}, {"a": 1, "c": 2}])
@pytest.mark.parametrize("slots", [{"a": 2, "b": 2, "c": 2}, {"a": 1, "b": 3, "c": 1}, {"a": 4}])
def test_groups_of_named_kinds_go_where_their_kind_is(
    fast: dict[str, int], slow: dict[str, int], slots: dict[str, int]
) -> None:
    room = Room(slots, {"fast": fast, "slow": slow})
    assert room.devices("slow") == sum(min(number, slots.get(node, 0)) for node, number in slow.items())
    for stages in (
        [("fast", 1, 1)],
        [("fast", 2, 1), ("slow", 1, 1)],
        [("slow", 1, 2), ("fast", 1, 1)],
        [("paced", 1, 2), ("slow", 2, 1)],
        [("slow", 1, 1), (None, 1, 1)],
        [(None, 1, 2), ("fast", 1, 1)],
    ):
        settings = [{"layers": (1,), "device": kind, "tp": tp, "dp": dp} for kind, tp, dp in stages]
        settings[-1]["layers"] = (5 - len(stages),)
        made = make_layout(MODEL, role(stages=tuple(settings), micro_batches=4).layout)
        groups = [(tp, kind) for kind, tp, dp in stages for _ in range(dp)]
        assert fits(made, room) == room_by_trying(groups, room), stages
        left = left_beside(made, room)
        if left is not None:
            taken = {kind: room.devices(kind) - left.devices(kind) for kind in room.kinds}
            assert sum(room.slots.values()) - sum(left.slots.values()) == made.num_ranks
            named = {kind: sum(size for size, of in groups if of == kind) for kind in room.kinds}
            assert all(taken[kind] >= number for kind, number in named.items()), stages
            assert min(left.slots.values()) >= 0


def test_the_largest_that_has_room_is_taken() -> None:
    wanted = role(tp=2, dp=2)
    assert largest_that_fits(wanted, DATA, Room({"a": 2, "b": 2})) == wanted.layout
    lost = largest_that_fits(wanted, DATA, Room({"a": 2, "b": 1}))
    assert lost is not None and (lost.tp, lost.dp) == (2, 1)
    scattered = largest_that_fits(wanted, DATA, Room({"a": 1, "b": 1}))
    assert scattered is not None and (scattered.tp, scattered.dp) == (1, 2)
    assert largest_that_fits(wanted, DATA, Room({"a": 0})) is None
