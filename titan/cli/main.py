"""The command line: each command is a few lines over the floors below; a user's mistake is one line, no traceback."""

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console

from titan.cli.labels import labels_app
from titan.config.load import load_config
from titan.config.settings import ClusterSettings
from titan.errors import ConfigError, TitanError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train one large teacher and several students at the same time, on whatever accelerators there are.",
)
app.add_typer(labels_app, name="labels")
RunFile = Annotated[Path, typer.Argument(help="A run.toml; docs/config.md lists its settings.", metavar="RUN.toml")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder, for example runs/quickstart.", metavar="RUN")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change one setting: --set run.steps=100.", metavar="A.B=VALUE")
]

Address = Annotated[
    str | None,
    typer.Option(
        help="The Ray to join, instead of cluster.address; auto: what RAY_ADDRESS says, or the one on this machine; "
        "local: start one.",
        metavar="HOST:PORT",
    ),
]


@app.command()
def run(
    file: RunFile,
    overrides: Overrides = None,
    address: Address = None,
    overwrite: Annotated[bool, typer.Option(help="Delete the run folder first if it exists.")] = False,
    go_on: Annotated[
        bool, typer.Option("--resume", help="Go on with the run if it was started before, as `titan resume` does.")
    ] = False,
) -> None:
    """Train the teacher and its students; ends with a report."""
    from titan.cluster.launch import new_run, resume_run, run_folder

    if overwrite and go_on:
        raise ConfigError("--overwrite --resume: a run that is deleted cannot go on; leave one of them out")
    _heed_sigterm()
    overrides = _with_address(overrides, address)
    config = load_config(file, overrides)
    if go_on and (run_folder(config) / "config.toml").is_file():
        _finish(resume_run(run_folder(config), overrides, Console()))
        return
    _finish(new_run(config, overwrite, Console()))


@app.command()
def resume(folder: RunFolder, overrides: Overrides = None, address: Address = None) -> None:
    """Go on with a stopped or killed run from its newest checkpoints, maybe in other layouts."""
    from titan.cluster.launch import resume_run

    _heed_sigterm()
    _finish(resume_run(folder, _with_address(overrides, address), Console()))


@app.command()
def tokenize(file: RunFile, overrides: Overrides = None) -> None:
    """Prepare the corpus of a run without training."""
    from titan.cluster.launch import prepare_data

    corpus = prepare_data(load_config(file, overrides or []))
    print(f"{corpus.folder}: {corpus.num_tokens('train'):,} training tokens, {corpus.num_tokens('heldout'):,} held out")


