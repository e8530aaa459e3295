"""Stages with replicas of several kinds of devices: what they take by hand, their shares, and what the planner finds
against trying all of them.
"""

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.test_plan_search import costs_of
from titan.config.check_layout import Batch, stage_mistakes
from titan.config.model import LayoutSettings, StageSettings
from titan.config.planning import SearchSettings
from titan.errors import ConfigError
from titan.plan.cost import Costs, Prediction
from titan.plan.edges import routes
from titan.plan.given import evaluate_layout
from titan.plan.layout import make_layout
from titan.plan.memory import stage_parameters
from titan.plan.search.joint import plan_jointly
from titan.plan.search.mixed import Design, Mixer, Unit, least_s
from titan.plan.search.node_loss import plans_after_node_loss
from titan.plan.search.role import RolePlan, plan_role
from titan.plan.search.schedules import best_interleaved
from titan.plan.search.settle import predict
from titan.plan.search.shares import water_filled, with_shares
from titan.plan.search.work import every_bound_s

SEARCH = SearchSettings(tensor=(1,))
WITHIN = 1.02
"""How much slower than the best of all layouts a plan may be: 1 % is not worth a mixed stage, the rest is what the
improvement misses."""


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to share so many samples, one each at least."""
    for cuts in itertools.combinations(range(1, total), parts - 1):
        yield tuple(end - start for start, end in itertools.pairwise([0, *cuts, total]))


def stages_of(counts: dict[str, int], layers: int, samples: int) -> Iterator[StageSettings]:
    """A stage on so many devices of each kind, with all shares."""
    kinds = tuple(kind for kind, number in counts.items() if number)
    islands = tuple(number for number in counts.values() if number)
    if sum(islands) > samples:
        return
    for shares in compositions(samples, sum(islands)):
        several = {"device": kinds, "islands": islands} if len(kinds) > 1 else {"device": kinds[0]}
        yield StageSettings(layers=(layers,), dp=sum(islands), shares=shares, **several)


def every_mixed(costs: Costs) -> Iterator[Prediction]:
    """All 1F1B layouts at tensor degree 1: any devices on any stage, any shares."""
    kinds = {kind.name: kind.devices for kind in costs.fleet.kinds.values()}
    task = costs.task
    some = [dict(zip(kinds, each, strict=True)) for each in itertools.product(*(range(n + 1) for n in kinds.values()))]
    for number in (n for n in range(1, task.batch_size + 1) if task.batch_size % n == 0):
        for stages in range(1, min(task.model.layers, sum(kinds.values())) + 1):
            for held in itertools.product([each for each in some if any(each.values())], repeat=stages):
                if any(sum(each[kind] for each in held) > most for kind, most in kinds.items()):
                    continue
                for split in compositions(task.model.layers, stages):
                    ways = [
                        list(stages_of(each, layers, task.batch_size // number))
                        for each, layers in zip(held, split, strict=True)
                    ]
                    for given in itertools.product(*ways):
                        yield predict(costs, LayoutSettings(stages=given, micro_batches=number))


def random_costs(rng: random.Random) -> Costs:
    fast, slow = rng.choice([(1, 1), (2, 1), (1, 2), (2, 2)])
    return costs_of(
        {"fast": fast, "slow": slow},
        {"fast": rng.uniform(20.0, 50.0), "slow": rng.uniform(5.0, 40.0)},
        layers=rng.randint(1, 4 if fast + slow < 4 else 3),
        batch=4,
        memory_gb=rng.choice([1.0, 0.006, 0.0045, 0.004, 0.0035]),
        gb_per_s=rng.choice([1.0, 10.0, 100.0]),
    )


def test_a_plan_is_never_worse_than_with_one_kind_a_stage_and_nearly_the_best_of_all() -> None:
    better = tight = 0
    for seed in range(30):
        costs = random_costs(random.Random(seed))
        every = list(every_mixed(costs))
        steps_s = [each.step_s for each in every if not each.too_large]
        tight += len(steps_s) < len(every)
        least = every_bound_s(costs, SEARCH)
        for each in every:
            assert least_s(costs, each.layout) <= each.step_s * (1 + 1e-9), seed
            assert least <= each.step_s * (1 + 1e-9), seed
        try:
            alone = plan_role(costs, SEARCH.model_copy(update={"mixed": False}))
        except ConfigError:
            continue
        plan = plan_role(costs, SEARCH)
        assert plan.step_s <= alone.step_s and not alone.mixed, seed
        assert plan.mixed == (plan.step_s < alone.step_s), seed
        assert plan.bound_step_s <= plan.step_s and plan.every_bound_s <= alone.work_bound_s, seed
        assert plan.step_s <= WITHIN * min(steps_s), (seed, plan.step_s / min(steps_s))
        if plan.mixed:
            better += 1
            check(plan, costs)
    assert better >= 8 and tight >= 8


def check(plan: RolePlan, costs: Costs) -> None:
    """A layout that a run accepts, fits, and reads the same after JSON."""
    batch = Batch(costs.task.batch_size, costs.task.sequence_length)
    assert not list(stage_mistakes("layout", plan.settings, costs.task.model, batch, costs.task.precision))
    again = LayoutSettings.model_validate_json(json.dumps(plan.settings.model_dump(mode="json")))
    assert again == plan.settings
    evaluated = evaluate_layout(costs, make_layout(costs.task.model, again))
    assert evaluated.step_s == plan.step_s and not evaluated.too_large
    told = json.loads(json.dumps(plan.to_json()))
    assert told["mixed"] and told["bound_step_s"] == told["bound_any_layout_step_s"] <= told["step_s"]
    assert sum(told["used"].values()) == len(told["devices"]) == evaluated.layout.num_ranks


def test_shares_are_those_of_trying_all() -> None:
    rng = random.Random(2)
    for _ in range(300):
        replicas = {kind: rng.randint(1, 2) for kind in ("fast", "slow", "odd")[: rng.randint(1, 3)]}
        samples = sum(replicas.values()) + rng.randint(0, 7)
        times = {kind: sorted(rng.uniform(0.0, 9.0) for _ in range(samples + 2)) for kind in replicas}
        order = [kind for kind, number in replicas.items() for _ in range(number)]

        def slowest(shares: tuple[int, ...], order: list[str] = order, times: dict[str, list[float]] = times) -> float:
            return max(times[kind][share] for kind, share in zip(order, shares, strict=True))

        found = water_filled(replicas, samples, lambda kind, share, times=times: times[kind][share])  # type: ignore[misc]
        got = tuple(itertools.chain.from_iterable(found.values()))
        assert sum(got) == samples and min(got) >= 1
        assert slowest(got) == min(map(slowest, compositions(samples, len(order))))


def two_and_one(layers: int = 1, batch: int = 60, **changed: float) -> Costs:
    return costs_of({"fast": 2, "slow": 1}, {"fast": 20.0, "slow": 10.0}, layers, batch, gb_per_s=100.0, **changed)


def mixed_stage(layers: int = 1, **changed: object) -> StageSettings:
    values = {"layers": (layers,), "dp": 3, "device": ("fast", "slow"), "islands": (2, 1), "shares": (2, 2, 1)}
    return StageSettings(**(values | changed))  # type: ignore[arg-type]


def test_one_layer_is_shared_by_all_devices_where_no_pipeline_could_use_them() -> None:
    """The case of docs/planner.md."""
    costs = two_and_one()
    alone, plan = (plan_role(costs, SEARCH.model_copy(update={"mixed": mixed})) for mixed in (False, True))
    assert alone.devices == {"fast": 2, "slow": 0} and plan.devices == {"fast": 2, "slow": 1}
    assert plan.settings.stages == (mixed_stage(),)
    assert 1.2 < alone.step_s / plan.step_s <= 1.25, "speeds add up to 5 instead of 4"
    assert plan.gap < 0.02


def test_a_mixed_stage_takes_what_its_replicas_exchanges_and_edges_take() -> None:
    costs = two_and_one(layers=3)
    task, block = costs.task, costs.profile.block
    settings = LayoutSettings(stages=(mixed_stage(2), StageSettings(layers=(1,), device="fast")), micro_batches=6)
    prediction = predict(costs, settings)
    layout, (first, second) = prediction.layout, prediction.times
    assert layout.transport == "host" and prediction.kinds == ("fast+slow", "fast")
    assert prediction.rank_kinds == ("fast", "fast", "slow", "fast")
    assert prediction.samples_of(0) == [4, 4, 2] and prediction.samples_of(1) == [10]
    own = [(2 * block(k, "layer", 1, n).forward_s + block(k, "embedding", 1, n).forward_s) for k, n in
           (("fast", 4), ("slow", 2))]  # fmt: skip
    assert first.forward_s == pytest.approx(max(own))
    assert [pace.forward_s[0] for pace in prediction.paces[:3]] == pytest.approx([own[0], own[0], own[1]])
    sample_bytes = task.sequence_length * task.model.hidden * 4
    ways = routes(layout.stages[0], layout.stages[1], 10, task.sequence_length, False)
    moved = sum((way.region.samples[1] - way.region.samples[0]) * sample_bytes for way in ways)
    assert first.to_next_s == second.to_previous_s == pytest.approx(1e-4 + moved / 100e9)
    parameters = stage_parameters(task, layout.stages[0])
    one_way, update_s = 1e-4 + 4 * parameters / 100e9, 16 * parameters / 10e9
    ring_s = 1e-4 + 2 * (2 - 1) / 2 * 4 * parameters / 100e9
    assert prediction.timeline.tail_s[0] == pytest.approx(ring_s + one_way + one_way + update_s)
    by_kind = prediction.needs[0]
    assert by_kind["fast"].activations == pytest.approx(2 * by_kind["slow"].activations)
    assert by_kind["fast"].state == by_kind["slow"].state


def test_edges_of_mixed_stages_go_over_each_pairs_own_network() -> None:
    """Slow links to the slow kind: what its replica sends counts at their speed, the others' does not."""
    costs = two_and_one(layers=2)
    slow_link = replace(costs.fleet.networks[frozenset(("fast", "slow"))], bytes_per_s=1e6, latency_s=0.5)
    fleet = replace(costs.fleet, networks={**costs.fleet.networks, frozenset(("fast", "slow")): slow_link})
    settings = LayoutSettings(
        stages=(
            StageSettings(layers=(1,), dp=2, device=("fast", "slow"), islands=(1, 1), shares=(4, 1)),
            StageSettings(layers=(1,), device="fast"),
        ),
        micro_batches=12,
    )
    times = predict(replace(costs, fleet=fleet), settings).times
    sample_bytes = 32 * 64 * 4
    slow_s, fast_s = sample_bytes / 1e6, 4 * sample_bytes / 100e9
    assert times[0].to_next_s == pytest.approx(0.5 + slow_s + fast_s), "the receiver takes them one by one"


