"""Which layout a role can have in what is left of the cluster."""

from collections.abc import Iterable

from titan.cluster.placement import free_slots
from titan.cluster.role_group import Phase, RoleGroup
from titan.config.model import LayoutSettings
from titan.config.settings import RunConfig
from titan.plan.smaller import largest_that_fits, smaller_layouts


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
            smallest = min((layout.ranks for layout in smaller_layouts(other.wanted, config.data)), default=0)
            _take(smallest or other.num_ranks, slots)
        elif other.is_starting and not other.places:
            _take(other.num_ranks, slots)
    return slots


def _take(ranks: int, slots: dict[str, int]) -> None:
    """Room for ranks that have no place yet is not free."""
    for node in slots:
        taken = min(ranks, max(0, slots[node]))
        slots[node] -= taken
        ranks -= taken
