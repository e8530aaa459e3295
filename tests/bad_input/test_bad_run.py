"""What spoils a real run: flipped bits and full disks are one line each, and their remedies lead to the same bits."""

import json
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.bad_input.places import content_of, damage, mount
from tests.runs import processes_under, titan, weights, write_tiny_config
from titan.checkpoint.folder import step_folder
from titan.distill.log.records import COMMITS
from titan.distill.log.segment import segment_path

ROLES = ("teacher", "late")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small.toml, one rank a role, and its finished run runs/small."""
    folder = tmp_path_factory.mktemp("real")
    text = write_tiny_config(folder).read_text().replace("{ tp = 2 }", "{ tp = 1 }").replace("steps = 40", "steps = 30")
    head, early, late = text.split("[[students]]")
    late = late.replace("lead = 0.05", "step = 2")
    assert "early" in early
    (folder / "small.toml").write_text("[[students]]".join((head, late)).replace('"tiny"', '"small"'))
    result = titan("run", "small.toml", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def only_line(result: subprocess.CompletedProcess[str]) -> str:
    """What a command that failed said, of which Ray's own remarks are no part."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("titan: "))
    return line


def back_to(workplace: Path, name: str, step: int) -> Path:
    """A copy of the finished run as if it had been killed soon after a checkpoint."""
    run = workplace / "runs" / name
    shutil.copytree(workplace / "runs/small", run)
    for role in ROLES:
        shutil.rmtree(step_folder(run / "checkpoints" / role, 30))
    assert step == 20
    (run / "summary.json").unlink()
    return run


@pytest.fixture(scope="module")
def flipped(workplace: Path) -> Path:
    """Killed at step 20 with all that a kill leaves behind, and a bit of the teacher's checkpoint flipped since."""
    run = back_to(workplace, "flipped", 20)
    damage(next(step_folder(run / "checkpoints/teacher", 20).glob("*.safetensors")), "flipped")
    (run / "checkpoints/late/step-00000030.partial").mkdir()
    (run / "checkpoints/late/step-00000030.partial/rank-00000.json").write_text("{")
    for name in (
        "metrics.jsonl",
        "events.jsonl",
        f"labels/teacher/{COMMITS}",
        "labels/teacher/part-000/0000000001.segment",
    ):
        with (run / name).open("ab") as file:
            file.write(b'{"torn')
    return run


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_flipped_bit_in_a_checkpoint_is_one_line_with_a_remedy(flipped: Path, workplace: Path) -> None:
    checkpoints = content_of(flipped / "checkpoints/teacher") | content_of(flipped / "checkpoints/late/step-00000020")
    line = only_line(titan("resume", "runs/flipped", cwd=workplace))
    assert "teacher rank 0 on" in line and "is damaged (checksum" in line and "the checkpoint before it" in line
    assert {path: path.read_bytes() for path in checkpoints} == checkpoints
    assert json.loads((flipped / "summary.json").read_text())["status"] == "failed"
    assert (flipped / "report.html").is_file()
    assert processes_under(workplace) == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_its_remedy_leads_to_the_same_bits_whatever_the_kill_left_behind(flipped: Path, workplace: Path) -> None:
    if step_folder(flipped / "checkpoints/teacher", 20).exists():
        shutil.rmtree(step_folder(flipped / "checkpoints/teacher", 20))
    result = titan("resume", "runs/flipped", cwd=workplace)
    assert result.returncode == 0, result.stderr
    for role in ROLES:
        expected, found = weights(workplace / "runs/small", role, 30), weights(flipped, role, 30)
        assert all((expected[key] == found[key]).all() for key in expected), role
    assert json.loads((flipped / "summary.json").read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_flipped_bit_in_the_labels_is_one_line_and_no_label_is_lost(workplace: Path) -> None:
    run = back_to(workplace, "mislabelled", 20)
    shutil.rmtree(run / "checkpoints/late")
    path = segment_path(run / "labels/teacher", 0, 1)
    damage(path, "flipped", path.stat().st_size * 3 // 10 + 500)
    labels = path.read_bytes()
    line = only_line(titan("resume", "runs/mislabelled", cwd=workplace))
    assert "late rank 0 on" in line and "the labels of step" in line and "restore the file" in line
    assert path.read_bytes()[: len(labels)] == labels
    assert processes_under(workplace) == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_disk_that_fills_while_training_is_one_line_and_the_run_goes_on_when_there_is_room(workplace: Path) -> None:
    disk = workplace / "disk"
    disk.mkdir()
    with ExitStack() as stack:
        if not mount(stack, disk, "size=1m"):
            pytest.skip("this machine permits no mounts")
        changes = ["--set", f"run.dir={disk}", "--set", "data.cache=runs/data"]
        line = only_line(titan("run", "small.toml", *changes, cwd=workplace))
        assert "No space left on device" in line and "resume" in line
        assert processes_under(workplace) == []
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert titan("status", f"{disk}/small", cwd=workplace).returncode == 0
        result = titan("resume", f"{disk}/small", cwd=workplace)
        assert result.returncode == 0, result.stderr
        for role in ROLES:
            expected, found = weights(workplace / "runs/small", role, 30), weights(disk / "small", role, 30)
            assert all((expected[key] == found[key]).all() for key in expected), role