def test_memory_is_counted_for_each_kind_of_a_stage() -> None:
    costs = two_and_one()
    alone = predict(costs, LayoutSettings(stages=(mixed_stage(),), micro_batches=1))
    assert alone.layout.transport == "host", "the gradients of unlike devices meet on the host"
    needs = alone.needs[0]
    assert needs["slow"].total < needs["fast"].total
    kinds = costs.fleet.kinds
    for kind, limit in (("fast", needs["fast"].total - 1), ("slow", needs["slow"].total - 1)):
        small = {**kinds, kind: replace(kinds[kind], memory_bytes=limit)}
        tight = predict(replace(costs, fleet=replace(costs.fleet, kinds=small)), LayoutSettings(
            stages=(mixed_stage(),), micro_batches=1))  # fmt: skip
        assert tight.too_large == [0]
        assert tight.memory[0] == needs[kind] and tight.limit_bytes[0] == limit


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({"device": ("fast", "slow", "fast")}, "stages.0.device names 3 kinds, islands has 2; give one kind an island"),
        ({"islands": None}, "stages.0.device names 2 kinds, islands is absent; give one kind an island"),
        ({"islands": (2, 2)}, "stages.0.islands adds up to 4, dp is 3"),
        ({"shard": 3}, "optimizer state is not shared between islands, use 1"),
    ],
)
def test_a_list_of_kinds_that_does_not_match_its_islands_is_one_line(stage: dict[str, object], says: str) -> None:
    costs = two_and_one()
    layout = LayoutSettings(stages=(mixed_stage(**stage),), micro_batches=1)
    found = list(stage_mistakes("layout", layout, costs.task.model, Batch(60, 32), "fp32"))
    assert any(says in each for each in found) and len(found) <= 2


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({"device": ("fast", "gpu")}, "stage 0 wants device 'gpu'; the inventory has fast, slow"),
        ({"islands": (1, 2)}, "the layout wants 2 devices of slow, the inventory has 1"),
    ],
)
def test_kinds_that_are_not_there_are_one_line(stage: dict[str, object], says: str) -> None:
    costs = two_and_one()
    with pytest.raises(ConfigError) as caught:
        evaluate_layout(costs, make_layout(costs.task.model, LayoutSettings(stages=(mixed_stage(**stage),))))
    assert says in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_shares_are_made_anew_for_other_micro_batches() -> None:
    costs = two_and_one(batch=60)
    for number, shares in ((1, (2, 2, 1)), (12, (2, 2, 1)), (15, (2, 1, 1)), (20, (1, 1, 1))):
        settings = LayoutSettings(stages=(mixed_stage(),), micro_batches=number)
        (stage,) = with_shares(costs, settings).stages or ()
        assert stage.shares == shares, number
    with pytest.raises(ConfigError, match="a stage has 3 replicas, a micro-batch 2 samples"):
        with_shares(costs, LayoutSettings(stages=(mixed_stage(),), micro_batches=30))


