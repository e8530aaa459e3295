"""A role's layout as frozen data: its stages, which blocks each holds, and where every rank stands."""

import itertools
from dataclasses import asdict, dataclass
from typing import Any

from titan.config.settings import TEACHER, LayoutSettings, ModelSettings, RunConfig

EMBEDDING = "embedding"
FINAL_NORM = "final_norm"
HEAD = "head"


@dataclass(frozen=True)
class Stage:
    """Named blocks on `tp * dp` ranks: maybe the embedding, layers [first_layer, end_layer), maybe the head."""

    index: int
    first_layer: int
    end_layer: int
    has_embedding: bool
    has_head: bool
    tp: int
    dp: int
    shard: int
    first_rank: int

    @property
    def ranks(self) -> range:
        """Ranks of the role's world that hold this stage; tensor rank runs fastest."""
        return range(self.first_rank, self.first_rank + self.tp * self.dp)

    def rank(self, replica: int, tensor: int) -> int:
        """World rank of one tensor rank of one replica."""
        return self.first_rank + replica * self.tp + tensor


@dataclass(frozen=True)
class Place:
    """Where a rank stands in its layout."""

    rank: int
    stage: Stage
    replica: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """All stages of a role, first to last, and how a step is cut."""

    stages: tuple[Stage, ...]
    micro_batches: int
    sequence_parallel: bool
    recompute: bool

    @property
    def num_ranks(self) -> int:
        """Processes of the role."""
        return sum(len(stage.ranks) for stage in self.stages)

    @property
    def tied_ranks(self) -> tuple[int, int]:
        """First ranks of the two stages that hold a tied embedding (equal when there is one stage)."""
        return self.stages[0].first_rank, self.stages[-1].first_rank

    def place(self, rank: int) -> Place:
        """Stage, replica and tensor rank of a world rank."""
        stage = next(stage for stage in self.stages if rank in stage.ranks)
        return Place(rank, stage, *divmod(rank - stage.first_rank, stage.tp))

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
    split = settings.layers or even_split(model.layers, settings.pp)
    stages, first_layer, first_rank = [], 0, 0
    for index, num_layers in enumerate(split):
        stages.append(
            Stage(
                index=index,
                first_layer=first_layer,
                end_layer=first_layer + num_layers,
                has_embedding=index == 0,
                has_head=index == len(split) - 1,
                tp=settings.tp,
                dp=settings.dp,
                shard=settings.shard,
                first_rank=first_rank,
            )
        )
        first_layer += num_layers
        first_rank += settings.tp * settings.dp
    return Layout(tuple(stages), settings.num_micro_batches, settings.sequence_parallel, settings.recompute)


def role_layouts(config: RunConfig) -> dict[str, Layout]:
    """The layout of every role, the teacher's first."""
    layouts = {TEACHER: make_layout(config.teacher.model, config.teacher.layout)}
    return layouts | {student.name: make_layout(student.model, student.layout) for student in config.students}


def replica_shares(samples: int, dp: int) -> tuple[tuple[int, int], ...]:
    """[start, end) of each replica's samples in a micro-batch: integer shares that need not be equal."""
    bounds = [samples * replica // dp for replica in range(dp + 1)]
    return tuple(itertools.pairwise(bounds))
