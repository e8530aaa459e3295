"""A run from its config to its report: folder, corpus, Ray, roles, summary."""

import errno
import fcntl
import os
import platform
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

import titan
from titan.checkpoint.fence import take_over
from titan.checkpoint.folder import newest_step, remove_partial
from titan.cluster.grace import Grace
from titan.cluster.label_source import find_log, provide_labels
from titan.cluster.planning import Planned, plan_run
from titan.cluster.preflight import (
    check_checkpoints,
    check_init,
    check_labels,
    check_pretrained,
    check_start,
    forbidden_changes,
)
from titan.cluster.results import final_results, results_so_far
from titan.cluster.session import ray_session
from titan.cluster.supervisor import Outcome, Supervisor
from titan.config.environment import user_cache_variable
from titan.config.load import dump_config, load_config
from titan.config.settings import TEACHER, RunConfig
from titan.data.corpus import Corpus
from titan.data.prepare import PrepareProgress, prepare_corpus
from titan.data.sampler import Sampler
from titan.data.shards import INDEX_FILE, TOKENIZER_FILE
from titan.distill.log.manifest import run_id
from titan.distill.log.repair import reopen
from titan.distill.log.second_copy import bring_together, copies_of_run, copy_folder, vacate_copies
from titan.errors import ConfigError, DataError, OutOfTimeError, RunError, StoppedError
from titan.observe.events import EventLog, read_events
from titan.observe.exporter import metrics_endpoint
from titan.observe.files import read_config, read_json, write_whole
from titan.observe.heartbeat import Heartbeat
from titan.observe.live import LiveDisplay
from titan.observe.metrics import MetricsLog, read_metrics
from titan.observe.progress import role_names, waits
from titan.observe.report import write_report
from titan.observe.summary import FILE as SUMMARY
from titan.observe.summary import RunEnd, write_summary

DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST,
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
)  # fmt: skip
"""What a system says when a folder cannot be written to."""


def run_folder(config: RunConfig) -> Path:
    """Where a run writes."""
    return Path(config.run.dir) / config.run.name


@dataclass(frozen=True)
class Launch:
    """What a run has when its ranks are to start."""

    planned: Planned
    folder: Path
    corpus: Corpus
    resumed: Mapping[str, int]
    """Step each role goes on from."""
    display: LiveDisplay
    begin_s: float

    @property
    def config(self) -> RunConfig:
        """What was asked for, with all layouts known."""
        return self.planned.config

    @property
    def wall_s(self) -> float:
        """Seconds since the command was given."""
        return time.monotonic() - self.begin_s


def new_run(config: RunConfig, overwrite: bool, console: Console) -> Path:
    """Start a run. Raises RunError if its folder holds a run already.

    The corpus comes first: while it cannot be had, no folder is left behind and no old run is deleted.
    """
    begin_s = time.monotonic()
    check_start(config)
    folder = run_folder(config)
    if cache_folder(config).resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"run.name is {config.run.name!r}, but prepared corpora are kept in {cache_folder(config)}; "
            "choose another run.name or data.cache"
        )
    with _hold(folder, make=True), _display(config, console) as display:
        _check_vacant(folder, overwrite)
        corpus = prepare_data(config, display)
        check_init(config, corpus)
        check_pretrained(config, corpus)
        if config.teacher.log is not None:
            find_log(config, corpus)
        planned = _plan(config, corpus, display)
        config = planned.config
        with _disk_errors(folder):
            vacate_copies(config, folder, overwrite)
            for entry in folder.iterdir() if overwrite else ():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            write_whole(folder / "config.toml", dump_config(config).encode())
        return _execute(Launch(planned, folder, corpus, dict.fromkeys(role_names(config), 0), display, begin_s))


def resume_run(folder: Path, overrides: list[str], console: Console) -> Path:
    """Go on with a run from its newest checkpoints, maybe in other layouts. A finished run is left as it is."""
    begin_s = time.monotonic()
    if not (folder / "config.toml").is_file():
        raise RunError(f"{folder} is no run folder: it has no config.toml; give the folder that `titan run` made")
    before = read_config(folder)
    config = load_config(folder / "config.toml", overrides)
    changed = forbidden_changes(before, config)
    if changed:
        raise ConfigError("\n".join(f"{name} cannot change when a run is resumed; start a new run" for name in changed))
    with _hold(folder):
        resumed = {role: newest_step(folder / "checkpoints" / role) or 0 for role in role_names(config)}
        if _is_finished(config, folder, resumed):
            print(f"{folder} is finished, step {config.run.steps} of {config.run.steps}: nothing is left to do")
            return folder
        check_start(config)
        with _display(config, console) as display:
            corpus = _known_corpus(config, folder, display) or prepare_data(config, display)
            check_checkpoints(config, folder, resumed, corpus)
            check_pretrained(config, corpus)
            planned = _plan(config, corpus, display)
            return _execute(Launch(planned, folder, corpus, resumed, display, begin_s))


