"""`titan plan` and `titan doctor --profile` as a user meets them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.parity import ALONE
from tests.runs import TINY, titan, write_tiny_config
from tests.worlds import CPU, LENGTH, VOCAB, World, make_trainer, run_world, tokens_of
from titan.config.model import LayoutSettings, ModelSettings
from titan.config.planning import InventorySettings, LinkSettings, NodeSettings, ProfileSettings, TaskSettings
from titan.ops.objective import Objective
from titan.parallel.live_bytes import LiveBytes
from titan.plan.cost import Costs
from titan.plan.fleet import make_fleet
from titan.plan.layout import make_layout
from titan.plan.profile import Profile
from titan.train.measure import measure_link, measure_shape

PLAN = """
name = "two-kinds"
[task]
vocab_size = 32000
sequence_length = 2048
batch_size = 256
model = { layers = 16, hidden = 2048, heads = 16, kv_heads = 8, ffn = 5632 }
[search]
tensor = [1, 2, 4]
[inventory]
nodes = [
  { name = "fast", kind = "fast", devices = 4, count = 2, memory_gb = 40 },
  { name = "slow", kind = "slow", devices = 4, count = 2, memory_gb = 40 },
]
links = [
  { between = ["fast", "fast"], gb_per_s = 20 },
  { between = ["slow", "slow"], gb_per_s = 10 },
  { between = ["fast", "slow"], gb_per_s = 5 },
]
[profile]
peaks = [{ kind = "fast", tflops = 300 }, { kind = "slow", tflops = 100 }]
devices = [{ kind = "fast", update_gb_per_s = 1000 }, { kind = "slow", update_gb_per_s = 1000 }]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.toml").write_text(PLAN)
    return folder


