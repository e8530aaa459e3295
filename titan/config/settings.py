"""What a run is: one frozen model a section of run.toml. docs/config.md is generated from this file."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]

TEACHER = "teacher"
"""Name of the teacher's role; no student may have it."""
VOCAB_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this in every layout, so that shapes do not depend on the layout."""


class Section(BaseModel):
    """A section of run.toml: values are frozen, types are strict, unknown keys are mistakes."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )


class RunSettings(Section):
    """The run as a whole."""

    name: Name
    """Names the run; everything it writes is in `dir/name`."""
    dir: str = "runs"
    """Folder that holds run folders."""
    seed: NonNegativeInt = 1
    """Seeds initial weights and the order of samples. The result depends on nothing else that is random."""
    steps: PositiveInt
    """Optimizer steps of the teacher."""


class DataSettings(Section):
    """Text, and how it becomes samples."""

    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    """Folders, globs, .txt/.py/... files, .jsonl, .jsonl.gz, .parquet, or the built-in `python-stdlib`."""
    text_field: str = "text"
    """Field or column that holds the text in .jsonl and Parquet sources."""
    vocab_size: Annotated[int, Field(ge=300)] = 4096
    """Pieces of the SentencePiece model that is trained on the corpus (256 of them are raw bytes)."""
    tokenizer: str | None = None
    """A SentencePiece `.model` file to use instead of training one; `vocab_size` is then taken from it."""
    sequence_length: Annotated[int, Field(ge=8)] = 128
    """Tokens a sample predicts."""
    batch_size: PositiveInt = 16
    """Samples in a step, over all ranks; the same for every role."""
    heldout_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.02
    """Share of documents, chosen by content hash, that no role trains on."""
    shard_tokens: PositiveInt = 4_000_000
    """Tokens in one Arrow shard file."""
    workers: NonNegativeInt = 0
    """Processes that prepare data; 0 takes one a core."""
    cache: str | None = None
    """Folder for prepared corpora, shared by runs; the default is `data` beside the run folders."""


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


class TeacherSettings(Section):
    """The large model, trained on text alone."""

    model: ModelSettings | None = None
    """Shape of the teacher; required, unless its labels come from a log."""
    layout: LayoutSettings = LayoutSettings()
    """How the teacher is cut over ranks."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Optimizer of the teacher."""
    precision: Precision = "fp32"
    """Type of weights and activations; bf16 and fp16 keep fp32 master weights, fp16 scales its loss."""
    source: Annotated[str, Field(pattern=r"^(train|log:.+)$")] = "train"
    """Where labels come from: `train` is the teacher's own training pass in this run; `log:PATH` the label log of
    another run, finished or still training: PATH is its run folder, or `labels/NAME` in it. No teacher trains then."""

    @property
    def log(self) -> str | None:
        """The path of another run's label log, if labels come from one."""
        return self.source.removeprefix("log:") if self.source.startswith("log:") else None


class StartSettings(Section):
    """When a student starts. Set at most one of these; with none it starts with the log's first step."""

    step: NonNegativeInt | None = None
    """Start after this teacher step."""
    lead: PositiveFloat | None = None
    """Start when the teacher's smoothed training loss is this many nats below that of the fresh student."""
    now: bool = False
    """Start after the newest step of the log there is; with `teacher.source` of a run that still trains."""


class FeatureSettings(Section):
    """What a student learns from inside one of the teacher's layers: the weight of each loss, a mean over tokens.

    docs/features.md says more of each. Their weighted sum is multiplied by a, as labels are.
    """

    layer: NonNegativeInt | None = None
    """Layer of the student, counted from 0; the default is the last. Not with `distill.auxiliary_layer`."""
    relation_heads: PositiveInt | None = None
    """Heads that queries, keys and values are cut into for the first five; the default is the greatest common divisor
    of all head counts of both models."""
    query: NonNegativeFloat = 0.0
    """KL between the relations of queries with queries (MiniLMv2, arXiv 2012.15828)."""
    key: NonNegativeFloat = 0.0
    """KL between the relations of keys with keys."""
    value: NonNegativeFloat = 0.0
    """KL between the relations of values with values."""
    attention: NonNegativeFloat = 0.0
    """KL between the attentions, queries with keys (ERNIE 3.0 Titan, arXiv 2112.12731)."""
    attention_map: NonNegativeFloat = 0.0
    """Squared distance between the attentions."""
    hint: NonNegativeFloat = 0.0
    """Squared distance between hidden states, after a learned projection where widths differ (arXiv 1412.6550)."""
    affinity: NonNegativeFloat = 0.0
    """Distance between the cosines of hidden states (arXiv 2107.12087)."""

    @property
    def relations(self) -> dict[str, float]:
        """Weights of the losses over relation heads that count."""
        every = {name: getattr(self, name) for name in ("query", "key", "value", "attention", "attention_map")}
        return {name: weight for name, weight in every.items() if weight}

    @property
    def weights(self) -> dict[str, float]:
        """Weights of all losses that count; empty if nothing is learned from features."""
        hidden = {name: getattr(self, name) for name in ("hint", "affinity")}
        return self.relations | {name: weight for name, weight in hidden.items() if weight}


