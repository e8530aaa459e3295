"""`titan labels recode`: labels of a run in another codec."""

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from titan.cli.label_logs import only_log
from titan.config.check import FEWEST_DRAWS
from titan.config.distillation import LabelSettings
from titan.distill.codec.raw import CodecName
from titan.errors import LabelError
from titan.observe.words import plural

_USED: dict[str, tuple[str, ...]] = {
    "sampled": ("top_k", "draws", "bytes_per_token"),
    "top_k": ("top_k", "bytes_per_token", "renormalise"),
    "random": ("draws",),
}
"""Options that a codec has a use for."""


def recode_labels(
    run: Annotated[Path, typer.Argument(help="A run whose labels are whole: codec hidden or full.", metavar="RUN")],
    out: Annotated[Path, typer.Argument(help="Folder for the new log.", metavar="OUT")],
    codec: Annotated[CodecName, typer.Option(help="Of the new log.")],
    top_k: Annotated[int | None, typer.Option(min=1, max=1024, help="As labels.top_k.")] = None,
    draws: Annotated[int | None, typer.Option(min=1, max=1024, help="As labels.draws.")] = None,
    bytes_per_token: Annotated[
        float | None, typer.Option(help="As labels.bytes_per_token; 0 sends every entry.")
    ] = None,
    renormalise: Annotated[
        bool, typer.Option("--renormalise", help="Scale each top_k label to sum to one (biased; for comparisons).")
    ] = False,
    producer: Annotated[str | None, typer.Option(help="The log of this role.", metavar="ROLE")] = None,
) -> None:
    """Make the same log in another codec: same steps, samples, tokens and seeds. Stopped, it goes on when repeated.

    Students learn from it with teacher.source = "log:OUT".
    """
    options = {"top_k": top_k, "draws": draws, "bytes_per_token": bytes_per_token}
    labels = _settings(codec, options, renormalise)
    folder = only_log(run, producer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of megatron-core, on import, about what `titan doctor` says better
        from titan.distill.recode import Wanted, recode  # torch takes seconds to import
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("steps")
        made = recode(
            folder, out, Wanted(labels, renormalise),
            lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    rest = "" if made.ended else "; its source goes on: repeat this for what comes"
    print(f"{made.folder}: steps {made.first_step} to {made.last_step}, {plural(made.steps, 'step')} made now{rest}")


def _settings(codec: CodecName, options: dict[str, float | None], renormalise: bool) -> LabelSettings:
    """Raises LabelError for an option that the codec has no use for."""
    given = {name: value for name, value in options.items() if value is not None}
    for name in [*given, *(["renormalise"] if renormalise else [])]:
        if name not in _USED.get(codec, ()):
            raise LabelError(
                f"--{name.replace('_', '-')} is given, but --codec {codec} has no use for it; leave it out"
            )
    budget = given.get("bytes_per_token")
    if budget == 0:
        given["bytes_per_token"] = None  # type: ignore[assignment]
    elif budget is not None and budget < 4:
        raise LabelError(f"--bytes-per-token is {budget:g}; give at least 4, or 0 for every entry")
    if codec == "sampled" and given.get("draws", FEWEST_DRAWS) < FEWEST_DRAWS:
        raise LabelError(f"--draws is {given['draws']}; --codec sampled needs at least {FEWEST_DRAWS}")
    return LabelSettings.model_validate({"codec": codec, **given})
