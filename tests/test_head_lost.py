"""Ray's head dies under a run: every role saves, and one line says so, before Ray ends the process itself."""

import socket
import time
from pathlib import Path

import psutil
import pytest

from tests.runs import start_titan, titan, wait_for_step, write_tiny_config
from titan.checkpoint.folder import newest_step
from titan.cluster.head import HeadWatch
from titan.observe.events import read_events
from titan.observe.metrics import StepMetric, read_metrics

RAY_ENDS_S = 60.0


def test_a_head_is_lost_only_after_a_while_without_an_answer() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    with HeadWatch(f"127.0.0.1:{port}", gone_s=2.5) as watch:
        time.sleep(1.5)
        assert watch.answers and not watch.lost
        server.close()
        time.sleep(1.5)
        assert not watch.answers and not watch.lost  # it may come again
        server = socket.create_server(("127.0.0.1", port))
        time.sleep(3.0)
        assert watch.answers and not watch.lost
        server.close()
        deadline = time.monotonic() + 30.0
        while not watch.lost:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_whose_ray_head_dies_saves_every_role_and_ends_with_one_line(tmp_path: Path) -> None:
    write_tiny_config(tmp_path)
    run = tmp_path / "runs/tiny"
    process = start_titan("run", "tiny.toml", "--set", "run.steps=100000", cwd=tmp_path)
    wait_for_step(run, "early", 12, process)
    (head,) = (one for one in psutil.Process(process.pid).children(recursive=True) if one.name() == "gcs_server")
    ranks = [
        one for one in psutil.Process(process.pid).children(recursive=True) if "RankActor" in " ".join(one.cmdline())
    ]
    begin = time.monotonic()
    head.kill()
    _, error = process.communicate(timeout=RAY_ENDS_S)
    assert time.monotonic() - begin < RAY_ENDS_S
    (line,) = error.splitlines()
    assert process.returncode == 1 and line.startswith("titan: Ray's head at ") and "every role has saved" in line
    assert [event["not_saved"] for event in read_events(run) if event["event"] == "head_lost"] == [[]]
    assert len(ranks) == 5 and not any(one.is_running() for one in ranks)
    for role in ("teacher", "early", "late"):
        told = [one.step for one in read_metrics(run) if isinstance(one, StepMetric) and one.role == role]
        saved = newest_step(run / "checkpoints" / role) or 0
        assert saved >= max(told, default=0), f"{role} saved {saved} of {told[-1:]}"
    audit = titan("labels", "audit", run, cwd=tmp_path)
    assert audit.returncode == 0, audit.stdout + audit.stderr