class DistillSettings(Section):
    """How much a student learns from labels: loss = (1 - a) * cross-entropy + a * T^2 * D(teacher, student)."""

    weight: Fraction = 0.9
    """Largest value of a; 0 makes a control that learns from text alone."""
    schedule: Literal["lead", "constant", "ramp", "wsd"] = "lead"
    """`lead`: a = weight * min(1, lead / full_lead), lead being the student's smoothed loss minus the teacher's;
    `constant`: a = weight; `ramp`: a rises linearly to weight over the first `ramp_fraction` of the student's steps;
    `wsd` rises so too, stays, and falls to 0 over the last `decay_fraction`."""
    full_lead: PositiveFloat = 0.3
    """Lead, in nats a token, from which on the whole weight is used."""
    ramp_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of the student's steps over which `ramp` and `wsd` rise."""
    decay_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of the student's steps over which `wsd` falls."""
    loss: Literal["forward_kl", "reverse_kl", "jsd", "mse"] = "forward_kl"
    """The divergence D: KL(teacher || student), KL(student || teacher), the generalised Jensen-Shannon divergence, or
    the mean squared difference of log-probabilities. Only `forward_kl` is unbiased with labels that are not whole."""
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Of `jsd`: the teacher's share of the middle distribution."""
    shrink: Fraction = 1.0
    """How far drawn entries correct the tail of a label: 1 is unbiased, less is less noisy, 0 ignores them."""
    features: FeatureSettings = FeatureSettings()
    """What the student learns from inside the teacher; nothing by default."""
    auxiliary_layer: bool = False
    """Learn features by an extra layer over the student's last, which is gone at export (ERNIE 3.0 Titan)."""


class StudentSettings(Section):
    """One student. It takes one step for every teacher step after its start."""

    name: Name
    """Names the student; `teacher` is taken."""
    model: ModelSettings
    """Shape of the student; its vocabulary is the run's."""
    layout: LayoutSettings = LayoutSettings()
    """How the student is cut over ranks."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Optimizer of the student; its schedule spans the steps from the student's start to the end of the run."""
    precision: Precision = "fp32"
    """Type of weights and activations."""
    seed: NonNegativeInt | None = None
    """Seeds the student's initial weights; the default is `run.seed`, so that students of one shape begin alike."""
    teacher: Name = TEACHER
    """Whose labels it learns: the teacher's, or those of another student, which is then a teacher assistant and makes
    a label log of its own."""
    init: str | None = None
    """Checkpoint that initial weights come from: `RUN/checkpoints/ROLE`, its newest, or `.../step-NNNNNNNN`; absent,
    they are random."""
    start: StartSettings = StartSettings()
    """When the student starts; a step or lead is that of its own teacher."""
    distill: DistillSettings = DistillSettings()
    """How much the student learns from labels."""


class FeatureLabelSettings(Section):
    """Features, sent if a student asks for some by `distill.features`: those that all students together ask for."""

    layer: NonNegativeInt | None = None
    """Layer of the teacher, counted from 0; the default is the last."""
    slots: Annotated[int, Field(ge=1, le=4096)] = 16
    """Steps of features that are held. A student that is further behind learns those steps without."""
    precision: Literal["bf16", "fp16"] = "bf16"
    """Type of the numbers that are sent; fp16 has three more bits and ends at 65504."""


class LabelSettings(Section):
    """Soft labels: what the teacher says about each token."""

    codec: Literal["sampled", "top_k", "random", "full", "hidden"] = "sampled"
    """`sampled`: the most likely entries and some drawn from the rest, as many of each for a token as serve it best:
    unbiased. `top_k`: the most likely entries, and the rest as one bucket: biased in the tail. `random`: entries drawn
    from the whole distribution (arXiv 2503.16870): unbiased and noisy. `full`: every log-probability. `hidden`: the
    teacher's last hidden states, and once a step its output weight, from which students make all of them again."""
    top_k: Annotated[int, Field(ge=1, le=1024)] = 15
    """Most likely entries that a label of `sampled` or `top_k` may have; a 16th would make their count longer."""
    draws: Annotated[int, Field(ge=1, le=1024)] = 16
    """Drawn entries that a label of `sampled` may have beyond those; for `random` the number of draws (50 there)."""
    bytes_per_token: Annotated[float, Field(ge=4.0)] | None = 36.0
    """Mean size of a label with `sampled` and `top_k`, in every sample; absent, every entry is sent."""
    delivery: Literal["auto", "files", "service"] = "auto"
    """How students get labels: from the log's `files` in the run folder, or from a label `service` on the teacher's
    node; `auto` is `files` with a local Ray, and `service` in a cluster that is joined."""
    without_students: bool = False
    """Make labels even if the run has no students; those of other runs may join at any time by `teacher.source`."""
    temperature: Annotated[float, Field(ge=0.1, le=20.0)] = 1.0
    """T of the distillation loss, the same for all students of the run."""
    features: FeatureLabelSettings = FeatureLabelSettings()
    """Queries, keys, values and hidden states of one of the teacher's layers."""


