"""Fixtures that several modules use."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.bad_input.places import Place, make_place


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make_place` makes it, to copy from."""
    return make_place(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    folder = tmp_path / "here"
    shutil.copytree(original, folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("TITAN_CACHE", raising=False)

    def started(*_: object) -> None:
        raise AssertionError("Ray was to be started")

    monkeypatch.setattr("titan.cluster.launch.ray_session", started)
    with ExitStack() as stack:
        yield Place(folder, stack, monkeypatch)
