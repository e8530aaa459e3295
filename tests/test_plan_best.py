"""The planner's search against brute force, an integer program, the exact timeline and a fresh search."""

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from titan.plan.search.best import best_over, node_losses, search
from titan.plan.search.bottleneck import bottleneck, limits_of, node_loss
from titan.plan.search.bound import bound_s, combos, least_steps_s, numbers, possible
from titan.plan.search.options import (
    Combo,
    Option,
    Pipeline,
    PlacedStage,
    SearchProblem,
    StageCost,
    bottleneck_s,
    fits,
    stage_bytes,
    stage_times,
    steps_s,
    timeline_of,
)

ROUNDING = 1e-9


def test_the_bottleneck_is_that_of_brute_force_over_orders_splits_and_subsets() -> None:
    rng = random.Random(3)
    nowhere = 0
    for case in range(500):
        problem, combo = small_problem(rng)
        best_s = min((bottleneck_s(pipeline) for pipeline in all_pipelines(problem, combo)), default=None)
        got = bottleneck(problem, combo)
        if best_s is None or got is None:
            nowhere += 1
            assert best_s is None and got is None, case
            continue
        assert got.stage_s == pytest.approx(best_s, abs=ROUNDING), case
        assert bottleneck_s(got.pipeline) == pytest.approx(best_s, abs=ROUNDING), case
        check_pipeline(problem, got.pipeline)
    assert 50 < nowhere < 250, "memory limits must bind, not always"


def test_the_bottleneck_is_that_of_an_integer_program() -> None:
    rng = random.Random(4)
    found = 0
    for case in range(50):
        problem, combo = medium_problem(rng)
        got = bottleneck(problem, combo)
        best_s = milp_bottleneck_s(problem, combo)
        assert (got is None) == (best_s is None), case
        if got is not None:
            found += 1
            assert got.stage_s == pytest.approx(best_s, rel=1e-6), case
            check_pipeline(problem, got.pipeline)
    assert found > 25


def test_the_loss_of_a_node_is_what_a_fresh_search_finds() -> None:
    rng = random.Random(5)
    for case in range(100):
        problem, combo = small_problem(rng) if case % 2 else medium_problem(rng)
        per_node = {option.kind: rng.randint(1, 3) for option in combo}
        for kind, got in node_loss(problem, combo, per_node).items():
            left = {**problem.devices, kind: max(0, problem.devices[kind] - per_node[kind])}
            fresh = bottleneck(replace(problem, devices=left), combo)
            assert (got is None) == (fresh is None), (case, kind)
            if got is not None and fresh is not None:
                assert got.stage_s == pytest.approx(fresh.stage_s, abs=ROUNDING), (case, kind)
                check_pipeline(replace(problem, devices=left), got.pipeline)


def test_many_steps_at_once_are_those_of_the_timeline() -> None:
    rng = random.Random(6)
    for _ in range(200):
        problem, combo = small_problem(rng, kinds=3)
        stages = rng.randint(1, 8)
        kinds = [[rng.randrange(3) for _ in range(stages)] for _ in range(3)]
        layers = [[rng.randint(1, 4) for _ in range(stages)] for _ in range(3)]
        got = steps_s(problem, combo, np.array(kinds), np.array(layers))
        least = least_steps_s(problem, combo, np.array(kinds), np.array(layers))
        for row, step_s in enumerate(got.tolist()):
            pipeline = [PlacedStage(combo[kind], held) for kind, held in zip(kinds[row], layers[row], strict=True)]
            assert step_s == pytest.approx(timeline_of(problem, pipeline).step_s, abs=ROUNDING)
            assert least[row] <= step_s + ROUNDING


def test_the_inequalities_of_the_bound_hold_for_every_pipeline() -> None:
    rng = random.Random(7)
    tight = 0
    for case in range(1500):
        problem, combo = small_problem(rng, kinds=3, tails=False)
        problem = replace(problem, micro_batches=rng.randint(1, 14))
        stages = rng.randint(1, 7)
        pipeline = [PlacedStage(rng.choice(combo), rng.randint(1, 4)) for _ in range(stages)]
        step_s = timeline_of(problem, pipeline).step_s
        for bound in inequalities(problem, pipeline):
            assert step_s >= bound - ROUNDING, case
            tight += bound > step_s - ROUNDING
    assert tight > 500


