"""What layouts are said to take, against sums done by hand; and the layouts that cannot be."""

import itertools
from dataclasses import replace
from typing import Any

import pytest

from titan.config.model import LayoutSettings, ModelSettings, StageSettings
from titan.config.planning import (
    BlockSettings,
    DeviceCostSettings,
    InventorySettings,
    LinkSettings,
    NodeSettings,
    PeakSettings,
    ProfileSettings,
    ShapeSettings,
    TaskSettings,
)
from titan.errors import ConfigError
from titan.plan.cost import Costs, Prediction
from titan.plan.edges import routes
from titan.plan.fleet import make_fleet
from titan.plan.given import evaluate_layout
from titan.plan.layout import Layout, Stage, make_layout
from titan.plan.profile import Profile

MODEL = ModelSettings(layers=4, hidden=64, heads=4, kv_heads=2, ffn=128)
LAYER = 64 * (2 * 64 + 2 * 2 * 16) + 3 * 64 * 128 + 2 * 64
"""Weights: queries, output, keys and values; gate, up and down; two norms."""
VOCAB = 1024 * 64
HIDDEN_BYTES = 32 * 64 * 4
"""Of one sample, fp32."""


def task_of(**changed: Any) -> TaskSettings:
    values = {"model": MODEL, "vocab_size": 1000, "sequence_length": 32, "batch_size": 8, "precision": "fp32"}
    return TaskSettings(**(values | changed))


def measured(kind: str, samples: int, tp: int = 1, factor: float = 1.0, **changed: Any) -> list[BlockSettings]:
    """Entries of all blocks; seconds grow with samples, and not only by their number."""
    whole = {"embedding": (0.1, 0.2), "layer": (1.0, 2.0), "head": (3.0, 1.0)}
    return [
        BlockSettings(
            **{
                "kind": kind,
                "block": block,
                "tp": tp,
                "samples": samples,
                "forward_s": factor * forward * (samples + 1),
                "backward_s": factor * backward * (samples + 1),
                "activation_bytes": 1000 * samples,
                "workspace_bytes": {"embedding": 10, "layer": 500, "head": 5000}[block],
            }
            | changed  # type: ignore[arg-type]
        )
        for block, (forward, backward) in whole.items()
    ]


def profile_of(blocks: list[BlockSettings], task: TaskSettings | None = None, **sections: Any) -> Profile:
    shape = ShapeSettings(
        hidden=64, heads=4, kv_heads=2, ffn=128, vocab_size=1000, sequence_length=32, precision="fp32",
        blocks=tuple(blocks),
    )  # fmt: skip
    return Profile(task or task_of(), ProfileSettings(shapes=(shape,), **sections))


def costs_of(task: TaskSettings | None = None, memory_gb: float = 1.0, **sections: Any) -> Costs:
    """Four fast and four slow devices in nodes of two, slow ones three times slower."""
    nodes = tuple(
        NodeSettings(name=kind, kind=kind, devices=2, count=2, memory_gb=memory_gb) for kind in ("fast", "slow")
    )
    links = (
        LinkSettings(between=("fast", "fast"), latency_s=0.01, gb_per_s=1.0),
        LinkSettings(between=("slow", "slow"), latency_s=0.02, gb_per_s=0.5),
        LinkSettings(between=("fast", "slow"), latency_s=0.03, gb_per_s=0.25),
    )
    blocks = [
        block
        for kind, factor in (("fast", 1.0), ("slow", 3.0))
        for tp in (1, 2)
        for samples in (1, 2, 4, 8)
        for block in measured(kind, samples, tp, factor / tp)
    ]
    fleet = make_fleet(InventorySettings(nodes=nodes, links=links))
    return Costs(task or task_of(), fleet, profile_of(blocks, task, **sections))


def predict(costs: Costs, *stages: StageSettings, **layout: Any) -> Prediction:
    return costs.predict(make_layout(costs.task.model, LayoutSettings(stages=stages, **layout)))


