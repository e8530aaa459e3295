"""`titan plan`: the stages of every role, their ranks and machines, and parameters a rank; nothing is trained."""

import json
import math
import tomllib
import warnings
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from titan.cli.plan_file import schedules_text
from titan.cluster.planning import plan_picture, plan_run
from titan.cluster.preflight import check_start
from titan.cluster.session import discover, local_inventory, ray_session
from titan.config.model import ModelSettings
from titan.config.settings import TEACHER, RunConfig
from titan.data.tokenizer import Tokenizer
from titan.errors import ConfigError
from titan.plan.cost import Prediction
from titan.plan.inventory import Inventory, check_fits, likely_nodes, plan_json
from titan.plan.layout import Layout, Stage, role_layouts

PLAIN_WIDTH = 160
"""Columns where there is no terminal."""


def is_plan_file(path: Path) -> bool:
    """Whether a file is a plan file rather than a run.toml; what cannot be read is left to whoever reads it."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return "run" not in values and "task" in values


def show_plan(config: RunConfig, console: Console, as_json: bool, picture: Path | None = None) -> None:
    """Print the plan of a run. Raises ConfigError or PlatformError if it cannot start."""
    check_start(config)
    planned = plan_run(config, _vocab_size(config))
    config = planned.config
    layouts, inventory = role_layouts(config), _inventory(config)
    check_fits(layouts, inventory, config.cluster.cpu_ranks_per_core)
    if picture is not None:
        if TEACHER not in planned.predictions:
            why = planned.unknown.get(TEACHER, "cluster.inventory and cluster.profile are absent")
            raise ConfigError(f"--picture {picture}: there is no timeline of the teacher: {why}")
        picture.write_bytes(plan_picture(config.run.name, planned.predictions[TEACHER]))
    if as_json:
        predictions = {
            role: found.to_json() | {"schedules_step_s": planned.schedules_s.get(role)}
            for role, found in planned.predictions.items()
        }
        print(json.dumps(plan_json(layouts, inventory) | {"predictions": predictions}, indent=1))
        return
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    console.print(_table(config, layouts, inventory, planned.predictions))
    for role, found in planned.predictions.items():
        size = config.roles[role].batch_size
        own = "" if size == config.data.batch_size else f" of {size} samples"
        told = f"{role}: {found.step_s:.3g} s a step{own}, as predicted"
        if role in planned.schedules_s:
            told += f"; {schedules_text(found.layout, planned.schedules_s[role])}"
        console.print(told, highlight=False, soft_wrap=True)
    for role, why in planned.unknown.items():
        console.print(f"{role}: no prediction, {why}", highlight=False, soft_wrap=True)
    total = sum(layout.num_ranks for layout in layouts.values())
    room = ", ".join(f"{node.name} ({node.device}) has room for {node.slots}" for node in inventory.nodes)
    console.print(f"{total} ranks; {room}", highlight=False, soft_wrap=True)


def _inventory(config: RunConfig) -> Inventory:
    if config.cluster.address is None:
        return local_inventory(config.cluster)
    with ray_session(config.cluster):
        return discover(config.cluster)


def _vocab_size(config: RunConfig) -> int:
    if config.data.tokenizer is not None:
        return Tokenizer(Path(config.data.tokenizer)).vocab_size
    return config.data.vocab_size


def _table(
    config: RunConfig, layouts: Mapping[str, Layout], inventory: Inventory, predictions: Mapping[str, Prediction]
) -> Table:
    nodes = likely_nodes(layouts, inventory)
    models = {name: role.model for name, role in config.roles.items()}
    vocab_size = _vocab_size(config)
    table = Table(title=f"plan of {config.run.name}", title_justify="left", box=box.SIMPLE_HEAD)
    known = ("device", "samples") if predictions else ()
    for column in ("role", "stage", *known, "layers", "tp", "dp", "ranks", "params/rank", "node"):
        left = column in ("role", "device", "samples", "layers", "node")
        table.add_column(column, justify="left" if left else "right")
    for role, layout in layouts.items():
        for stage in layout.stages:
            found = predictions.get(role)
            shared = found.shared(stage.index % len(layout.positions)) if found is not None else ("", "")
            table.add_row(
                role if stage.index == 0 else "",
                str(stage.index),
                *(shared if known else ()),
                _holds(stage),
                str(stage.tp),
                str(stage.dp),
                _span(stage.ranks),
                f"{_parameters_of_rank(models[role], vocab_size, stage):,}",
                ", ".join(dict.fromkeys(nodes[role][stage.first_rank : stage.ranks.stop])),
            )
    return table


def _holds(stage: Stage) -> str:
    layers = _span(range(stage.first_layer, stage.end_layer))
    return " + ".join(filter(None, ("embedding" * stage.has_embedding, layers, "head" * stage.has_head)))


def _span(numbers: range) -> str:
    return str(numbers.start) if len(numbers) == 1 else f"{numbers.start}-{numbers.stop - 1}"


def _parameters_of_rank(model: ModelSettings, vocab_size: int, stage: Stage) -> int:
    """Elements one tensor rank of a stage keeps, padding of the vocabulary and copies of a tied embedding included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of megatron-core, on import, about what `titan doctor` says better
        from titan.model.parameters import layer_of, parameter_specs

    total = 0
    for name, spec in parameter_specs(model, vocab_size).items():
        layer = layer_of(name)
        if layer is not None:
            here = stage.first_layer <= layer < stage.end_layer
        elif name == "embedding.weight":
            here = stage.has_embedding or (model.tied and stage.has_head)
        else:
            here = stage.has_head
        total += math.prod(spec.local_shape(stage.tp)) if here else 0
    return total
