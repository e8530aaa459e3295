"""Where ranks run: room for a layout in the Ray cluster, tensor-parallel groups together on a node."""

from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from titan.cluster.rank_actor import RankActor
from titan.cluster.session import ACCELERATORS
from titan.config.settings import RunConfig
from titan.errors import ConfigError
from titan.plan.layout import Layout


def is_placed_by_kind(kind: str | None, config: RunConfig, paced: frozenset[str]) -> bool:
    """Whether a rank of this kind of device goes where Ray knows the kind: `ray start --resources='{"KIND": N}'`.

    Kinds that are paced, and a local Ray that knows no kinds, take any slot.
    """
    return kind is not None and kind not in paced and config.cluster.address is not None


def reserve(layout: Layout, config: RunConfig, paced: frozenset[str], now: bool) -> list[PlacementGroup]:
    """One placement group a tensor-parallel group; its bundles stay on one node.

    now: raise ConfigError for a kind of device that the cluster has not enough of, instead of waiting for it
    """
    bundle = rank_bundle(config)
    resources = ray.cluster_resources()

    def bundle_of(kind: str | None) -> dict[str, float]:
        if kind is None or not is_placed_by_kind(kind, config, paced):
            return bundle
        wanted = sum(one.tp * one.kinds.count(kind) for one in layout.positions)
        if now and resources.get(kind, 0) < wanted:
            raise ConfigError(
                f"layout wants {wanted} devices of kind {kind!r}, the Ray cluster offers "
                f"{resources.get(kind, 0):g}; start its nodes with --resources='{{\"{kind}\": N}}'"
            )
        return bundle | {kind: 1.0}

    return [
        placement_group([bundle_of(kind)] * stage.tp, strategy="STRICT_PACK")
        for stage in layout.positions
        for kind in stage.kinds
    ]


def ranks_are_on_cpu(config: RunConfig) -> bool:
    """Whether ranks run without accelerators in the connected cluster."""
    return not rank_bundle(config).keys() & set(ACCELERATORS.values())


def rank_bundle(config: RunConfig) -> dict[str, float]:
    """What Ray sets aside for one rank."""
    resources = ray.cluster_resources()
    for kind, name in ACCELERATORS.items():
        if config.cluster.device in ("auto", kind) and resources.get(name):
            return {"CPU": 1.0, name: 1.0}
    return {"CPU": 1.0 / config.cluster.cpu_ranks_per_core}


def rank_groups(layout: Layout, groups: Sequence[PlacementGroup]) -> list[PlacementGroup]:
    """The placement group of every rank, in rank order."""
    remaining = iter(groups)
    return [
        group
        for stage in layout.positions
        for _, group in zip(range(stage.dp), remaining, strict=False)
        for _ in range(stage.tp)
    ]


def nodes_of(groups: Sequence[PlacementGroup], bundles: Sequence[int]) -> list[str]:
    """The node of each of these bundles of groups that have their room, by id."""
    tables = {group.id: placement_group_table(group)["bundles_to_node_id"] for group in groups}
    return [tables[group.id][index] for group, index in zip(groups, bundles, strict=True)]


def start_actor(name: str, group: PlacementGroup, index: int) -> Any:
    """An actor for one rank, in a bundle of a placement group."""
    bundle = group.bundle_specs[index]
    skin = _skin().options(
        name=name,
        num_cpus=bundle["CPU"],
        num_gpus=bundle.get("GPU", 0),
        resources={name: share for name, share in bundle.items() if name not in ("CPU", "GPU")},
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
    )
    return skin.remote()


def start_spare(name: str, node_id: str) -> Any:
    """An actor on a node that takes no room there."""
    affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return _skin().options(name=name, num_cpus=0, scheduling_strategy=affinity).remote()


def _skin() -> Any:
    return ray.remote(concurrency_groups={"control": 1}, max_restarts=0)(RankActor)


def free_slots(config: RunConfig, used: Sequence[str]) -> dict[str, int]:
    """Ranks that each living node can still take; used: the nodes of ranks that have their place."""
    bundle = rank_bundle(config)
    slots = {}
    for node in ray.nodes():
        if node["Alive"]:
            rooms = [node["Resources"].get(name, 0.0) / share for name, share in bundle.items()]
            slots[str(node["NodeID"])] = int(min(rooms) + 1e-6) - list(used).count(node["NodeID"])
    return slots


def free_devices(kind: str, used: Sequence[str]) -> dict[str, int]:
    """Devices of a kind that each living node still has; used: the nodes of those that are taken."""
    return {
        str(node["NodeID"]): int(node["Resources"][kind]) - list(used).count(node["NodeID"])
        for node in ray.nodes()
        if node["Alive"] and kind in node["Resources"]
    }