def _plan(config: RunConfig, corpus: Corpus, display: LiveDisplay) -> Planned:
    if config.cluster.inventory is not None:
        display.phase("planning")
        display.refresh()
    return plan_run(config, corpus.vocab_size)


def cache_folder(config: RunConfig) -> Path:
    """Where prepared corpora are kept."""
    return Path(config.data.cache or user_cache_variable() or Path(config.run.dir) / "data")


def prepare_data(config: RunConfig, display: LiveDisplay | None = None) -> Corpus:
    """Prepare the corpus of a run, or find it done. Raises DataError or ConfigError if the run cannot use it."""

    def show(progress: PrepareProgress) -> None:
        if display is not None:
            share = f": {progress.done / progress.total:.0%} of {progress.total / 1e6:.1f} MB" if progress.total else ""
            display.phase(f"preparing data, {progress.phase}{share}")
            display.refresh()

    return _checked_corpus(config, prepare_corpus(config.data, cache_folder(config), show))


def _checked_corpus(config: RunConfig, folder: Path) -> Corpus:
    corpus = Corpus.open(folder, verify=True)
    Sampler(corpus, config.data.sequence_length, config.data.batch_size, config.run.seed).heldout(1)
    check_labels(config, corpus)
    return corpus


def _known_corpus(config: RunConfig, folder: Path, display: LiveDisplay) -> Corpus | None:
    """The corpus that a run began with, which need not be that of its sources today; None if it never had one.

    Raises DataError if it is gone and the sources now give another.
    """
    events = [event for event in read_events(folder) if event["event"] == "data_ready"]
    if not events:
        return None
    known = Path(str(events[-1]["corpus"]))
    for place in (known, cache_folder(config) / known.name):
        if (place / INDEX_FILE).is_file():
            return _checked_corpus(config, place)
    corpus = prepare_data(config, display)
    if corpus.folder.name != known.name:
        raise DataError(
            f"data.sources: the run began with corpus {known}, which is gone, and the sources now give another, "
            f"{corpus.folder}; put the folder or the sources back, or start a new run"
        )
    return corpus


def _execute(launch: Launch) -> Path:
    """Everything from Ray to the report."""
    folder = launch.folder
    with _disk_errors(folder, then=f"`titan resume {folder}` goes on from the last checkpoint"):
        _tidy(launch.config, folder, launch.resumed)
        if (copies := copies_of_run(launch.config)) is not None:
            copies.mkdir(parents=True, exist_ok=True)
            write_whole(copies / "config.toml", (folder / "config.toml").read_bytes())
        if launch.config.students or launch.config.makes_labels:
            provide_labels(launch.config, launch.corpus, folder)
        again = f"`titan resume {folder}` goes on from the last checkpoint"
        grace = Grace(launch.config.recovery.grace_s, again)
        with EventLog(folder) as events, Heartbeat(folder), grace:
            events.emit("run_started", pid=os.getpid(), host=platform.node(), version=titan.__version__)
            try:
                outcome = _train(launch, events, grace)
            except BaseException as error:
                _wind_up(launch, events, error)
                if isinstance(error, KeyboardInterrupt):
                    raise StoppedError(f"stopped at once; {again}") from None
                raise
            ended: RunEnd = "stopped" if outcome.stopped else "finished"
            results = final_results(launch.config, outcome.reports)
            write_summary(folder, launch.config, results, launch.wall_s, ended)
            events.emit("run_finished", status=ended, wall_s=round(launch.wall_s, 1))
        write_report(folder)
    if outcome.stopped:
        step = max(report.step for report in outcome.reports.values())
        raise StoppedError(f"stopped at step {step}; `titan resume {folder}` goes on from there")
    return folder


def _train(launch: Launch, events: EventLog, grace: Grace) -> Outcome:
    config, corpus, display = launch.config, launch.corpus, launch.display
    events.emit(
        "data_ready",
        corpus=str(corpus.folder),
        tokens=corpus.num_tokens("train"),
        heldout_tokens=corpus.num_tokens("heldout"),
        megabytes=round((corpus.num_bytes("train") + corpus.num_bytes("heldout")) / 1e6, 1),
        vocab_size=corpus.vocab_size,
    )
    shutil.copyfile(corpus.tokenizer.path, launch.folder / TOKENIZER_FILE)  # so that export needs no corpus
    if any(launch.resumed.values()):
        events.emit("resumed", steps=dict(launch.resumed))
    display.phase("starting Ray")
    endpoint = metrics_endpoint(launch.folder, config)
    with MetricsLog(launch.folder) as metrics, endpoint, ray_session(config.cluster):
        supervisor = Supervisor(
            launch.planned,
            launch.folder,
            corpus.folder,
            events,
            metrics,
            display,
            launch.resumed,
            tidy=lambda role: _tidy_role(config, launch.folder, role),
            grace=grace,
        )
        outcome = supervisor.run()
    display.phase("")
    return outcome


