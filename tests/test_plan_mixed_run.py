"""A stage on two kinds of paced devices, executed: it follows one process and takes the time that was predicted."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.runs import TINY, processes_under, titan, write_tiny_config
from tests.test_planned_run import INVENTORY, SHAPE, blocks_of
from tests.worlds import BATCH, CPU, GQA, LENGTH, VOCAB, World, local, run_world, tokens_of
from titan.config.model import LayoutSettings, OptimizerSettings, StageSettings
from titan.config.planning import (
    BlockSettings,
    DeviceCostSettings,
    InventorySettings,
    LinkSettings,
    NodeSettings,
    ProfileSettings,
    SearchSettings,
    ShapeSettings,
    TaskSettings,
)
from titan.observe.metrics import StepMetric, read_metrics
from titan.ops.objective import Objective
from titan.plan.cost import Costs
from titan.plan.fleet import make_fleet
from titan.plan.pace import Pace
from titan.plan.profile import Profile
from titan.plan.search.role import plan_role
from titan.plan.search.settle import predict
from titan.train.trainer import Trainer, TrainerSettings

STEPS = 6
SAMPLE_S = {"fast": 0.010, "slow": 0.020}
"""Forward seconds of a layer and sample; backward takes twice as long."""
ALONE = LayoutSettings()


def paced_costs() -> Costs:
    """Two fast devices and a slow one, told times that a busy CPU keeps."""
    shares: tuple[tuple[Any, float], ...] = (("embedding", 0.1), ("layer", 1.0), ("head", 0.5))
    blocks = tuple(
        BlockSettings(
            kind=kind, block=block, tp=1, samples=samples, forward_s=seconds * share * samples,
            backward_s=2 * seconds * share * samples, activation_bytes=1000,
        )
        for kind, seconds in SAMPLE_S.items()
        for block, share in shares
        for samples in (1, BATCH)
    )  # fmt: skip
    shape = ShapeSettings(
        hidden=GQA.hidden, heads=GQA.heads, kv_heads=GQA.num_kv_heads, ffn=GQA.ffn, vocab_size=VOCAB,
        sequence_length=LENGTH, precision="fp32", blocks=blocks,
    )  # fmt: skip
    nodes = tuple(
        NodeSettings(name=kind, kind=kind, devices=number, memory_gb=2.0, paced=True)
        for kind, number in (("fast", 2), ("slow", 1))
    )
    pairs = (("fast", "fast"), ("slow", "slow"), ("fast", "slow"))
    links = tuple(LinkSettings(between=pair, gb_per_s=1.0, latency_s=2e-4) for pair in pairs)
    devices = tuple(DeviceCostSettings(kind=kind, update_gb_per_s=0.2) for kind in SAMPLE_S)
    task = TaskSettings(model=GQA, vocab_size=VOCAB, sequence_length=LENGTH, batch_size=BATCH, precision="fp32")
    fleet = make_fleet(InventorySettings(nodes=nodes, links=links))
    return Costs(task, fleet, Profile(task, ProfileSettings(shapes=(shape,), devices=devices)))


def train(world: World, layout: LayoutSettings, paces: tuple[Pace, ...] | None) -> list[tuple[float, float, float]]:
    """Cross-entropy, gradient norm and seconds of every step."""
    settings = TrainerSettings(GQA, layout, OptimizerSettings(), "fp32", VOCAB, LENGTH, BATCH, seed=1)
    trainer = Trainer(world, settings, paces[world.place.rank] if paces else None)
    results = [trainer.step(tokens_of(step), 2e-3, Objective()) for step in range(STEPS)]
    return [(result.cross_entropy, result.grad_norm or 0.0, result.seconds) for result in results]


LAYOUTS = {
    "planned": None,
    "mixed stage before a slow one": LayoutSettings(
        stages=(
            StageSettings(layers=(3,), dp=2, device=("fast", "slow"), islands=(1, 1), shares=(3, 1)),
            StageSettings(layers=(1,), device="fast"),
        ),
        micro_batches=4,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_mixed_stage_follows_one_process_and_is_not_faster_than_predicted(name: str) -> None:
    costs = paced_costs()
    settings = LAYOUTS[name]
    if settings is None:
        plan = plan_role(costs, SearchSettings(tensor=(1,)))
        assert plan.mixed and plan.devices == {"fast": 2, "slow": 1}
        settings = plan.settings
    prediction = predict(costs, settings)
    assert "fast+slow" in prediction.kinds and prediction.layout.transport == "host"
    many = local.run_worlds(
        {"teacher": prediction.layout}, CPU, train, settings, prediction.paces, timeout_s=120.0
    )["teacher"]  # fmt: skip
    (alone,) = run_world(ALONE, train, ALONE, None)
    for rank in many:
        for step, (got, want) in enumerate(zip(rank, alone, strict=True)):
            assert got[0] == pytest.approx(want[0], abs=1e-5), f"cross-entropy of step {step}"
            assert got[1] == pytest.approx(want[1], rel=1e-4), f"gradient norm of step {step}"
    measured_s = min(seconds for _, _, seconds in many[0][1:])
    print(f"{name}: predicted {prediction.step_s:.3f} s, measured {measured_s:.3f} s")
    assert measured_s >= 0.95 * prediction.step_s  # how much longer it takes on a busy machine says nothing


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planned teacher of one layer: a pipeline could not use the slow device."""
    folder = tmp_path_factory.mktemp("mixed")
    write_tiny_config(folder)
    (folder / "inventory.toml").write_text(INVENTORY)
    (folder / "profile.toml").write_text(SHAPE.format(blocks=f"{blocks_of('fast', 0.01)},{blocks_of('slow', 0.03)}"))
    text = TINY.format(text=folder / "text").partition("[[students]]")[0]
    text = text.replace("layers = 2,", "layers = 1,").replace("layout = { tp = 2 }", "layout = { planned = true }")
    text += '[cluster]\ndevice = "cpu"\ninventory = "inventory.toml"\nprofile = "profile.toml"\n'
    (folder / "mixed.toml").write_text(text.replace("steps = 40", "steps = 12"))
    return folder


