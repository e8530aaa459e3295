"""What students learn from: labels, when they start with them, and how much they count."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from titan.config.section import Fraction, Section


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
    draws: Annotated[int, Field(ge=1, le=1024)] = 48
    """Drawn entries that a label of `sampled` may have beyond those; for `random` the number of draws (50 there)."""
    bytes_per_token: Annotated[float, Field(ge=4.0)] | None = 36.0
    """Mean size of a label with `sampled` and `top_k`, in every sample; absent, every entry is sent."""
    delivery: Literal["auto", "files", "service"] = "auto"
    """How students get labels: from the log's `files` in the run folder, or from a label `service` on the teacher's
    node; `auto` is `files` with a local Ray, and `service` in a cluster that is joined."""
    without_students: bool = False
    """Make labels even if the run has no students; those of other runs may join at any time by `teacher.source`."""
    keep: Literal["all", "needed"] = "all"
    """Old labels: `all` stay; with `needed` what the newest checkpoint of every student of this run is past is
    deleted, a file at a time, at the producer's checkpoints."""
    max_bytes: Annotated[int, Field(ge=65536)] | None = None
    """Most that a log may take on disk, index included; absent, there is no limit."""
    when_full: Literal["drop", "wait", "stop"] = "drop"
    """What a log of `max_bytes` does, or one whose disk has less than `recovery.min_free_bytes` free: `drop` deletes
    the oldest labels, which students that still needed them skip; `wait` pauses its teacher until there is room, which
    students' checkpoints make; `stop` ends the run."""
    segment_bytes: Annotated[int, Field(ge=4096)] = 64 << 20
    """Size at which a file of the log is full and the next begins; old labels go a file at a time. With `max_bytes` it
    is at most an eighth of that over the replicas that write."""
    copy_to: str | None = None
    """Folder, on another disk or on shared storage, that gets a second copy of each log, in PATH/NAME/labels: the
    labels of a step are on that disk before the step is committed. `titan resume` takes from it what a log lacks."""
    wait_s: PositiveFloat = 120.0
    """Longest pause of a teacher for students that it is to wait for, or for room in its log. Then it goes on without
    the student until that has caught up; without room the run ends."""
    temperature: Annotated[float, Field(ge=0.1, le=20.0)] = 1.0
    """T of the distillation loss, the same for all students of the run."""
    features: FeatureLabelSettings = FeatureLabelSettings()
    """Queries, keys, values and hidden states of one of the teacher's layers."""
