"""What a role is: the shape of its model, how it is cut over ranks, its optimizer."""

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
)

from titan.config.section import Fraction, Name, Section

VOCAB_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this in every layout, so that shapes do not depend on the layout."""


class ModelSettings(Section):
    """Shape of a decoder: RMSNorm, rotary positions, SwiGLU, grouped-query attention."""

    layers: PositiveInt
    """Transformer layers."""
    hidden: PositiveInt
    """Width of the hidden states."""
    heads: PositiveInt
    """Query heads; must divide `hidden`."""
    kv_heads: PositiveInt | None = None
    """Key and value heads; must divide `heads`. The default is `heads`."""
    ffn: PositiveInt
    """Inner width of the gated feed-forward network."""
    tied: bool = False
    """Share the embedding with the output weight."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square inside RMSNorm."""

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads after the default."""
        return self.kv_heads or self.heads


Precision = Literal["fp32", "bf16", "fp16"]


def _as_tuple(value: object) -> object:
    """A number may stand for a list of one."""
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, int) else value


def _form_of(value: object) -> str:
    """Which of two forms a value has, so that a mistake is told of that form alone."""
    return "kinds" if isinstance(value, list | tuple) else "kind"


class StageSettings(Section):
    """One pipeline stage of a layout whose stages are unlike."""

    layers: Annotated[tuple[PositiveInt, ...], BeforeValidator(_as_tuple)]
    """Transformer layers; with `chunks` above 1 a list, one number a chunk."""
    tp: PositiveInt = 1
    """Tensor-parallel degree."""
    dp: PositiveInt = 1
    """Replicas, sharing the samples of a micro-batch."""
    shard: PositiveInt = 1
    """Ranks that share optimizer state: 1 (none) or `dp`."""
    shares: tuple[PositiveInt, ...] | None = None
    """How many parts of a micro-batch each replica takes, for example [3, 1]; the default is equal parts."""
    precision: Precision | None = None
    """Type of weights and activations; the default is the role's."""
    device: (
        Annotated[
            Annotated[Name, Tag("kind")] | Annotated[tuple[Name, ...], Tag("kinds")],
            Discriminator(_form_of),
        ]
        | None
    ) = None
    """Kind of device, as the inventory names it; the default is any. A list where replicas are of several kinds: one
    for each of `islands`."""
    static_shapes: bool = False
    """Fill every replica's part of a micro-batch up to the largest, for devices that compile for fixed shapes. The
    filling is cut off again before it could count."""
    islands: tuple[PositiveInt, ...] | None = None
    """Replicas in each island, adding up to `dp`, where one fast network does not join all of them: gradients are
    reduced inside each island and exchanged in fp32 over the host's network."""

    @property
    def kinds(self) -> tuple[str | None, ...]:
        """Kind of device of each replica; None for any."""
        if not isinstance(self.device, tuple):
            return (self.device,) * self.dp
        return tuple(
            kind for kind, size in zip(self.device, self.islands or (self.dp,), strict=True) for _ in range(size)
        )


class LayoutSettings(Section):
    """How a role is cut over ranks: `tp * pp * dp` of them, or stage by stage."""

    tp: PositiveInt = 1
    """Tensor-parallel degree; must divide `kv_heads`, `ffn` and `hidden`."""
    pp: PositiveInt = 1
    """Pipeline stages."""
    dp: PositiveInt = 1
    """Replicas of each stage, sharing the samples of a micro-batch."""
    layers: tuple[PositiveInt, ...] | None = None
    """Layers of each stage, first stage first (with `chunks`, pp times as many); the default is as even as can be."""
    shard: PositiveInt = 1
    """Ranks that share optimizer state: 1 (none) or `dp`."""
    stages: Annotated[tuple[StageSettings, ...], Field(min_length=1)] | None = None
    """Stages one by one, where they are unlike; `tp`, `pp`, `dp`, `layers` and `shard` are then left out."""
    planned: bool = False
    """Let titan choose stages and micro-batches, for the devices of `cluster.inventory` by what `cluster.profile` says
    of them; what describes stages is then left out."""
    mixed: bool = True
    """With `planned`: whether a stage may have replicas of several kinds of devices, with unequal shares of samples,
    where that is faster. The teacher's counts for all roles that are planned."""
    micro_batches: PositiveInt | None = None
    """Micro-batches in a step; each is split over `dp`. The default is `2 * pp`, or 1 without a pipeline."""
    schedule: Literal["1f1b", "interleaved"] = "1f1b"
    """Order of passes. `interleaved` has a smaller bubble; it needs `chunks` of 2 or more, and `micro_batches` that are
    a multiple of the stages."""
    chunks: PositiveInt = 1
    """Separate runs of layers that each stage holds under the interleaved schedule."""
    transport: Literal["auto", "direct", "host"] = "auto"
    """How activations cross between stages: `direct` by torch.distributed, `host` through host memory and TCP, which
    joins devices that speak no common collective library; `auto` is `host` where two stages' devices differ."""
    sequence_parallel: bool = False
    """Cut norms and residuals along the sequence inside a tensor-parallel group."""
    recompute: bool = False
    """Keep only each layer's input and compute its activations again in the backward pass."""

    @property
    def num_stages(self) -> int:
        """Pipeline stages, each on ranks of its own."""
        return self.pp if self.stages is None else len(self.stages)

    @property
    def ranks(self) -> int:
        """Processes this layout needs."""
        if self.stages is not None:
            return sum(stage.tp * stage.dp for stage in self.stages)
        return self.tp * self.pp * self.dp

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches in a step after the default."""
        return self.micro_batches or (1 if self.num_stages == 1 else 2 * self.num_stages)


class OptimizerSettings(Section):
    """AdamW with a warm-up and a decay."""

    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    warmup_steps: NonNegativeInt = 50
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    final_fraction: Fraction = 0.1
    """Learning rate at the last step, as a share of the peak."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices; norms have none."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    clip: PositiveFloat = 1.0
    """Largest norm of the gradient over all parameters of the role."""