@pytest.mark.slow
def test_a_run_is_planned_placed_and_paced_on_both_kinds(workplace: Path) -> None:
    said = titan("plan", "mixed.toml", cwd=workplace)
    assert said.returncode == 0 and "1 fast + 1 slow" in said.stdout, said.stdout + said.stderr
    result = titan("run", "mixed.toml", cwd=workplace)
    assert result.returncode == 0, result.stderr
    ran = workplace / "runs" / "tiny"
    plan = json.loads((ran / "plan.json").read_text())
    (stage,) = plan["roles"]["teacher"]["stages"]
    assert (stage["device"], stage["islands"], stage["shares"]) == (["fast", "slow"], [1, 1], [3, 1])
    prediction = plan["predictions"]["teacher"]
    assert prediction["positions"][0]["device"] == "fast+slow" and prediction["positions"][0]["samples"] == [6, 2]
    steps = [m for m in read_metrics(ran) if isinstance(m, StepMetric)]
    assert len(steps) == 12 and steps[-1].loss < steps[0].loss
    assert median(m.step_s for m in steps[1:]) >= 0.95 * prediction["step_s"], "paced devices are never faster"
    assert 'device = [\n    "fast",\n    "slow",\n]' in (ran / "config.toml").read_text()
    assert "<h2>Plan</h2>" in (ran / "report.html").read_text() and "fast+slow" in (ran / "report.html").read_text()
    again = titan("resume", ran, cwd=workplace)
    assert again.returncode == 0 and "is finished" in again.stdout, again.stderr
    assert processes_under(workplace) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("device=['fast','gpu'],islands=[1,1]", "stages.0.device is 'gpu'; the inventory has fast, slow, cpu"),
        ("device=['fast','slow'],islands=[2]", "stages.0.device names 2 kinds, islands has 1"),
        ("device=['fast',3],islands=[1,1]", "stages.0.device.kinds.1 is 3; want"),
        ("device=['cpu','slow'],islands=[1,1],tp=2", "layouts claim 2 devices of kind 'slow', the inventory has 1"),
    ],
)
def test_a_mistake_in_a_mixed_stage_is_one_line(workplace: Path, stage: str, says: str) -> None:
    text = (workplace / "mixed.toml").read_text().replace("planned = true", f"stages = [{{layers=1,dp=2,{stage}}}]")
    (workplace / "bad.toml").write_text(text.replace("=", " = ").replace("'", '"'))
    result = titan("run", "bad.toml", "--set", "run.name=bad", cwd=workplace)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert says in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
