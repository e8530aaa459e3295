"""A run whose ranks go to its home for everything is, bit by bit, the run whose ranks see the run folder."""

import re
from pathlib import Path

import pytest
import torch

from tests.runs import titan, weights, write_tiny_config
from tests.test_launch_hosts import losses
from titan.observe.events import read_events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROLES = ("teacher", "early", "late")
KEEP = """
[labels]
keep = "needed"
segment_bytes = 20000
wait_s = 20.0
"""


def write_config(folder: Path) -> Path:
    """A teacher of two replicas that waits for `early`, which teaches `late`, which starts from a checkpoint."""
    path = write_tiny_config(folder)
    text = path.read_text().replace("layout = { tp = 2 }", "layout = { dp = 2 }")
    text = text.replace("start = { step = 5 }", 'start = { step = 5 }\nbackpressure = "wait"\nmax_lag = 4')
    text = re.sub(r'name = "late"\nmodel = \{.*?\}\nstart = .*?\n', 'name = "late"\nmodel = { layers = 2, hidden = 32, '
                  'heads = 2, ffn = 64 }\nteacher = "early"\ninit = "start/step-00000010"\n', text)  # fmt: skip
    path.write_text(text + KEEP)
    return path


def test_through_its_home_a_run_is_bit_by_bit_the_run_that_sees_its_folder(tmp_path: Path) -> None:
    text = write_config(tmp_path).read_text()
    (tmp_path / "first.toml").write_text(text.replace('init = "start/step-00000010"\n', ""))
    first = titan("run", "first.toml", "--set", "run.name=first", "--set", "run.steps=20", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (tmp_path / "start").symlink_to(tmp_path / "runs/first/checkpoints/early")
    for name in ("shared", "per-node"):
        done = titan("run", "tiny.toml", "--set", f"run.name={name}", "--set", f"run.storage={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        looked = titan("labels", "audit", f"runs/{name}", cwd=tmp_path)
        assert looked.returncode == 0, looked.stdout + looked.stderr
    near, far = (tmp_path / "runs" / name for name in ("shared", "per-node"))
    expected, found = losses(near), losses(far)
    assert found == expected and {role for _, role, _ in found} == set(ROLES)
    for role in ROLES:
        one, two = weights(near, role, 40), weights(far, role, 40)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    for pattern in ("labels/*/commits.jsonl", "ledger/*.jsonl"):
        names = sorted(path.relative_to(near) for path in near.glob(pattern))
        assert len(names) == 2 and all((near / name).read_bytes() == (far / name).read_bytes() for name in names)
    for run in (near, far):
        assert any(event["event"] == "labels_dropped" for event in read_events(run)), "old labels went"
