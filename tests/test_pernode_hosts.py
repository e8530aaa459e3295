"""Hosts that share no storage: the run folder is on the driver's alone, and the others have and lose only copies."""

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hosts.namespaces import Host, hosts, require_namespaces
from tests.hosts.ray_hosts import start_ray
from tests.runs import titan, write_tiny_config
from tests.test_launch_hosts import losses, write_config
from titan.checkpoint.folder import newest_step
from titan.observe.events import read_events

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]
TITAN = (sys.executable, "-m", "titan.cli.main")
STEPS = 150
WAIT_S = 240.0
ROOMS = (
    ("--num-cpus=0",),
    *(("--num-cpus=1", '--resources={"t": 1}'),) * 3,
    ("--num-cpus=1", '--resources={"c": 3}'),
)
"""The driver's host, three of which the teacher takes two, one for students."""


def two_and_one(folder: Path) -> Path:
    """The teacher's stages on two hosts, all students on one."""
    path = write_config(folder)
    path.write_text(path.read_text().replace('device = "a"', 'device = "t"').replace('device = "b"', 'device = "t"'))
    return path


def on_its_disk(host: Host, write: Callable[[Path], Path]) -> Path:
    """Write a config to a disk that one host alone sees; returns its path there."""
    outside, inside = host.folder / host.name / "private/work", host.folder / "private/work"
    path = write(outside)
    path.write_text(path.read_text().replace(str(outside), str(inside)))
    return inside / path.name


def wait_until(true: Callable[[], bool], log: Path, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, f"no {what} in {WAIT_S:.0f} s: {log.read_text()[-3000:]}"
        time.sleep(0.2)


def hosts_of(run: Path, role: str) -> list[str]:
    """Of its ranks, as they were started last."""
    told = [one["processes"] for one in read_events(run) if one["event"] == "placed" and one["role"] == role]
    return [process.partition(":")[0] for process in told[-1]]


def lose_with_its_disk(host: Host) -> None:
    """The host dies, and nothing that was on it comes back."""
    host.kill()
    for part in ("private", "tmp"):
        shutil.rmtree(host.folder / host.name / part)
        (host.folder / host.name / part).mkdir()


def test_without_shared_storage_a_run_that_loses_a_host_and_its_disk_is_the_run_on_one_host(tmp_path: Path) -> None:
    require_namespaces()
    two_and_one(tmp_path / "one")
    alone = titan("run", "tiny.toml", "--set", f"run.steps={STEPS}", cwd=tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    with hosts(5) as made:
        home = made[0]
        path = on_its_disk(home, two_and_one)
        cluster = start_ray(made, ROOMS)
        settings = ("run.storage=per-node", f"run.steps={STEPS}", "cluster.nodes=5")
        sets = [part for one in settings for part in ("--set", one)]
        log = home.folder / "titan.log"
        words = ("env", "-C", path.parent, *TITAN, "run", path, "--address", cluster.address, *sets)
        process = home.start(*words, log=log, environment=cluster.environment)
        run, there = home.folder / home.name / "private/work/runs/tiny", home.folder / "private/work/runs/tiny"
        wait_until(lambda: (newest_step(run / "checkpoints/teacher") or 0) >= 20, log, "checkpoint")
        lost = next(host for host in made if host.name == hosts_of(run, "teacher")[0])
        lose_with_its_disk(lost)
        wait_until(lambda: process.poll() is not None, log, "end of the run")
        assert process.returncode == 0, log.read_text()[-3000:]

        told = read_events(run)
        assert any(one["event"] == "recovered" and one["role"] == "teacher" for one in told)
        assert set(hosts_of(run, "teacher")) == {"h1", "h2", "h3"} - {lost.name}
        assert {*hosts_of(run, "early"), *hosts_of(run, "late")} == {"h4"}
        for host in made[1:]:
            place = host.folder / host.name / "private/work/runs"
            brought = [] if host is lost else ["data"]
            assert [entry.name for entry in place.glob("*")] == brought, "the corpus, and no more"
        expected, found = losses(tmp_path / "one/runs/tiny"), losses(run)
        for command in ("audit", "verify"):
            looked = home.run(*TITAN, "labels", command, there)
            assert looked.returncode == 0, looked.stdout + looked.stderr
        exported = home.run(*TITAN, "export", there, "--student", "early", "--out", home.folder / "private/out")
        assert exported.returncode == 0, exported.stderr
    assert expected.keys() == found.keys() and {role for _, role, _ in found} == {"teacher", "early", "late"}
    assert max(abs(expected[key] - found[key]) for key in expected) < 1e-5


def test_a_host_that_does_not_see_the_run_folder_is_told_in_one_line_and_the_remedy_works(tmp_path: Path) -> None:
    require_namespaces()

    def only_teacher(folder: Path) -> Path:
        path = write_tiny_config(folder)
        text = path.read_text()
        layout = 'layout = { stages = [{ layers = 2, device = "t" }] }\n'
        text = text[: text.index("[[students]]")].replace("layout = { tp = 2 }\n", layout).replace("40", "12")
        path.write_text(f'{text}[cluster]\ndevice = "cpu"\nnodes = 2\n')
        return path

    with hosts(2) as (home, other):
        path = on_its_disk(home, only_teacher)
        cluster = start_ray([home, other], ROOMS[:2])
        run = home.folder / "private/work/runs/tiny"

        def call(*words: object) -> tuple[int, str]:
            command = (*TITAN, *words, "--address", cluster.address)
            done = home.run(*command, cwd=path.parent, environment=cluster.environment, timeout_s=WAIT_S)
            return done.returncode, done.stderr

        code, said = call("run", path)
        lines = [line for line in said.splitlines() if line.startswith("titan: ")]
        assert code == 1 and "Traceback" not in said, said
        assert lines == [
            "titan: teacher rank 0 on h1, step 0: run.storage is 'shared', but this host does not see the run folder "
            f"{run}; put run.dir on storage that all hosts share, or set run.storage = 'per-node'"
        ]
        assert not (other.folder / other.name / "private/work").exists(), "nothing is left on that host"
        code, said = call("resume", run, "--set", "run.storage=per-node")
        assert code == 0, said
        assert newest_step(home.folder / home.name / "private/work/runs/tiny/checkpoints/teacher") == 12
