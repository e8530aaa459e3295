"""Three hosts, as network namespaces: a run over them is the run of one host, and mpirun makes a cluster of them."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.hosts import remote_shell
from tests.hosts.namespaces import Host, hosts, require_namespaces
from tests.hosts.ray_hosts import start_ray
from tests.runs import titan, write_tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[1]
TIMEOUT_S = 240.0
STAGES = """layout = {{ stages = [{{ layers = 1, device = "a" }}, {{ layers = 1, device = "b" }}] }}"""


def write_config(folder: Path) -> Path:
    """tiny.toml with the teacher's two stages on devices a and b, and all students on c."""
    path = write_tiny_config(folder)
    text = path.read_text().replace("layout = { tp = 2 }", STAGES.format(), 1).replace("steps = 40", "steps = 20")
    text = text.replace("layout = { pp = 2 }", 'layout = { stages = [{ layers = 1, device = "c" }, '
                        '{ layers = 1, device = "c" }] }')  # fmt: skip
    text = text.replace("start = { lead = 0.05 }", 'layout = { stages = [{ layers = 1, device = "c" }] }\n'
                        "start = { step = 5 }")  # fmt: skip
    path.write_text(text)
    return path


def losses(run: Path) -> dict[tuple[str, str, int], float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(line["kind"], line["role"], line["step"]): line["loss"] for line in lines if "loss" in line}


def num_ranks(host: Host) -> int:
    """Rank processes that a host had, by the logs that Ray keeps of them."""
    logs = (host.folder / host.name / "tmp/ray").glob("session_2*/logs/worker-*.out")
    return sum("actor_name:RankActor" in log.read_text(errors="replace") for log in logs)


def test_a_run_over_three_hosts_matches_the_run_on_one(tmp_path: Path) -> None:
    require_namespaces()
    write_config(tmp_path / "one")
    alone = titan("run", "tiny.toml", cwd=tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    with hosts(3) as (h0, h1, h2):
        shared = h0.folder / "shared"
        write_config(shared)
        kinds = ({"a": 1}, {"b": 1}, {"c": 3})
        cluster = start_ray(
            [h0, h1, h2],
            [(f"--resources={json.dumps(kind)}", f"--num-cpus={next(iter(kind.values()))}") for kind in kinds],
        )
        command = (sys.executable, "-m", "titan.cli.main", "run", "tiny.toml", "--address", cluster.address)
        done = h0.run(
            *command,
            "--set",
            "cluster.nodes=3",
            "--set",
            "labels.delivery=files",
            environment=cluster.environment,
            cwd=shared,
            timeout_s=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        run = shared / "runs/tiny"
        expected, found = losses(tmp_path / "one/runs/tiny"), losses(run)
        plan = json.loads((run / "plan.json").read_text())
        assert [num_ranks(host) for host in (h0, h1, h2)] == [1, 1, 3]
        assert not re.search(cluster.environment["RAY_AUTH_TOKEN"], (run / "config.toml").read_text())
    assert expected.keys() == found.keys() and {role for _, role, _ in found} == {"teacher", "early", "late"}
    assert max(abs(expected[key] - found[key]) for key in expected) < 1e-5
    assert plan["num_ranks"] == 5


@pytest.mark.skipif(not Path(sys.executable).with_name("mpirun").exists(), reason="no mpirun: pip install '.[mpi]'")
def test_mpirun_over_three_hosts_makes_a_node_of_each_and_leaves_nothing(tmp_path: Path) -> None:
    require_namespaces()
    with hosts(3) as made:
        folder = made[0].folder
        path = write_tiny_config(folder / "shared")
        text = re.sub(r"\[\[students\]\].*?(?=\[checkpoint\])", "", path.read_text(), flags=re.DOTALL)
        path.write_text(text.replace("steps = 40", "steps = 10"))
        remote = (sys.executable, remote_shell.__file__)
        launcher = folder / "remote_shell.sh"
        launcher.write_text(f'#!/bin/sh\nexec {" ".join(remote)} "$@"\n')
        launcher.chmod(0o755)
        for host in made:
            host.start(*remote, "serve", log=folder / f"shell-{host.name}.log")
        options = ("-launcher", "ssh", "-launcher-exec", launcher, "-hosts", "h0,h1,h2", "-ppn", "2", "-n", "6")
        done = made[0].run(
            ROOT / "launch/mpi.sh", *options, "--", "tiny.toml",
            environment={"TITAN_RAY_OPTIONS": f"--num-cpus=2 --object-store-memory={100 << 20}"},
            cwd=path.parent, timeout_s=TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        run = path.parent / "runs/tiny"
        nodes = json.loads((run / "plan.json").read_text())["inventory"]["nodes"]
        assert sorted(node["name"] for node in nodes) == ["h0", "h1", "h2"]
        assert json.loads((run / "summary.json").read_text())["status"] == "finished"
        assert sum(num_ranks(host) for host in made) == 2
        for host in made:
            # a process that ended has no command line; its parent is gone too, and `sleep`, the init, reaps nothing
            left = [line for line in host.run("ps", "ax", "-o", "args=").stdout.splitlines() if "<defunct>" not in line]
            assert not [line for line in left if "ray" in line.lower() or "mpi" in line], left
            assert not list((folder / host.name / "tmp").glob("titan-mpi-*"))