def test_times_between_measured_micro_batches_are_linear_and_beyond_twice_the_last_unknown() -> None:
    profile = profile_of([*measured("fast", 2), *measured("fast", 4)])
    for samples, forward_s in ((1, 1.5), (2, 3.0), (3, 4.0), (4, 5.0), (6, 7.0), (8, 9.0)):
        assert profile.block("fast", "layer", 1, samples).forward_s == pytest.approx(forward_s), samples
    with pytest.raises(ConfigError, match=r"layer on fast at tp 1 for at most 4 samples, a layout needs 9; measure"):
        profile.block("fast", "layer", 1, 9)
    with pytest.raises(ConfigError, match=r"layer on fast at tp 1 for 4 samples or more, a layout needs 1; measure"):
        profile_of(measured("fast", 4)).block("fast", "layer", 1, 1)


def test_a_hole_in_a_profile_is_named() -> None:
    blocks = [block for block in measured("fast", 2) if block.block != "head"]
    with pytest.raises(ConfigError, match="profile knows nothing of head on fast at tp 1 for hidden 64"):
        profile_of(blocks).block("fast", "head", 1, 2)
    with pytest.raises(ConfigError, match="profile knows nothing of layer on fast at tp 2"):
        profile_of(blocks).block("fast", "layer", 2, 2)
    other = task_of(sequence_length=64)
    with pytest.raises(ConfigError, match="64 tokens, fp32; measure it with"):
        profile_of(blocks, other).block("fast", "layer", 1, 2)
    assert not profile_of(blocks).has("fast", 1)


def test_calibration_multiplies_seconds_and_nothing_else() -> None:
    plain = profile_of(measured("fast", 2)).block("fast", "layer", 1, 2)
    tuned = profile_of(measured("fast", 2), devices=(DeviceCostSettings(kind="fast", calibration=1.25),))
    cost = tuned.block("fast", "layer", 1, 2)
    assert cost.forward_s == pytest.approx(1.25 * plain.forward_s)
    assert cost.backward_s == pytest.approx(1.25 * plain.backward_s)
    assert cost.activation_bytes == plain.activation_bytes


def test_what_was_not_measured_is_estimated_from_operations() -> None:
    peak = PeakSettings(kind="fast", tflops=1.0, efficiency=0.5, tensor_gb_per_s=1.0)
    profile = Profile(task_of(), ProfileSettings(peaks=(peak,)))
    tokens = 2 * 32
    operations = 2 * LAYER * tokens + 2 * tokens * 32 * 64
    assert profile.block("fast", "layer", 1, 2).forward_s == pytest.approx(operations / 0.5e12)
    assert profile.block("fast", "layer", 1, 2).backward_s == pytest.approx(2 * operations / 0.5e12)
    exchange_s = 2 * (2 * 1 / 2 * tokens * 64 * 4 / 1e9)
    assert profile.block("fast", "layer", 2, 2).forward_s == pytest.approx(operations / 1e12 + exchange_s)


def test_a_step_is_the_exact_timeline_of_its_stages() -> None:
    """Two stages, two micro-batches of four samples: every pass and message by hand."""
    costs = costs_of(devices=tuple(DeviceCostSettings(kind=kind, update_gb_per_s=1000.0) for kind in ("fast", "slow")))
    prediction = predict(
        costs, StageSettings(layers=(3,), device="fast"), StageSettings(layers=(1,), device="slow"), micro_batches=2
    )
    first, last = prediction.times
    assert (first.forward_s, first.backward_s) == pytest.approx((5 * 3.1, 5 * 6.2))
    assert (last.forward_s, last.backward_s) == pytest.approx((15 * 4.0, 15 * 3.0))
    edge_s = 0.03 + 4 * HIDDEN_BYTES / 0.25e9
    assert (first.to_next_s, last.to_previous_s) == pytest.approx((edge_s, edge_s))
    # forward 0 reaches the slow stage, which is never idle again; then its gradient goes back
    passes_s = 15.5 + edge_s + 2 * (60.0 + 45.0) + edge_s + 31.0
    tail_s = (3 * LAYER + VOCAB) * 16 / 1e12
    assert prediction.step_s == pytest.approx(passes_s + tail_s)


