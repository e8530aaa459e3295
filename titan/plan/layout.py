"""A role's layout as frozen data: its stages, which blocks each holds, and where every rank stands."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from titan.config.model import LayoutSettings, ModelSettings, StageSettings
from titan.config.settings import RunConfig
from titan.plan.schedule import Pass, Schedule, ScheduleName, make_schedule

EMBEDDING = "embedding"
FINAL_NORM = "final_norm"
HEAD = "head"


@dataclass(frozen=True)
class Stage:
    """Named blocks on `tp * dp` ranks: maybe the embedding, layers [first_layer, end_layer), maybe the head."""

    index: int
    """Place in the order of the model."""
    first_layer: int
    end_layer: int
    has_embedding: bool
    has_head: bool
    tp: int
    dp: int
    shard: int
    first_rank: int
    chunk: int = 0
    """Which of the stages on the same ranks this is; 0 unless the schedule is interleaved."""
    shares: tuple[int, ...] = ()
    """Parts of a micro-batch that each replica takes; empty for equal parts."""
    precision: str | None = None
    """Type of weights and activations; None for the role's."""
    device: str | tuple[str, ...] | None = None
    """Kind of device in the inventory, or one for each island; None for any."""
    islands: tuple[int, ...] = ()
    """Replicas in each island; empty for one island."""
    static_shapes: bool = False
    """Whether every replica computes on as many samples as the one that has most."""

    @property
    def ranks(self) -> range:
        """Ranks of the role's world that hold this stage; tensor rank runs fastest."""
        return range(self.first_rank, self.first_rank + self.tp * self.dp)

    @property
    def kinds(self) -> tuple[str | None, ...]:
        """Kind of device of each replica; None for any."""
        if not isinstance(self.device, tuple):
            return (self.device,) * self.dp
        sizes = self.islands or (self.dp,)
        return tuple(kind for kind, size in zip(self.device, sizes, strict=True) for _ in range(size))

    def rank(self, replica: int, tensor: int) -> int:
        """World rank of one tensor rank of one replica."""
        return self.first_rank + replica * self.tp + tensor

    def samples(self, count: int) -> tuple[tuple[int, int], ...]:
        """[start, end) of each replica's samples in a micro-batch of `count`."""
        return replica_samples(count, self.shares or (1,) * self.dp)


@dataclass(frozen=True)
class Place:
    """Where a rank stands in its layout."""

    rank: int
    stages: tuple[Stage, ...]
    """Stages this rank holds a part of, in the order of the model; one unless the schedule is interleaved."""
    position: int
    """Which of the pipeline's positions it is at."""
    replica: int
    tensor: int

    @property
    def stage(self) -> Stage:
        """The first of its stages; what describes ranks (tp, dp, shard, shares) is the same for all."""
        return self.stages[0]

    @property
    def device(self) -> str | None:
        """Its kind of device; None for any."""
        return self.stage.kinds[self.replica]

    @property
    def head_stage(self) -> Stage | None:
        """The stage with the head, if this rank holds it."""
        return self.stages[-1] if self.stages[-1].has_head else None


@dataclass(frozen=True)
class Layout:
    """All stages of a role, first to last, and how a step is cut."""

    stages: tuple[Stage, ...]
    micro_batches: int
    sequence_parallel: bool
    recompute: bool
    schedule: ScheduleName = "1f1b"
    chunks: int = 1
    transport: Literal["direct", "host"] = "direct"

    @property
    def positions(self) -> tuple[Stage, ...]:
        """The first stage at each pipeline position: one a group of ranks."""
        return self.stages[: len(self.stages) // self.chunks]

    @property
    def num_ranks(self) -> int:
        """Processes of the role."""
        return sum(len(stage.ranks) for stage in self.positions)

    def place(self, rank: int) -> Place:
        """Stages, replica and tensor rank of a world rank."""
        position = next(index for index, stage in enumerate(self.positions) if rank in stage.ranks)
        stages = self.stages[position :: len(self.positions)]
        return Place(rank, stages, position, *divmod(rank - stages[0].first_rank, stages[0].tp))

    def actions(self, position: int, frozen: bool = False) -> Schedule:
        """What the ranks at a position do in a training step; frozen: the forward passes of one, in their order."""
        every = make_schedule(self.schedule, position, len(self.positions), self.chunks, self.micro_batches)
        return tuple(action for action in every if action.kind is Pass.FORWARD) if frozen else every

    def to_json(self) -> dict[str, Any]:
        """Plain data for plan.json."""
        return asdict(self) | {"num_ranks": self.num_ranks}


def even_split(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage, as even as can be; what is left over goes to the middle stages first.

    The first stage also has the embedding and the last the head, so they are the ones to spare.
    """
    base, extra = divmod(layers, stages)
    order = sorted(range(stages), key=lambda stage: (abs(2 * stage - (stages - 1)), stage))
    return tuple(base + (stage in order[:extra]) for stage in range(stages))


def make_layout(model: ModelSettings, settings: LayoutSettings) -> Layout:
    """The layout that settings describe; the settings have been checked."""
    wanted = settings.stages or _alike(model, settings)
    chunks, count = settings.chunks, len(wanted) * settings.chunks
    first_ranks = [0, *itertools.accumulate(stage.tp * stage.dp for stage in wanted)]
    stages: list[Stage] = []
    for index in range(count):
        chunk, position = divmod(index, len(wanted))
        of = wanted[position]
        first_layer = stages[-1].end_layer if stages else 0
        stages.append(
            Stage(
                index=index,
                first_layer=first_layer,
                end_layer=first_layer + of.layers[chunk],
                has_embedding=index == 0,
                has_head=index == count - 1,
                tp=of.tp,
                dp=of.dp,
                shard=of.shard,
                first_rank=first_ranks[position],
                chunk=chunk,
                shares=of.shares or (),
                precision=of.precision,
                device=of.device,
                islands=of.islands or (),
                static_shapes=of.static_shapes,
            )
        )
    mixed = len({kind for stage in wanted for kind in stage.kinds}) > 1
    transport = settings.transport if settings.transport != "auto" else ("host" if mixed else "direct")
    return Layout(
        tuple(stages), settings.num_micro_batches, settings.sequence_parallel, settings.recompute, settings.schedule,
        chunks, transport,
    )  # fmt: skip


def _alike(model: ModelSettings, settings: LayoutSettings) -> tuple[StageSettings, ...]:
    """Stages that differ in nothing but their layers."""
    split = settings.layers or even_split(model.layers, settings.pp * settings.chunks)
    return tuple(
        StageSettings(layers=split[position :: settings.pp], tp=settings.tp, dp=settings.dp, shard=settings.shard)
        for position in range(settings.pp)
    )


def role_layouts(config: RunConfig) -> dict[str, Layout]:
    """The layout of every role, the teacher's first."""
    return {name: make_layout(role.model, role.layout) for name, role in config.roles.items()}


def replica_samples(count: int, shares: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """[start, end) of each replica's samples when `count` are split by integer shares, as near to them as can be."""
    whole = sum(shares)
    ends = [count * taken // whole for taken in itertools.accumulate(shares, initial=0)]
    return tuple(itertools.pairwise(ends))
