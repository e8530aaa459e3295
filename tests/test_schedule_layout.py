"""Pure plans: schedules never deadlock, layouts leave nobody out, and a parameter cut is a parameter pasted."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worlds import GQA, TIED, VOCAB, World, make_trainer, run_world
from titan.config.model import LayoutSettings, ModelSettings
from titan.model.parameters import (
    ParameterSpec,
    initial_value,
    layer_of,
    num_parameters,
    parameter_specs,
)
from titan.model.stage import padded_vocab
from titan.plan.edges import owned, routes, row_routes
from titan.plan.layout import Stage, even_split, make_layout, replica_samples
from titan.plan.schedule import Action, Pass, forward_only, interleaved, one_forward_one_backward, zero_bubble

# --- schedules ---


class DeadlockError(AssertionError):
    """No stage can go on."""


def simulate(schedules: list[tuple[Action, ...]], chunks: int = 1) -> tuple[list[int], int]:
    """Run all positions in ticks; receives wait, sends do not. Returns the most in flight on each, and the ticks.

    Forward i of a stage needs forward i of the stage before it; backward i needs backward i of the stage after it, and
    the stage's own forward i; a weight gradient needs the stage's own backward. Stage = chunk * positions + position.
    """
    positions = len(schedules)
    stages = positions * chunks
    done: set[tuple[int, Pass, int]] = set()
    place, in_flight, most = [0] * positions, [0] * positions, [0] * positions
    ticks = 0
    while any(place[position] < len(schedules[position]) for position in range(positions)):
        ready = []
        for position in range(positions):
            if place[position] == len(schedules[position]):
                continue
            action = schedules[position][place[position]]
            stage, index = action.chunk * positions + position, action.micro_batch
            if action.kind is Pass.FORWARD:
                needs = [(stage - 1, Pass.FORWARD, index)] if stage else []
            elif action.kind is Pass.BACKWARD:
                needs = [(stage, Pass.FORWARD, index)]
                needs += [(stage + 1, Pass.BACKWARD, index)] if stage + 1 < stages else []
            else:
                needs = [(stage, Pass.BACKWARD, index)]
            if all(need in done for need in needs):
                ready.append((position, stage, action))
        if not ready:
            raise DeadlockError(f"positions stand at {place} of {[len(schedule) for schedule in schedules]}")
        for position, stage, action in ready:
            done.add((stage, action.kind, action.micro_batch))
            place[position] += 1
            in_flight[position] += {Pass.FORWARD: 1, Pass.BACKWARD: -1, Pass.WEIGHT: 0}[action.kind]
            most[position] = max(most[position], in_flight[position])
        ticks += 1
    return most, ticks


MANY = [(stages, micro) for stages in range(1, 9) for micro in (1, 2, 3, 4, 7, 8, 16, 33)]


@pytest.mark.parametrize(("stages", "micro_batches"), MANY)
def test_1f1b_ends_with_every_micro_batch_once_each_way_and_few_in_flight(stages: int, micro_batches: int) -> None:
    schedules = [one_forward_one_backward(stage, stages, micro_batches) for stage in range(stages)]
    for schedule in schedules:
        for kind in (Pass.FORWARD, Pass.BACKWARD):
            order = [action.micro_batch for action in schedule if action.kind is kind]
            assert order == list(range(micro_batches)), "in order, so that neighbours agree on what comes next"
    most, ticks = simulate(schedules)
    assert most == [min(micro_batches, stages - stage) for stage in range(stages)]
    assert ticks == 2 * (micro_batches + stages - 1), "no bubble but the fill and the drain"


GROUPED = [(positions, chunks, groups) for positions in (1, 2, 3, 4, 6) for chunks in (1, 2, 3) for groups in (1, 2, 4)]


@pytest.mark.parametrize(("positions", "chunks", "groups"), GROUPED)
def test_interleaved_ends_with_every_micro_batch_once_each_way_and_a_smaller_bubble(
    positions: int, chunks: int, groups: int
) -> None:
    micro_batches = positions * groups
    schedules = [interleaved(position, positions, chunks, micro_batches) for position in range(positions)]
    for schedule in schedules:
        for kind, chunk in itertools.product((Pass.FORWARD, Pass.BACKWARD), range(chunks)):
            order = [action.micro_batch for action in schedule if (action.kind, action.chunk) == (kind, chunk)]
            assert order == list(range(micro_batches)), "in order on every edge, so that neighbours agree"
    _, ticks = simulate(schedules, chunks)
    assert ticks == 2 * (micro_batches * chunks + positions - 1), "the bubble is one chunk's, not one stage's"


@pytest.mark.parametrize(("positions", "micro_batches"), MANY)
def test_zero_bubble_makes_every_gradient_once_and_holds_no_more(positions: int, micro_batches: int) -> None:
    schedules = [zero_bubble(position, positions, micro_batches) for position in range(positions)]
    for schedule in schedules:
        held = 0
        for kind in Pass:
            assert sorted(a.micro_batch for a in schedule if a.kind is kind) == list(range(micro_batches))
        for action in schedule:
            held += {Pass.FORWARD: 1, Pass.BACKWARD: 0, Pass.WEIGHT: -1}[action.kind]
            assert held <= min(positions, micro_batches) + 1
    simulate(schedules)


def test_the_simulator_sees_a_deadlock() -> None:
    """Backward before forward on the last stage; and a stage that wants micro-batches in another order."""
    good = list(one_forward_one_backward(0, 2, 2))
    with pytest.raises(DeadlockError):
        simulate([tuple(good), tuple(reversed(one_forward_one_backward(1, 2, 2)))])
    eager = [Action(Pass.FORWARD, 0), Action(Pass.BACKWARD, 0), Action(Pass.FORWARD, 1), Action(Pass.BACKWARD, 1)]
    late = [Action(Pass.FORWARD, 0), Action(Pass.FORWARD, 1), Action(Pass.BACKWARD, 0), Action(Pass.BACKWARD, 1)]
    with pytest.raises(DeadlockError):
        simulate([tuple(eager), tuple(late)])


@pytest.mark.parametrize("micro_batches", [1, 5])
def test_looking_only_runs_forward_through_every_stage(micro_batches: int) -> None:
    schedules = [forward_only(1, micro_batches)] * 3
    simulate(schedules)
    assert schedules[0] == tuple(Action(Pass.FORWARD, index) for index in range(micro_batches))


# --- layouts ---


@given(st.integers(1, 12), st.integers(0, 60))
def test_an_even_split_gives_every_layer_away_and_spares_the_ends(stages: int, more: int) -> None:
    layers = stages + more
    split = even_split(layers, stages)
    assert len(split) == stages and sum(split) == layers
    assert max(split) - min(split) <= 1
    if stages > 2 and layers % stages:
        assert min(split) in (split[0], split[-1]), "the embedding and the head come on top of these"
        middle = split[1:-1]
        assert max(middle) >= max(split[0], split[-1])


def layouts() -> st.SearchStrategy[LayoutSettings]:
    return st.builds(
        LayoutSettings,
        tp=st.sampled_from([1, 2, 4]),
        pp=st.integers(1, 4),
        dp=st.integers(1, 3),
        micro_batches=st.sampled_from([None, 1, 6]),
    )


@given(layouts())
def test_the_ranks_of_a_layout_are_shared_out_without_gap_or_overlap(settings_: LayoutSettings) -> None:
    model = ModelSettings(layers=6, hidden=64, heads=4, ffn=128)
    layout = make_layout(model, settings_)
    assert layout.num_ranks == settings_.ranks
    assert sorted(itertools.chain(*(stage.ranks for stage in layout.stages))) == list(range(layout.num_ranks))
    seen = Counter()
    for rank in range(layout.num_ranks):
        place = layout.place(rank)
        assert place.rank == rank == place.stage.rank(place.replica, place.tensor)
        seen[place.stage.index, place.replica, place.tensor] += 1
    wanted = itertools.product(range(settings_.pp), range(settings_.dp), range(settings_.tp))
    assert seen == dict.fromkeys(wanted, 1)
    layers = [layer for stage in layout.stages for layer in range(stage.first_layer, stage.end_layer)]
    assert layers == list(range(model.layers))
    assert [stage.has_embedding for stage in layout.stages] == [True] + [False] * (settings_.pp - 1)
    assert [stage.has_head for stage in layout.stages] == [False] * (settings_.pp - 1) + [True]
    assert layout.micro_batches == (settings_.micro_batches or (1 if settings_.pp == 1 else 2 * settings_.pp))


def test_given_layers_are_taken_as_they_are() -> None:
    layout = make_layout(GQA, LayoutSettings(pp=2, layers=(1, 3)))
    assert [(stage.first_layer, stage.end_layer) for stage in layout.stages] == [(0, 1), (1, 4)]


@given(st.integers(1, 8), st.integers(0, 100))
def test_replicas_share_the_samples_of_a_micro_batch_as_evenly_as_integers_allow(dp: int, more: int) -> None:
    samples = dp + more
    shares = replica_samples(samples, (1,) * dp)
    assert [index for start, end in shares for index in range(start, end)] == list(range(samples))
    sizes = [end - start for start, end in shares]
    assert len(sizes) == dp and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 200))
def test_unequal_shares_are_met_as_near_as_integers_allow(shares: list[int], times: int, more: int) -> None:
    exact = replica_samples(sum(shares) * times, shares)
    assert [end - start for start, end in exact] == [share * times for share in shares]
    samples = sum(shares) * times + more
    split = replica_samples(samples, shares)
    assert [index for start, end in split for index in range(start, end)] == list(range(samples))
    for (start, end), share in zip(split, shares, strict=True):
        assert abs((end - start) - samples * share / sum(shares)) < 1


# --- what crosses an edge ---


@st.composite
def stages(draw: st.DrawFn) -> Stage:
    tp, dp = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3))
    shares = tuple(draw(st.lists(st.integers(1, 4), min_size=dp, max_size=dp)))
    return Stage(0, 0, 1, False, False, tp, dp, 1, draw(st.sampled_from([0, 50])), shares=shares)


@given(source=stages(), target=stages(), samples=st.integers(12, 30), cut=st.booleans())
def test_routes_bring_every_rank_what_it_owns_exactly_once(
    source: Stage, target: Stage, samples: int, cut: bool
) -> None:
    length = 8
    found = routes(source, target, samples, length, cut)
    for replica, tensor in itertools.product(range(target.dp), range(target.tp)):
        wanted = owned(target, replica, tensor, samples, length, cut)
        got = Counter()
        for route in found:
            if route.target == target.rank(replica, tensor):
                assert route.source in source.ranks
                sender = divmod(route.source - source.first_rank, source.tp)
                held = owned(source, *sender, samples, length, cut)
                assert held.samples[0] <= route.region.samples[0] and route.region.samples[1] <= held.samples[1]
                assert held.positions[0] <= route.region.positions[0] and route.region.positions[1] <= held.positions[1]
                got.update(itertools.product(range(*route.region.positions), range(*route.region.samples)))
        assert got == Counter(itertools.product(range(*wanted.positions), range(*wanted.samples)))


@given(source=stages(), target=stages())
def test_row_routes_bring_every_replica_its_rows_exactly_once(source: Stage, target: Stage) -> None:
    rows = 64
    got = Counter()
    for giver, taker, (start, end) in row_routes(source, target, rows):
        tensor = (giver - source.first_rank) % source.tp
        assert tensor * rows // source.tp <= start < end <= (tensor + 1) * rows // source.tp
        got.update((taker, row) for row in range(start, end))
    part = rows // target.tp
    wanted = {
        (target.rank(replica, tensor), row): 1
        for replica in range(target.dp)
        for tensor in range(target.tp)
        for row in range(tensor * part, (tensor + 1) * part)
    }
    assert got == wanted


# --- the parameter table ---

SHAPES = [GQA, TIED, ModelSettings(layers=2, hidden=48, heads=6, kv_heads=2, ffn=80)]


@settings(max_examples=60, deadline=None)
@given(model=st.sampled_from(SHAPES), tp=st.sampled_from([1, 2]), data=st.data())
def test_pasting_all_cuts_gives_the_parameter_back(model: ModelSettings, tp: int, data: st.DataObject) -> None:
    specs = parameter_specs(model, VOCAB)
    spec = specs[data.draw(st.sampled_from(sorted(specs)))]
    whole = torch.arange(float(torch.Size(spec.shape).numel())).view(spec.shape)
    result = torch.full(spec.shape, -1.0)
    order = data.draw(st.permutations(range(tp)))
    for tensor in order:
        part = spec.cut(whole, tensor, tp)
        assert part.shape == spec.local_shape(tp)
        spec.paste(result, part, tensor, tp)
    assert torch.equal(result, whole)
    if spec.axis is not None:
        parts = torch.cat([spec.cut(whole, tensor, tp).reshape(-1) for tensor in range(tp)])
        assert torch.equal(parts.sort().values, whole.view(-1)), "every element on exactly one rank"


@settings(deadline=None)
@given(
    rows=st.integers(1, 5), inner=st.integers(1, 4), columns=st.integers(1, 4), tp=st.sampled_from([1, 2, 4]),
    axis=st.sampled_from([0, 1, 2]),
)  # fmt: skip
def test_any_view_may_be_cut_along_any_of_its_axes(rows: int, inner: int, columns: int, tp: int, axis: int) -> None:
    view = [rows, inner, columns]
    view[axis] *= tp
    spec = ParameterSpec((view[0] * view[1], view[2]), tuple(view), axis, 0.02)
    whole = torch.randn(spec.shape)
    result = torch.zeros(spec.shape)
    for tensor in range(tp):
        part = spec.cut(whole, tensor, tp)
        assert part.shape == spec.local_shape(tp) and part.numel() == whole.numel() // tp
        spec.paste(result, part, tensor, tp)
    assert torch.equal(result, whole)


def test_gate_and_up_are_each_cut_and_heads_stay_whole() -> None:
    specs = parameter_specs(GQA, VOCAB)
    ffn, hidden = GQA.ffn, GQA.hidden
    fc1 = torch.arange(2.0 * ffn)[:, None].expand(-1, hidden)
    assert specs["layers.0.mlp.linear_fc1.weight"].cut(fc1, 1, 2)[:, 0].tolist() == [
        *range(ffn // 2, ffn),
        *range(ffn + ffn // 2, 2 * ffn),
    ]
    width = hidden // GQA.heads
    group = (GQA.heads // GQA.num_kv_heads + 2) * width
    qkv = torch.arange(float(group * GQA.num_kv_heads))[:, None].expand(-1, hidden)
    cut = specs["layers.0.self_attention.linear_qkv.weight"].cut(qkv, 1, 2)
    assert cut[:, 0].tolist() == list(range(group, 2 * group)), "one key-value head with its query heads"


def test_the_table_counts_what_the_model_has() -> None:
    hidden, ffn, layers = 64, 128, 4
    attention = (4 + 2 * 2) * 16 * hidden + hidden * hidden
    layer = attention + 3 * ffn * hidden + 2 * hidden
    assert num_parameters(TIED, VOCAB) == VOCAB * hidden + layers * layer + hidden
    assert num_parameters(GQA, VOCAB) == 2 * VOCAB * hidden + layers * layer + hidden
    assert padded_vocab(VOCAB) == 512 and padded_vocab(512) == 512 and padded_vocab(513) == 576
    assert layer_of("layers.12.mlp.linear_fc1.weight") == 12 and layer_of("head") is None


def test_initial_weights_follow_from_name_and_seed_alone() -> None:
    specs = parameter_specs(GQA, VOCAB)
    torch.manual_seed(5)
    first = {name: initial_value(name, spec, 1) for name, spec in specs.items()}
    torch.manual_seed(6)
    for name, spec in reversed(specs.items()):
        assert torch.equal(initial_value(name, spec, 1), first[name])
        assert spec.std is None or not torch.equal(initial_value(name, spec, 2), first[name])
        assert spec.std is None or first[name].std() == pytest.approx(spec.std, rel=0.05)
    alike = [name for name in specs if name.endswith("linear_fc2.weight")]
    assert not torch.equal(first[alike[0]], first[alike[1]]), "layers start different"


def weights_at_birth(
    world: World, layout: LayoutSettings, model: ModelSettings
) -> dict[str, tuple[int, int, torch.Tensor]]:
    place = world.place
    named = make_trainer(world, layout, model).stage.named_parameters()
    return {name: (place.tensor, place.stage.tp, value.detach()) for name, value in named.items()}


@pytest.mark.parametrize(
    "layout",
    [LayoutSettings(tp=2, pp=2), LayoutSettings(pp=2, layers=(1, 3), dp=2, shard=2), LayoutSettings(tp=2, dp=2)],
    ids=["tp2-pp2", "pp2-dp2-sharded", "tp2-dp2"],
)
@pytest.mark.parametrize("model", [GQA, TIED], ids=["gqa", "tied"])
def test_initial_weights_are_the_same_in_every_layout(layout: LayoutSettings, model: ModelSettings) -> None:
    specs = parameter_specs(model, VOCAB)
    seen = set()
    for weights in run_world(layout, weights_at_birth, layout, model, model=model):
        for name, (tensor, tp, value) in weights.items():
            seen.add(name)
            assert torch.equal(value, specs[name].cut(initial_value(name, specs[name], 1), tensor, tp)), name
    assert seen == set(specs)