def planned(place: Path, *arguments: object) -> dict[str, Any]:
    result = titan("plan", "plan.toml", "--json", *arguments, cwd=place)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_plan_says_how_good_it_is_and_what_it_is_better_than(place: Path) -> None:
    found = planned(place, "--picture", "plan.png")
    assert found["bound_step_s"] <= found["step_s"] <= 1.25 * found["bound_step_s"]
    assert found["gap"] == pytest.approx(found["step_s"] / found["bound_step_s"] - 1)
    assert found["step_s"] < min(found["uniform_step_s"], found["best_single_kind_step_s"])
    assert all(0 < device["memory_bytes"] <= device["limit_bytes"] == 40e9 for device in found["devices"])
    assert (place / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_and_the_timeline_are_readable_without_a_terminal(place: Path) -> None:
    result = titan("plan", "plan.toml", cwd=place)
    assert result.returncode == 0
    expected = ("stage   device", "layers", "memory", "forward ▒  backward █", "gap ", "equal layers on all devices")
    for words in (*expected, "schedule ", "zero-bubble is only simulated"):
        assert words in result.stdout, words


def test_the_schedule_is_chosen_unless_the_file_says_1f1b(tmp_path: Path) -> None:
    few = PLAN.replace("batch_size = 256", "batch_size = 8").replace("tensor = [1, 2, 4]", "tensor = [4]")
    for name, text in (("auto", few), ("plain", few.replace("tensor =", 'schedule = "1f1b"\ntensor ='))):
        (tmp_path / f"{name}.toml").write_text(text)
    auto, plain = (
        json.loads(titan("plan", f"{name}.toml", "--json", cwd=tmp_path).stdout) for name in ("auto", "plain")
    )
    assert (auto["schedule"], plain["schedule"], plain["chunks"]) == ("interleaved", "1f1b", 1)
    assert len(auto["stages"]) == auto["chunks"] * (1 + max(device["stage"] for device in auto["devices"]))
    assert auto["step_s"] == plain["schedules_step_s"]["interleaved"] < plain["step_s"]
    assert plain["step_s"] == auto["schedules_step_s"]["1f1b"]
    assert auto["bound_any_schedule_step_s"] == auto["bound_step_s"] <= auto["step_s"]
    said = titan("plan", "auto.toml", cwd=tmp_path).stdout
    assert (
        "no layout under any schedule with one kind of device a stage takes less than" in said
        and "schedule interleaved in " in said
    )


def test_a_stage_on_two_kinds_is_shown_with_its_kinds_and_shares(tmp_path: Path) -> None:
    one = PLAN.replace("layers = 16", "layers = 1").replace("tensor = [1, 2, 4]", "tensor = [4]")
    (tmp_path / "one.toml").write_text(one)
    found = json.loads(titan("plan", "one.toml", "--json", cwd=tmp_path).stdout)
    (stage,) = found["stages"]
    assert found["mixed"] and (stage["device"], stage["islands"]) == (["fast", "slow"], [2, 2])
    fast, _, slow, _ = (share * found["samples"] // sum(stage["shares"]) for share in stage["shares"])
    assert 2.5 < fast / slow < 3.5 and found["bound_step_s"] == found["bound_any_layout_step_s"]
    said = titan("plan", "one.toml", cwd=tmp_path).stdout
    assert "2 fast + 2 slow" in said and f" {fast} + {slow} " in said and "no layout at all takes less than" in said
    (tmp_path / "one.toml").write_text(one.replace("tensor =", "mixed = false\ntensor ="))
    alone = json.loads(titan("plan", "one.toml", "--json", cwd=tmp_path).stdout)
    assert not alone["mixed"] and alone["step_s"] > 1.1 * found["step_s"]
    kinds = '{ layers = 1, dp = 2, islands = [1, 1], device = ["fast", "gpu"] }'
    (tmp_path / "wrong.toml").write_text(f"stages = [{kinds}]\n")
    told = titan("plan", "one.toml", "--layout", "wrong.toml", cwd=tmp_path)
    assert told.returncode != 0 and len(told.stderr.splitlines()) == 1
    assert "stage 0 wants device 'gpu'; the inventory has fast, slow" in told.stderr


def test_a_given_layout_is_evaluated_and_not_searched(place: Path) -> None:
    best = planned(place)
    halves = ", ".join(f'{{ layers = 8, device = "{kind}", dp = 4 }}' for kind in ("fast", "slow"))
    (place / "layout.toml").write_text(f"micro_batches = 16\nstages = [{halves}]\n")
    given = planned(place, "--layout", "layout.toml")
    assert given["fits"] and given["step_s"] > best["step_s"] and "bound_step_s" not in given


def test_other_files_stand_for_sections(place: Path) -> None:
    (place / "profile.toml").write_text('peaks = [{ kind = "fast", tflops = 600 }, { kind = "slow", tflops = 200 }]\n')
    (place / "inventory.toml").write_text(
        'nodes = [{ name = "n", kind = "fast", devices = 8, memory_gb = 80 }]\n'
        'links = [{ between = ["fast", "fast"], gb_per_s = 50 }]\n'
    )
    (place / "model.toml").write_text(PLAN.partition("[task]")[2].partition("[search]")[0].replace("16,", "8,", 1))
    whole = planned(place)
    assert planned(place, "--profile", "profile.toml")["step_s"] < whole["step_s"]
    assert {d["kind"] for d in planned(place, "--inventory", "inventory.toml")["devices"]} == {"fast"}
    assert planned(place, "--model", "model.toml")["step_s"] < whole["step_s"]


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        (("links = [", "linkz = ["), (), "linkz is no setting; did you mean links?"),
        (("tflops = 300", "tflops = -300"), (), "tflops is -300; want greater than 0"),
        (
            ('["fast", "slow"]', '["fast", "fast"]'),
            ("--layout", "two.toml"),
            "between fast and slow",
        ),
        (('{ kind = "slow", tflops = 100 }', ""), ("--layout", "two.toml"), "knows nothing of layer on slow"),
        (("memory_gb = 40", "memory_gb = 0.5"), (), "bytes"),
        (("", ""), ("--layout", "gap.toml"), "stages have 15 layers, the model has 16"),
        (("", ""), ("--layout", "zero.toml"), "stages.1.layers.0 is 0; want greater than 0"),
        (("", ""), ("--layout", "none.toml"), "cannot read none.toml"),
        (("", ""), ("--set", "run.steps=3"), "is a plan file, not a run.toml"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_is_one_line(tmp_path: Path, change: tuple[str, str], arguments: tuple[str, ...], says: str) -> None:
    (tmp_path / "plan.toml").write_text(PLAN.replace(*change) if change[0] else PLAN)
    for name, layers in (("two", (8, 8)), ("gap", (8, 7)), ("zero", (16, 0))):
        both = zip(layers, ("fast", "slow"), strict=True)
        stages = ", ".join(f'{{ layers = {count}, device = "{kind}", dp = 4 }}' for count, kind in both)
        (tmp_path / f"{name}.toml").write_text(f"micro_batches = 16\nstages = [{stages}]\n")
    result = titan("plan", "plan.toml", *arguments, cwd=tmp_path)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert says in result.stderr and result.stderr.startswith("titan: "), result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_measured_profile_predicts_a_run_and_is_calibrated_by_it(tmp_path: Path) -> None:
    write_tiny_config(tmp_path)
    (tmp_path / "inventory.toml").write_text('nodes = [{ name = "host", kind = "cpu", devices = 4, memory_gb = 8 }]\n')
    text = TINY.format(text=tmp_path / "text").partition("[[students]]")[0] + "[cluster]\ndevice = 'cpu'\n"
    (tmp_path / "alone.toml").write_text(text)
    made = titan("doctor", "--profile", "cpu.json", "--run", "alone.toml", "--tensor", 1, "--tensor", 2, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    profile = json.loads((tmp_path / "cpu.json").read_text())
    blocks = profile["shapes"][0]["blocks"]
    assert {(b["block"], b["tp"]) for b in blocks} == {(k, t) for k in ("embedding", "layer", "head") for t in (1, 2)}
    assert profile["links"][0]["gb_per_s"] > 0 and profile["devices"][0]["update_gb_per_s"] > 0
    sets = [f"--set=cluster.{name}={file}" for name, file in (("inventory", "inventory.toml"), ("profile", "cpu.json"))]
    ran = titan("run", "alone.toml", *sets, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    done = titan("doctor", "--calibrate", "runs/tiny", "--profile", "cpu.json", cwd=tmp_path)
    assert done.returncode == 0 and "times what was predicted" in done.stdout, done.stderr
    assert json.loads((tmp_path / "cpu.json").read_text())["devices"][0]["calibration"] != 1.0


def test_a_profile_without_a_run_is_a_mistake(tmp_path: Path) -> None:
    result = titan("doctor", "--profile", "x.json", cwd=tmp_path)
    assert result.returncode == 2 and "needs --run RUN.toml" in result.stderr


def living_bytes(world: World, settings: LayoutSettings) -> int:
    """Most bytes of living tensors in any step but the first."""
    with LiveBytes() as live:
        trainer = make_trainer(world, settings, WIDER)
        for step in range(3):
            if step == 1:
                live.peak = live.now
            trainer.step(tokens_of(step), 1e-3, Objective())
    return live.peak


WIDER = ModelSettings(layers=4, hidden=192, heads=4, kv_heads=2, ffn=512)
MEMORY = {
    "one": ALONE,
    "pp2 uneven": LayoutSettings(pp=2, layers=(3, 1), micro_batches=4),
    "dp2 sharded": LayoutSettings(dp=2, shard=2, micro_batches=2),
    "interleaved": LayoutSettings(pp=2, schedule="interleaved", chunks=2, micro_batches=4),
}


@pytest.mark.slow
def test_predicted_memory_is_that_of_living_tensors() -> None:
    task = TaskSettings(model=WIDER, vocab_size=VOCAB, sequence_length=LENGTH, batch_size=16, precision="fp32")
    shape, _ = measure_shape(CPU, "cpu", task, tensor=(1,), samples=(4, 8, 16))
    node = NodeSettings(name="cpu", kind="cpu", devices=2, memory_gb=1.0)
    inventory = InventorySettings(nodes=(node,), links=(LinkSettings(between=("cpu", "cpu"), gb_per_s=1.0),))
    costs = Costs(task, make_fleet(inventory), Profile(task, ProfileSettings(shapes=(shape,))))
    for name, settings in MEMORY.items():
        prediction = costs.predict(make_layout(WIDER, settings))
        for rank, got in enumerate(run_world(settings, living_bytes, settings, model=WIDER)):
            told = prediction.memory[prediction.layout.place(rank).position].total
            assert got == pytest.approx(told, rel=0.06), f"{name}, rank {rank}"


def test_a_link_is_measured() -> None:
    latency_s, gb_per_s = measure_link(CPU)
    assert 0 <= latency_s < 0.1 and 0.01 < gb_per_s < 1000
