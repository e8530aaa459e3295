"""A host is lost and another comes: roles go on with fewer ranks and grow again, and no step is lost."""

import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.runs import kill_tree, processes_under, start_titan, titan, wait_for_events, wait_for_step, write_tiny_config
from titan.observe.events import read_events
from titan.observe.metrics import StepMetric, read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(500)]
STEPS = 500
MEMORY = 80 << 20


def test_roles_shrink_without_a_host_and_grow_with_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # a cluster of this test's own, on the loopback
    folder = tmp_path / "work"
    write_tiny_config(folder)
    head = {"num_cpus": 1, "node_name": "a", "include_dashboard": False, "object_store_memory": MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        lost = cluster.add_node(num_cpus=1, node_name="b", object_store_memory=MEMORY)
        settings = ["run.name=regroup", f"run.steps={STEPS}", f"cluster.address={cluster.address}", "cluster.nodes=2"]
        settings += ["cluster.cpu_ranks_per_core=3", "teacher.layout.tp=1", "teacher.layout.dp=2"]
        process = start_titan("run", "tiny.toml", *(part for s in settings for part in ("--set", s)), cwd=folder)
        run = folder / "runs" / "regroup"
        try:
            wait_for_step(run, "teacher", 15, process, timeout_s=150.0)
            cluster.remove_node(lost, allow_graceful=False)
            wait_for_events(run, "recovered", 1, process, timeout_s=150.0)
            cluster.add_node(num_cpus=1, node_name="c", object_store_memory=MEMORY)
            _, error = process.communicate(timeout=250)
        finally:
            if process.poll() is None:
                kill_tree(process.pid)
        assert process.returncode == 0, error
    finally:
        cluster.shutdown()
    changes = [(event["role"], event["ranks"]) for event in read_events(run) if event["event"] == "layout"]
    by_role = {role: [ranks for who, ranks in changes if who == role] for role in dict(changes)}
    assert by_role, "five ranks do not fit on one node of three"
    assert all(ranks[-1] == 2 for ranks in by_role.values()), f"did not grow again: {by_role}"
    for role in ("teacher", "early", "late"):
        steps = [metric.step for metric in read_metrics(run) if isinstance(metric, StepMetric) and metric.role == role]
        assert sorted(steps) == list(range(min(steps), STEPS + 1)), role
    assert titan("labels", "audit", "runs/regroup", cwd=folder).returncode == 0
    deadline = time.monotonic() + 20.0
    while processes_under(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_under(folder) == []
    assert not ray.is_initialized()


def test_a_wait_for_room_that_is_over_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    folder = tmp_path / "work"
    write_tiny_config(folder)
    head = {"num_cpus": 1, "node_name": "a", "include_dashboard": False, "object_store_memory": MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        lost = cluster.add_node(num_cpus=1, node_name="b", object_store_memory=MEMORY)
        settings = ["run.name=wait", "run.steps=4000", f"cluster.address={cluster.address}", "cluster.nodes=2"]
        settings += ["cluster.cpu_ranks_per_core=3", "recovery.policy=wait", "recovery.wait_s=5.0"]
        process = start_titan("run", "tiny.toml", *(part for s in settings for part in ("--set", s)), cwd=folder)
        try:
            wait_for_step(folder / "runs" / "wait", "teacher", 5, process, timeout_s=150.0)
            cluster.remove_node(lost, allow_graceful=False)
            _, error = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                kill_tree(process.pid)
        assert process.returncode == 1
        assert "waited 5 s for room for" in error and "(recovery.wait_s sets the wait)" in error, error
    finally:
        cluster.shutdown()
