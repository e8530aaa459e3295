"""What a layout may not say: about its model, the batch, and its own stages. Each finding is one line with a remedy."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from titan.config.model import VOCAB_MULTIPLE, LayoutSettings, ModelSettings, Precision, StageSettings
from titan.config.settings import DataSettings, Role

ALIKE = ("tp", "pp", "dp", "layers", "shard")
"""What describes stages that are alike, and has no place beside `stages`."""


CHOSEN = (*ALIKE, "stages", "micro_batches", "schedule", "chunks")
"""What a planned layout leaves to titan."""


def layout_mistakes(name: str, role: Role, data: DataSettings) -> Iterator[str]:
    """Everything wrong with the layout of a role; name: dotted, as in run.toml."""
    layout = role.layout
    if layout.planned:
        yield from _planned_mistakes(name, layout)
        return
    setting = "data.batch_size" if role.batch_size == data.batch_size else f"{role.place}.batch_size"
    batch = Batch(role.batch_size, data.sequence_length, setting)
    yield from stage_mistakes(name, layout, role.model, batch, role.precision)


@dataclass(frozen=True)
class Batch:
    """What a step holds."""

    samples: int
    length: int
    setting: str = "data.batch_size"
    """Which says how many samples."""


def stage_mistakes(
    name: str, layout: LayoutSettings, model: ModelSettings, batch: Batch, precision: Precision
) -> Iterator[str]:
    """Everything wrong with stages that are given, for a model and its batch."""
    if layout.stages is None:
        yield from _alike_mistakes(name, model, layout)
        tp_at = [(name, layout.tp, layout.dp, layout.shard)]
    else:
        yield from _stages_mistakes(name, layout, layout.stages, model, precision)
        tp_at = [(f"{name}.stages.{i}", stage.tp, stage.dp, stage.shard) for i, stage in enumerate(layout.stages)]
    for where, tp, dp, shard in tp_at:
        yield from _degree_mistakes(where, model, batch, tp, layout.sequence_parallel)
        if shard not in (1, dp):
            yield f"{where}.shard is {shard}; use 1 or dp ({dp})"
    yield from _schedule_mistakes(name, layout)
    yield from _batch_mistakes(name, layout, batch)


def _planned_mistakes(name: str, layout: LayoutSettings) -> Iterator[str]:
    for key in CHOSEN:
        if _is_told(layout, key):
            yield f"{name}.{key} is {getattr(layout, key)} beside planned, which chooses it; leave one of them out"
            break


def _is_told(layout: LayoutSettings, key: str) -> bool:
    """Whether a setting says something; a run's own config.toml has all defaults written out."""
    return bool(getattr(layout, key) != LayoutSettings.model_fields[key].default)


def _alike_mistakes(name: str, model: ModelSettings, layout: LayoutSettings) -> Iterator[str]:
    count = layout.pp * layout.chunks
    if count > model.layers and layout.chunks == 1:
        yield f"{name}.pp is {layout.pp}, more stages than layers ({model.layers}); use at most {model.layers}"
    elif count > model.layers:
        yield (
            f"{name}.pp x chunks is {layout.pp} x {layout.chunks}, more than the model's layers ({model.layers}); "
            "use fewer chunks"
        )
    if layout.layers is not None and len(layout.layers) != count:
        want = "one a stage" if layout.chunks == 1 else f"one a chunk, {count}"
        yield f"{name}.layers has {len(layout.layers)} entries, pp is {layout.pp}; give {want}"
    elif layout.layers is not None and sum(layout.layers) != model.layers:
        yield f"{name}.layers adds up to {sum(layout.layers)}, the model has {model.layers}; make them equal"


