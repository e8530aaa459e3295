"""Which layout a role can have in what is left of the cluster."""

from collections import Counter
from collections.abc import Iterable, Sequence

from titan.cluster.fallback import Fallbacks
from titan.cluster.placement import free_devices, free_slots, is_placed_by_kind
from titan.cluster.planning import Planned
from titan.cluster.role_group import Phase, RoleGroup
from titan.config.model import LayoutSettings
from titan.config.settings import Role
from titan.errors import ConfigError
from titan.observe.events import EventLog
from titan.plan.layout import make_layout
from titan.plan.smaller import Room, fits, largest_that_fits, left_beside, smaller_layouts


class RoomFinder:
    """Looks at the cluster for the roles of one run."""

    def __init__(self, planned: Planned):
        self.config, self.fallbacks = planned.config, Fallbacks(planned)
        of_layouts = [kind for role in self.config.roles.values() for kind in _kinds_of(role)]
        of_fleets = [kind for costs in planned.costs.values() for kind in costs.fleet.kinds]
        self.kinds = [
            kind
            for kind in dict.fromkeys([*of_layouts, *of_fleets])
            if is_placed_by_kind(kind, self.config, planned.paced)
        ]
        """Kinds of devices that ranks are placed by."""

    def prepare(self, events: EventLog) -> None:
        """Plan aside for the loss of a node, where layouts name devices that can be lost."""
        if self.config.recovery.policy == "shrink":
            self.fallbacks.prepare([name for name, role in self.config.roles.items() if self._is_planned(role)], events)

    def layouts_to_start(self, groups: Iterable[RoleGroup]) -> dict[str, LayoutSettings]:
        """The layout of each role where none has a place yet: one after the other the largest that has room.

        Each leaves to those after it what their smallest layouts need. Raises ConfigError where not even these fit.
        """
        groups, room = list(groups), self._room(())
        slots, chosen = sum(room.slots.values()), {}
        for number, group in enumerate(groups):
            beside = room
            for later in groups[number + 1 :]:
                beside = self._without_smallest(later, beside)
            settings = self._largest(group.wanted, beside)
            if settings is None:
                raise ConfigError(
                    f"recovery.start_smaller is true, but the smallest layouts of "
                    f"{', '.join(one.role for one in groups)} do not fit into the {slots} ranks that there is room "
                    "for; wait for more hosts (cluster.nodes), or have fewer students"
                )
            chosen[group.role] = settings
            room = left_beside(make_layout(group.wanted.model, settings), room) or room
        return chosen

    def layout_for(self, group: RoleGroup, others: Iterable[RoleGroup]) -> LayoutSettings:
        """The layout a role is to start with, or go on with, beside the others.

        Its own if there is room for that; else, where `recovery.policy` is to shrink, the best that has room; else its
        own again, to be waited for.
        """
        wanted = group.wanted.layout
        if self.config.recovery.policy != "shrink":
            return wanted
        return self._largest(group.wanted, self._room_beside(group, others)) or wanted

    def who_must_give_way(self, group: RoleGroup, others: Iterable[RoleGroup]) -> RoleGroup | None:
        """If a role that waits finds no room at all: the largest of those that train whose room would do."""
        others = list(others)
        if self.config.recovery.policy != "shrink" or self._has_room(group, others):
            return None
        training = [one for one in others if one is not group and one.phase is Phase.TRAIN and one.num_ranks > 1]
        would_do = [one for one in training if self._has_room(group, [other for other in others if other is not one])]
        return max(would_do, key=lambda other: other.num_ranks, default=None)

    def _has_room(self, group: RoleGroup, others: Iterable[RoleGroup]) -> bool:
        return self._largest(group.wanted, self._room_beside(group, others)) is not None

    def _largest(self, role: Role, room: Room) -> LayoutSettings | None:
        """A role's own layout if there is room for it, else the best for what there is; None if none fits."""
        if not self._is_planned(role):
            return largest_that_fits(role, self.config.data, room)
        if fits(make_layout(role.model, role.layout), room):
            return role.layout
        found = self.fallbacks.layout(role.name, {kind: room.devices(kind) for kind in self.kinds})
        return found if found is not None and fits(make_layout(role.model, found), room) else None

    def _is_planned(self, role: Role) -> bool:
        """Whether the planner can say what to do without some of the devices that a role's layout names."""
        return role.name in self.fallbacks.costs and any(kind in self.kinds for kind in _kinds_of(role))

    def _room(self, others: Sequence[RoleGroup]) -> Room:
        """What is free beside roles that have their place."""
        used = [
            (place.node_id, one.layout.place(rank).device) for one in others for rank, place in enumerate(one.places)
        ]
        slots = free_slots(self.config, [node for node, _ in used])
        devices = {kind: free_devices(kind, [node for node, of in used if of == kind]) for kind in self.kinds}
        return Room(slots, devices)

    def _room_beside(self, group: RoleGroup, others: Iterable[RoleGroup]) -> Room:
        """What is free for a role. One that waits for room too is sure of its smallest layout only."""
        every = [other for other in others if other is not group]
        room = self._room(every)
        for other in every:
            if other.phase is Phase.ROOM:
                room = self._without_smallest(other, room)
            elif other.is_starting and not other.places:
                room = left_beside(other.layout, room) or _without(other.num_ranks, room)
        return room

    def _without_smallest(self, group: RoleGroup, room: Room) -> Room:
        """What a role's smallest layout leaves, which has no place yet."""
        wanted = group.wanted
        ranks = min((layout.ranks for layout in smaller_layouts(wanted, self.config.data)), default=wanted.layout.ranks)
        return _without(ranks, room, [kind for kind in dict.fromkeys(_kinds_of(wanted)) if kind in self.kinds])


def _kinds_of(role: Role) -> list[str]:
    """Kinds of devices that a role's layout names, one a replica."""
    return [kind for stage in role.layout.stages or () for kind in stage.kinds if kind is not None]


def devices_of(settings: LayoutSettings) -> dict[str, int]:
    """Ranks of a layout by the kind of device it names; {} if it names none."""
    kinds = Counter[str]()
    for stage in settings.stages or ():
        for kind in stage.kinds:
            if kind is not None:
                kinds[kind] += stage.tp
    return dict(kinds)


def _without(ranks: int, room: Room, kinds: Sequence[str] = ()) -> Room:
    """What some ranks leave that have no place yet: on devices of these kinds, or best where there are none of any."""
    slots, devices = dict(room.slots), {kind: dict(nodes) for kind, nodes in room.kinds.items()}

    def comes_late(node: str) -> bool:
        has = {kind for kind, nodes in devices.items() if nodes.get(node)}
        return not has.intersection(kinds) if kinds else bool(has)

    for node in sorted(slots, key=comes_late):
        taken = min(ranks, max(0, slots[node]))
        slots[node] -= taken
        ranks -= taken
        for kind in kinds:
            devices[kind][node] = max(0, devices[kind].get(node, 0) - taken)
    return Room(slots, devices)
