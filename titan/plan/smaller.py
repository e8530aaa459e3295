"""Layouts to fall back on when there is not room for the wanted one: the same model on fewer ranks."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from titan.config.check_layout import layout_mistakes
from titan.config.model import LayoutSettings
from titan.config.settings import DataSettings, Role
from titan.plan.layout import Layout, make_layout


@dataclass(frozen=True)
class Room:
    """What is free in a cluster."""

    slots: dict[str, int]
    """Ranks that each node can take."""
    kinds: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of each kind of device that ranks are placed by, the devices of each node. Ranks of other kinds take any slot."""

    def devices(self, kind: str) -> int:
        """How many of a kind that ranks are placed by can be had."""
        return sum(min(free, self.slots.get(node, 0)) for node, free in self.kinds[kind].items())


def smaller_layouts(role: Role, data: DataSettings) -> list[LayoutSettings]:
    """Valid layouts of a role that need fewer ranks than its own, those with the most ranks first.

    Of two with as many, the one that keeps the tensor degree, and then the stages: replicas are the first to go, as
    a rank then holds what it held before. Stages that were described one by one become alike.
    """
    found = []
    for candidate in _candidates(role.layout):
        changed = replace(role, layout=candidate)
        if candidate.ranks < role.layout.ranks and not any(layout_mistakes("", changed, data)):
            found.append(candidate)
    own = role.layout
    return sorted(found, key=lambda layout: (-layout.ranks, layout.tp != own.tp, layout.num_stages != own.num_stages))


def _candidates(layout: LayoutSettings) -> Iterator[LayoutSettings]:
    kept = {"transport": layout.transport, "recompute": layout.recompute}
    if layout.stages is not None:
        most_tp = max(stage.tp for stage in layout.stages)
        most_dp = max(stage.dp for stage in layout.stages)
        own: dict[str, object] = {"micro_batches": layout.num_micro_batches}
        sharded = any(stage.shard > 1 for stage in layout.stages)
    else:
        most_tp, most_dp = layout.tp, layout.dp
        own = {"micro_batches": layout.num_micro_batches, "sequence_parallel": layout.sequence_parallel}
        sharded = layout.shard > 1
    for pp in range(layout.num_stages, 0, -1):
        for tp in _divisors(most_tp):
            for dp in _divisors(most_dp):
                values = {**kept, **own, "tp": tp, "pp": pp, "dp": dp, "shard": dp if sharded else 1}
                values["sequence_parallel"] = bool(own.get("sequence_parallel")) and tp > 1
                if layout.stages is None and pp == layout.pp:
                    values |= {name: getattr(layout, name) for name in ("layers", "schedule", "chunks")}
                yield LayoutSettings.model_validate(values)


def _divisors(number: int) -> list[int]:
    return [each for each in range(number, 0, -1) if number % each == 0]


def left_beside(layout: Layout, room: Room) -> Room | None:
    """What stays free if every tensor-parallel group takes a place on one node; None if one finds none.

    Groups that are placed by kind come first, then the largest.
    """
    slots, kinds = dict(room.slots), {kind: dict(nodes) for kind, nodes in room.kinds.items()}
    groups = [(stage.tp, kinds.get(kind or "")) for stage in layout.positions for kind in stage.kinds]
    for size, devices in sorted(groups, key=lambda group: (group[1] is None, -group[0])):
        of_kind = slots if devices is None else devices
        node = next((name for name, free in slots.items() if min(free, of_kind.get(name, 0)) >= size), None)
        if node is None:
            return None
        slots[node] -= size
        if devices is not None:
            devices[node] -= size
    return Room(slots, kinds)


def fits(layout: Layout, room: Room) -> bool:
    """Whether there is room for a layout."""
    return left_beside(layout, room) is not None


def largest_that_fits(role: Role, data: DataSettings, room: Room) -> LayoutSettings | None:
    """The role's own layout if there is room for it, else the first smaller one that has; None if none has."""
    for layout in (role.layout, *smaller_layouts(role, data)):
        if fits(make_layout(role.model, layout), room):
            return layout
    return None
