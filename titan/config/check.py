"""What types cannot say: settings that contradict each other. Each finding is one line: setting, value, remedy."""

import math
import re
from collections.abc import Iterator

from titan.config.settings import TEACHER, VOCAB_MULTIPLE, LayoutSettings, ModelSettings, OptimizerSettings, RunConfig


def find_mistakes(config: RunConfig) -> list[str]:
    """All contradictions in a config whose types are right."""
    mistakes: list[str] = []
    roles = [("teacher", config.teacher.model, config.teacher.layout, config.teacher.optimizer)]
    roles += [(f"students.{s.name}", s.model, s.layout, s.optimizer) for s in config.students]
    for name, model, layout, optimizer in roles:
        mistakes += _model_mistakes(f"{name}.model", model)
        mistakes += _layout_mistakes(f"{name}.layout", model, layout, config)
        mistakes += _optimizer_mistakes(f"{name}.optimizer", optimizer)
    mistakes += _student_mistakes(config)
    mistakes += _label_mistakes(config)
    mistakes += _place_mistakes(config)
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
            f"try {_divisors(model.heads, model.num_kv_heads)}"
        )


def _layout_mistakes(name: str, model: ModelSettings, layout: LayoutSettings, config: RunConfig) -> Iterator[str]:
    if layout.pp > model.layers:
        yield f"{name}.pp is {layout.pp}, more stages than layers ({model.layers}); use at most {model.layers}"
    if layout.layers is not None and len(layout.layers) != layout.pp:
        yield f"{name}.layers has {len(layout.layers)} entries, pp is {layout.pp}; give one a stage"
    elif layout.layers is not None and sum(layout.layers) != model.layers:
        yield f"{name}.layers adds up to {sum(layout.layers)}, the model has {model.layers}; make them equal"
    cut = {"kv_heads": model.num_kv_heads, "ffn": model.ffn, "hidden": model.hidden}
    whole = math.gcd(VOCAB_MULTIPLE, *cut.values())
    if whole % layout.tp:
        yield (
            f"{name}.tp is {layout.tp}; want a power of two that divides "
            f"{', '.join(f'{what} ({value})' for what, value in cut.items())} and {VOCAB_MULTIPLE}, "
            f"so at most {whole}"
        )
    if layout.shard not in (1, layout.dp):
        yield f"{name}.shard is {layout.shard}; use 1 or dp ({layout.dp})"
    if layout.sequence_parallel and config.data.sequence_length % layout.tp:
        yield (
            f"{name}.sequence_parallel needs data.sequence_length ({config.data.sequence_length}) to be a multiple "
            f"of tp ({layout.tp}); use {config.data.sequence_length // layout.tp * layout.tp}"
        )
    batch, number = config.data.batch_size, layout.num_micro_batches
    if batch % number:
        yield (
            f"{name}.micro_batches is {number}, which does not divide data.batch_size ({batch}); "
            f"use {_divisors(batch, number)}"
        )
    elif batch // number < layout.dp:
        yield (
            f"{name}.dp is {layout.dp}, but a micro-batch has {batch // number} samples "
            f"(data.batch_size {batch} / {number} micro-batches); use fewer micro-batches or a larger batch"
        )


def _optimizer_mistakes(name: str, optimizer: OptimizerSettings) -> Iterator[str]:
    if (
        optimizer.final_fraction < 1.0
        and optimizer.schedule == "constant"
        and "final_fraction" in (optimizer.model_fields_set)
    ):
        yield f"{name}.final_fraction is {optimizer.final_fraction}, but schedule is 'constant'; leave it out"


def _student_mistakes(config: RunConfig) -> Iterator[str]:
    names = [student.name for student in config.students]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"students.name {name!r} is used {names.count(name)} times; give every student a name of its own"
    for student in config.students:
        here = f"students.{student.name}"
        if student.name == TEACHER:
            yield f"{here}.name is taken by the teacher; choose another"
        start = student.start
        if start.step is not None and start.lead is not None:
            yield f"{here}.start has both step ({start.step}) and lead ({start.lead}); keep one"
        if start.step is not None and start.step >= config.run.steps:
            yield f"{here}.start.step is {start.step}, run.steps is {config.run.steps}; start earlier"


def _label_mistakes(config: RunConfig) -> Iterator[str]:
    if config.students and config.data.tokenizer is None and config.labels.top_k > config.data.vocab_size:
        yield (
            f"labels.top_k is {config.labels.top_k}, more than data.vocab_size ({config.data.vocab_size}); "
            "a few dozen are enough"
        )


def _place_mistakes(config: RunConfig) -> Iterator[str]:
    """Paths and addresses."""
    paths = (("run.dir", config.run.dir), ("data.cache", config.data.cache), ("data.tokenizer", config.data.tokenizer))
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


def _divisors(number: int, near: int) -> str:
    """The divisors of a number on both sides of a value, as words."""
    small = [n for n in range(1, math.isqrt(min(number, 10**12)) + 1) if number % n == 0]
    every = sorted({*small, *(number // n for n in small)})
    below, above = [n for n in every if n < near][-1:], [n for n in every if n > near][:1]
    return " or ".join(map(str, below + above))
