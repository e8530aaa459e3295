"""Which layout a role can have in what is left of the cluster."""

from collections.abc import Iterable

from titan.cluster.placement import free_slots
from titan.cluster.role_group import Phase, RoleGroup
from titan.config.model import LayoutSettings
from titan.config.settings import RunConfig
from titan.errors import ConfigError
from titan.plan.smaller import largest_that_fits, smaller_layouts


def layouts_to_start(groups: Iterable[RoleGroup], config: RunConfig) -> dict[str, LayoutSettings]:
    """The layout of each role where none has a place yet: one after the other the largest that has room.

    Each leaves to those after it what their smallest layouts need. Raises ConfigError where not even these fit.
    """
    groups, slots = list(groups), free_slots(config, ())
    least = {group.role: _smallest(group, config) for group in groups}
    room, chosen = sum(slots.values()), {}
    for group in groups:
        del least[group.role]
        beside = dict(slots)
        _take(sum(least.values()), beside)
        settings = largest_that_fits(group.wanted, config.data, beside)
        if settings is None:
            raise ConfigError(
                f"recovery.start_smaller is true, but the smallest layouts of {', '.join(one.role for one in groups)} "
                f"do not fit into the {room} ranks that there is room for; wait for more hosts (cluster.nodes), or "
                "have fewer students"
            )
        chosen[group.role] = settings
        _take(settings.ranks, slots)
    return chosen


def layout_for(group: RoleGroup, others: Iterable[RoleGroup], config: RunConfig) -> LayoutSettings:
    """The layout a role is to start with, or go on with, beside the others.

    Its own if there is room for that; else, where `recovery.policy` is to shrink, the largest that has room; else its
    own again, to be waited for.
    """
    wanted = group.wanted.layout
    if config.recovery.policy != "shrink":
        return wanted
    return largest_that_fits(group.wanted, config.data, _room_beside(group, others, config)) or wanted


def who_must_give_way(group: RoleGroup, others: Iterable[RoleGroup], config: RunConfig) -> RoleGroup | None:
    """The role with the most ranks among those that train, if a role that waits finds no room at all beside them."""
    if config.recovery.policy != "shrink":
        return None
    if largest_that_fits(group.wanted, config.data, _room_beside(group, others, config)) is not None:
        return None
    training = [other for other in others if other is not group and other.phase is Phase.TRAIN and other.num_ranks > 1]
    return max(training, key=lambda other: other.num_ranks, default=None)


def _room_beside(group: RoleGroup, others: Iterable[RoleGroup], config: RunConfig) -> dict[str, int]:
    """Free ranks by node. A role that waits for room too is sure of its smallest layout only."""
    every = [other for other in others if other is not group]
    slots = free_slots(config, [place.node_id for other in every for place in other.places])
    for other in every:
        if other.phase is Phase.ROOM:
            _take(_smallest(other, config), slots)
        elif other.is_starting and not other.places:
            _take(other.num_ranks, slots)
    return slots


def _smallest(group: RoleGroup, config: RunConfig) -> int:
    """Ranks of a role's smallest layout."""
    own = group.wanted.layout.ranks
    return min((layout.ranks for layout in smaller_layouts(group.wanted, config.data)), default=own)


def _take(ranks: int, slots: dict[str, int]) -> None:
    """Room for ranks that have no place yet is not free."""
    for node in slots:
        taken = min(ranks, max(0, slots[node]))
        slots[node] -= taken
        ranks -= taken