def test_lost_nodes_and_several_roles_may_get_mixed_stages_too() -> None:
    costs = costs_of({"fast": 3, "slow": 2}, {"fast": 20.0, "slow": 15.0}, 1, 60, per_node=1, gb_per_s=100.0)
    plan = plan_role(costs, SEARCH)
    assert plan.mixed and plan.devices == {"fast": 3, "slow": 2}
    after = plans_after_node_loss(plan)
    for kind, then in after.items():
        anew = plan_role(replace(costs, fleet=costs.fleet.without({kind: 1})), SEARCH)
        assert then is not None and then.step_s == pytest.approx(anew.step_s, rel=0.02)
    large = costs_of({"fast": 3, "slow": 2}, {"fast": 20.0, "slow": 15.0}, 1, 60, gb_per_s=100.0, hidden=256)
    small = costs_of({"fast": 3, "slow": 2}, {"fast": 20.0, "slow": 15.0}, 1, 1, gb_per_s=100.0)
    both = plan_jointly({"teacher": large, "student": small}, SEARCH)
    assert both["teacher"].mixed and both["teacher"].devices["slow"] >= 1, "the device that nobody else can use"
    assert sum(sum(plan.devices.values()) for plan in both.values()) <= 5
    assert both.bound_step_s < both.step_s, "the bound of stages on one kind is above it"