def test_the_slowest_replica_counts_and_shares_need_not_be_equal() -> None:
    stage = StageSettings(layers=(4,), dp=2, shares=(3, 1), device="fast")
    prediction = predict(costs_of(), stage, micro_batches=2)
    assert prediction.times[0].forward_s == pytest.approx((3 + 1) * (4 * 1.0 + 0.1 + 3.0))
    assert prediction.paces[1].forward_s[0] == pytest.approx((1 + 1) * (4 * 1.0 + 0.1 + 3.0))


@pytest.mark.parametrize(
    ("source", "target", "samples_moved"),
    [
        ((1, 1), (1, 1), 4),
        ((1, 2), (1, 2), 2),
        ((1, 1), (1, 2), 4),  # one sends all
        ((1, 2), (1, 1), 4),  # one receives all
        ((1, 1), (2, 1), 8),  # one sends a copy to each tensor rank
        ((2, 1), (1, 1), 4),
    ],
)
def test_an_edge_takes_what_its_busiest_rank_sends_or_receives(
    source: tuple[int, int], target: tuple[int, int], samples_moved: int
) -> None:
    stages = [
        Stage(index, index, index + 1, index == 0, index == 1, tp, dp, 1, 2 * index, device="fast")
        for index, (tp, dp) in enumerate((source, target))
    ]
    seconds = costs_of().edge_s(stages[0], stages[1], 4, sequence_parallel=False)
    assert seconds == pytest.approx(0.01 + samples_moved * HIDDEN_BYTES / 1e9)


def test_the_busiest_rank_of_an_edge_is_that_of_all_its_messages() -> None:
    degrees = [(tp, dp) for tp in (1, 2, 4) for dp in (1, 2, 3)]
    for source_degrees, target_degrees, cut in itertools.product(degrees, degrees, (False, True)):
        source, target = (
            Stage(index, index, index + 1, index == 0, index == 1, tp, dp, 1, 12 * index, device="fast")
            for index, (tp, dp) in enumerate((source_degrees, target_degrees))
        )
        source = replace(source, shares=(5, 1) if source.dp == 2 else ())
        moved: dict[tuple[str, int], int] = {}
        for route in routes(source, target, 6, 32, cut):
            positions, samples = route.region.shape
            for end in (("sent", route.source), ("received", route.target)):
                moved[end] = moved.get(end, 0) + positions * samples
        seconds = costs_of().edge_s(source, target, 6, cut)
        assert seconds == pytest.approx(0.01 + max(moved.values()) * 64 * 4 / 1e9), (
            source_degrees,
            target_degrees,
            cut,
        )


def test_replicas_exchange_gradients_and_update_after_the_passes() -> None:
    costs = costs_of(devices=(DeviceCostSettings(kind="fast", update_gb_per_s=2.0),))
    weights = 4 * LAYER + 2 * VOCAB
    one = predict(costs, StageSettings(layers=(4,), device="fast")).timeline.tail_s[0]
    two = predict(costs, StageSettings(layers=(4,), dp=2, device="fast")).timeline.tail_s[0]
    shared = predict(costs, StageSettings(layers=(4,), dp=2, shard=2, device="fast")).timeline.tail_s[0]
    assert one == pytest.approx(weights * 16 / 2e9)
    assert two == pytest.approx(weights * 16 / 2e9 + 0.01 + 2 * 1 / 2 * 4 * weights / 1e9)
    assert two - shared == pytest.approx(weights * 4 / 2e9)


@pytest.mark.parametrize(
    ("precision", "shard", "each"),
    [("fp32", 1, 4 + 4 + 8), ("fp32", 2, 4 + 4 + 4), ("bf16", 1, 2 + 4 + 12), ("bf16", 2, 2 + 4 + 6)],
)
def test_weights_gradients_and_optimizer_are_counted_as_the_engine_holds_them(
    precision: str, shard: int, each: int
) -> None:
    costs = costs_of()
    stage = StageSettings(layers=(4,), dp=2, shard=shard, precision=precision, device="fast")  # type: ignore[arg-type]
    memory = predict(costs, stage).memory[0]
    assert memory.state == pytest.approx((4 * LAYER + 2 * VOCAB) * each)


