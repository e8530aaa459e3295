"""A real Slurm on this machine: munged, slurmctld and several slurmd, all in one temporary folder."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
START_WAIT_S = 30.0
CONFIG = """
ClusterName=titantest
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=30
KillWait=20
MinJobAge=600
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 RealMemory=4000
PartitionName=main Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP OverTimeLimit=0
"""


@dataclass(frozen=True)
class Slurm:
    """A running Slurm and how to reach it."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: object, cwd: Path | None = None, timeout_s: float = 30.0) -> str:
        """Standard output of one of Slurm's commands."""
        done = subprocess.run(
            list(map(str, command)), env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def wait_for(self, job: str, states: set[str], timeout_s: float) -> str:
        """The state of a job, once it is one of `states`."""
        deadline = time.monotonic() + timeout_s
        while (state := self.field(job, "JobState")) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state} after {timeout_s} s, not one of {states}"
            time.sleep(0.3)
        return state


def require_slurm() -> None:
    """Skip, with the reason, where no Slurm can be started."""
    if os.geteuid() != 0:
        pytest.skip("not root: slurmd starts jobs as other users")
    os.environ["PATH"] += ":/usr/sbin"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurm-wlm munge")


@contextmanager
def slurm(nodes: int) -> Iterator[Slurm]:
    """A Slurm with idle nodes n1, n2, ...; when it ends, so has every process of it and of its jobs."""
    folder = Path(tempfile.mkdtemp(prefix="titan-slurm-", dir="/tmp"))
    made = Slurm(folder)
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(mode=0o711)
    (folder / "munge/key").write_bytes(os.urandom(128))
    (folder / "munge/key").chmod(0o400)
    ports = _free_ports(nodes + 1)
    text = CONFIG.format(
        host=socket.gethostname().split(".")[0],
        folder=folder,
        port=ports[0],
        nodes=nodes,
        first=ports[1],
        last=ports[-1],
    )
    (folder / "slurm.conf").write_text(text)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        munge = folder / "munge"
        options = [f"--{name}={munge / name[:-5]}" for name in ("key-file", "pid-file", "seed-file")]
        options += [f"--socket={munge}/socket", f"--log-file={munge}/log"]
        daemons.append(_start(made, "munged", "--foreground", "--force", *options))
        _wait(lambda: (munge / "socket").exists(), "munged", folder)
        daemons.append(_start(made, "slurmctld", "-D", "-i"))
        daemons += [_start(made, "slurmd", "-D", "-N", f"n{number}") for number in range(1, nodes + 1)]
        _wait(lambda: _num_idle(made) == nodes, f"{nodes} idle nodes", folder)
        yield made
    finally:
        _end(made, daemons)
        shutil.rmtree(folder, ignore_errors=True)


def _start(made: Slurm, *command: str) -> "subprocess.Popen[bytes]":
    out = (made.folder / f"{command[0]}.out").open("ab")
    return subprocess.Popen(command, env=made.environment, stdout=out, stderr=out, start_new_session=True)


def _num_idle(made: Slurm) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"],
        env=made.environment,
        capture_output=True,
        text=True,
        timeout=20,
    )
    return done.stdout.split().count("idle")


def _wait(ready: object, what: str, folder: Path) -> None:
    assert callable(ready)
    deadline = time.monotonic() + START_WAIT_S
    while not ready():
        if time.monotonic() > deadline:
            said = "\n".join(path.read_text(errors="replace")[-500:] for path in folder.glob("*.out"))
            raise AssertionError(f"waited {START_WAIT_S} s for {what}:\n{said}")
        time.sleep(0.1)


def _end(made: Slurm, daemons: "list[subprocess.Popen[bytes]]") -> None:
    """Jobs first, which slurmstepd runs outside the daemons' sessions, then the daemons."""
    mine = f"SLURM_CONF={made.folder}/slurm.conf"
    for _ in range(3):
        for process in psutil.process_iter(["pid"]):
            if process.pid != os.getpid() and mine in _environment(process.pid):
                with_suppress_kill(process.pid)
        time.sleep(0.1)
    for daemon in daemons:
        daemon.wait(timeout=20)


def _environment(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def with_suppress_kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _free_ports(count: int) -> list[int]:
    """Ports in a row that nothing listens on, below those that the kernel hands out."""
    for first in range(17000 + os.getpid() % 5000, 32000, count):
        sockets = []
        try:
            for port in range(first, first + count):
                probe = socket.socket()
                sockets.append(probe)
                probe.bind(("", port))
            return list(range(first, first + count))
        except OSError:
            continue
        finally:
            for probe in sockets:
                probe.close()
    raise AssertionError("no ports in a row are free")
