"""A few faults in one run, on one host and over three; `make chaos` has many (tests/chaos.py)."""

from pathlib import Path

import pytest

from tests.chaos import SERVICE, STUDENTS, chaos
from tests.hosts.chaos import ENDS, KINDS, hosts_chaos
from tests.hosts.namespaces import require_namespaces

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]


def test_kills_and_hangs_of_students_and_service_change_nothing(tmp_path: Path) -> None:
    result = chaos(tmp_path / "work", faults=8, steps=500, seed=3, victims=(*STUDENTS, SERVICE), timeout_s=400.0)
    assert result.problems == []
    assert sum(result.faults.values()) == 8, result.faults


def test_a_run_over_three_hosts_survives_lost_ranks_hosts_links_disk_driver_and_ray(tmp_path: Path) -> None:
    require_namespaces()
    result = hosts_chaos(tmp_path / "work", faults=6, steps=120, seed=2, timeout_s=400.0)
    assert result.problems == [], result
    assert set(result.faults) == set(KINDS[:6])
    assert result.starts == 1 + len(ENDS)