def test_tied_embeddings_are_on_both_ends_and_once_on_a_single_stage() -> None:
    tied = costs_of(task_of(model=MODEL.model_copy(update={"tied": True})))
    one = predict(tied, StageSettings(layers=(4,), device="fast")).memory
    two = predict(tied, *(StageSettings(layers=(2,), device="fast"),) * 2, micro_batches=2).memory
    assert one[0].state == pytest.approx((4 * LAYER + VOCAB) * 16)
    assert [memory.state for memory in two] == pytest.approx([(2 * LAYER + VOCAB) * 16] * 2)


def test_activations_are_those_of_the_micro_batches_in_flight() -> None:
    """Three stages, four micro-batches of two samples: 1F1B has 3, 2 and 1 in flight."""
    costs = costs_of(devices=(DeviceCostSettings(kind="fast", fixed_gb=0.25),))
    stages = [StageSettings(layers=(number,), device="fast") for number in (2, 1, 1)]
    first, middle, last = predict(costs, *stages, micro_batches=4).memory
    edge = 2 * HIDDEN_BYTES
    assert first.activations == pytest.approx(3 * (2 * 2000 + 2000 + edge) + edge)
    assert middle.activations == pytest.approx(2 * (2000 + edge) + 2 * edge)
    assert last.activations == pytest.approx(2000 + 2000 + edge)
    assert (first.workspace, middle.workspace, last.workspace) == (500, 500, 5000)
    assert first.fixed == 0.25e9
    assert first.total == first.state + first.activations + first.workspace + first.fixed
    few = predict(costs, *stages, micro_batches=2).memory[0]
    assert few.activations == pytest.approx(2 * (2 * 4000 + 4000 + 2 * edge) + 2 * edge)


def test_recomputing_does_the_forward_pass_of_layers_again_but_not_of_embedding_and_head() -> None:
    """Two stages of micro-batches of four samples, and two chunks of one stage: backward passes by hand."""
    first, last = (StageSettings(layers=(number,), device="fast") for number in (3, 1))
    plain = predict(costs_of(), first, last, micro_batches=2)
    again = predict(costs_of(), first, last, micro_batches=2, recompute=True)
    assert [times.forward_s for times in again.times] == [times.forward_s for times in plain.times]
    assert [times.backward_s for times in plain.times] == pytest.approx([5 * (3 * 2 + 0.2), 5 * (2 + 1.0)])
    assert [times.backward_s for times in again.times] == pytest.approx([5 * (3 * 3 + 0.2), 5 * (3 + 1.0)])
    assert [pace.backward_s[0] for pace in again.paces] == [times.backward_s for times in again.times]
    assert again.busy_s[0] == pytest.approx(2 * 5 * (3 * 4 + 0.3))
    # the last stage is never idle after its first forward pass; with longer passes back it is the first that is late
    edge_s, tail_s = 0.01 + 4 * HIDDEN_BYTES / 1e9, again.timeline.tail_s[0]
    assert plain.step_s == pytest.approx(15.5 + edge_s + 2 * (20 + 15) + edge_s + 31 + tail_s)
    assert again.step_s == pytest.approx(15.5 + edge_s + (20 + 20) + edge_s + 2 * 46 + tail_s)
    cut = StageSettings(layers=(1, 1), device="fast")
    chunks = predict(costs_of(), cut, cut, micro_batches=2, schedule="interleaved", chunks=2, recompute=True)
    assert [times.backward_s for times in chunks.times] == pytest.approx([5 * (3 + 0.2), 15.0, 15.0, 5 * (3 + 1.0)])


