"""Eight faults of students and label service in one run; `make prove` has fifty (tests/chaos.py)."""

from pathlib import Path

import pytest

from tests.chaos import SERVICE, STUDENTS, chaos

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]


def test_kills_and_hangs_of_students_and_service_change_nothing(tmp_path: Path) -> None:
    result = chaos(tmp_path / "work", faults=8, steps=500, seed=3, victims=(*STUDENTS, SERVICE), timeout_s=400.0)
    assert result.problems == []
    assert sum(result.faults.values()) == 8, result.faults
