"""Stages that are unlike each other in everything follow one process, over both transports."""

from pathlib import Path
from typing import Any

import pytest

from tests.parity import ALONE, MODELS, START, History, Parity, assert_same, train
from tests.worlds import BATCH, World, make_trainer, run_world, tokens_of
from titan.config.model import LayoutSettings, StageSettings
from titan.ops.objective import Objective

STEPS = 20


def stages(*wanted: dict[str, Any], **more: Any) -> LayoutSettings:
    """A layout stage by stage."""
    return LayoutSettings(stages=tuple(StageSettings(**stage) for stage in wanted), **more)


LAYOUTS = {
    "tp2 to tp1": (stages({"layers": 3, "tp": 2}, {"layers": 1}), "gqa"),
    "tp1 to tp2": (stages({"layers": 1}, {"layers": 3, "tp": 2}), "gqa"),
    "dp1 to dp2": (stages({"layers": 1}, {"layers": 3, "dp": 2}), "gqa"),
    "dp2 to dp1": (stages({"layers": 2, "dp": 2}, {"layers": 2}), "gqa"),
    "dp3 to dp2": (stages({"layers": 2, "dp": 3}, {"layers": 2, "dp": 2}), "gqa"),
    "shares 3:1": (stages({"layers": 2, "dp": 2, "shares": (3, 1)}, {"layers": 2}), "gqa"),
    "three stages all different, tied": (
        stages({"layers": 1, "tp": 2}, {"layers": 2, "dp": 2, "shares": (1, 3), "shard": 2}, {"layers": 1},
               micro_batches=4), "tied",
    ),
    "tied, tp1 to tp2": (stages({"layers": 2}, {"layers": 2, "tp": 2}), "tied"),
    "tied, tp2 dp1 to tp1 dp2 sharded": (stages({"layers": 2, "tp": 2}, {"layers": 2, "dp": 2, "shard": 2}), "tied"),
    "tied, dp3 to dp2": (stages({"layers": 3, "dp": 3}, {"layers": 1, "dp": 2}), "tied"),
    "sequence slices of 2 to whole, recompute": (
        stages({"layers": 2, "tp": 2}, {"layers": 2, "dp": 2}, sequence_parallel=True, recompute=True), "tied",
    ),
    "whole to sequence slices of 2 to 4": (
        stages({"layers": 1}, {"layers": 1, "tp": 2}, {"layers": 2, "tp": 4}, sequence_parallel=True,
               micro_batches=4), "mha",
    ),
    "interleaved": (LayoutSettings(pp=2, schedule="interleaved", chunks=2, micro_batches=4), "gqa"),
    "interleaved, unlike stages, tied": (
        stages({"layers": (1, 1), "tp": 2}, {"layers": (1, 1), "dp": 2, "shares": (1, 2)}, schedule="interleaved",
               chunks=2, micro_batches=4), "tied",
    ),
    "static shapes, shares 3:1 and dp3": (
        stages({"layers": 2, "dp": 2, "shares": (3, 1), "static_shapes": True},
               {"layers": 2, "dp": 3, "static_shapes": True}), "tied",
    ),
    "two islands": (stages({"layers": 2, "dp": 3, "islands": (2, 1)}, {"layers": 2}), "gqa"),
    "two islands of tp2, tied": (stages({"layers": 2}, {"layers": 2, "tp": 2, "dp": 2, "islands": (1, 1)}), "tied"),
}  # fmt: skip


@pytest.fixture(scope="module")
def follow(tmp_path_factory: pytest.TempPathFactory) -> Parity:
    return Parity(tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["direct", "host"])
@pytest.mark.parametrize(("layout", "kind"), LAYOUTS.values(), ids=LAYOUTS)
def test_unlike_stages_follow_one_process(follow: Parity, layout: LayoutSettings, kind: str, transport: str) -> None:
    assert_same(*follow(layout.model_copy(update={"transport": transport}), kind, steps=STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dp3 to dp2", "interleaved, unlike stages, tied"])
def test_so_do_students_of_soft_labels(follow: Parity, name: str) -> None:
    layout, kind = LAYOUTS[name]
    assert_same(*follow(layout, kind, soft=True, steps=8))


@pytest.mark.slow
@pytest.mark.parametrize(
    "chain",
    [
        ["three stages all different, tied", "interleaved, unlike stages, tied", "tied, dp3 to dp2"],
        ["tied, tp2 dp1 to tp1 dp2 sharded", "two islands of tp2, tied", "three stages all different, tied"],
    ],
    ids=["there", "back"],
)
def test_a_checkpoint_of_one_goes_on_in_another(follow: Parity, chain: list[str], tmp_path: Path) -> None:
    """Each layout takes over from the one before; together they are one process."""
    each = 6
    alone = follow.alone("tied", "fp32", False, BATCH, each * len(chain))
    folder, history = follow.checkpoint("tied"), []
    for turn, name in enumerate(chain):
        layout, kind = LAYOUTS[name]
        model = MODELS[kind]
        target = tmp_path / str(turn)
        many = run_world(layout, train, layout, model, "fp32", False, BATCH, folder, each, target, model=model)
        history += many[0][:-1]
        folder = target
    assert_same([[*history, many[0][-1]]], alone)


def mixed_precision(world: World, layout: LayoutSettings, steps: int) -> History:
    trainer = make_trainer(world, layout)
    results = [trainer.step(tokens_of(step), 2e-3, Objective()) for step in range(steps)]
    return [(result.cross_entropy, 0.0, result.grad_norm) for result in results]


@pytest.mark.slow
def test_a_stage_in_bf16_beside_one_in_fp32_stays_near_single_precision() -> None:
    """bf16 rounds a value by at most 2^-9 of itself: the bounds of tests/test_parallel_parity.py."""
    layout = stages({"layers": 2, "precision": "bf16"}, {"layers": 2, "dp": 2}, transport="host")
    many = run_world(layout, mixed_precision, layout, 10)
    (alone,) = run_world(ALONE, mixed_precision, ALONE, 10)
    assert all(history == many[0] for history in many) and many[0] != alone
    for step, (got, want) in enumerate(zip(many[0], alone, strict=True), START + 1):
        assert got[0] == pytest.approx(want[0], abs=2.0**-9), f"cross-entropy of step {step}"
        assert got[2] == pytest.approx(want[2], rel=5 * 2.0**-9), f"gradient norm of step {step}"


def sizes_seen(world: World, layout: LayoutSettings) -> set[int]:
    """How many samples the module of this rank was given."""
    trainer = make_trainer(world, layout)
    module, seen = trainer.stage.module, set()

    def look(_: object, arguments: tuple[dict[str, Any], int]) -> None:
        inputs = arguments[0]
        seen.add(inputs["hidden"].shape[1] if "hidden" in inputs else len(inputs["tokens"]))

    module.register_forward_pre_hook(look)
    trainer.step(tokens_of(1), 2e-3, Objective())
    return seen


@pytest.mark.slow
def test_static_shapes_are_the_same_on_every_replica() -> None:
    layout, _ = LAYOUTS["static shapes, shares 3:1 and dp3"]
    assert run_world(layout, sizes_seen, layout) == [{3}, {3}, {2}, {2}, {2}]
    ragged, _ = LAYOUTS["shares 3:1"]
    assert run_world(ragged, sizes_seen, ragged) == [{3}, {1}, {4}]
