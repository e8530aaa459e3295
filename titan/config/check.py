"""What types cannot say: settings that contradict each other. Each finding is one line: setting, value, remedy."""

import re
from collections.abc import Iterator

from titan.config.check_batch import batch_mistakes
from titan.config.check_features import feature_mistakes
from titan.config.check_layout import divisors, layout_mistakes
from titan.config.check_log import log_mistakes
from titan.config.model import ModelSettings, OptimizerSettings
from titan.config.section import Section
from titan.config.settings import TEACHER, RunConfig, StudentSettings

FEWEST_DRAWS = 8
"""Of `sampled`."""


def find_mistakes(config: RunConfig) -> list[str]:
    """All contradictions in a config whose types are right."""
    mistakes: list[str] = []
    for role in config.roles.values():
        mistakes += _model_mistakes(f"{role.place}.model", role.model)
        mistakes += layout_mistakes(f"{role.place}.layout", role, config.data)
        mistakes += _optimizer_mistakes(f"{role.place}.optimizer", role.optimizer)
    mistakes += _teacher_mistakes(config)
    mistakes += _student_mistakes(config)
    mistakes += _label_mistakes(config)
    mistakes += log_mistakes(config)
    mistakes += feature_mistakes(config)
    mistakes += batch_mistakes(config)
    mistakes += _place_mistakes(config)
    mistakes += _storage_mistakes(config)
    mistakes += _plan_mistakes(config)
    if config.recovery.start_smaller and config.recovery.policy != "shrink":
        mistakes.append(
            f"recovery.start_smaller is true, but recovery.policy is {config.recovery.policy!r}, with which no role "
            "ever has fewer ranks; leave it out, or use 'shrink'"
        )
    return mistakes


