"""Ray's head dies under a run: every role saves, and one line says so, before Ray ends the process itself."""

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.runs import rank_processes, start_titan, titan, wait_for_step, write_tiny_config
from titan.checkpoint.folder import newest_step
from titan.cluster.head import HeadWatch
from titan.observe.events import read_events
from titan.observe.metrics import StepMetric, read_metrics

RAY_ENDS_S = 60.0


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90.0
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ranks_of(pid: int) -> list[psutil.Process]:
    """Also while processes come and go."""
    try:
        return rank_processes(pid)
    except psutil.Error:
        return []


@pytest.mark.parametrize("heeds", [True, False])
def test_a_head_is_lost_only_after_a_while_without_an_answer_and_that_must_be_heeded(heeds: bool) -> None:
    stuck = threading.Event()
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    with HeadWatch(stuck.set, f"127.0.0.1:{port}", every_s=0.05, gone_s=2.0, heed_s=0.5) as watch:
        server.close()
        until(lambda: not watch.answers)
        assert not watch.lost  # it may come again
        server = socket.create_server(("127.0.0.1", port))
        until(lambda: watch.answers)
        assert not watch.lost and watch.look()
        server.close()
        begin = time.monotonic()
        until(lambda: watch.lost)
        assert time.monotonic() - begin > 1.0 and not stuck.is_set()
        if heeds:
            watch.heeded.set()
        assert stuck.wait(1.5) is not heeds


def test_a_head_whose_host_says_that_nobody_listens_is_lost_sooner_than_one_that_is_out_of_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = 1  # where nobody listens
    took = {}
    for error in (ConnectionRefusedError, TimeoutError):

        def fail(*_: object, error: type[OSError] = error) -> None:
            raise error

        monkeypatch.setattr(socket, "create_connection", fail)
        with HeadWatch(lambda: None, f"127.0.0.1:{port}", every_s=0.05, gone_s=2.0, refused_s=0.5, heed_s=5.0) as watch:
            until(lambda watch=watch: watch.lost)  # type: ignore[misc]
            took[error] = watch.silent_s
    assert 0.5 < took[ConnectionRefusedError] < 1.8 < 2.0 < took[TimeoutError]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_that_lost_a_rank_while_starting_and_then_its_ray_head_saves_every_role_and_ends_with_one_line(
    tmp_path: Path,
) -> None:
    write_tiny_config(tmp_path)
    run = tmp_path / "runs/tiny"
    process = start_titan("run", "tiny.toml", "--set", "run.steps=100000", cwd=tmp_path)
    until(lambda: bool(ranks_of(process.pid)))
    ranks_of(process.pid)[0].kill()  # one that is lost before all are up is put up again
    wait_for_step(run, "early", 12, process, 150.0)
    assert [event["event"] for event in read_events(run)].count("rank_lost") == 1
    (head,) = (one for one in psutil.Process(process.pid).children(recursive=True) if one.name() == "gcs_server")
    ranks = ranks_of(process.pid)
    begin = time.monotonic()
    head.kill()
    _, error = process.communicate(timeout=RAY_ENDS_S)
    assert time.monotonic() - begin < RAY_ENDS_S
    (line,) = error.splitlines()
    assert process.returncode == 1 and line.startswith("titan: Ray's head at ") and "every role has saved" in line
    (lost,) = (event for event in read_events(run) if event["event"] == "head_lost")
    assert lost["not_saved"] == [] and lost["silent_s"] < 10.0
    assert len(ranks) == 5 and not any(one.is_running() for one in ranks)
    for role in ("teacher", "early", "late"):
        told = [one.step for one in read_metrics(run) if isinstance(one, StepMetric) and one.role == role]
        saved = newest_step(run / "checkpoints" / role) or 0
        assert saved >= max(told, default=0), f"{role} saved {saved} of {told[-1:]}"
    audit = titan("labels", "audit", run, cwd=tmp_path)
    assert audit.returncode == 0, audit.stdout + audit.stderr