def test_the_step_is_nearly_always_that_of_brute_force_and_the_bound_never_above() -> None:
    rng = random.Random(1)
    ratios, loose = [], []
    while len(ratios) < 100:
        problem, combo = small_problem(rng)
        best_s = min((timeline_of(problem, each).step_s for each in all_pipelines(problem, combo)), default=None)
        found = search(problem)
        assert (best_s is None) == (found is None)
        if best_s is None or found is None:
            continue
        check_pipeline(problem, found.pipeline)
        assert found.step_s == pytest.approx(timeline_of(problem, found.pipeline).step_s, abs=ROUNDING)
        assert found.bound_s <= best_s * (1 + ROUNDING)
        assert combos(problem).bound_s_N.min() <= best_s * (1 + ROUNDING)
        costs = numbers(problem, found.combo, limits_of(problem, found.combo))
        assert possible(costs, best_s)
        assert bound_s(costs, 0.0, best_s) <= best_s
        ratios.append(found.step_s / best_s)
        loose.append(best_s / found.bound_s - 1)
    assert sum(ratio < 1 + ROUNDING for ratio in ratios) >= 0.97 * len(ratios)
    assert max(ratios) < 1.05
    assert sum(loose) / len(loose) < 0.15


def test_the_best_of_several_options_and_micro_batches_is_that_of_brute_force() -> None:
    rng = random.Random(9)
    compared = 0
    while compared < 25:
        problems = [several_options(rng, micro_batches) for micro_batches in (2, 4)]
        best_s = min(
            (
                timeline_of(problem, pipeline).step_s
                for problem in problems
                for combo in itertools.product(*problem.options.values())
                for pipeline in all_pipelines(problem, combo)
            ),
            default=None,
        )
        found = best_over(problems)
        assert (best_s is None) == (found is None)
        if best_s is None or found is None:
            continue
        compared += 1
        assert found.bound_s <= best_s * (1 + ROUNDING)
        assert best_s - ROUNDING <= found.step_s <= best_s * 1.02
        near = best_over(problems, goal=0.1)
        assert near is not None
        assert near.bound_s <= best_s * (1 + ROUNDING)


def test_no_bound_rules_out_a_pipeline_of_many_stages() -> None:
    rng = random.Random(11)
    tried = 0
    for case in range(20):
        problem, _ = medium_problem(rng)
        problem = replace(problem, edge_s=random_edges(rng, "abc"), micro_batches=rng.choice([4, 12, 24]))
        found = search(problem)
        if found is None:
            continue
        costs = numbers(problem, found.combo, limits_of(problem, found.combo))
        worse = [nearby(rng, found.pipeline) for _ in range(20)]
        for pipeline in [found.pipeline, *(each for each in worse if fits(problem, each))]:
            tried += 1
            assert possible(costs, timeline_of(problem, pipeline).step_s), case
        quick = best_over([problem], goal=0.02, patience=1)
        assert quick is not None
        assert quick.bound_s <= found.step_s * (1 + ROUNDING)
    assert tried > 60


def test_a_kind_that_would_only_slow_the_whole_is_left_out() -> None:
    slow = replace(plain("slow", 10.0), limit_bytes=100.0)
    fast = plain("fast", 1.0)
    problem = SearchProblem(8, {"fast": 4, "slow": 4}, {"fast": (fast,), "slow": (slow,)}, 16, {})
    found = search(problem)
    assert found is not None
    assert [(stage.option.kind, stage.layers) for stage in found.pipeline] == [("fast", 2)] * 4


@pytest.mark.parametrize("limit_bytes", [0.5, 1.9])
def test_layers_that_fit_nowhere_give_nothing(limit_bytes: float) -> None:
    option = replace(plain("fast", 1.0), limit_bytes=limit_bytes)
    problem = SearchProblem(8, {"fast": 4}, {"fast": (option,)}, 4, {})
    assert search(problem) is None
    assert bottleneck(problem, (option,)) is None
    assert search(replace(problem, devices={"fast": 0})) is None


