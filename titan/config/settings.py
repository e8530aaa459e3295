"""What a run is: one frozen model a section of run.toml. docs/config.md is generated from it."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from titan.config.distillation import DistillSettings, LabelSettings, StartSettings
from titan.config.model import LayoutSettings, ModelSettings, OptimizerSettings, Precision
from titan.config.section import Name, Section

TEACHER = "teacher"
"""Name of the teacher's role; no student may have it."""


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
    storage: Literal["shared", "per-node"] = "shared"
    """Who sees the run folder: all hosts that have ranks; or with `per-node` the driver's host alone, to which ranks
    send what they keep, and from which they get what they need (docs/operations.md)."""


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
    """Samples in a step, over all ranks; of students that have no `batch_size` of their own, too."""
    heldout_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.02
    """Share of documents, chosen by content hash, that no role trains on."""
    shard_tokens: PositiveInt = 4_000_000
    """Tokens in one Arrow shard file."""
    workers: NonNegativeInt = 0
    """Processes that prepare data; 0 takes one a core."""
    cache: str | None = None
    """Folder for prepared corpora, shared by runs; the default is `data` beside the run folders."""


class TeacherSettings(Section):
    """The large model, trained on text alone."""

    model: ModelSettings | None = None
    """Shape of the teacher; required if it trains in this run. A `hf:` folder says it itself."""
    layout: LayoutSettings = LayoutSettings()
    """How the teacher is cut over ranks."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Optimizer of the teacher."""
    precision: Precision = "fp32"
    """Type of weights and activations; bf16 and fp16 keep fp32 master weights, fp16 scales its loss."""
    source: Annotated[str, Field(pattern=r"^(train|log:.+|hf:.+)$")] = "train"
    """Where labels come from: `train` is the teacher's own training pass in this run; `log:PATH` the label log of
    another run, finished or still training: PATH is its run folder, or `labels/NAME` in it. `hf:PATH` is a Hugging Face
    folder with a Llama model, such as `titan export` writes: its weights stay as they are, and its forward pass over
    the run's samples makes the labels; `data.tokenizer` must be, and by default is, that folder's. No teacher trains
    then."""

    @property
    def log(self) -> str | None:
        """The path of another run's label log, if labels come from one."""
        return self.source.removeprefix("log:") if self.source.startswith("log:") else None

    @property
    def pretrained(self) -> str | None:
        """The path of a Hugging Face folder, if that is the teacher: it is frozen, and only makes labels."""
        return self.source.removeprefix("hf:") if self.source.startswith("hf:") else None


class StudentSettings(Section):
    """One student. It learns the samples of every teacher step after its start."""

    name: Name
    """Names the student; `teacher` is taken."""
    model: ModelSettings
    """Shape of the student; its vocabulary is the run's."""
    layout: LayoutSettings = LayoutSettings()
    """How the student is cut over ranks."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Optimizer of the student; its schedule spans the student's own steps, from its start to the end of the run."""
    batch_size: PositiveInt | None = None
    """Samples in a step of its own: those of the teacher's steps in their order, regrouped. The default is that of its
    teacher, `data.batch_size`. Not for one that teaches others or learns features."""
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
    backpressure: Literal["spill", "skip", "wait"] = "spill"
    """What happens when it is slower than its teacher: `spill` falls behind as far as the log goes; `skip` jumps to the
    newest step when it is further behind than `max_lag`; with `wait` its teacher pauses instead."""
    max_lag: NonNegativeInt | None = None
    """Most steps behind its teacher that a student with `skip` or `wait` learns a step; required there."""
    distill: DistillSettings = DistillSettings()
    """How much the student learns from labels."""


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
    little room, `shrink` goes on with fewer ranks (in the planner's layout where kinds of devices are named), and
    grows again at a checkpoint once there is room; `wait` waits for room. `stop` ends the run, to be resumed by hand.
    """
    start_smaller: bool = False
    """Start with fewer ranks where there is not yet room for all, with `shrink`; roles grow as hosts join."""
    wait_s: PositiveFloat = 600.0
    """Longest wait for room; then the run ends."""
    max_restarts: NonNegativeInt = 5
    """Restarts of a role in a row without a new checkpoint; the next failure ends the run."""
    hang_timeout_s: PositiveFloat = 8.0
    """A process that has not answered for so long counts as hung, and is killed."""
    grace_s: PositiveFloat = 240.0
    """Time from SIGTERM to the end of the process. Every role stops after its step and saves; one that has not when the
    grace is nearly over is ended, with what its last checkpoint has."""
    min_free_bytes: NonNegativeInt = 0
    """Free room below which the disk of the run folder, or of `labels.copy_to`, counts as full: `labels.when_full` says
    what is done, and below half of it every role saves and the run ends. With 0 a write that fails ends the run."""
    spares: NonNegativeInt = 0
    """Processes a node that wait with their imports done; a role that starts again takes them over instead of starting
    its own. As many as the largest role has ranks on a node are best. Only for ranks on CPUs."""


class ObserveSettings(Section):
    """How a run is watched from outside."""

    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port at which the driver serves metrics for Prometheus; absent, it serves none."""
    metrics_host: str = "127.0.0.1"
    """Address that it listens on; `0.0.0.0` for a Prometheus on another host. Whoever reaches it can read the metrics.
    """


@dataclass(frozen=True)
class Role:
    """A model of the run: the teacher or a student."""

    name: str
    place: str
    """Where run.toml has it: `teacher`, `students.NAME`."""
    model: ModelSettings
    layout: LayoutSettings
    optimizer: OptimizerSettings
    precision: Precision
    batch_size: int
    frozen: bool = False
    """Whether its weights stay as they are: it has no gradients and no optimizer."""


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
    observe: ObserveSettings = ObserveSettings()

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
        """Whose ranks run, by name, the teacher first. There is no teacher where labels come from a log."""
        every = []
        teacher = self.teacher
        if teacher.log is None and teacher.model is not None:
            frozen, own = teacher.pretrained is not None, (teacher.model, teacher.layout, teacher.optimizer)
            every.append(Role(TEACHER, TEACHER, *own, teacher.precision, self.data.batch_size, frozen))
        for one in self.students:
            own, size = (one.model, one.layout, one.optimizer), one.batch_size or self.data.batch_size
            every.append(Role(one.name, f"students.{one.name}", *own, one.precision, size))
        return {role.name: role for role in every}

    def regroups(self, student: StudentSettings) -> bool:
        """Whether a student has another batch size than its teacher."""
        return student.batch_size not in (None, self.data.batch_size)

    def steps_in_hand(self, student: StudentSettings) -> int:
        """Most teacher steps of which a student may have samples that are in no full batch yet."""
        size, step = student.batch_size or self.data.batch_size, self.data.batch_size
        return -(-(size - math.gcd(size, step)) // step)
