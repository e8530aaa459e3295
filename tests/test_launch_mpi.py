"""`launch/mpi.sh` under a real mpirun: a run, its exit code, and its end by a signal."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.runs import kill_tree, wait_for_step, write_tiny_config

ROOT = Path(__file__).parents[1]
MPIRUN = ROOT / ".venv/bin/mpirun"
RANKS = 3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun: pip install '.[mpi]'"),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.toml, a teacher of two ranks alone."""
    folder = tmp_path_factory.mktemp("mpi")
    config = write_tiny_config(folder)
    config.write_text(re.sub(r"\[\[students\]\].*?(?=\[checkpoint\])", "", config.read_text(), flags=re.DOTALL))
    return folder


@pytest.fixture(autouse=True)
def _nothing_is_left(workplace: Path) -> Iterator[None]:
    before = set(Path("/tmp").glob("titan-mpi-*"))
    yield
    assert set(Path("/tmp").glob("titan-mpi-*")) <= before
    mine = [p.info["cmdline"] for p in psutil.process_iter(["cmdline", "cwd"]) if p.info["cwd"] == str(workplace)]
    assert not mine


def start(workplace: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"TITAN_RAY_OPTIONS": f"--num-cpus=2 --object-store-memory={100 << 20}"}
    return subprocess.Popen(
        [str(ROOT / "launch/mpi.sh"), "-n", str(RANKS), "--", *arguments],
        cwd=workplace, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]", timeout_s: float = 120.0) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        raise
    return process.returncode, out, err


def last_step(run: Path) -> int:
    """As metrics.jsonl has it."""
    return max(json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines())


def test_a_run_is_stopped_by_sigterm_and_the_same_call_goes_on_to_the_end(workplace: Path) -> None:
    run = workplace / "runs/tiny"
    process = start(workplace, "tiny.toml", "--set", "run.steps=600")
    wait_for_step(run, "teacher", 2, process)
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    code, _, err = finish(process, 60.0)
    assert code == 130 and "stopped at step" in err
    assert time.monotonic() - begin < 30
    stopped = last_step(run)
    config = run / "config.toml"
    config.write_text(config.read_text().replace("steps = 600", f"steps = {stopped + 3}"))
    code, out, err = finish(start(workplace, "tiny.toml", "--set", f"run.steps={stopped + 3}"))
    assert code == 0, out + err
    assert last_step(run) == stopped + 3


def test_the_exit_code_and_the_message_are_those_of_titan(workplace: Path) -> None:
    code, _, err = finish(start(workplace, "tiny.toml", "--set", "run.stops=3"))
    assert code == 2 and "titan: run.stops is no setting" in err
    done = subprocess.run([str(ROOT / "launch/mpi.sh"), "-n", "2", "--"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and "which run?" in done.stderr
