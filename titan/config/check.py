"""What types cannot say: settings that contradict each other. Each finding is one line: setting, value, remedy."""

from collections.abc import Iterator

from titan.config.settings import LayoutSettings, ModelSettings, OptimizerSettings, RunConfig


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
        divisors = [n for n in range(1, model.heads + 1) if model.heads % n == 0]
        yield (
            f"{name}.kv_heads must divide heads ({model.heads}), got {model.kv_heads}; "
            f"try one of {', '.join(map(str, divisors))}"
        )


def _layout_mistakes(name: str, model: ModelSettings, layout: LayoutSettings, config: RunConfig) -> Iterator[str]:
    if layout.pp > model.layers:
        yield f"{name}.pp is {layout.pp}, more stages than layers ({model.layers}); use at most {model.layers}"
    if layout.layers is not None and len(layout.layers) != layout.pp:
        yield f"{name}.layers has {len(layout.layers)} entries for {layout.pp} stages; give one a stage"
    elif layout.layers is not None and sum(layout.layers) != model.layers:
        yield f"{name}.layers adds up to {sum(layout.layers)}, the model has {model.layers}; make them equal"
    for what, value in (("kv_heads", model.num_kv_heads), ("ffn", model.ffn), ("hidden", model.hidden)):
        if value % layout.tp:
            yield f"{name}.tp is {layout.tp}, which does not divide {what} ({value}); use a divisor of {value}"
    if layout.tp > 64 or layout.tp & (layout.tp - 1):
        yield f"{name}.tp is {layout.tp}; use a power of two up to 64, so that the padded vocabulary divides"
    if layout.shard not in (1, layout.dp):
        yield f"{name}.shard is {layout.shard}; use 1 or dp ({layout.dp})"
    if layout.sequence_parallel and config.data.sequence_length % layout.tp:
        yield (
            f"{name}.sequence_parallel needs data.sequence_length ({config.data.sequence_length}) to be a multiple "
            f"of tp ({layout.tp}); use {config.data.sequence_length // layout.tp * layout.tp}"
        )
    batch, number = config.data.batch_size, layout.num_micro_batches
    if batch % number:
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        yield (
            f"{name}.micro_batches is {number}, which does not divide data.batch_size ({batch}); "
            f"use one of {', '.join(map(str, divisors))}"
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
        if student.name == "teacher":
            yield f"{here}.name is taken by the teacher; choose another"
        start = student.start
        if start.step is not None and start.lead is not None:
            yield f"{here}.start has both step ({start.step}) and lead ({start.lead}); keep one"
        if start.step is not None and start.step >= config.run.steps:
            yield f"{here}.start.step is {start.step}, run.steps is {config.run.steps}; start earlier"