def _wind_up(launch: Launch, events: EventLog, error: BaseException) -> None:
    """Leave word of a run that broke off, as far as possible: the disk may be full, and `error` matters more."""
    ended: RunEnd = "stopped" if isinstance(error, KeyboardInterrupt | StoppedError) else "failed"
    with suppress(Exception):
        if ended == "failed":
            events.emit("error", error=str(error).splitlines()[0] if str(error) else type(error).__name__)
        events.emit("run_finished", status=ended, wall_s=round(launch.wall_s, 1))
        results = results_so_far(launch.config, launch.folder, launch.corpus.vocab_size)
        write_summary(launch.folder, launch.config, results, launch.wall_s, ended)
        if not isinstance(error, OutOfTimeError):  # a picture takes seconds, and is made at any time by `titan report`
            write_report(launch.folder)


def _display(config: RunConfig, console: Console) -> LiveDisplay:
    return LiveDisplay(config.run.name, config.run.steps, role_names(config), console, waits=waits(config))


@contextmanager
def _hold(folder: Path, make: bool = False) -> Iterator[None]:
    """Keep other drivers out of a run folder; the kernel lets go of it when this process ends, however it ends.

    make: make the folder; it goes again if it is still empty in the end
    """
    with _disk_errors(folder):
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{folder} is in use by another titan, as `titan status {folder}` tells; wait for it or stop it"
            ) from None
        except OSError:
            pass  # a network file system without locks
        yield
    finally:
        os.close(handle)
        if make:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _disk_errors(folder: Path, then: str = "run again, or choose another run.dir") -> Iterator[None]:
    """Turn what the system says about the run folder's disk into an error with a remedy.

    A thread that meets it, as TensorBoard's writer does, says nothing: who hands it more to write is told then.
    """

    def hear(said: threading.ExceptHookArgs) -> None:
        if not (isinstance(said.exc_value, OSError) and said.exc_value.errno in DISK_ERRORS):
            before(said)

    before, threading.excepthook = threading.excepthook, hear
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise RunError(
            f"cannot write to {error.filename or folder}: {error.strerror}; make room or make it writable, then {then}"
        ) from None
    finally:
        threading.excepthook = before


def _check_vacant(folder: Path, overwrite: bool) -> None:
    """Raise RunError if a new run may not have the folder."""
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise RunError(
            f"{folder} exists; go on with `titan resume {folder}`, choose another --set run.name=..., "
            "or start over with --overwrite"
        )
    if not (folder / "config.toml").is_file():
        raise RunError(
            f"{folder} is no run folder (it has no config.toml), so --overwrite leaves it alone; "
            "choose another run.name or empty it yourself"
        )


def _is_finished(config: RunConfig, folder: Path, resumed: Mapping[str, int]) -> bool:
    """Whether the run said so and every role still has its last checkpoint."""
    summary = read_json(folder / SUMMARY) or {}
    return summary.get("status") == "finished" and all(step == config.run.steps for step in resumed.values())


def _tidy(config: RunConfig, folder: Path, resumed: Mapping[str, int]) -> None:
    """Make the logs ready to go on: without what a killed run left half-written or roles did after their checkpoints.

    Raises LabelError for labels that were committed and are lost, RunError for damaged metrics.
    """
    read_metrics(folder)  # before anything is cut off
    for role in resumed:
        _tidy_role(config, folder, role)
    MetricsLog.rewind(folder, resumed)


def _tidy_role(config: RunConfig, folder: Path, role: str) -> int:
    """Make a role's files ready to go on while none of its ranks runs; returns the step of its newest checkpoint.

    Ranks that could not be reached may still run: from now on they write nothing.
    """
    take_over(folder, role)
    checkpoints = folder / "checkpoints" / role
    remove_partial(checkpoints)
    step = newest_step(checkpoints) or 0
    log, copy = folder / "labels" / role, copy_folder(config, role)
    if not config.teaches(role):
        return step
    if copy is not None and (role == TEACHER or log.is_dir() or copy.is_dir()):
        bring_together(log, copy, run_id(folder), durable=step)
    if role == TEACHER or log.is_dir():
        reopen(log, needed=step)
    return step
