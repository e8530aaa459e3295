"""The devices of an inventory as the planner sees them: kinds, nodes and networks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from titan.config.planning import InventorySettings, LinkSettings
from titan.errors import ConfigError


@dataclass(frozen=True)
class Kind:
    """All devices of one kind."""

    name: str
    devices: int
    devices_per_node: int
    """Of its smallest node: what every node can hold."""
    largest_node: int
    """Devices of its largest node: the most that the loss of one takes."""
    memory_bytes: float
    island: str
    paced: bool


@dataclass(frozen=True)
class Network:
    """How fast bytes travel."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        """From the first byte that leaves to the last one that arrives."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Fleet:
    """An inventory, looked up by kind."""

    kinds: dict[str, Kind]
    networks: dict[frozenset[str], Network]
    """By the two islands they join; one island for the network inside it."""

    @property
    def num_devices(self) -> int:
        """Devices of all kinds."""
        return sum(kind.devices for kind in self.kinds.values())

    def without(self, used: Mapping[str, int]) -> "Fleet":
        """What is left when some devices of each kind are taken."""
        left = {name: replace(kind, devices=kind.devices - used.get(name, 0)) for name, kind in self.kinds.items()}
        return Fleet({name: kind for name, kind in left.items() if kind.devices > 0}, self.networks)

    def network(self, first: str, second: str) -> Network:
        """Between devices of two kinds (or of one, on different nodes). Raises ConfigError if no link is given."""
        ends = frozenset(self.kinds[kind].island for kind in (first, second))
        if ends not in self.networks:
            between = sorted(ends) * (2 if len(ends) == 1 else 1)
            raise ConfigError(
                f"inventory.links has no link between {' and '.join(between)}, which a layout needs; "
                f"add [[inventory.links]] with between = {between}, gb_per_s, or measure it: `titan doctor --profile "
                "FILE --address HOST:PORT`"
            )
        return self.networks[ends]


def make_fleet(inventory: InventorySettings, measured: Sequence[LinkSettings] = ()) -> Fleet:
    """The fleet of a checked inventory; measured: links for where the inventory has none."""
    kinds: dict[str, Kind] = {}
    for node in inventory.nodes:
        known = kinds.get(node.kind)
        kinds[node.kind] = Kind(
            name=node.kind,
            devices=node.devices * node.count + (known.devices if known else 0),
            devices_per_node=min(node.devices, known.devices_per_node if known else node.devices),
            largest_node=max(node.devices, known.largest_node if known else 0),
            memory_bytes=node.memory_gb * 1e9,
            island=node.island or node.kind,
            paced=node.paced,
        )
    links = (*measured, *inventory.links)
    return Fleet(kinds, {frozenset(link.between): Network(link.latency_s, link.gb_per_s * 1e9) for link in links})
