"""What devices there are, and whether the layouts of a run fit on them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from titan.errors import ConfigError
from titan.plan.layout import Layout


@dataclass(frozen=True)
class Node:
    """One machine and the ranks it can take."""

    name: str
    device: str
    """cpu or cuda."""
    slots: int
    """Ranks: accelerators, or cores times `cluster.cpu_ranks_per_core`."""


@dataclass(frozen=True)
class Inventory:
    """All machines of the run."""

    nodes: tuple[Node, ...]

    @property
    def slots(self) -> int:
        """Ranks that all machines can take."""
        return sum(node.slots for node in self.nodes)


def plan_json(layouts: Mapping[str, Layout], inventory: Inventory) -> dict[str, Any]:
    """Plain data for plan.json."""
    return {
        "inventory": asdict(inventory),
        "roles": {role: layout.to_json() for role, layout in layouts.items()},
        "num_ranks": sum(layout.num_ranks for layout in layouts.values()),
    }


def check_fits(layouts: Mapping[str, Layout], inventory: Inventory, ranks_per_core: int) -> None:
    """Raise ConfigError unless every rank finds a slot and every tensor-parallel group fits on one node."""
    wanted = sum(layout.num_ranks for layout in layouts.values())
    devices = " + ".join(f"{node.slots} on {node.name} ({node.device})" for node in inventory.nodes)
    if wanted > inventory.slots:
        ranks = ", ".join(f"{role} {layout.num_ranks}" for role, layout in layouts.items())
        on_cpu = any(node.device == "cpu" for node in inventory.nodes)
        hint = f" or raise cluster.cpu_ranks_per_core ({ranks_per_core})" if on_cpu else ""
        raise ConfigError(
            f"layouts need {wanted} ranks ({ranks}), there is room for {inventory.slots}: {devices}; "
            f"use smaller layouts or fewer students{hint}"
        )
    largest = max(node.slots for node in inventory.nodes)
    for role, layout in layouts.items():
        for stage in layout.stages:
            if stage.tp > largest:
                raise ConfigError(
                    f"{role}: tp is {stage.tp}, but no node has room for more than {largest} ranks ({devices}); "
                    "a tensor-parallel group stays on one node: use a smaller tp"
                )


def likely_nodes(layouts: Mapping[str, Layout], inventory: Inventory) -> dict[str, list[str]]:
    """Name of the node of each rank of each role, tensor-parallel groups put in order where they first fit whole.

    Ray decides in the end, by the same rule that a group stays on one node. "?" is a group that fits nowhere.
    """
    room = {node.name: node.slots for node in inventory.nodes}
    where: dict[str, list[str]] = {}
    for role, layout in layouts.items():
        where[role] = []
        for stage in layout.stages:
            for _ in range(stage.dp):
                name = next((name for name, slots in room.items() if slots >= stage.tp), "?")
                room[name] = room.get(name, 0) - stage.tp
                where[role] += [name] * stage.tp
    return where