class CheckpointSettings(Section):
    """What survives a crash."""

    every_steps: PositiveInt = 200
    """Steps between checkpoints; the last step always has one."""
    keep: PositiveInt = 2
    """Newest checkpoints kept a role."""


class EvalSettings(Section):
    """Held-out loss."""

    every_steps: NonNegativeInt = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    samples: PositiveInt = 256
    """Held-out samples in an evaluation (fewer if there are fewer); always the same ones."""


class ClusterSettings(Section):
    """Ray, and how long to wait for things."""

    address: Annotated[str | None, BeforeValidator(lambda given: None if given == "local" else given)] = None
    """Ray cluster to join, `host:port`, or `auto` for what RAY_ADDRESS says; absent or `local`, one is started for the
    run."""
    nodes: PositiveInt = 1
    """Nodes of a Ray that is joined to wait for, at most `start_timeout_s`, before ranks are placed."""
    cpu_ranks_per_core: PositiveInt = 4
    """CPU ranks that may share a core of a machine without accelerators."""
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """Kind of device that ranks use; `auto` takes CUDA where torch sees it, then Ascend NPUs where torch_npu does."""
    inventory: str | None = None
    """File that lists the kinds of devices there are (docs/planner.md); absent, what Ray finds is all of one kind."""
    profile: str | None = None
    """File that says what the devices of the inventory take."""
    start_timeout_s: PositiveFloat = 300.0
    """Longest wait for all ranks to be up."""
    step_timeout_s: PositiveFloat = 300.0
    """Longest wait for a message inside a step, or for the next label."""
    dashboard_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of Ray's dashboard; absent, there is no dashboard."""


class RecoverySettings(Section):
    """What happens when a rank, its process or its host fails."""

    policy: Literal["shrink", "wait", "stop"] = "shrink"
    """Only the role concerned starts again, from its newest checkpoint; the others go on. Where a lost host leaves too
    little room, `shrink` goes on with fewer ranks, and grows again at a checkpoint once there is room; `wait` waits for
    room. `stop` ends the run, to be resumed by hand."""
    wait_s: PositiveFloat = 600.0
    """Longest wait for room; then the run ends."""
    max_restarts: NonNegativeInt = 5
    """Restarts of a role in a row without a new checkpoint; the next failure ends the run."""
    hang_timeout_s: PositiveFloat = 8.0
    """A process that has not answered for so long counts as hung, and is killed."""


@dataclass(frozen=True)
class Role:
    """A model that trains in the run: the teacher or a student."""

    name: str
    place: str
    """Where run.toml has it: `teacher`, `students.NAME`."""
    model: ModelSettings
    layout: LayoutSettings
    optimizer: OptimizerSettings
    precision: Precision


class RunConfig(Section):
    """A whole run.toml."""

    run: RunSettings
    data: DataSettings
    teacher: TeacherSettings
    students: tuple[StudentSettings, ...] = ()
    labels: LabelSettings = LabelSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    eval: EvalSettings = EvalSettings()
    cluster: ClusterSettings = ClusterSettings()
    recovery: RecoverySettings = RecoverySettings()

    @property
    def makes_labels(self) -> bool:
        """Whether this run's teacher writes a label log."""
        return self.teacher.log is None and (bool(self.students) or self.labels.without_students)

    def teaches(self, role: str) -> bool:
        """Whether a role of this run makes a label log."""
        return self.makes_labels if role == TEACHER else any(student.teacher == role for student in self.students)

    @property
    def serves_labels(self) -> bool:
        """Whether students of this run get their labels from a label service."""
        delivery = self.labels.delivery
        joined = self.cluster.address is not None
        return self.makes_labels and bool(self.students) and (delivery == "service" or (delivery == "auto" and joined))

    @property
    def roles(self) -> dict[str, Role]:
        """Who trains, by name, the teacher first. No teacher does whose labels come from a log."""
        every = []
        teacher = self.teacher
        if teacher.log is None and teacher.model is not None:
            every.append(Role(TEACHER, TEACHER, teacher.model, teacher.layout, teacher.optimizer, teacher.precision))
        every += [
            Role(one.name, f"students.{one.name}", one.model, one.layout, one.optimizer, one.precision)
            for one in self.students
        ]
        return {role.name: role for role in every}
