"""`launch/slurm.sh` in a real Slurm: told to end, it saves, goes back into the queue and finishes."""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.hosts.slurm import Slurm, require_slurm, slurm
from tests.runs import write_tiny_config

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch/slurm.sh"
NODES = 3

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    require_slurm()
    with slurm(NODES) as made:
        yield made


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tiny.toml, a teacher of two ranks alone."""
    monkeypatch.setenv("TITAN", str(ROOT / ".venv/bin/titan"))
    monkeypatch.setenv("TITAN_RAY_OPTIONS", f"--object-store-memory={100 << 20}")
    config = write_tiny_config(tmp_path / "work")
    config.write_text(re.sub(r"\[\[students\]\].*?(?=\[checkpoint\])", "", config.read_text(), flags=re.DOTALL))
    return tmp_path / "work"


def submit(cluster: Slurm, workplace: Path, *arguments: str) -> str:
    out = cluster.run("sbatch", f"--nodes={NODES}", SCRIPT, "tiny.toml", *arguments, cwd=workplace)
    return out.split()[-1]


def log_of(workplace: Path, job: str) -> str:
    path = workplace / f"titan-{job}.log"
    return path.read_text() if path.exists() else ""


def wait_for_line(workplace: Path, job: str, line: str, timeout_s: float = 200.0) -> None:
    deadline = time.monotonic() + timeout_s
    while line not in log_of(workplace, job):
        assert time.monotonic() < deadline, f"no {line!r} in {timeout_s} s: {log_of(workplace, job)}"
        time.sleep(0.2)


def processes_of(job: str) -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if process.environ().get("SLURM_JOB_ID") == job:
                found.append(" ".join(process.info["cmdline"] or []))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_a_job_told_that_its_time_is_up_saves_and_goes_on_after_it_was_requeued(
    cluster: Slurm, workplace: Path
) -> None:
    job = submit(cluster, workplace, "--set", "run.steps=300")
    run = workplace / "runs/tiny"
    wait_for_line(workplace, job, "training")
    cluster.run("scancel", "--batch", "--signal=TERM", job)  # what --signal=B:TERM@300 sends before the time limit
    wait_for_line(workplace, job, f"job {job} goes back into the queue", 40.0)
    assert json.loads((run / "summary.json").read_text())["status"] == "stopped"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert 0 < max(line["step"] for line in lines) < 300
    assert cluster.wait_for(job, {"COMPLETED", "FAILED", "CANCELLED"}, 250.0) == "COMPLETED", log_of(workplace, job)
    assert cluster.field(job, "Restarts") == "1"
    assert f"job {job}, start 1, on n[1-3]" in log_of(workplace, job)
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = [line["step"] for line in steps if line["kind"] == "step"]
    assert numbers == list(range(1, 301))
    assert processes_of(job) == []
    assert not [line for line in log_of(workplace, job).splitlines() if re.search(r"\b[0-9a-f]{64}\b", line)]


def test_a_job_that_cannot_run_fails_with_titans_code_and_is_not_requeued(cluster: Slurm, workplace: Path) -> None:
    job = submit(cluster, workplace, "--set", "run.stops=3")
    assert cluster.wait_for(job, {"COMPLETED", "FAILED", "CANCELLED"}, 100.0) == "FAILED"
    assert cluster.field(job, "ExitCode") == "2:0" and cluster.field(job, "Restarts") == "0"
    assert "run.stops is no setting" in log_of(workplace, job)
    assert processes_of(job) == []


def test_a_cancelled_job_stays_cancelled(cluster: Slurm, workplace: Path) -> None:
    job = submit(cluster, workplace, "--set", "run.steps=3000")
    wait_for_line(workplace, job, "training")
    cluster.run("scancel", job)
    assert cluster.wait_for(job, {"CANCELLED"}, 30.0) == "CANCELLED"
    deadline = time.monotonic() + 40
    while processes_of(job):
        assert time.monotonic() < deadline, processes_of(job)
        time.sleep(0.2)
    assert cluster.field(job, "JobState") == "CANCELLED" and cluster.field(job, "Restarts") == "0"
    assert os.path.exists(workplace / "runs/tiny/config.toml")
