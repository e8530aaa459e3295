"""`titan doctor --profile` and `--calibrate`: what devices take, as measured alone and as a run has shown it."""

import json
import statistics
from pathlib import Path

import tomli_w
from rich.console import Console
from rich.table import Table

from titan.config.environment import cpu_count
from titan.config.planning import (
    DeviceCostSettings,
    LinkSettings,
    ProfileSettings,
    ShapeSettings,
    TaskSettings,
    load_profile,
)
from titan.config.settings import TEACHER, RunConfig
from titan.data.tokenizer import Tokenizer
from titan.errors import ConfigError
from titan.observe.events import read_events
from titan.observe.files import write_whole
from titan.observe.metrics import read_metrics
from titan.observe.planned import promises
from titan.observe.status import since_last_start
from titan.platform.device import num_devices, prepare_process, select_platform


def write_profile(
    config: RunConfig, out: Path, console: Console, kind: str | None, tensor: list[int], samples: list[int]
) -> None:
    """Measure every shape of model in a run, print a table, and write a JSON profile. Raises ConfigError."""
    if not out.parent.is_dir():
        raise ConfigError(f"--profile {out}: {out.parent} is no folder; make it first")
    platform = select_platform(config.cluster.device)
    prepare_process(platform)
    from titan.train.measure import measure_link, measure_shape  # megatron-core comes after the process is set up

    kind = kind or platform.kind
    together = num_devices(platform.kind) if platform.kind != "cpu" else cpu_count()
    shapes: list[ShapeSettings] = []
    speeds = []
    known: list[TaskSettings] = []
    for role, task in _tasks(config).items():
        alone = task.model_copy(update={"model": task.model.model_copy(update={"layers": 1, "tied": False})})
        if alone in known:  # another role has blocks of this shape
            continue
        known.append(alone)
        too_many = [tp for tp in tensor if task.model.num_kv_heads % tp]
        if too_many:
            raise ConfigError(f"--tensor {too_many[0]}: does not divide kv_heads ({task.model.num_kv_heads}) of {role}")
        console.print(f"measuring {role}: hidden {task.model.hidden}, {task.precision}", highlight=False)
        shape, update_gb_per_s = measure_shape(platform, kind, task, tensor, samples, together)
        speeds.append(update_gb_per_s)
        shapes.append(shape)
    latency_s, gb_per_s = measure_link(platform)
    profile = ProfileSettings(
        devices=(DeviceCostSettings(kind=kind, update_gb_per_s=min(speeds)),),
        shapes=tuple(shapes),
        links=(LinkSettings(between=(kind, kind), latency_s=latency_s, gb_per_s=gb_per_s),),
    )
    out.write_text(json.dumps(profile.model_dump(mode="json"), indent=1) + "\n")
    _show(profile, console)
    console.print(f"profile of {kind}: {out}", highlight=False, soft_wrap=True)


def _tasks(config: RunConfig) -> dict[str, TaskSettings]:
    vocab_size = config.data.vocab_size
    if config.data.tokenizer is not None:
        vocab_size = Tokenizer(Path(config.data.tokenizer)).vocab_size
    roles = {TEACHER: (config.teacher.model, config.teacher.precision)}
    roles |= {student.name: (student.model, student.precision) for student in config.students}
    return {
        role: TaskSettings(
            model=model,
            vocab_size=vocab_size,
            sequence_length=config.data.sequence_length,
            batch_size=config.data.batch_size,
            precision=precision,
        )
        for role, (model, precision) in roles.items()
    }


def _show(profile: ProfileSettings, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("hidden", "block", "tp", "samples", "forward ms", "backward ms", "kept MB", "workspace MB"):
        table.add_column(title, justify="left" if title == "block" else "right")
    for shape in profile.shapes:
        for block in shape.blocks:
            table.add_row(
                str(shape.hidden), block.block, str(block.tp), str(block.samples), f"{block.forward_s * 1e3:.2f}",
                f"{block.backward_s * 1e3:.2f}", f"{block.activation_bytes / 1e6:.2f}",
                f"{block.workspace_bytes / 1e6:.2f}",
            )  # fmt: skip
    console.print(table)
    for link in profile.links:
        console.print(
            f"link inside this host: {link.latency_s * 1e3:.2f} ms, {link.gb_per_s:.2f} GB/s", highlight=False
        )


def calibrate_profile(folder: Path, path: Path, console: Console) -> None:
    """Set each kind's calibration in a profile so that a run's predicted passes meet its measured ones.

    Raises RunError for no run folder, ConfigError for a profile that cannot be read or a run that measured nothing.
    """
    profile = load_profile(path)
    events = since_last_start(read_events(folder))
    ratios: dict[str, list[float]] = {}
    for promise in promises(folder, events, read_metrics(folder)):
        for kind, predicted_s, measured_s in promise.busy:
            ratios.setdefault(kind, []).append(measured_s / predicted_s)
    if not ratios:
        raise ConfigError(f"--calibrate {folder}: the run has measured nothing beside a prediction; let it run longer")
    known = {device.kind: device for device in profile.devices}
    for kind, found in ratios.items():
        before = known.get(kind, DeviceCostSettings(kind=kind))
        factor = statistics.median(found)
        known[kind] = before.model_copy(update={"calibration": before.calibration * factor})
        console.print(f"{kind}: passes took {factor:.3f} times what was predicted", highlight=False)
    values = profile.model_copy(update={"devices": tuple(known.values())}).model_dump(mode="json")
    text = json.dumps(values, indent=1) + "\n" if path.suffix == ".json" else tomli_w.dumps(values)
    write_whole(path, text.encode())
    console.print(f"calibrated: {path}", highlight=False, soft_wrap=True)
