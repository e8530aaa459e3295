"""`titan labels`: what is in a run's label logs, whether every bit is intact, and what became of every sample."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from titan.cli.label_logs import label_folders, only_log
from titan.cli.labels_recode import recode_labels
from titan.distill.log.audit import Audit, audit
from titan.distill.log.contents import LogContents, read_contents
from titan.distill.log.export import export_labels
from titan.distill.log.ledger import Place
from titan.distill.log.verify import Finding, Verified, verify_ledgers, verify_log
from titan.observe.files import require_run_folder
from titan.observe.metrics import StepMetric, read_metrics
from titan.observe.words import plural

labels_app = typer.Typer(no_args_is_help=True, help="Look into the label logs of a run; none of this changes them.")

RunFolder = Annotated[Path, typer.Argument(help="A run folder, for example runs/quickstart.", metavar="RUN")]
Producer = Annotated[
    str | None, typer.Option(help="Only the log of this role: teacher, or a teacher assistant.", metavar="ROLE")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]


@labels_app.command("ls")
def list_labels(run: RunFolder, producer: Producer = None, as_json: AsJson = False) -> None:
    """Segments of each log with their steps, and where readers are."""
    logs = [read_contents(folder) for folder in label_folders(run, producer)]
    if as_json:
        _print_json([asdict(log) for log in logs])
        return
    console = Console()
    for log in logs:
        console.print(_segment_table(log))
        if log.readers:
            places = ", ".join(f"{name} at step {step}" for name, step in log.readers.items())
            console.print(f"readers: {places}", highlight=False)


@labels_app.command("verify")
def verify_labels(run: RunFolder, producer: Producer = None, as_json: AsJson = False) -> None:
    """Check every bit of the logs and ledgers; exit code 1 if one is wrong, with file, byte and step."""
    verified = {folder.name: verify_log(folder) for folder in label_folders(run, producer)}
    findings = [finding for log in verified.values() for finding in log.findings] + verify_ledgers(run)
    if as_json:
        _print_json(_verify_record(verified, findings))
    else:
        for name, log in verified.items():
            size = f"{plural(log.steps, 'step')}, {plural(log.blocks, 'block')}, {log.size_bytes / 1e6:.1f} MB"
            print(f"{name}: {size}: {plural(len(log.findings), 'problem') if log.findings else 'all intact'}")
        for finding in findings:
            print(finding)
    if findings:
        raise typer.Exit(1)


@labels_app.command("stats")
def label_stats(run: RunFolder, producer: Producer = None, as_json: AsJson = False) -> None:
    """Size and rate of each log: bytes a token, steps, samples, segments, steps and bytes a second."""
    rows = [_stats(run, read_contents(folder)) for folder in label_folders(run, producer)]
    if as_json:
        _print_json(rows)
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("log")
    for heading in ("steps", "samples", "tokens", "segments", "MB", "bytes/token", "steps/s", "MB/s"):
        table.add_column(heading, justify="right")
    for row in rows:
        rate, flow = row["steps_per_s"], row["bytes_per_s"]
        table.add_row(
            row["producer"], f"{row['first_step']}-{row['last_step']}", f"{row['samples']:,}", f"{row['tokens']:,}",
            str(row["segments"]), f"{row['size_bytes'] / 1e6:.1f}", f"{row['bytes_per_token']:.2f}",
            "" if rate is None else f"{rate:.2f}", "" if flow is None else f"{flow / 1e6:.3f}",
        )  # fmt: skip
    Console().print(table)


@labels_app.command("audit")
def audit_labels(run: RunFolder, as_json: AsJson = False) -> None:
    """Prove from the files that every published sample was learned once or skipped; exit code 1 if not."""
    require_run_folder(run)
    result = audit(run)
    if as_json:
        _print_json(asdict(result) | {"clean": result.clean})
    else:
        _print_audit(result)
    if not result.clean:
        raise typer.Exit(1)


@labels_app.command("export")
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="File to write.", metavar="FILE.parquet")],
    first: Annotated[int | None, typer.Option(help="First step; without it, the log's first.")] = None,
    last: Annotated[int | None, typer.Option(help="Last step; without it, the log's last.")] = None,
    producer: Producer = None,
    as_json: AsJson = False,
) -> None:
    """Write the labels of a range of steps to a Parquet file, a row a token."""
    folder = only_log(run, producer)
    log = read_contents(folder)
    rows = export_labels(folder, first or log.first_step, last or log.last_step, out)
    if as_json:
        _print_json({"path": str(out), "rows": rows})
    else:
        print(f"{out}: {plural(rows, 'token')} of steps {first or log.first_step} to {last or log.last_step}")


labels_app.command("recode")(recode_labels)


def _stats(run: Path, log: LogContents) -> dict[str, Any]:
    """A log in numbers; rates are those of its producer's steps, None where metrics do not tell them."""
    times = sorted(
        (metric.step, metric.time_s)
        for metric in read_metrics(run)
        if isinstance(metric, StepMetric)
        and metric.role == log.producer
        and log.first_step <= metric.step <= log.last_step
    )
    elapsed = times[-1][1] - times[0][1] if len(times) > 1 else 0.0
    rate = (times[-1][0] - times[0][0]) / elapsed if elapsed > 0 else None
    return {
        "producer": log.producer,
        "first_step": log.first_step,
        "last_step": log.last_step,
        "steps": log.num_steps,
        "samples": log.samples,
        "tokens": log.tokens,
        "segments": len(log.segments),
        "size_bytes": log.size_bytes,
        "bytes_per_token": log.bytes_per_token,
        "steps_per_s": rate,
        "bytes_per_s": None if rate is None else rate * log.size_bytes / max(1, log.num_steps),
    }


def _segment_table(log: LogContents) -> Table:
    ended = f", {log.ended}" if log.ended else ""
    title = f"{log.producer}: steps {log.first_step} to {log.last_step}{ended}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("part", justify="right")
    table.add_column("segment")
    for heading in ("steps", "blocks", "samples", "MB"):
        table.add_column(heading, justify="right")
    for segment in log.segments:
        steps = f"{segment.first_step}-{segment.last_step}" if segment.blocks else ""
        size = f"{segment.size_bytes / 1e6:.2f}"
        table.add_row(
            str(segment.part), segment.path.name, steps, f"{segment.blocks:,}", f"{segment.samples:,}", size
        )  # fmt: skip
    return table


def _verify_record(verified: dict[str, Verified], findings: list[Finding]) -> dict[str, Any]:
    logs = {
        name: {"steps": log.steps, "blocks": log.blocks, "size_bytes": log.size_bytes} for name, log in verified.items()
    }
    return {"intact": not findings, "logs": logs, "findings": [asdict(finding) for finding in findings]}


def _print_audit(result: Audit) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("student", "learns from"):
        table.add_column(heading)
    for heading in ("from", "to", "published", "consumed", "skipped", "since checkpoint", "ahead"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for student in result.students:
        counts = (student.published, student.consumed, student.skipped, student.since, student.ahead)
        table.add_row(
            student.student, student.producer, _words(student.start), _words(student.place),
            *(f"{count:,}" for count in counts), "wrong" if student.findings else "ok",
        )  # fmt: skip
    Console().print(table)
    for finding in result.findings:
        print(finding)
    if result.clean:
        print("every published sample is accounted for, each at most once")


def _words(place: Place | None) -> str:
    return "" if place is None else f"{place.step}:{place.sample}"


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1, default=str))
