"""A run from its config to its report: folder, corpus, Ray, roles, summary."""

import os
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from rich.console import Console

import titan
from titan.checkpoint.folder import newest_step, remove_partial
from titan.cluster.session import local_inventory, ray_session
from titan.cluster.supervisor import Outcome, Supervisor
from titan.config.environment import user_cache_variable
from titan.config.load import dump_config, load_config
from titan.config.settings import RunConfig
from titan.data.corpus import Corpus
from titan.data.prepare import PrepareProgress, prepare_corpus
from titan.data.sampler import Sampler
from titan.distill.log import reopen
from titan.distill.rank import TEACHER, RoleReport
from titan.errors import ConfigError, RunError, RunStopped
from titan.observe.events import EventLog
from titan.observe.live import LiveDisplay
from titan.observe.metrics import MetricsLog
from titan.observe.progress import role_names, waits
from titan.observe.report import write_report
from titan.observe.summary import RoleResult, write_summary
from titan.plan.inventory import check_fits
from titan.plan.layout import make_layout

MAY_CHANGE = ("checkpoint", "cluster", "eval")
"""Sections that may differ when a run is resumed; in roles, `layout` may."""


def run_folder(config: RunConfig) -> Path:
    """Where a run writes."""
    return Path(config.run.dir) / config.run.name


