"""`titan doctor` says what is there, what it means, and whether a run can start."""

import io
import time
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from titan.cli import doctor


def said(width: int = 200) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=width)
    can_start = doctor.print_findings(console, try_ray=False)
    return can_start, console.file.getvalue()  # type: ignore[attr-defined]


def test_a_working_machine_gets_a_table_and_a_verdict_within_seconds() -> None:
    begin = time.monotonic()
    can_start, text = said()
    assert time.monotonic() - begin < 5.0
    assert can_start
    assert text.rstrip().splitlines()[-1].startswith("A run can start here, with ")
    for word in ("python", "torch", "megatron-core", "ray", "apex", "cores", "/dev/shm", "rank slots", "optimizer"):
        assert any(line.startswith(word) for line in text.splitlines()), word


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    found = metadata.version

    def without_ray(name: str) -> str:
        if name == "ray":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata, "version", without_ray)
    can_start, text = said()
    assert not can_start
    last = text.rstrip().splitlines()[-1]
    assert last == "A run cannot start here: ray is missing, pip install -e . in titan's folder."


def test_a_megatron_core_of_another_version_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    found = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.15.0" if name == "megatron-core" else found(name))
    can_start, text = said()
    assert not can_start
    assert "megatron-core is 0.15.0, titan needs ==0.16.1" in text


@pytest.mark.parametrize("extension", [True, False])
def test_an_apex_is_nvidias_only_with_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: bool
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('doctor must not import it')")
    unrelated = doctor._apex()
    assert "not NVIDIA's" in unrelated.found and "pip uninstall apex" in unrelated.why
    assert doctor._optimizer(on_cuda=True).found == "torch AdamW"
    for part in ("multi_tensor_apply", "optimizers"):
        (package / part).mkdir()
    if extension:
        (tmp_path / "amp_C.py").touch()
    nvidias = doctor._apex()
    assert "not NVIDIA's" not in nvidias.found
    assert ("of no use" in nvidias.why) != extension
    assert doctor._optimizer(on_cuda=True).found == ("apex FusedAdam" if extension else "torch AdamW")
    assert (doctor._optimizer(on_cuda=False).problem is not None) == extension
