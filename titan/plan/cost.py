"""What a layout takes on a fleet: its step's exact timeline, memory on every rank, and the pace of paced devices."""

import math
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
    kinds: tuple[str, ...]
    """Kind of device at each position."""
    times: tuple[StageTimes, ...]
    timeline: Timeline
    memory: tuple[Memory, ...]
    """At each position, on the rank that needs most."""
    limit_bytes: tuple[float, ...]
    paces: tuple[Pace, ...]
    """By rank: what its device takes, and what it is told to take where it is paced."""

    @property
    def step_s(self) -> float:
        """Seconds of an optimizer step."""
        return self.timeline.step_s

    @property
    def busy_s(self) -> tuple[float, ...]:
        """By rank: seconds that its passes of one step take."""
        number = self.layout.micro_batches
        return tuple(number * (sum(pace.forward_s) + sum(pace.backward_s)) for pace in self.paces)

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

    def kind_of(self, stage: Stage) -> str:
        """The kind of device of a stage. Raises ConfigError if it is not in the inventory or not told."""
        known = ", ".join(self.fleet.kinds)
        if stage.device is None:
            if len(self.fleet.kinds) == 1:
                return next(iter(self.fleet.kinds))
            raise ConfigError(f"stage {stage.index} names no device; give one of {known} (layout.stages.device)")
        if stage.device not in self.fleet.kinds:
            raise ConfigError(f"stage {stage.index} wants device {stage.device!r}; the inventory has {known}")
        return stage.device

    def passes(self, stage: Stage, samples: int, recompute: bool) -> tuple[float, float]:
        """Seconds forward and backward of one micro-batch, of which a replica has `samples`.

        recompute: whether the backward pass does the layers' forward pass again (arXiv 1604.06174); embedding and head
                   keep what they need
        """
        kind, layers = self.kind_of(stage), stage.end_layer - stage.first_layer
        layer = self.profile.block(kind, "layer", stage.tp, samples)
        forward_s, backward_s = layers * layer.forward_s, layers * layer.backward_in(recompute)
        for has, name in ((stage.has_embedding, "embedding"), (stage.has_head, "head")):
            if has:
                block = self.profile.block(kind, name, stage.tp, samples)  # type: ignore[arg-type]
                forward_s += block.forward_s
                backward_s += block.backward_s
        return forward_s, backward_s

    def edge_s(self, source: Stage, target: Stage, samples: int, sequence_parallel: bool) -> float:
        """Seconds until the last part of a micro-batch has crossed an edge; messages of one rank go one by one."""
        task = self.task
        network = self.fleet.network(self.kind_of(source), self.kind_of(target))
        size = task.model.hidden * DTYPE_BYTES[source.precision or task.precision]
        moved = _busiest(source, target, samples, task.sequence_length, sequence_parallel)
        return network.seconds(moved * size)

    def tail_s(self, stages: tuple[Stage, ...]) -> float:
        """Gradient exchange and optimizer of a position.

        A ring moves 2 (d - 1) / d of the gradients over each link; over a node's border it is the island's network.
        """
        stage = stages[0]
        kind, precision = self.kind_of(stage), stage.precision or self.task.precision
        parameters = sum(stage_parameters(self.task, part) for part in stages)
        seconds = 0.0
        if stage.dp > 1:
            moved = 2 * (stage.dp - 1) / stage.dp * 4 * parameters
            seconds += self.fleet.network(kind, kind).seconds(moved)
        state = parameters * bytes_per_parameter(precision, stage.shard)
        return seconds + state / self.profile.update_bytes_per_s(kind)

    def samples_of(self, layout: Layout) -> int:
        """Samples of a micro-batch, over all replicas."""
        return self.task.batch_size // layout.micro_batches

    def stage_times(self, layout: Layout) -> list[StageTimes]:
        """Passes and messages of every stage, those of its slowest replica."""
        samples, cut, last = self.samples_of(layout), layout.sequence_parallel, len(layout.stages) - 1
        times = []
        for stage in layout.stages:
            shares = {end - start for start, end in stage.samples(samples)}
            passes = [self.passes(stage, share, layout.recompute) for share in shares]
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

    def memory_at(self, layout: Layout, position: int) -> Memory:
        """Of the rank at a position that needs most."""
        stage = layout.positions[position]
        most = max(end - start for start, end in stage.samples(self.samples_of(layout)))
        return position_memory(self.profile, layout, position, self.kind_of(stage), most)

    def predict(self, layout: Layout) -> Prediction:
        """Everything about a layout. Raises ConfigError for what profile or inventory do not know."""
        number, tails, times = len(layout.positions), self.tails(layout), self.stage_times(layout)
        line = timeline([layout.actions(position) for position in range(number)], layout.chunks, times, tails)
        kinds = tuple(self.kind_of(stage) for stage in layout.positions)
        memory = tuple(self.memory_at(layout, position) for position in range(number))
        limits = tuple(self.fleet.kinds[kind].memory_bytes for kind in kinds)
        paces = tuple(pace for position in range(number) for pace in self._paces(layout, position, tails[position]))
        return Prediction(layout, kinds, tuple(times), line, memory, limits, paces)

    def _paces(self, layout: Layout, position: int, tail_s: float) -> list[Pace]:
        """Of every rank at a position, in order; replicas with as many samples are alike."""
        stages, of_share = layout.stages[position :: len(layout.positions)], dict[int, Pace]()
        paces = list[Pace]()
        for start, end in stages[0].samples(self.samples_of(layout)):
            share = end - start
            if share not in of_share:
                passes = [self.passes(stage, share, layout.recompute) for stage in stages]
                of_share[share] = Pace(tuple(f for f, _ in passes), tuple(b for _, b in passes), tail_s)
            paces += [of_share[share]] * stages[0].tp
        return paces


def _busiest(source: Stage, target: Stage, samples: int, length: int, sequence_parallel: bool) -> float:
    """Tokens that the busiest rank of an edge sends or receives: the most over all `titan.plan.edges.routes`.

    Every sample of a sender goes to one replica, of which each tensor rank gets a copy or its slice of the positions.
    """
    source_cut, target_cut = (sequence_parallel and stage.tp > 1 for stage in (source, target))
    received = length / target.tp if target_cut else length
    if source_cut:
        sent = length / source.tp * (1 if target_cut else target.tp)
    else:  # copies take turns
        sent = received * math.ceil(target.tp / source.tp)
    most_sent, most_received = (max(end - start for start, end in stage.samples(samples)) for stage in (source, target))
    return max(most_sent * sent, most_received * received)