def test_recomputing_keeps_layer_inputs_and_needs_one_layer_for_a_moment() -> None:
    costs = costs_of()
    memory = predict(costs, StageSettings(layers=(4,), device="fast"), micro_batches=4, recompute=True).memory[0]
    assert memory.activations == pytest.approx(4 * 2 * HIDDEN_BYTES + 2000 + 2000)
    assert memory.workspace == 5000
    plain = predict(costs, StageSettings(layers=(4,), device="fast"), micro_batches=4).memory[0]
    assert plain.activations == pytest.approx(4 * 2000 + 2000 + 2000)


def test_a_layout_that_is_too_large_is_told_by_stage() -> None:
    stages = [StageSettings(layers=(number,), device="fast") for number in (3, 1)]
    assert predict(costs_of(memory_gb=0.0025), *stages, micro_batches=2).too_large == [0]
    assert predict(costs_of(memory_gb=1.0), *stages, micro_batches=2).too_large == []


def test_a_missing_link_names_both_ends() -> None:
    nodes = tuple(NodeSettings(name=kind, kind=kind, devices=2, memory_gb=1.0) for kind in ("fast", "slow"))
    fleet = make_fleet(InventorySettings(nodes=nodes))
    costs = Costs(task_of(), fleet, costs_of().profile)
    stages = [StageSettings(layers=(2,), device=kind) for kind in ("fast", "slow")]
    with pytest.raises(ConfigError, match=r"inventory.links has no link between fast and slow"):
        predict(costs, *stages, micro_batches=2)
    with pytest.raises(ConfigError, match=r"inventory.links has no link between fast and fast"):
        predict(costs, StageSettings(layers=(4,), dp=2, device="fast"))


def stages_of(*spans: tuple[int, int], dp: int = 1, tp: int = 1, device: str = "fast") -> Layout:
    stages = tuple(
        Stage(i, first, end, i == 0, i == len(spans) - 1, tp, dp, 1, i * tp * dp, device=device)
        for i, (first, end) in enumerate(spans)
    )
    return Layout(stages, micro_batches=2, sequence_parallel=False, recompute=False)


@pytest.mark.parametrize(
    ("layout", "mistake"),
    [
        (
            stages_of((0, 1), (2, 4)),
            r"stage 1 holds layers \[2, 4\), but the one before ends at 1; layers 1 to 1 are on",
        ),
        (
            stages_of((0, 3), (2, 4)),
            r"stage 1 holds layers \[2, 4\), but the one before ends at 3; layers 2 to 2 are on",
        ),
        (
            stages_of((0, 2), (2, 2), (2, 4)),
            r"stage 1 holds layers \[2, 2\), which is none; give every stage one layer",
        ),
        (stages_of((0, 2), (2, 3)), "the stages end at layer 3, the model has 4 layers; make them equal"),
        (stages_of((0, 2), (2, 5)), "the stages end at layer 5, the model has 4 layers; make them equal"),
        (
            replace(stages_of((0, 4), dp=4), micro_batches=4),
            "stage 0 has 4 replicas, but a micro-batch has 2 samples, not one for each",
        ),
        (
            replace(stages_of((0, 4)), micro_batches=3),
            r"micro_batches is 3, which does not divide task.batch_size \(8\)",
        ),
        (stages_of((0, 2), (2, 4), dp=3), "the layout wants 6 devices of fast, the inventory has 4; use fewer"),
        (stages_of((0, 4), tp=4), "stage 0 has tp 4, but a node of fast has 2 devices"),
        (stages_of((0, 4), device="quick"), "stage 0 wants device 'quick'; the inventory has fast, slow"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_in_one_line(layout: Layout, mistake: str) -> None:
    with pytest.raises(ConfigError, match=mistake) as caught:
        evaluate_layout(costs_of(), layout)
    assert len(str(caught.value).splitlines()) == 1


def test_all_mistakes_of_a_layout_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        evaluate_layout(costs_of(), stages_of((0, 0), (1, 5), dp=5))
    assert len(str(caught.value).splitlines()) == 6


def test_a_given_layout_has_the_numbers_of_a_plan() -> None:
    layout = make_layout(MODEL, LayoutSettings(stages=(StageSettings(layers=(4,), device="fast"),), micro_batches=2))
    assert evaluate_layout(costs_of(), layout) == costs_of().predict(layout)