def test_96_stages_are_split_and_every_node_loss_is_at_hand_in_under_a_second() -> None:
    combo = tuple(replace(plain(kind, speed), limit_bytes=9.0) for kind, speed in zip("abc", (1, 2, 2.4), strict=True))
    problem = SearchProblem(128, dict.fromkeys("abc", 32), {each.kind: (each,) for each in combo}, 256, {})
    found = search(problem)
    assert found is not None
    assert found.gap < 0.05
    start_s = time.process_time()
    bottlenecks = node_loss(problem, combo, dict.fromkeys("abc", 8))
    assert time.process_time() - start_s < 1.0
    start_s = time.process_time()
    plans = node_losses(found, dict.fromkeys("abc", 8))
    assert time.process_time() - start_s < 1.0 * len(plans)
    for kind, plan in plans.items():
        exact = bottlenecks[kind]
        assert plan is not None and exact is not None
        left = replace(problem, devices={**problem.devices, kind: 24})
        check_pipeline(left, plan[0])
        assert found.step_s <= plan[1] == pytest.approx(timeline_of(left, plan[0]).step_s)
        assert bottleneck_s(plan[0]) >= exact.stage_s - ROUNDING


def check_pipeline(problem: SearchProblem, pipeline: Pipeline) -> None:
    assert sum(stage.layers for stage in pipeline) == problem.layers
    assert fits(problem, pipeline)


def all_pipelines(problem: SearchProblem, combo: Combo) -> Iterator[Pipeline]:
    """Every subset and order of units with every split of the layers, within memory."""
    for stages in range(1, problem.layers + 1):
        for options in itertools.product(combo, repeat=stages):
            for cuts in itertools.combinations(range(1, problem.layers), stages - 1):
                edges = itertools.pairwise((0, *cuts, problem.layers))
                pipeline = tuple(
                    PlacedStage(option, end - start) for option, (start, end) in zip(options, edges, strict=True)
                )
                if used_too_much(problem, options):
                    break
                if fits(problem, pipeline):
                    yield pipeline


def nearby(rng: random.Random, pipeline: Pipeline) -> Pipeline:
    """A pipeline near another: a few layers moved and the stages perhaps in another order."""
    stages = list(pipeline)
    for _ in range(rng.randint(1, 3)):
        one, other = rng.randrange(len(stages)), rng.randrange(len(stages))
        if one != other and stages[one].layers > 1:
            stages[one] = replace(stages[one], layers=stages[one].layers - 1)
            stages[other] = replace(stages[other], layers=stages[other].layers + 1)
    if rng.random() < 0.5:
        rng.shuffle(stages)
    return tuple(stages)


def used_too_much(problem: SearchProblem, options: Sequence[Option]) -> bool:
    return any(
        sum(option.devices for option in options if option.kind == kind) > number
        for kind, number in problem.devices.items()
    )


def milp_bottleneck_s(problem: SearchProblem, combo: Combo) -> float | None:
    """An integer program per number of stages: which kind and how many layers each stage has, as binaries."""
    best_s: float | None = None
    for stages in range(1, min(problem.layers, sum(map(problem.units, combo))) + 1):
        choices = [
            (place, kind, layers, bottleneck_part_s(option, layers, place == 0, place == stages - 1))
            for place in range(stages)
            for kind, option in enumerate(combo)
            for layers in range(1, problem.layers - stages + 2)
            if stage_bytes(option, layers, min(problem.micro_batches, stages - place), place == 0, place == stages - 1)
            <= option.limit_bytes
        ]
        if not choices:
            continue
        place, kind, layers, seconds = (np.array(column) for column in zip(*choices, strict=True))
        one_each = [np.append(place == each, 0) for each in range(stages)]
        slowest = [np.append(-seconds * (place == each), 1) for each in range(stages)]
        units = [np.append(kind == each, 0) for each in range(len(combo))]
        got = milp(
            np.append(np.zeros(len(choices)), 1),
            constraints=[
                LinearConstraint(np.array(one_each), 1, 1),
                LinearConstraint(np.append(layers, 0)[None], problem.layers, problem.layers),
                LinearConstraint(np.array(units), 0, [problem.units(option) for option in combo]),
                LinearConstraint(np.array(slowest), 0, np.inf),
            ],
            integrality=np.append(np.ones(len(choices)), 0),
            bounds=Bounds(0, np.append(np.ones(len(choices)), np.inf if best_s is None else best_s)),
        )
        if got.status == 0 and (best_s is None or got.fun < best_s):
            best_s = float(got.fun)
    return best_s


def bottleneck_part_s(option: Option, layers: int, first: bool, last: bool) -> float:
    return layers * option.layer.both_s + first * option.embedding.both_s + last * option.head.both_s