def _model_mistakes(name: str, model: ModelSettings) -> Iterator[str]:
    if model.hidden % model.heads:
        nearest = max(model.heads, round(model.hidden / model.heads) * model.heads)
        yield f"{name}.hidden must be a multiple of heads ({model.heads}), got {model.hidden}; try {nearest}"
    elif (model.hidden // model.heads) % 2:
        yield (
            f"{name}.hidden / heads must be even for rotary positions, got {model.hidden} / {model.heads}; "
            f"try hidden {2 * model.hidden}"
        )
    if model.heads % model.num_kv_heads:
        yield (
            f"{name}.kv_heads must divide heads ({model.heads}), got {model.kv_heads}; "
            f"try {divisors(model.heads, model.num_kv_heads)}"
        )


def _optimizer_mistakes(name: str, optimizer: OptimizerSettings) -> Iterator[str]:
    if optimizer.schedule == "constant" and not _is_default(optimizer, "final_fraction"):
        yield f"{name}.final_fraction is {optimizer.final_fraction}, but schedule is 'constant'; leave it out"


def _teacher_mistakes(config: RunConfig) -> Iterator[str]:
    teacher = config.teacher
    if teacher.log is None and teacher.model is None:
        yield "teacher.model is missing and has no default; add it, docs/config.md says what it is"
    if teacher.log is not None and not config.students:
        yield f"teacher.source is {teacher.source!r}, but there are no students to learn from it; add [[students]]"
    if teacher.pretrained is not None:
        yield from _frozen_mistakes(config)


def _frozen_mistakes(config: RunConfig) -> Iterator[str]:
    """What a teacher that only makes labels has no use for."""
    teacher = config.teacher
    frozen = f"but teacher.source is {teacher.source!r}"
    if not config.makes_labels:
        yield f"{frozen.removeprefix('but ')}, but nobody wants labels; add [[students]], or labels.without_students"
    for name in OptimizerSettings.model_fields:
        if not _is_default(teacher.optimizer, name):
            yield f"teacher.optimizer.{name} is set, {frozen}, which is not trained; leave it out"
    layout = teacher.layout
    if layout.planned:
        yield f"teacher.layout.planned plans for training, {frozen}, which has only forward passes; give tp, pp and dp"
    if layout.recompute:
        yield f"teacher.layout.recompute is for backward passes, {frozen}, which has none; leave it out"
    if layout.shard > 1 or any(stage.shard > 1 for stage in layout.stages or ()):
        yield f"teacher.layout.shard cuts optimizer state, {frozen}, which has none; leave it out"


def _student_mistakes(config: RunConfig) -> Iterator[str]:
    names = [student.name for student in config.students]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"students.name {name!r} is used {names.count(name)} times; give every student a name of its own"
    for student in config.students:
        here = f"students.{student.name}"
        distill = student.distill
        if distill.schedule == "wsd" and distill.ramp_fraction + distill.decay_fraction > 1:
            yield (
                f"{here}.distill.ramp_fraction is {distill.ramp_fraction:g} and decay_fraction "
                f"{distill.decay_fraction:g}, more than 1 in sum; make one smaller"
            )
        if student.name == TEACHER:
            yield f"{here}.name is taken by the teacher; choose another"
        if student.teacher != TEACHER and student.teacher not in names:
            known = ", ".join([TEACHER, *(name for name in names if name != student.name)])
            yield f"{here}.teacher is {student.teacher!r}, which is no role of this run; choose one of {known}"
        elif chain := _circle(student, config):
            yield f"{here}.teacher leads in a circle: {' learns from '.join(chain)}; let one learn from {TEACHER!r}"
        start = student.start
        if (start.step is not None) + (start.lead is not None) + start.now > 1:
            given = {name: value for name, value in start.model_dump().items() if value not in (None, False)}
            yield f"{here}.start has {' and '.join(f'{name} ({value})' for name, value in given.items())}; keep one"
        if start.step is not None and start.step >= config.run.steps:
            yield f"{here}.start.step is {start.step}, run.steps is {config.run.steps}; start earlier"


def _circle(student: StudentSettings, config: RunConfig) -> list[str]:
    """Names from a student by its teachers back to itself; [] if the way ends with the teacher."""
    teacher_of = {other.name: other.teacher for other in config.students if other.name != TEACHER}
    chain = [student.name]
    while (name := teacher_of.get(chain[-1])) is not None and name not in chain:
        chain.append(name)
    return [*chain, student.name] if name == student.name != TEACHER else []


def _is_default(section: Section, name: str) -> bool:
    """Whether a setting has its default. That it was named says nothing: config.toml of a run names every one."""
    return bool(getattr(section, name) == type(section).model_fields[name].default)


def _has_head(config: RunConfig) -> bool:
    """Whether labels hold the likeliest entries."""
    return config.labels.codec in ("sampled", "top_k")


def would_bias(loss: str, codec: str) -> bool:
    """Whether labels of a codec are drawn in a way that a loss cannot correct for."""
    return loss != "forward_kl" and (codec == "random" or (codec == "sampled" and loss != "mse"))


def _label_mistakes(config: RunConfig) -> Iterator[str]:
    if (
        config.students
        and config.data.tokenizer is None
        and _has_head(config)
        and config.labels.top_k > config.data.vocab_size
    ):
        yield (
            f"labels.top_k is {config.labels.top_k}, more than data.vocab_size ({config.data.vocab_size}); "
            "a few dozen are enough"
        )
    if config.labels.codec == "sampled" and config.labels.draws < FEWEST_DRAWS:
        yield (
            f"labels.draws is {config.labels.draws}; with labels.codec sampled at least {FEWEST_DRAWS} are needed, "
            "or what a draw stands for would be mostly chance; leave it out for 48"
        )

    for student in config.students if config.teacher.log is None else ():  # of a log its own codec counts
        loss, codec = student.distill.loss, config.labels.codec
        if would_bias(loss, codec):
            yield (
                f"students.{student.name}.distill.loss is {loss!r}, which drawn labels (labels.codec {codec!r}) would "
                "bias; set labels.codec to 'top_k' or 'full', or the loss to 'forward_kl'"
            )
    labels = config.labels
    used = {
        "sampled": ("top_k", "draws", "bytes_per_token"),
        "top_k": ("top_k", "bytes_per_token"),
        "random": ("draws",),
    }
    for name in ("top_k", "draws", "bytes_per_token"):
        if not _is_default(labels, name) and name not in used.get(labels.codec, ()):
            yield f"labels.{name} is set, but labels.codec {labels.codec!r} has no use for it; leave it out"


def _plan_mistakes(config: RunConfig) -> Iterator[str]:
    """What planning needs."""
    cluster = config.cluster
    for role in config.roles.values():
        name, layout = role.place, role.layout
        if layout.planned and (cluster.inventory is None or cluster.profile is None):
            missing = "inventory" if cluster.inventory is None else "profile"
            yield f"{name}.layout.planned needs cluster.{missing}, which is absent; give the path of one"
    if cluster.profile is not None and cluster.inventory is None:
        yield f"cluster.profile is {cluster.profile!r}, but cluster.inventory is absent; give both or neither"


def _place_mistakes(config: RunConfig) -> Iterator[str]:
    """Paths and addresses."""
    paths = (
        ("run.dir", config.run.dir),
        ("teacher.source", config.teacher.log or config.teacher.pretrained),
        ("data.cache", config.data.cache),
        ("data.tokenizer", config.data.tokenizer),
        ("labels.copy_to", config.labels.copy_to),
        ("cluster.inventory", config.cluster.inventory),
        ("cluster.profile", config.cluster.profile),
    )
    for name, path in paths:
        if path is not None and "\0" in path:
            yield f"{name} is {path!r}; a path has no NUL character, take it out"
    cluster = config.cluster
    if cluster.address is None:
        return
    port = re.fullmatch(r"[^/\s]+:(\d+)", cluster.address)
    if cluster.address != "auto" and (port is None or not 0 < int(port[1]) < 65536):
        yield (
            f"cluster.address is {cluster.address!r}; want host:port of a running Ray (`ray start --head` prints it), "
            "or leave it out for a local one"
        )
    if cluster.dashboard_port is not None:
        yield (
            f"cluster.dashboard_port is {cluster.dashboard_port}, but a Ray that is joined at cluster.address has "
            "chosen its own; leave it out"
        )


def _storage_mistakes(config: RunConfig) -> Iterator[str]:
    """What ranks cannot have of a run folder that their hosts do not see."""
    if config.run.storage == "shared":
        return
    here, labels = "but run.storage is 'per-node'", config.labels
    if labels.delivery == "files":
        yield f"labels.delivery is 'files', {here}, and hosts do not see them; leave it out"
    if labels.copy_to is not None:
        yield f"labels.copy_to is {labels.copy_to!r}, {here}, where the driver's host alone keeps labels; leave it out"
    for student in config.students:
        if student.distill.features.weights:
            yield (
                f"students.{student.name}.distill.features is set, {here}, and features are not sent over it; leave "
                "them out, or put run.dir on storage that all hosts share"
            )
