"""Inventories, profiles and plan files: every mistake that they can hold, those that are shipped, their schemas."""

import json
from pathlib import Path

import pytest

from titan.config.planning import (
    load_inventory,
    load_plan,
    load_profile,
)
from titan.config.schema import DOCS, SCHEMAS, schema
from titan.errors import ConfigError

INVENTORY = """
links = [{ between = ["fast", "slow"], gb_per_s = 1 }]
[[nodes]]
name = "a"
kind = "fast"
devices = 2
memory_gb = 1
[[nodes]]
name = "b"
kind = "slow"
devices = 2
memory_gb = 1
"""
PROFILE = """
[[shapes]]
hidden = 64
heads = 4
kv_heads = 2
ffn = 128
vocab_size = 1000
sequence_length = 32
precision = "fp32"
[[shapes.blocks]]
kind = "fast"
block = "layer"
tp = 1
samples = 1
forward_s = 1.0
backward_s = 2.0
activation_bytes = 8
"""


@pytest.mark.parametrize(
    ("old", "new", "mistake"),
    [
        (INVENTORY[INVENTORY.index("[[nodes") :], "nodes = []", "nodes is []; want at least 1"),
        ("devices = 2", "devices = 0", "nodes.0.devices is 0; want greater than 0"),
        ("memory_gb = 1", "memory_gb = -1", "nodes.0.memory_gb is -1; want greater than 0"),
        ('name = "b"', 'name = "a"', "inventory.nodes name 'a' is used 2 times; give every group a name of its own"),
        ('kind = "slow"', 'kind = "fast"', "there are the islands fast"),
        ('["fast", "slow"]', '["fast", "swift"]', "names 'swift'; there are the islands fast, slow"),
        ("gb_per_s = 1", "gb_per_s = 0", "links.0.gb_per_s is 0; want greater than 0"),
        ("devices = 2", "device = 2", "nodes.0.device is no setting; did you mean devices?"),
    ],
)
def test_a_wrong_inventory_is_refused(tmp_path: Path, old: str, new: str, mistake: str) -> None:
    path = tmp_path / "inventory.toml"
    path.write_text(INVENTORY)
    assert len(load_inventory(path).nodes) == 2
    path.write_text(INVENTORY.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_inventory(path)
    assert mistake in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "mistake"),
    [
        ("forward_s = 1.0", "forward_s = -1.0", "shapes.0.blocks.0.forward_s is -1.0; want greater than 0"),
        ("backward_s = 2.0", "backward_s = 0", "shapes.0.blocks.0.backward_s is 0; want greater than 0"),
        ("forward_s = 1.0", "forward_s = nan", "shapes.0.blocks.0.forward_s is nan; want a finite number"),
        ("activation_bytes = 8", "activation_bytes = -8", "shapes.0.blocks.0.activation_bytes is -8; want"),
        ("forward_s = 1.0", "", "shapes.0.blocks.0.forward_s is missing and has no default"),
        ('block = "layer"', 'block = "layers"', "shapes.0.blocks.0.block is 'layers'; want 'embedding', 'layer' or"),
        ("samples = 1", "samples = 0", "shapes.0.blocks.0.samples is 0; want greater than 0"),
        (PROFILE[PROFILE.index("[[shapes.blocks") :], "blocks = []", "shapes.0.blocks is []; want at least 1"),
    ],
)
def test_a_wrong_profile_is_refused(tmp_path: Path, old: str, new: str, mistake: str) -> None:
    path = tmp_path / "profile.toml"
    path.write_text(PROFILE)
    assert len(load_profile(path).shapes) == 1
    path.write_text(PROFILE.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    assert mistake in str(caught.value)


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "profile.toml"
    path.write_text(PROFILE.replace("forward_s = 1.0", "forward_s = -1.0").replace("samples = 1", "samples = 0"))
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    assert len(str(caught.value).splitlines()) == 2


def test_a_measurement_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.toml"
    path.write_text(PROFILE + PROFILE[PROFILE.index("[[shapes.blocks") :])
    with pytest.raises(
        ConfigError, match=r"profile.shapes.0.blocks has layer on fast, tp 1, 1 samples twice; keep one"
    ):
        load_profile(path)


def test_a_plan_file_may_refer_to_others_by_relative_path(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/inventory.toml").write_text(INVENTORY)
    (tmp_path / "parts/profile.json").write_text(json.dumps({"peaks": [{"kind": "fast", "tflops": 1.0}]}))
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'name = "referring"\ninventory = "parts/inventory.toml"\nprofile = "parts/profile.json"\n'
        "[task]\nvocab_size = 1000\nsequence_length = 32\nbatch_size = 8\n"
        "model = { layers = 4, hidden = 64, heads = 4, ffn = 128 }\n"
    )
    settings, inventory, profile = load_plan(plan)
    assert (settings.name, len(inventory.nodes), profile.peaks[0].tflops) == ("referring", 2, 1.0)
    (tmp_path / "parts/inventory.toml").unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*inventory.toml"):
        load_plan(plan)


def test_the_plan_files_that_are_shipped_are_right() -> None:
    for path in (DOCS.parent / "configs/inventories").glob("*.toml"):
        text = path.read_text()
        (load_plan if "[task]" in text else load_inventory)(path)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_in_docs_are_not_stale(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == schema(SCHEMAS[name]), "run python -m titan.config.schema"
