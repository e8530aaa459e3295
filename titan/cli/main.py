"""The command line: each command is a few lines over the floors below; a user's mistake is one line, no traceback."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from titan.config.load import load_config
from titan.errors import TitanError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train one large teacher and several students at the same time, on whatever accelerators there are.",
)
RunFile = Annotated[Path, typer.Argument(help="A run.toml; docs/config.md lists its settings.", metavar="RUN.toml")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder, for example runs/quickstart.", metavar="RUN")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change one setting: --set run.steps=100.", metavar="A.B=VALUE")
]


@app.command()
def run(
    file: RunFile,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option(help="Delete the run folder first if it exists.")] = False,
) -> None:
    """Train the teacher and its students; ends with a report."""
    from titan.cluster.launch import new_run

    config = load_config(file, overrides or [])
    _finish(new_run(config, overwrite, Console()))


@app.command()
def resume(folder: RunFolder, overrides: Overrides = None) -> None:
    """Go on with a stopped or killed run from its newest checkpoints, maybe in other layouts."""
    from titan.cluster.launch import resume_run

    _finish(resume_run(folder, overrides or [], Console()))


@app.command()
def tokenize(file: RunFile, overrides: Overrides = None) -> None:
    """Prepare the corpus of a run without training."""
    from titan.cluster.launch import prepare_data
    from titan.data.corpus import Corpus

    folder = prepare_data(load_config(file, overrides or []))
    corpus = Corpus.open(folder)
    print(f"{folder}: {corpus.num_tokens('train'):,} training tokens, {corpus.num_tokens('heldout'):,} held out")


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
    out: Annotated[Path, typer.Option(help="Folder to write to; must not exist or be empty.")],
    student: Annotated[str | None, typer.Option(help="Which student; without it, the teacher.")] = None,
    format: Annotated[str, typer.Option(help="Only `llama` so far.")] = "llama",
) -> None:
    """Write a model as a Hugging Face folder: safetensors, config.json and the tokenizer."""
    from titan.cli.export import export_role

    print(export_role(folder, student, format, out))


@app.command()
def doctor() -> None:
    """What this machine can do, which back ends are chosen, and why."""
    from titan.cli.doctor import print_findings

    print_findings(Console())


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
        for line in str(error).splitlines() or [type(error).__name__]:
            print(f"titan: {line}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("titan: stopped; `titan resume RUN` goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        show, exit_code = getattr(error, "show", None), getattr(error, "exit_code", None)
        if show is None or exit_code is None:
            raise
        show()  # a wrong option or argument
        sys.exit(exit_code)


if __name__ == "__main__":
    main()