def _stages_mistakes(
    name: str, layout: LayoutSettings, stages: tuple[StageSettings, ...], model: ModelSettings, precision: Precision
) -> Iterator[str]:
    for key in ALIKE:
        if _is_told(layout, key):
            yield f"{name}.{key} is {getattr(layout, key)} beside stages, which say it themselves; leave it out"
            break
    total = 0
    for index, stage in enumerate(stages):
        here = f"{name}.stages.{index}"
        total += sum(stage.layers)
        if len(stage.layers) != layout.chunks:
            yield f"{here}.layers has {len(stage.layers)} entries, {name}.chunks is {layout.chunks}; give one a chunk"
            return
        if stage.shares is not None and len(stage.shares) != stage.dp:
            yield f"{here}.shares has {len(stage.shares)} entries, dp is {stage.dp}; give one a replica"
        if stage.islands is not None and sum(stage.islands) != stage.dp:
            yield f"{here}.islands adds up to {sum(stage.islands)}, dp is {stage.dp}; count every replica once"
        elif stage.islands is not None and len(stage.islands) > 1 and stage.shard > 1:
            yield f"{here}.shard is {stage.shard}; optimizer state is not shared between islands, use 1"
        yield from _kind_mistakes(here, stage)
    if total != model.layers:
        yield f"{name}.stages have {total} layers, the model has {model.layers}; make them equal"
    kinds = {stage.precision or precision for stage in stages}
    if "fp16" in kinds and len(kinds) > 1:
        yield (
            f"{name}.stages mix fp16 with {', '.join(sorted(kinds - {'fp16'}))}; fp16 scales the loss for all stages, "
            "use it in all or in none"
        )


def _kind_mistakes(here: str, stage: StageSettings) -> Iterator[str]:
    if not isinstance(stage.device, tuple):
        return
    islands = len(stage.islands or (stage.dp,))
    if len(stage.device) != islands:
        given = f"islands has {islands}" if stage.islands else "islands is absent"
        yield (
            f"{here}.device names {len(stage.device)} kinds, {given}; give one kind an island, and in islands the "
            "replicas of each"
        )


def _degree_mistakes(where: str, model: ModelSettings, batch: Batch, tp: int, sequence_parallel: bool) -> Iterator[str]:
    cut = {"kv_heads": model.num_kv_heads, "ffn": model.ffn, "hidden": model.hidden}
    whole = math.gcd(VOCAB_MULTIPLE, *cut.values())
    if whole % tp:
        yield (
            f"{where}.tp is {tp}; want a power of two that divides "
            f"{', '.join(f'{what} ({value})' for what, value in cut.items())} and {VOCAB_MULTIPLE}, "
            f"so at most {whole}"
        )
    if sequence_parallel and batch.length % tp:
        setting = f"{where.partition('.layout')[0]}.layout.sequence_parallel"
        yield (
            f"{setting} needs data.sequence_length ({batch.length}) to be a multiple "
            f"of tp ({tp}); use {batch.length // tp * tp}"
        )


def _schedule_mistakes(name: str, layout: LayoutSettings) -> Iterator[str]:
    stages, number = layout.num_stages, layout.num_micro_batches
    if layout.schedule == "1f1b":
        if layout.chunks > 1:
            yield f"{name}.chunks is {layout.chunks}, but schedule is '1f1b'; use 'interleaved' or 1 chunk"
        return
    if layout.chunks < 2 or stages < 2:
        yield (
            f"{name}.schedule is 'interleaved' with {stages} stages and {layout.chunks} chunks; it needs 2 or more of "
            "both, use '1f1b'"
        )
    elif number % stages:
        yield (
            f"{name}.micro_batches is {number}; the interleaved schedule wants a multiple of the stages ({stages}), "
            f"use {math.ceil(number / stages) * stages}"
        )


def _batch_mistakes(name: str, layout: LayoutSettings, whole: Batch) -> Iterator[str]:
    batch, number, setting = whole.samples, layout.num_micro_batches, whole.setting
    if batch % number:
        yield (
            f"{name}.micro_batches is {number}, which does not divide {setting} ({batch}); "
            f"use {divisors(batch, number)}"
        )
        return
    samples = batch // number
    size = f"a micro-batch has {samples} samples ({setting} {batch} / {number} micro-batches)"
    remedy = "use fewer micro-batches or a larger batch"
    if layout.stages is None and samples < layout.dp:
        yield f"{name}.dp is {layout.dp}, but {size}; {remedy}"
    for index, stage in enumerate(layout.stages or ()):
        shares = stage.shares or (1,) * stage.dp
        if len(shares) == stage.dp and samples * min(shares) < sum(shares):
            what = f"shares is {list(stage.shares)}" if stage.shares else f"dp is {stage.dp}"
            yield f"{name}.stages.{index}.{what}, but {size}, not one for every replica; {remedy}"


def divisors(number: int, near: int) -> str:
    """The divisors of a number on both sides of a value, as words."""
    small = [n for n in range(1, math.isqrt(min(number, 10**12)) + 1) if number % n == 0]
    every = sorted({*small, *(number // n for n in small)})
    below, above = [n for n in every if n < near][-1:], [n for n in every if n > near][:1]
    return " or ".join(map(str, below + above))