def inequalities(problem: SearchProblem, pipeline: Sequence[PlacedStage]) -> Iterator[float]:
    """(a), (b) and (c) of titan/plan/search/bound.py for every stage and neighbourhood, written from its text."""
    times, _ = stage_times(problem, pipeline)
    micro_batches, stages = problem.micro_batches, len(pipeline)
    x = [each.forward_s + each.backward_s for each in times]
    edge = [each.to_next_s for each in times]
    trip_s = sum(x) + 2 * sum(edge)
    for index, own in enumerate(times):
        distance = stages - index
        yield micro_batches * x[index]
        yield trip_s + (micro_batches - 1) * own.backward_s + max(0, micro_batches - distance) * own.forward_s
        after = micro_batches - 1 - distance
        for size in range(1, distance + 1) if after >= 0 else ():
            near = slice(index, index + size)
            around_s = sum(x[near]) + 2 * sum(edge[index : index + size - 1])
            yield (
                trip_s + after // size * around_s + after % size * max(x[near]) + sum(x[index:]) + 2 * sum(edge[index:])
            )


def plain(kind: str, layer_s: float) -> Option:
    none = StageCost()
    return Option(kind, 1, 1, StageCost(layer_s / 3, layer_s * 2 / 3, 1.0, 0.02), none, none, 0.0, 8.0)


def random_option(rng: random.Random, kind: str, tp: int, dp: int, tails: bool) -> Option:
    forward_s = rng.choice([0.25, 0.5, 1, 1.5, 2, 3]) * rng.uniform(0.9, 1.1)
    layer = StageCost(
        forward_s, forward_s * rng.choice([1.0, 1.5, 2.0]), rng.choice([1.0, 2.0]), rng.choice([0, 0.25, 0.5, 1])
    )
    embedding = StageCost(rng.choice([0, 0.2, 1]), rng.choice([0, 0.2]), rng.choice([0, 1, 2]), rng.choice([0, 0.5]))
    head = StageCost(rng.choice([0, 0.5, 2]), rng.choice([0, 1]), rng.choice([0, 1, 2]), rng.choice([0, 0.5]))
    tail_s, tail_layer_s = (rng.choice([0, 0.5]), rng.choice([0, 0.1])) if tails else (0.0, 0.0)
    fixed_bytes, limit_bytes = rng.choice([0, 0.5]), rng.uniform(2, 14)
    return Option(kind, tp, dp, layer, embedding, head, fixed_bytes, limit_bytes, tail_s, tail_layer_s)


def random_edges(rng: random.Random, kinds: str) -> dict[tuple[str, str], float]:
    return {pair: rng.choice([0, 0.05, 0.3, 1.0]) for pair in itertools.combinations_with_replacement(sorted(kinds), 2)}


def small_problem(rng: random.Random, kinds: int | None = None, tails: bool = True) -> tuple[SearchProblem, Combo]:
    names = "abc"[: kinds or rng.randint(1, 3)]
    combo = tuple(random_option(rng, kind, 1, rng.choice([1, 2]), tails) for kind in names)
    devices = {
        option.kind: rng.randint(len(names) == 1, 3) * option.dp + rng.randint(0, option.dp - 1) for option in combo
    }
    options = {option.kind: (option,) for option in combo}
    micro_batches = rng.choice([1, 2, 3, 4, 6, 8])
    return SearchProblem(rng.randint(2, 6), devices, options, micro_batches, random_edges(rng, names)), combo


def medium_problem(rng: random.Random) -> tuple[SearchProblem, Combo]:
    combo = tuple(random_option(rng, kind, 1, 1, True) for kind in "abc")
    combo = tuple(replace(option, limit_bytes=rng.uniform(6, 20)) for option in combo)
    devices = dict(zip("abc", rng.choice([(3, 3, 3), (4, 2, 2), (2, 3, 5), (5, 4, 1)]), strict=True))
    layers, micro_batches = rng.randint(16, 24), rng.choice([2, 8, 16])
    return SearchProblem(layers, devices, {each.kind: (each,) for each in combo}, micro_batches, {}), combo


def several_options(rng: random.Random, micro_batches: int) -> SearchProblem:
    options = {kind: tuple(random_option(rng, kind, tp, 1, True) for tp in (1, 2)) for kind in "ab"}
    return SearchProblem(5, {"a": 3, "b": 2}, options, micro_batches, random_edges(rng, "ab"))