def new_run(config: RunConfig, overwrite: bool, console: Console) -> Path:
    """Start a run. Raises RunError if its folder holds a run already."""
    check_local_fit(config)
    folder = run_folder(config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            raise RunError(
                f"{folder} exists; go on with `titan resume {folder}`, choose another --set run.name=..., "
                "or start over with --overwrite"
            )
        if not (folder / "config.toml").is_file():
            raise RunError(f"{folder} is no run folder (it has no config.toml), so --overwrite leaves it alone")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(dump_config(config))
    except OSError as error:
        raise RunError(
            f"cannot write to {folder}: {error.strerror}; choose another run.dir or make it writable"
        ) from None
    return _execute(config, folder, console)


def resume_run(folder: Path, overrides: list[str], console: Console) -> Path:
    """Go on with a run from its newest checkpoints, maybe in other layouts."""
    if not (folder / "config.toml").is_file():
        raise RunError(f"{folder} is no run folder: it has no config.toml; give the folder that `titan run` made")
    before = load_config(folder / "config.toml")
    config = load_config(folder / "config.toml", overrides)
    changed = _forbidden_changes(before, config)
    if changed:
        raise ConfigError("\n".join(f"{name} cannot change when a run is resumed; start a new run" for name in changed))
    check_local_fit(config)
    return _execute(config, folder, console)


def check_local_fit(config: RunConfig) -> None:
    """Raise ConfigError if a run on this machine alone needs more ranks than it can take."""
    if config.cluster.address is None and config.cluster.device == "cpu":
        layouts = {TEACHER: make_layout(config.teacher.model, config.teacher.layout)}
        layouts |= {student.name: make_layout(student.model, student.layout) for student in config.students}
        check_fits(layouts, local_inventory(config.cluster), config.cluster.cpu_ranks_per_core)


def cache_folder(config: RunConfig) -> Path:
    """Where prepared corpora are kept."""
    return Path(config.data.cache or user_cache_variable() or Path(config.run.dir) / "data")


def prepare_data(config: RunConfig, display: LiveDisplay | None = None) -> Path:
    """Prepare the corpus of a run, or find it done; returns its folder."""

    def show(progress: PrepareProgress) -> None:
        if display is not None:
            share = progress.done / max(1, progress.total)
            display.phase(f"preparing data, {progress.phase}: {share:.0%} of {progress.total / 1e6:.1f} MB")
            display.refresh()

    folder = prepare_corpus(config.data, cache_folder(config), show)
    corpus = Corpus.open(folder, verify=True)
    Sampler(corpus, config.data.sequence_length, config.data.batch_size, config.run.seed).heldout(1)
    return folder


def _execute(config: RunConfig, folder: Path, console: Console) -> Path:
    begin = time.monotonic()
    resumed = _resume_points(config, folder)
    if resumed:
        MetricsLog.rewind(folder, resumed)
    with (
        EventLog(folder) as events,
        LiveDisplay(config.run.name, config.run.steps, role_names(config), console, waits=waits(config)) as display,
    ):
        version = titan.__version__
        events.emit("run_started", pid=os.getpid(), host=platform.node(), version=version)
        try:
            corpus_folder = prepare_data(config, display)
            corpus = Corpus.open(corpus_folder)
            events.emit(
                "data_ready",
                corpus=str(corpus_folder),
                tokens=corpus.num_tokens("train"),
                heldout_tokens=corpus.num_tokens("heldout"),
                megabytes=round((corpus.num_bytes("train") + corpus.num_bytes("heldout")) / 1e6, 1),
                vocab_size=corpus.vocab_size,
            )
            if any(resumed.values()):
                events.emit("resumed", steps=dict(resumed))
            display.phase("starting Ray")
            with MetricsLog(folder) as metrics, ray_session(config.cluster):
                supervisor = Supervisor(config, folder, corpus_folder, events, metrics, display, resumed)
                outcome = supervisor.run()
            display.phase("")
        except BaseException as error:
            status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            if status == "failed":
                events.emit("error", error=str(error).splitlines()[0] if str(error) else type(error).__name__)
            events.emit("run_finished", status=status, wall_s=round(time.monotonic() - begin, 1))
            if status == "stopped":
                raise RunStopped(f"stopped at once; `titan resume {folder}` goes on from the last checkpoint") from None
            raise
        wall_s = time.monotonic() - begin
        ended: Literal["stopped", "finished"] = "stopped" if outcome.stopped else "finished"
        write_summary(folder, config, _results(config, outcome), wall_s, ended)
        events.emit("run_finished", status=ended, wall_s=round(wall_s, 1))
    write_report(folder)
    if outcome.stopped:
        raise RunStopped(f"stopped at step {outcome.reports[TEACHER].step}; `titan resume {folder}` goes on from there")
    return folder


def _resume_points(config: RunConfig, folder: Path) -> dict[str, int]:
    """The step each role goes on from; clears away what a killed run left half-written."""
    resumed = {}
    for role in role_names(config):
        checkpoints = folder / "checkpoints" / role
        remove_partial(checkpoints)
        resumed[role] = newest_step(checkpoints) or 0
    if config.students:
        committed = reopen(folder / "labels" / TEACHER)
        if committed < resumed[TEACHER]:
            raise RunError(
                f"the label log ends at step {committed}, before the teacher's checkpoint of step {resumed[TEACHER]}: "
                f"labels are missing; restore {folder / 'labels'} or start a new run"
            )
    return resumed


def _results(config: RunConfig, outcome: Outcome) -> Mapping[str, RoleResult]:
    def result(report: RoleReport) -> RoleResult:
        labels = report.extra
        return RoleResult(
            params=report.params,
            tokens=report.tokens,
            tokens_per_s=report.tokens / report.train_seconds if report.train_seconds else 0.0,
            heldout_bits_per_byte=report.heldout_bits_per_byte,
            steps=report.tokens // (config.data.batch_size * config.data.sequence_length),
            labels_consumed=_whole(labels.get("labels_consumed")),
            labels_missed=_whole(labels.get("labels_missed")),
            labels_repeated=_whole(labels.get("labels_repeated")),
            max_lag_steps=_whole(labels.get("max_lag_steps")),
            label_bytes_per_token=labels.get("label_bytes_per_token"),
        )

    return {role: result(outcome.reports[role]) for role in role_names(config)}


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _forbidden_changes(before: RunConfig, after: RunConfig) -> list[str]:
    """Names of settings that differ and may not."""

    def flat(value: object, name: str) -> dict[str, object]:
        if isinstance(value, dict):
            return {
                k: v for key, item in value.items() for k, v in flat(item, f"{name}.{key}" if name else key).items()
            }
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return {
                k: v for i, item in enumerate(value) for k, v in flat(item, f"{name}.{item.get('name', i)}").items()
            }
        return {name: value}

    old, new = (flat(config.model_dump(mode="json"), "") for config in (before, after))
    different = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return [name for name in different if name.split(".")[0] not in MAY_CHANGE and ".layout." not in f"{name}."]
