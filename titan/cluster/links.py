"""Links between the nodes of a Ray cluster, measured as edges of a run use them: device to device by host transport.

Pairs of nodes are measured one after the other, on each as many devices at once as both nodes have: what one device
gets while its neighbours send too. In a cluster of up to MOST_PAIRS pairs all are measured; in a larger one, of each
two islands the first nodes, the last ones, and the first of one with the last of the other. Of each two islands the
slowest pair counts: a plan does not choose nodes.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch._C._distributed_c10d import TCPStore

from titan.cluster.session import ACCELERATORS
from titan.config.planning import InventorySettings, LinkSettings
from titan.config.settings import ClusterSettings
from titan.errors import ConfigError, PlatformError
from titan.parallel.host_transport import HostTransport, own_address
from titan.parallel.link import SIZES, LinkTime, measure_transport
from titan.platform.device import DeviceKind, select_platform

MOST_PAIRS = 28
"""All pairs of eight nodes; each takes two to three seconds on a fast network."""
MOST_STREAMS = 8
"""Devices of a node that send at once."""
MESSAGE_TIMEOUT_S, PAIR_TIMEOUT_S = 30.0, 120.0
NO_KIND = {"CPU", "memory", "object_store_memory", *ACCELERATORS.values()}
"""Resources of a node that Ray itself names; so are those with a colon."""


@dataclass(frozen=True)
class LinkNode:
    """The devices of one kind on a node."""

    node_id: str
    """As Ray names the node."""
    name: str
    kind: str
    island: str
    device: DeviceKind
    devices: int


@dataclass(frozen=True)
class MeasuredPair:
    """What the link between two nodes takes, for each of the devices that use it at once."""

    first: LinkNode
    second: LinkNode
    streams: int
    """Devices of each node that sent at the same time."""
    time: LinkTime
    """Of the slowest of them."""


def link_nodes(settings: ClusterSettings, kind: str | None, inventory: InventorySettings | None) -> list[LinkNode]:
    """Nodes of the connected cluster by kind of device, in the order of their names.

    A node's kinds are the resources it was started with (`ray start --resources='{"KIND": N}'`), of which those count
    that the inventory has, if there is one. A node without any is of `kind`, by default what the device is.
    """
    islands = {node.kind: node.island or node.kind for node in inventory.nodes} if inventory else None
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: (node["NodeName"], node["NodeID"]))
    names = [node["NodeName"] for node in alive]
    found = list[LinkNode]()
    for node in alive:
        node_id, name, resources = node["NodeID"], node["NodeName"], node["Resources"]
        if names.count(name) > 1:  # several Ray nodes on one host
            name = f"{name}/{node_id[:6]}"
        device, number = _device(settings, resources)
        fallback = kind or device
        kinds = {each: int(resources[each]) for each in sorted(resources) if _is_kind(each, islands)}
        if not kinds and (islands is None or fallback in islands):
            kinds = {fallback: number}
        for each, count in kinds.items():
            if count:
                found.append(LinkNode(node_id, name, each, (islands or {}).get(each, each), device, count))
    return found


def _is_kind(resource: str, islands: Mapping[str, str] | None) -> bool:
    """Whether a resource of a node names a kind of device."""
    return resource in islands if islands is not None else resource not in NO_KIND and ":" not in resource


def _device(settings: ClusterSettings, resources: dict[str, float]) -> tuple[DeviceKind, int]:
    """What ranks of a node compute on, and how many such devices it has."""
    accelerators: tuple[DeviceKind, ...] = ("cuda", "npu")
    for device in accelerators:
        number = int(resources.get(ACCELERATORS[device], 0))
        if number and settings.device in ("auto", device):
            return device, number
    return "cpu", int(resources.get("CPU", 0))


def pairs_to_measure(nodes: Sequence[LinkNode]) -> list[tuple[LinkNode, LinkNode]]:
    """All pairs, or where they are many three of each two islands."""
    every = [(one, other) for index, one in enumerate(nodes) for other in nodes[index + 1 :]]
    if len(every) <= MOST_PAIRS:
        return every
    islands = dict.fromkeys(node.island for node in nodes)
    by_island = [[node for node in nodes if node.island == island] for island in islands]
    chosen = dict[tuple[LinkNode, LinkNode], None]()
    for index, ours in enumerate(by_island):
        if len(ours) > 1:
            chosen |= dict.fromkeys([(ours[0], ours[1]), (ours[0], ours[-1]), (ours[-2], ours[-1])])
        for theirs in by_island[index + 1 :]:
            chosen |= dict.fromkeys([(ours[0], theirs[0]), (ours[0], theirs[-1]), (ours[-1], theirs[-1])])
    return list(chosen)


def links_of(pairs: Iterable[MeasuredPair]) -> tuple[LinkSettings, ...]:
    """One link for each two islands: that of the pair on which a large message takes longest."""
    slowest = dict[frozenset[str], MeasuredPair]()
    for pair in pairs:
        ends = frozenset((pair.first.island, pair.second.island))
        known = slowest.get(ends)
        if known is None or pair.time.seconds(SIZES[-1]) > known.time.seconds(SIZES[-1]):
            slowest[ends] = pair
    return tuple(
        LinkSettings(
            between=(pair.first.island, pair.second.island),
            latency_s=pair.time.latency_s,
            gb_per_s=pair.time.bytes_per_s / 1e9,
        )
        for pair in slowest.values()
    )


def measure_links(settings: ClusterSettings, nodes: Sequence[LinkNode]) -> list[MeasuredPair]:
    """Measure pairs of nodes of the connected cluster, one after the other.

    Raises ConfigError for fewer than two nodes, PlatformError for devices that are not free within
    `cluster.start_timeout_s` and for nodes that do not reach each other; it names them all.
    """
    if len(nodes) < 2:
        kinds = ", ".join(f"{node.name} ({node.kind})" for node in nodes) or "none of a known kind"
        raise ConfigError(
            f"cluster.address {settings.address}: there is no link to measure between fewer than two nodes: {kinds}; "
            "start Ray on another node, with --resources='{\"KIND\": N}' where cluster.inventory names kinds"
        )
    pairs = pairs_to_measure(nodes)
    ends = dict[LinkNode, list[Any]]()
    try:
        for one, other in pairs:
            for node in (one, other):
                wanted = _streams(one, other) - len(ends.setdefault(node, []))
                ends[node] += [_start(node) for _ in range(wanted)]
        _await_start(ends, settings.start_timeout_s)
        return _measure_all(pairs, ends)
    finally:
        for actors in ends.values():
            for actor in actors:
                ray.kill(actor, no_restart=True)


def _streams(one: LinkNode, other: LinkNode) -> int:
    return min(one.devices, other.devices, MOST_STREAMS)


def _start(node: LinkNode) -> Any:
    affinity = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    device = {"num_gpus": 1} if node.device == "cuda" else {}
    resources = {ACCELERATORS["npu"]: 1} if node.device == "npu" else {}
    skin = ray.remote(max_restarts=0)(LinkEnd)
    return skin.options(num_cpus=0, resources=resources, scheduling_strategy=affinity, **device).remote(node.device)


def _await_start(ends: dict[LinkNode, list[Any]], timeout_s: float) -> None:
    """Raise PlatformError unless every process is up in time."""
    calls = {actor.open.remote(): node for node, actors in ends.items() for actor in actors}
    _, late = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)
    if late:
        names = ", ".join(dict.fromkeys(calls[call].name for call in late))
        raise PlatformError(
            f"waited {timeout_s:.0f} s for a free device on {names} to measure links; is a run using it? "
            "(cluster.start_timeout_s sets the wait)"
        )
    for call, node in calls.items():
        _get(call, f"cannot measure links of {node.name}", timeout_s)


def _measure_all(pairs: Sequence[tuple[LinkNode, LinkNode]], ends: dict[LinkNode, list[Any]]) -> list[MeasuredPair]:
    measured, failed = list[MeasuredPair](), list[str]()
    for one, other in pairs:
        try:
            measured.append(_measure_pair(one, other, ends))
        except PlatformError as error:
            failed.append(str(error))
    if failed:
        raise PlatformError("; ".join(failed))
    return measured


def _measure_pair(one: LinkNode, other: LinkNode, ends: dict[LinkNode, list[Any]]) -> MeasuredPair:
    """All streams of a pair at once. Raises PlatformError for ends that do not reach each other in time."""
    what, streams = f"no link between {one.name} and {other.name}", _streams(one, other)
    couples = list(zip(ends[one][:streams], ends[other][:streams], strict=True))
    places = [_get(first.open.remote(), what, PAIR_TIMEOUT_S) for first, _ in couples]
    calls = [
        end.measure.remote(rank, *place)
        for couple, place in zip(couples, places, strict=True)
        for rank, end in enumerate(couple)
    ]
    times: list[LinkTime] = [_get(call, what, PAIR_TIMEOUT_S) for call in calls][::2]
    return MeasuredPair(one, other, streams, max(times, key=lambda time: time.seconds(SIZES[-1])))


def _get(call: Any, what: str, timeout_s: float) -> Any:
    try:
        return ray.get(call, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise PlatformError(f"{what}: no answer in {timeout_s:.0f} s; do the hosts reach each other?") from None
    except ray.exceptions.RayError as error:
        cause = str(getattr(error, "cause", None) or error).strip().splitlines()[0]
        raise PlatformError(f"{what}: {cause}; do the hosts reach each other, on every port?") from None


class LinkEnd:
    """One device of a node, as one end of a link after the other. A plain class; `_start` makes it an actor."""

    def __init__(self, device: DeviceKind):
        torch.set_num_threads(1)
        self.platform = select_platform(device)
        self.store: TCPStore | None = None

    def open(self) -> tuple[str, int]:
        """Host and port at which the two ends of the next link meet; called on the first of them."""
        host = ray.util.get_node_ip_address()
        timeout = timedelta(seconds=MESSAGE_TIMEOUT_S)
        self.store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        return host, int(self.store.port)

    def measure(self, rank: int, host: str, port: int) -> LinkTime:
        """Meet the other end and measure; what rank 0 returns counts. Raises PeerLostError, RuntimeError."""
        store = self.store if rank == 0 else None
        if store is None:
            store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=MESSAGE_TIMEOUT_S))
        device = self.platform.device
        transport = HostTransport(rank, 2, store, own_address(host), device, MESSAGE_TIMEOUT_S)
        try:
            return measure_transport(transport, rank, device)
        finally:
            with suppress(OSError):
                transport.close()