@app.command()
def plan(
    file: Annotated[
        Path, typer.Argument(help="A run.toml, or a plan file (docs/planner.md).", metavar="RUN.toml|PLAN.toml")
    ],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    layout: Annotated[
        Path | None, typer.Option(help="Evaluate this layout instead of searching.", metavar="FILE")
    ] = None,
    inventory: Annotated[
        Path | None, typer.Option(help="Devices, instead of those the file names.", metavar="FILE")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Task, instead of the plan file's.", metavar="FILE")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="What devices take, instead of what the file names.", metavar="FILE")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Write the timeline there.", metavar="FILE.png")] = None,
) -> None:
    """Who would compute what, on which devices, and how long a step would take; nothing is trained."""
    from titan.cli.plan import is_plan_file, show_plan

    if is_plan_file(file):
        from titan.cli.plan_file import show_plan_file

        if overrides:
            raise ConfigError(f"--set {overrides[0]}: {file} is a plan file, not a run.toml; change it there")
        show_plan_file(file, Console(), as_json, layout, inventory, model, profile, picture)
        return
    for name, value in (("layout", layout), ("model", model)):
        if value is not None:
            raise ConfigError(f"--{name} {value}: a run.toml says this itself; change it there or with --set")
    sets = [f"cluster.{name}={path}" for name, path in (("inventory", inventory), ("profile", profile)) if path]
    show_plan(load_config(file, [*(overrides or []), *sets]), Console(), as_json, picture)


@app.command()
def simulate(
    file: Annotated[
        Path, typer.Argument(help="A simulation; docs/simulate.md lists its settings.", metavar="SIM.toml")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Write a picture there.", metavar="FILE.png")] = None,
) -> None:
    """What failures, slow devices and checkpoints leave of a run on up to 10,000 devices; nothing is trained."""
    from titan.cli.simulate import show_simulation
    from titan.plan.simulate.planned import read_simulation

    config, planned = read_simulation(file)
    show_simulation(config, Console(), as_json, picture, planned)


@app.command()
def status(folder: RunFolder) -> None:
    """Where a run is, from any terminal, finished or not."""
    from titan.observe.status import print_status, read_status

    print_status(read_status(folder), Console())


@app.command()
def report(folder: RunFolder) -> None:
    """Write report.html and report.png again from the run folder."""
    from titan.observe.report import write_report

    print(write_report(folder))


@app.command()
def export(
    folder: RunFolder,
    out: Annotated[Path, typer.Option(help="Folder to write to; must not exist or be empty.", metavar="DIR")],
    student: Annotated[str | None, typer.Option(help="Which student; without it, the teacher.", metavar="NAME")] = None,
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Type of the weights.")] = "fp32",
    step: Annotated[int | None, typer.Option(help="Which checkpoint; without it, the newest.")] = None,
    format: Annotated[Literal["llama"], typer.Option(help="Kind of model folder.")] = "llama",
) -> None:
    """Write a model as a Hugging Face folder: safetensors, config.json and the tokenizer."""
    warnings.simplefilter("ignore")  # of megatron-core, on import, about what `titan doctor` says better
    from titan.checkpoint.export import export_role

    done = export_role(folder, student, out, dtype=dtype, step=step)
    print(f"{done.folder}: {done.role} of step {done.step}, {done.num_parameters:,} parameters, {dtype}, as {format}")


@app.command()
def doctor(
    ray: Annotated[bool, typer.Option("--ray", help="Also start a local Ray and stop it; some seconds more.")] = False,
    profile: Annotated[
        Path | None, typer.Option(help="Measure the models of --run on this device; write there.", metavar="OUT.json")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="With --profile: whose models.", metavar="RUN.toml")] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Correct the profile by what this run's steps took.", metavar="RUN")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="With --profile: what to call this kind of device.")] = None,
    tensor: Annotated[list[int] | None, typer.Option(help="With --profile: a tensor degree; give several.")] = None,
    samples: Annotated[list[int] | None, typer.Option(help="With --profile: a micro-batch; give several.")] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="With --profile: a Ray cluster whose links to measure too; alone without --run.", metavar="HOST:PORT"
        ),
    ] = None,
) -> None:
    """What this machine can do, which back ends are chosen, and why; exit code 1 if a run cannot start."""
    from titan.cli.doctor import print_findings

    if calibrate is not None:
        if profile is None:
            raise ConfigError(f"--calibrate {calibrate}: needs --profile, the file to correct")
        from titan.cli.measure import calibrate_profile

        calibrate_profile(calibrate, profile, Console())
        return
    if address is not None and profile is None:
        raise ConfigError(f"--address {address}: needs --profile, the file to write links into")
    if profile is not None:
        if run is None and address is not None:
            from titan.cli.measure import write_links

            write_links(ClusterSettings(address=address), profile, Console(), kind)
            return
        if run is None:
            raise ConfigError(
                f"--profile {profile}: needs --run RUN.toml, which names the models to measure, or --address"
            )
        warnings.simplefilter("ignore")  # of megatron-core, on import, about what `titan doctor` says better
        from titan.cli.measure import write_profile

        sets = [f"cluster.address={address}"] if address is not None else []
        write_profile(load_config(run, sets), profile, Console(), kind, tensor or [1], samples or [1, 2, 4, 8])
        return
    if not print_findings(Console(), try_ray=ray):
        raise typer.Exit(1)


def _with_address(overrides: Sequence[str] | None, address: str | None) -> list[str]:
    """Overrides, with --address as one of them: the last, so that it wins."""
    return [*(overrides or []), *([f"cluster.address={address}"] if address is not None else [])]


def _heed_sigterm() -> None:
    """What Ctrl-C does, until there are ranks and the supervisor takes over: stop with a word and a code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _finish(folder: Path) -> None:
    """Say what came out: whether distillation helped, and where to look."""
    from titan.observe.files import read_config
    from titan.observe.metrics import read_metrics
    from titan.observe.verdict import verdict

    for sentence in verdict(read_config(folder), read_metrics(folder), finished=True):
        print(sentence)
    print(f"report: {folder / 'report.html'}, picture: {folder / 'report.png'}")


def main() -> None:
    """Entry point: errors of the user's making end in one line a mistake and a non-zero exit code."""
    try:
        sys.exit(app(standalone_mode=False))
    except TitanError as error:
        lines = str(error).splitlines() if isinstance(error, ConfigError) else [_one_line(error)]
        _leave(lines, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _leave(["stopped; `titan resume RUN` goes on from the last checkpoint"], 130)
    except BrokenPipeError:  # `titan status | head`: nobody reads on, and Python's last flush must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # what no floor below had a better word for: a full disk, a folder that may not be written
        place = f"{error.filename}: " if error.filename else ""
        _leave([f"{place}{error.strerror or _one_line(error)}; make room or choose a path that can be used"], 1)
    except Exception as error:
        message, exit_code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
        if message is None or exit_code is None:
            raise
        if len(sys.argv) < 2:
            sys.exit(exit_code)  # no command at all: the help has been printed
        command = getattr(getattr(error, "ctx", None), "command_path", "titan")
        _leave([f"{_one_line(message()).rstrip('.')}; see `{command} --help`"], exit_code)


def _leave(lines: Sequence[str], exit_code: int) -> NoReturn:
    for line in lines:
        print(f"titan: {line}", file=sys.stderr)
    sys.exit(exit_code)


def _one_line(error: Exception | str) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    main()
