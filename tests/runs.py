"""Starting real runs the way a user does, killing them, and looking at what they left."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from titan.observe.events import read_events

TEXT_MODULES = ("argparse", "ast", "typing", "enum", "inspect", "pathlib", "pickle", "random", "socket", "tarfile")
RUN_TIMEOUT_S = 240.0
WAIT_S = 180.0

TINY = """
[run]
name = "tiny"
steps = 40
[data]
sources = ["{text}"]
vocab_size = 512
sequence_length = 32
batch_size = 8
heldout_fraction = 0.2
workers = 1
[teacher]
model = {{ layers = 2, hidden = 64, heads = 2, ffn = 128 }}
layout = {{ tp = 2 }}
[[students]]
name = "early"
model = {{ layers = 2, hidden = 32, heads = 2, ffn = 64 }}
layout = {{ pp = 2 }}
start = {{ step = 5 }}
[[students]]
name = "late"
model = {{ layers = 1, hidden = 32, heads = 2, ffn = 64 }}
start = {{ lead = 0.05 }}
[checkpoint]
every_steps = 10
[eval]
samples = 32
[cluster]
device = "cpu"
step_timeout_s = 60.0
"""


def write_tiny_config(folder: Path) -> Path:
    """A run.toml over a few modules of the standard library, in an empty folder."""
    text = folder / "text"
    text.mkdir(parents=True)
    for name in TEXT_MODULES:
        source = Path(sys.modules["os"].__file__ or "").with_name(f"{name}.py")
        (text / source.name).write_text(source.read_text())
    path = folder / "tiny.toml"
    path.write_text(TINY.format(text=text))
    return path


def titan(*arguments: object, cwd: Path, timeout_s: float = RUN_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; on a timeout all its processes die."""
    with start_titan(*arguments, cwd=cwd) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_titan(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    """Start the command in a session of its own."""
    command = [sys.executable, "-m", "titan.cli.main", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_for_step(
    folder: Path, role: str, step: int, process: subprocess.Popen[str], timeout_s: float = WAIT_S
) -> None:
    """Wait until a role has reported a step."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"the run ended with {process.returncode}: {process.communicate()}")
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # torn: being written
            if record["role"] == role and record["step"] >= step:
                return
        time.sleep(0.05)
    kill_tree(process.pid)
    raise AssertionError(f"{role} did not reach step {step} in {timeout_s} s")


def wait_for_events(
    folder: Path, event: str, count: int, process: subprocess.Popen[str], timeout_s: float = WAIT_S
) -> None:
    """Wait until a run has told so many events of a kind."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"the run ended with {process.returncode}: {process.communicate()}")
        if (folder / "events.jsonl").exists() and (sum(one["event"] == event for one in read_events(folder)) >= count):
            return
        time.sleep(0.05)
    kill_tree(process.pid)
    raise AssertionError(f"no {event} number {count} in {timeout_s} s")


def rank_processes(pid: int) -> list[psutil.Process]:
    """Processes of the ranks of a run, by the pid of its driver."""
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if "RankActor" in " ".join(child.cmdline())]


def placed(run: Path, role: str) -> list[int]:
    """Processes of the ranks of a role, those that were started last."""
    events = [event for event in read_events(run) if event["event"] == "placed" and event["role"] == role]
    return [int(process.rpartition(":")[2]) for process in events[-1]["processes"]]


def kill_tree(pid: int) -> list[int]:
    """SIGKILL a process and all its descendants at once; returns who they were."""
    parent = psutil.Process(pid)
    family = [parent, *parent.children(recursive=True)]
    for process in family:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)
    return [process.pid for process in family]


def processes_under(folder: Path) -> list[str]:
    """Command lines of living rank processes and drivers that belong to a run in this folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "status"]):
        info = process.info
        if info["status"] != psutil.STATUS_ZOMBIE and info["cwd"] and Path(info["cwd"]).is_relative_to(folder):
            found.append(" ".join(info["cmdline"] or [])[:100])
    return found


def weights(folder: Path, role: str, step: int) -> dict[str, torch.Tensor]:
    """All pieces of a checkpoint by key, whatever rank wrote them."""
    files = sorted((folder / "checkpoints" / role / f"step-{step:08d}").glob("*.safetensors"))
    assert files, f"{role} has no checkpoint of step {step}"
    pieces: dict[str, torch.Tensor] = {}
    for file in files:
        pieces |= load_file(file)
    return pieces