def test_one_kind_and_mixed_false_leave_the_search_as_it_was() -> None:
    costs = costs_of({"fast": 3}, {"fast": 20.0}, layers=2)
    assert not plan_role(costs, SEARCH).mixed
    told = plan_role(two_and_one(), SEARCH.model_copy(update={"mixed": False}))
    assert told.bound_step_s == min(told.step_s, told.pipeline_bound_s)
    assert told.every_bound_s <= told.work_bound_s


def test_interleaved_mixed_stages_have_shares_of_their_own_micro_batches() -> None:
    costs = two_and_one(layers=4, batch=60)
    stages = (mixed_stage(2, dp=2, islands=(1, 1), shares=(2, 1)), StageSettings(layers=(2,), device="fast"))
    for number in (4, 10, 12, 20):
        search = SEARCH.model_copy(update={"micro_batches": (number,)})
        found = best_interleaved(costs, search, [LayoutSettings(stages=stages, micro_batches=2)])
        assert found is not None and found[0].micro_batches == number
        assert found[0] == with_shares(costs, found[0])
        assert every_bound_s(costs, search) <= found[1].step_s


def test_neighbours_become_one_stage_on_all_their_devices() -> None:
    mixer = Mixer(two_and_one(layers=4), SEARCH)
    apart = Design((Unit(2, 1, (("fast", 2),)), Unit(2, 1, (("slow", 1),))), 2)
    changes = set(mixer._changes(apart))
    assert Design((Unit(4, 1, (("fast", 2), ("slow", 1))),), 2) in changes
    assert Design((Unit(2, 1, (("fast", 1),)), Unit(2, 1, (("fast", 1), ("slow", 1)))), 2) in changes
    together = Design((Unit(2, 1, (("fast", 1), ("slow", 1))),), 2)
    assert Design((Unit(1, 1, (("slow", 1),)), Unit(1, 1, (("fast", 1),))), 2) in set(mixer._changes(together))
    assert Design((Unit(2, 1, (("fast", 2), ("slow", 1))),), 2) in set(mixer._changes(together)), "an idle device"
