"""What a layout takes on a fleet: its step's exact timeline, memory on every rank, and the pace of paced devices."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from titan.config.planning import TaskSettings
from titan.errors import ConfigError
from titan.plan.fleet import Fleet
from titan.plan.layout import Layout, Stage
from titan.plan.memory import Memory, bytes_per_parameter, position_memory, stage_parameters
from titan.plan.pace import Pace
from titan.plan.profile import DTYPE_BYTES, Profile
from titan.plan.timeline import StageTimes, Timeline, timeline


@dataclass(frozen=True)
class Prediction:
    """What is expected of a layout."""

    layout: Layout
    micro_batch_samples: int
    """Samples of a micro-batch, over all replicas."""
    kinds: tuple[str, ...]
    """Kind of device at each position; where replicas are of several, they are joined by "+"."""
    times: tuple[StageTimes, ...]
    timeline: Timeline
    memory: tuple[Memory, ...]
    """At each position, on the rank that needs most; of several kinds on the one with the least room left."""
    limit_bytes: tuple[float, ...]
    needs: tuple[Mapping[str, Memory], ...]
    """At each position, by kind, on the rank that needs most."""
    paces: tuple[Pace, ...]
    """By rank: what its device takes, and what it is told to take where it is paced."""
    rank_kinds: tuple[str, ...]
    """By rank: its kind of device."""

    @property
    def step_s(self) -> float:
        """Seconds of an optimizer step."""
        return self.timeline.step_s

    @property
    def busy_s(self) -> tuple[float, ...]:
        """By rank: seconds that its passes of one step take."""
        number = self.layout.micro_batches
        return tuple(number * (sum(pace.forward_s) + sum(pace.backward_s)) for pace in self.paces)

    def samples_of(self, position: int) -> list[int]:
        """Samples of a micro-batch that each replica at a position has."""
        return [end - start for start, end in self.layout.positions[position].samples(self.micro_batch_samples)]

    def shared(self, position: int) -> tuple[str, str]:
        """In words: kinds of device at a position, with the replicas of each if they are several; a replica's samples.

        `2 fast + 1 slow` and `11-12 + 5`
        """
        shares: dict[str, list[int]] = {}
        stage = self.layout.positions[position]
        kinds = self.rank_kinds[stage.first_rank : stage.ranks.stop : stage.tp]
        for kind, samples in zip(kinds, self.samples_of(position), strict=True):
            shares.setdefault(kind, []).append(samples)
        counted = [f"{len(of)} {kind}" if len(shares) > 1 else kind for kind, of in shares.items()]
        least_most = [dict.fromkeys((min(of), max(of))) for of in shares.values()]
        return " + ".join(counted), " + ".join("-".join(map(str, each)) for each in least_most)

    @property
    def too_large(self) -> list[int]:
        """Positions whose memory does not suffice."""
        return [i for i, memory in enumerate(self.memory) if memory.total > self.limit_bytes[i]]

    def to_json(self) -> dict[str, Any]:
        """Plain data for plan.json and `titan plan --json`."""
        line = self.timeline
        positions = []
        for index, (stage, kind) in enumerate(zip(self.layout.positions, self.kinds, strict=True)):
            layers = sum(one.end_layer - one.first_layer for one in self.layout.stages[index :: len(self.kinds)])
            positions.append(
                {
                    "device": kind,
                    "tp": stage.tp,
                    "dp": stage.dp,
                    "samples": self.samples_of(index),
                    "layers": layers,
                    "busy_s": max(self.busy_s[rank] for rank in stage.ranks),
                    "idle_share": line.idle_shares[index],
                    "memory_bytes": self.memory[index].total,
                    "limit_bytes": self.limit_bytes[index],
                }
            )
        return {"step_s": self.step_s, "positions": positions}


@dataclass(frozen=True)
class Costs:
    """A role's task on a fleet, with what its blocks cost there."""

    task: TaskSettings
    fleet: Fleet
    profile: Profile
    frozen: bool = False
    """Whether there are forward passes alone: no gradients, no optimizer. Such a role is predicted, never planned."""

    def kinds_of(self, stage: Stage) -> tuple[str, ...]:
        """The kind of device of each replica. Raises ConfigError if one is not in the inventory or not told."""
        if not isinstance(stage.device, tuple):
            return (self._known_kind(stage, stage.device),) * stage.dp
        return tuple(self._known_kind(stage, kind) for kind in stage.kinds)

    def _known_kind(self, stage: Stage, kind: str | None) -> str:
        known = ", ".join(self.fleet.kinds)
        if kind is None:
            if len(self.fleet.kinds) == 1:
                return next(iter(self.fleet.kinds))
            raise ConfigError(f"stage {stage.index} names no device; give one of {known} (layout.stages.device)")
        if kind not in self.fleet.kinds:
            raise ConfigError(f"stage {stage.index} wants device {kind!r}; the inventory has {known}")
        return kind

    def parts_of(self, stage: Stage, samples: int) -> dict[tuple[str, int], None]:
        """The different (kind, samples of a micro-batch) of a stage's replicas, in their order."""
        shares = (end - start for start, end in stage.samples(samples))
        return dict.fromkeys(zip(self.kinds_of(stage), shares, strict=True))

    def passes(self, stage: Stage, kind: str, samples: int, recompute: bool) -> tuple[float, float]:
        """Seconds forward and backward of one micro-batch, of which a replica of a kind has `samples`.

        recompute: whether the backward pass does the layers' forward pass again (arXiv 1604.06174); embedding and head
                   keep what they need
        """
        if self.frozen:
            return self._forward_s(stage, kind, samples), 0.0
        layers = stage.end_layer - stage.first_layer
        layer = self.profile.block(kind, "layer", stage.tp, samples)
        forward_s, backward_s = layers * layer.forward_s, layers * layer.backward_in(recompute)
        for has, name in ((stage.has_embedding, "embedding"), (stage.has_head, "head")):
            if has:
                block = self.profile.block(kind, name, stage.tp, samples)  # type: ignore[arg-type]
                forward_s += block.forward_s
                backward_s += block.backward_s
        return forward_s, backward_s

    def _forward_s(self, stage: Stage, kind: str, samples: int) -> float:
        """A forward pass alone: of the head's three products, logits and two gradients, only the first."""
        layers = stage.end_layer - stage.first_layer
        forward_s = layers * self.profile.block(kind, "layer", stage.tp, samples).forward_s
        if stage.has_embedding:
            forward_s += self.profile.block(kind, "embedding", stage.tp, samples).forward_s
        if stage.has_head:
            forward_s += self.profile.block(kind, "head", stage.tp, samples).forward_s / 3
        return forward_s

    def edge_s(self, source: Stage, target: Stage, samples: int, sequence_parallel: bool) -> float:
        """Seconds until the last part of a micro-batch has crossed an edge; messages of one rank go one by one."""
        task = self.task
        sample_bytes = task.model.hidden * DTYPE_BYTES[source.precision or task.precision]
        sent, received = (
            tokens * sample_bytes for tokens in tokens_moved(source, target, task.sequence_length, sequence_parallel)
        )
        source_kinds, target_kinds = self.kinds_of(source), self.kinds_of(target)
        if len({*source_kinds}) == len({*target_kinds}) == 1:
            most_sent, most_received = (max(e - s for s, e in stage.samples(samples)) for stage in (source, target))
            network = self.fleet.network(source_kinds[0], target_kinds[0])
            return network.seconds(max(most_sent * sent, most_received * received))
        return self._mixed_edge_s(source, target, samples, sent, received)

    def _mixed_edge_s(self, source: Stage, target: Stage, samples: int, sent: float, received: float) -> float:
        """The same where replicas differ: each rank's messages over the networks to those it shares samples with.

        sent, received: bytes of one sample that the busiest rank of a replica sends, or receives
        """
        kinds, target_kinds = self.kinds_of(source), self.kinds_of(target)
        gives_s, takes_s = [0.0] * source.dp, [0.0] * target.dp
        latency_s = 0.0
        for giver, taker, number in shared_samples(source, target, samples):
            network = self.fleet.network(kinds[giver], target_kinds[taker])
            latency_s = max(latency_s, network.latency_s)
            gives_s[giver] += number * sent / network.bytes_per_s
            takes_s[taker] += number * received / network.bytes_per_s
        return latency_s + max(*gives_s, *takes_s)

    def tail_s(self, stages: tuple[Stage, ...]) -> float:
        """Gradient exchange and optimizer of a position.

        A ring moves 2 (d - 1) / d of the gradients over each link; over a node's border it is the island's network.
        Where replicas sit in several islands, the first replica of each then sends its sums to those of all others, and
        gives what comes out to the replicas of its island (`titan.parallel.bridge`).
        """
        if self.frozen:
            return 0.0
        stage = stages[0]
        kinds, precision = self.kinds_of(stage), stage.precision or self.task.precision
        sizes = stage.islands or (stage.dp,)
        firsts = [kinds[start] for start in itertools.accumulate(sizes[:-1], initial=0)]
        parameters = sum(stage_parameters(self.task, part) for part in stages)
        gradient_bytes, state = 4 * parameters, parameters * bytes_per_parameter(precision, stage.shard)
        reduce_s = bridge_s = end_s = 0.0
        for kind, size in zip(firsts, sizes, strict=True):
            update_s = state / self.profile.update_bytes_per_s(kind)
            if size > 1:
                network = self.fleet.network(kind, kind)
                reduce_s = max(reduce_s, network.seconds(2 * (size - 1) / size * gradient_bytes))
                update_s += network.seconds(gradient_bytes) if len(sizes) > 1 else 0.0
            end_s = max(end_s, update_s)
        for index, kind in enumerate(firsts):
            others = [self.fleet.network(kind, other) for at, other in enumerate(firsts) if at != index]
            bridge_s = max(bridge_s, sum(network.seconds(gradient_bytes) for network in others))
        return reduce_s + bridge_s + end_s

    def samples_of(self, layout: Layout) -> int:
        """Samples of a micro-batch, over all replicas."""
        return self.task.batch_size // layout.micro_batches

    def stage_times(self, layout: Layout) -> list[StageTimes]:
        """Passes and messages of every stage, those of its slowest replica."""
        samples, cut, last = self.samples_of(layout), layout.sequence_parallel, len(layout.stages) - 1
        times = []
        for stage in layout.stages:
            parts = self.parts_of(stage, samples)
            passes = [self.passes(stage, kind, share, layout.recompute) for kind, share in parts]
            ahead = layout.stages[stage.index + 1] if stage.index < last else None
            behind = layout.stages[stage.index - 1] if stage.index else None
            times.append(
                StageTimes(
                    forward_s=max(forward for forward, _ in passes),
                    backward_s=max(backward for _, backward in passes),
                    to_next_s=self.edge_s(stage, ahead, samples, cut) if ahead else 0.0,
                    to_previous_s=self.edge_s(stage, behind, samples, cut) if behind else 0.0,
                )
            )
        return times

    def tails(self, layout: Layout) -> list[float]:
        """Gradient exchange and optimizer of every position."""
        number = len(layout.positions)
        return [self.tail_s(layout.stages[position::number]) for position in range(number)]

    def memory_at(self, layout: Layout, position: int) -> dict[str, Memory]:
        """By kind of device, of the rank at a position that needs most."""
        most: dict[str, int] = {}
        for kind, share in self.parts_of(layout.positions[position], self.samples_of(layout)):
            most[kind] = max(most.get(kind, 0), share)
        return {
            kind: position_memory(self.profile, layout, position, kind, share, self.frozen)
            for kind, share in most.items()
        }

    def predict(self, layout: Layout) -> Prediction:
        """Everything about a layout. Raises ConfigError for what profile or inventory do not know."""
        number, tails, times = len(layout.positions), self.tails(layout), self.stage_times(layout)
        actions = [layout.actions(position, self.frozen) for position in range(number)]
        line = timeline(actions, layout.chunks, times, tails)
        kinds = [self.kinds_of(stage) for stage in layout.positions]
        needs = tuple(self.memory_at(layout, position) for position in range(number))
        fullest = [max(of, key=lambda kind: of[kind].total - self.fleet.kinds[kind].memory_bytes) for of in needs]
        return Prediction(
            layout=layout,
            micro_batch_samples=self.samples_of(layout),
            kinds=tuple("+".join(dict.fromkeys(of)) for of in kinds),
            times=tuple(times),
            timeline=line,
            memory=tuple(of[kind] for of, kind in zip(needs, fullest, strict=True)),
            limit_bytes=tuple(self.fleet.kinds[kind].memory_bytes for kind in fullest),
            needs=needs,
            paces=tuple(pace for place in range(number) for pace in self._paces(layout, place, tails[place])),
            rank_kinds=tuple(
                kind for of, stage in zip(kinds, layout.positions, strict=True) for kind in of for _ in range(stage.tp)
            ),
        )

    def _paces(self, layout: Layout, position: int, tail_s: float) -> list[Pace]:
        """Of every rank at a position, in order; replicas of one kind with as many samples are alike."""
        stages, samples = layout.stages[position :: len(layout.positions)], self.samples_of(layout)
        paces = dict[tuple[str, int], Pace]()
        for part in self.parts_of(stages[0], samples):
            passes = [self.passes(stage, *part, layout.recompute) for stage in stages]
            paces[part] = Pace(tuple(f for f, _ in passes), tuple(b for _, b in passes), tail_s)
        shares = (end - start for start, end in stages[0].samples(samples))
        parts = zip(self.kinds_of(stages[0]), shares, strict=True)
        return [paces[part] for part in parts for _ in range(stages[0].tp)]


def tokens_moved(source: Stage, target: Stage, length: int, sequence_parallel: bool) -> tuple[float, float]:
    """Tokens that the busiest rank of a replica (sends, receives) for each sample of an edge.

    Those of all `titan.plan.edges.routes`: every sample of a sender goes to one replica, of which each tensor rank gets
    a copy or its slice of the positions.
    """
    source_cut, target_cut = (sequence_parallel and stage.tp > 1 for stage in (source, target))
    received = length / target.tp if target_cut else length
    if source_cut:
        sent = length / source.tp * (1 if target_cut else target.tp)
    else:  # copies take turns
        sent = received * math.ceil(target.tp / source.tp)
    return sent, received


def shared_samples(source: Stage, target: Stage, samples: int) -> Iterator[tuple[int, int, int]]:
    """(replica of source, replica of target, samples of a micro-batch that both have), where there are any."""
    given, taken = source.samples(samples), target.samples(samples)
    giver = taker = 0
    while giver < len(given) and taker < len(taken):
        (start, end), (begin, stop) = given[giver], taken[taker]
        if min(end, stop) > max(start, begin):
            yield giver, taker, min(end, stop) - max(start, begin)
        giver, taker = (giver + 1, taker) if end <= stop else (giver, taker + 1)
