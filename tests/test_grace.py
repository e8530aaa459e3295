"""The grace after SIGTERM, and what a container does before it ends."""

import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from titan.cluster import grace as module
from titan.cluster.drain import drain, is_driver, is_rank
from titan.cluster.grace import Grace
from titan.config.settings import RecoverySettings

ROOT = Path(__file__).parents[1]


def test_a_grace_is_nearly_over_a_while_before_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [50.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s[0])
    for seconds, waits_s in ((240.0, 225.0), (9.0, 4.5)):
        with Grace(seconds, "") as grace:
            now_s[0] += 1000.0
            assert not grace.is_nearly_over, "it has not begun"
            grace.begin()
            now_s[0] += waits_s - 0.1
            grace.begin()  # a second SIGTERM does not prolong it
            assert not grace.is_nearly_over
            now_s[0] += 0.2
            assert grace.is_nearly_over


@pytest.mark.parametrize(("saved", "code"), [(False, 143), (True, 130)])
def test_a_driver_that_waits_for_something_else_is_ended_when_its_grace_is_over(saved: bool, code: int) -> None:
    program = (
        "import time\nfrom titan.cluster.grace import Grace\n"
        "with Grace(0.3, 'do this') as grace:\n    grace.begin()\n"  # a run that ended in time is left alone
        f"with Grace(1.0, 'do that') as grace:\n    grace.begin()\n    if {saved}: grace.saved()\n    time.sleep(60)\n"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (code, "titan: recovery.grace_s: 1 s after SIGTERM; do that\n")
    assert time.monotonic() - begin > 1.0


def test_slurm_says_that_the_time_is_up_early_enough() -> None:
    script = (ROOT / "launch/slurm.sh").read_text()
    (early_s,) = re.findall(r"^#SBATCH --signal=B:TERM@(\d+)$", script, re.MULTILINE)
    (stop_s,) = re.findall(r"STOP_WAIT_S=(\d+)$", script, re.MULTILINE)
    assert RecoverySettings().grace_s + int(stop_s) + 20 <= int(early_s)


def test_drivers_and_ranks_are_known_by_their_command_lines() -> None:
    for driver in (
        ["/opt/titan/bin/python", "/opt/titan/bin/titan", "run", "/etc/titan/run.toml", "--resume"],
        ["python3", "-m", "titan.cli.main", "resume", "runs/x"],
        ["titan", "run", "x.toml"],
    ):
        assert is_driver(driver), driver
    for other in (
        ["/bin/sh", "-c", "titan run /etc/titan/run.toml"],
        ["python", "/opt/titan/bin/titan", "status", "run"],
        ["python", "-m", "titan.cluster.drain", "200"],
        [],
    ):
        assert not is_driver(other), other
    assert is_rank(["ray::RankActor.train"]) and not is_rank(["ray::ServiceActor"]) and not is_rank([])


def test_a_drain_asks_drivers_to_stop_and_waits_for_them_and_for_ranks(tmp_path: Path) -> None:
    (tmp_path / "titan").write_text(
        "import signal, sys, time\nasked = []\nsignal.signal(signal.SIGTERM, lambda *_: asked.append(1))\n"
        "print('up', flush=True)\nwhile not asked: time.sleep(0.01)\ntime.sleep(1.0)\nsys.exit(130)\n"
    )
    driver, other = (
        subprocess.Popen([sys.executable, str(tmp_path / "titan"), command], stdout=subprocess.PIPE)
        for command in ("run", "status")
    )
    rank = subprocess.Popen(["ray::RankActor", "2"], executable="/bin/sleep")
    for process in (driver, other):
        assert process.stdout is not None
        process.stdout.readline()
    seen = [psutil.Process(process.pid) for process in (driver, other, rank)]
    try:
        begin = time.monotonic()
        assert not drain(seen[:2], timeout_s=0.0)
        assert drain(seen, timeout_s=30.0)
        assert driver.poll() == 130 and rank.poll() == 0 and other.poll() is None
        assert 0.9 < time.monotonic() - begin < 20.0
    finally:
        other.kill()
        driver.kill()
        rank.kill()


@pytest.mark.parametrize(("sent", "code"), [(True, 130), (False, 0)])
def test_a_sigterm_whose_exception_python_drops_is_not_lost(sent: bool, code: int) -> None:
    program = (
        "import os, signal, sys\nfrom titan.cluster.session import no_signal_lost\n"
        "class Cleaned:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGTERM)\n        sum(range(99))\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))\n"
        "try:\n    with no_signal_lost():\n        one = Cleaned()\n"
        f"        if {sent}: del one\n        else: one = setattr(Cleaned, '__del__', lambda self: None)\n"
        "except KeyboardInterrupt:\n    sys.exit(130)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert "SystemExit" not in done.stderr, "the user need not know"
