"""A teacher on a host that is cut off from the network, but not from the storage: it is put up again elsewhere, and the
one that was given up, stopped meanwhile, comes back and can write nothing."""

import pytest

from tests.hosts.cluster import HurtRun
from tests.hosts.namespaces import hosts, require_namespaces
from tests.runs import titan, write_tiny_config
from titan.checkpoint.folder import newest_step
from titan.observe.events import read_events

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]
ROOMS = (("--num-cpus=1",), *(("--num-cpus=1", '--resources={"t": 1}'),) * 2)
TEACHER = 'layout = { stages = [{ layers = 2, device = "t" }] }'
SETTINGS = (
    "run.steps=1500",
    "labels.delivery=files",
    "cluster.nodes=3",
    "students.early.backpressure=wait",  # so that the run is not over before the teacher that was given up is back
    "students.early.max_lag=10",
    "labels.wait_s=50",
)
WAIT_S = 180.0


def teacher_is_back(hurt: HurtRun) -> bool:
    """It trains again; a student that was on the same host may do so before it."""
    return any(one["event"] == "recovered" and one["role"] == "teacher" for one in read_events(hurt.run))


def test_a_teacher_that_was_cut_off_and_comes_back_is_refused_and_the_labels_stay_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_namespaces()
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "300")  # else Ray ends what is cut off after a minute
    with hosts(3, 160 << 20) as made:
        path = write_tiny_config(made[0].folder / "shared/work")
        path.write_text(path.read_text().replace("layout = { tp = 2 }", TEACHER, 1))
        hurt = HurtRun(made, SETTINGS, ROOMS)
        hurt.begin("run", path)
        hurt.wait(lambda: (newest_step(hurt.run / "checkpoints/teacher") or 0) >= 20, WAIT_S, "checkpoint")
        name, _, pid = hurt.placed("teacher")[0].rpartition(":")
        host = next(host for host in made if host.name == name)

        host.run("kill", "-STOP", pid)
        hurt.down.add(name)
        host.unplug()
        hurt.wait(lambda: teacher_is_back(hurt), WAIT_S, "recovery of the teacher")
        assert hurt.placed("teacher")[0].rpartition(":")[0] != name
        session = next(one for one in (host.folder / name / "tmp/ray").glob("session_2*"))
        refused = "generation 1 of teacher writes nothing more: generation "

        def says_why() -> bool:
            return any(refused in log.read_text(errors="replace") for log in session.glob("logs/worker-*.err"))

        assert not says_why()
        host.run("kill", "-CONT", pid)
        hurt.wait(says_why, WAIT_S, "word of the teacher that was given up")
        host.plug_in()
        hurt.down.remove(name)
        hurt.wait_for_end(2 * WAIT_S)
        assert hurt.ended() == 0, hurt.log.read_text()[-2000:]
        for command in ("audit", "verify"):
            looked = titan("labels", command, hurt.run, cwd=hurt.run)
            assert looked.returncode == 0, looked.stdout + looked.stderr
