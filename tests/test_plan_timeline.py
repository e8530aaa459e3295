"""The timeline of a schedule against relaxation to a fixed point, known closed forms, and schedules that cannot run."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from titan.plan.schedule import Action, Pass, Schedule, ScheduleName, forward_only, make_schedule
from titan.plan.timeline import StageTimes, Timeline, passes_in_order, timeline

SCHEDULES: tuple[ScheduleName, ...] = ("1f1b", "interleaved", "zero-bubble")


def test_every_start_and_end_is_that_of_the_slow_oracle() -> None:
    rng = random.Random(1)
    for case in range(500):
        name = SCHEDULES[case % 3]
        positions, chunks = rng.randint(1, 6), rng.randint(1, 3) if name == "interleaved" else 1
        micro_batches = positions * rng.randint(1, 3) if name == "interleaved" else rng.randint(1, 9)
        schedules = schedules_of(name, positions, chunks, micro_batches)
        times = [random_times(rng, stage, positions * chunks, name) for stage in range(positions * chunks)]
        tails = [rng.choice((0.0, rng.random())) for _ in range(positions)]
        got = timeline(schedules, chunks, times, tails)
        ends = relaxed_ends(schedules, times)
        for span in got.spans:
            stage = span.chunk * positions + span.position
            assert span.end_s == pytest.approx(ends[span.kind, stage, span.micro_batch], abs=1e-9), (case, span)
            assert span.end_s - span.start_s == pytest.approx(times[stage].of(span.kind), abs=1e-9)
        assert len(got.spans) == len(ends)
        assert got.step_s == pytest.approx(slow_step_s(schedules, ends, tails), abs=1e-9), case


def test_passes_of_a_position_do_not_overlap_and_follow_its_schedule() -> None:
    schedules = schedules_of("interleaved", 3, 2, 6)
    times = [StageTimes(1.0 + stage, 2.0, to_next_s=0.3, to_previous_s=0.2) for stage in range(6)]
    got = timeline(schedules, 2, times, [0.0] * 3)
    for position in range(3):
        own = [span for span in got.spans if span.position == position]
        assert tuple(Action(span.kind, span.micro_batch, span.chunk) for span in own) == schedules[position]
        assert all(before.end_s <= after.start_s for before, after in itertools.pairwise(own))


@pytest.mark.parametrize(("positions", "micro_batches"), [(1, 1), (1, 5), (2, 7), (4, 4), (4, 8), (8, 32), (5, 3)])
def test_equal_stages_under_1f1b_take_fill_plus_micro_batches(positions: int, micro_batches: int) -> None:
    times = [StageTimes(1.0, 2.0)] * positions
    got = timeline(schedules_of("1f1b", positions, 1, micro_batches), 1, times, [0.5] * positions)
    assert got.step_s == (micro_batches + positions - 1) * 3.0 + 0.5
    share = (micro_batches * 3.0 + 0.5) / got.step_s
    assert got.idle_shares == pytest.approx([1 - share] * positions)
    assert got.busy_s == pytest.approx([micro_batches * 3.0 + 0.5] * positions)


@pytest.mark.parametrize(("positions", "chunks", "groups"), [(2, 2, 1), (2, 2, 3), (4, 2, 2), (4, 4, 2), (3, 5, 4)])
def test_the_bubble_of_an_interleaved_schedule_shrinks_by_its_chunks(positions: int, chunks: int, groups: int) -> None:
    micro_batches = positions * groups
    times = [StageTimes(1.0 / chunks, 2.0 / chunks)] * (positions * chunks)
    got = timeline(schedules_of("interleaved", positions, chunks, micro_batches), chunks, times, [0.0] * positions)
    work_s = 3.0 * micro_batches
    assert got.step_s / work_s - 1 == pytest.approx((positions - 1) / (chunks * micro_batches))


@pytest.mark.parametrize(("positions", "micro_batches"), [(2, 4), (4, 8), (8, 16), (8, 64)])
def test_zero_bubble_saves_two_thirds_of_the_bubble_of_equal_stages(positions: int, micro_batches: int) -> None:
    """ZB-H1 with F = B = W leaves (P - 1)(F + B - W), a third of 1F1B's (P - 1)(F + B + W)."""
    tails = [0.0] * positions
    plain = timeline(schedules_of("1f1b", positions, 1, micro_batches), 1, [StageTimes(1.0, 2.0)] * positions, tails)
    split = [StageTimes(1.0, 1.0, 1.0)] * positions
    zero = timeline(schedules_of("zero-bubble", positions, 1, micro_batches), 1, split, tails)
    assert plain.step_s == 3.0 * (micro_batches + positions - 1)
    assert zero.step_s == 3.0 * micro_batches + positions - 1


def test_zero_bubble_does_not_repair_a_stage_that_is_too_slow() -> None:
    for slow in range(4):
        factors = [3.0 if stage == slow else 1.0 for stage in range(4)]
        times = [StageTimes(factor, factor, factor) for factor in factors]
        got = timeline(schedules_of("zero-bubble", 4, 1, 64), 1, times, [0.0] * 4)
        assert got.step_s >= 64 * 9.0, "the slow stage alone computes that long"
        assert min(got.idle_shares[:slow] + got.idle_shares[slow + 1 :]) > 0.6, "and the others wait for it"


def test_a_link_slower_than_the_passes_sets_the_pace() -> None:
    """Two stages of 1 s passes behind a link of 10 s: messages queue on it, they do not overlap."""
    times = [StageTimes(1.0, 1.0, to_next_s=10.0), StageTimes(1.0, 1.0, to_previous_s=0.0)]
    got = timeline([forward_only(1, 5)] * 2, 1, times, [0.0, 0.0])
    arrivals = [span.start_s for span in got.spans if span.position == 1]
    assert arrivals == [11.0, 21.0, 31.0, 41.0, 51.0]
    assert got.finish_s == (5.0, 52.0), "the sender does not wait for its link"


def test_the_two_directions_of_an_edge_do_not_wait_for_each_other() -> None:
    schedules = schedules_of("1f1b", 2, 1, 2)
    one_way = timeline(schedules, 1, [StageTimes(1.0, 1.0, to_next_s=2.0), StageTimes(1.0, 1.0)], [0.0] * 2)
    both = timeline(
        schedules, 1, [StageTimes(1.0, 1.0, to_next_s=2.0), StageTimes(1.0, 1.0, to_previous_s=2.0)], [0.0] * 2
    )
    assert (one_way.step_s, both.step_s) == (8.0, 10.0), "both would be 12 or more if directions shared the link"


def test_the_longest_tail_after_the_last_pass_ends_the_step() -> None:
    schedules = schedules_of("1f1b", 2, 1, 1)
    assert timeline(schedules, 1, [StageTimes(1.0, 1.0)] * 2, [0.0, 5.0]).step_s == 8.0
    assert timeline(schedules, 1, [StageTimes(1.0, 1.0)] * 2, [1.5, 2.0]).step_s == 5.5


@pytest.mark.parametrize(
    ("name", "positions", "chunks", "micro_batches", "peak"),
    [
        ("1f1b", 4, 1, 8, (4, 3, 2, 1)),
        ("1f1b", 4, 1, 2, (2, 2, 2, 1)),
        ("zero-bubble", 4, 1, 8, (4, 4, 4, 4)),
        ("interleaved", 1, 1, 3, (1,)),
    ],
)
def test_peak_in_flight(
    name: ScheduleName, positions: int, chunks: int, micro_batches: int, peak: tuple[int, ...]
) -> None:
    times = [StageTimes(1.0, 1.0, 1.0)] * (positions * chunks)
    got = timeline(schedules_of(name, positions, chunks, micro_batches), chunks, times, [0.0] * positions)
    assert got.peak_in_flight == peak


def test_peak_in_flight_of_an_interleaved_schedule_is_counted_by_stage() -> None:
    positions, chunks, micro_batches = 4, 2, 8
    schedules = schedules_of("interleaved", positions, chunks, micro_batches)
    got = timeline(schedules, chunks, [StageTimes(1.0, 2.0)] * 8, [0.0] * 4).peak_in_flight
    for stage in range(8):
        held, most = 0, 0
        for action in schedules[stage % positions]:
            if action.chunk == stage // positions:
                held += 1 if action.kind is Pass.FORWARD else -1
                most = max(most, held)
        assert got[stage] == most


def test_a_schedule_that_deadlocks_says_where() -> None:
    backward_first = (Action(Pass.BACKWARD, 0), Action(Pass.FORWARD, 0))
    with pytest.raises(AssertionError, match=r"position 1 waits for ever with .*BACKWARD"):
        timeline([forward_only(1, 1), backward_first], 1, [StageTimes(1.0, 1.0)] * 2, [0.0, 0.0])
    crossed = [
        (Action(Pass.FORWARD, 0), Action(Pass.BACKWARD, 0), Action(Pass.FORWARD, 1), Action(Pass.BACKWARD, 1)),
        (Action(Pass.FORWARD, 0), Action(Pass.FORWARD, 1), Action(Pass.BACKWARD, 0), Action(Pass.BACKWARD, 1)),
    ]
    with pytest.raises(AssertionError, match="deadlocks"):
        timeline(crossed, 1, [StageTimes(1.0, 1.0)] * 2, [0.0, 0.0])


def test_times_of_the_wrong_number_of_stages_are_refused() -> None:
    schedules = schedules_of("1f1b", 2, 1, 2)
    with pytest.raises(AssertionError, match="3 stages' times"):
        timeline(schedules, 1, [StageTimes(1.0, 1.0)] * 3, [0.0, 0.0])
    with pytest.raises(AssertionError, match="1 tails"):
        timeline(schedules, 1, [StageTimes(1.0, 1.0)] * 2, [0.0])


def test_the_order_of_passes_holds_each_pass_once() -> None:
    schedules = schedules_of("zero-bubble", 3, 1, 5)
    order = passes_in_order(schedules, 3)
    assert len(order) == len(set(order)) == 3 * 3 * 5


def test_a_slower_pass_or_link_never_shortens_a_step() -> None:
    rng = random.Random(3)
    for _ in range(100):
        schedules = schedules_of("interleaved", 3, 2, 6)
        times = [random_times(rng, stage, 6, "interleaved") for stage in range(6)]
        before_s = step_s(schedules, 2, times)
        stage, field = rng.randrange(6), rng.choice(("forward_s", "backward_s", "to_next_s", "to_previous_s"))
        slower = replace(times[stage], **{field: getattr(times[stage], field) + rng.random()})
        assert step_s(schedules, 2, [*times[:stage], slower, *times[stage + 1 :]]) >= before_s - 1e-12


def test_chunks_share_the_connection_between_two_positions() -> None:
    """Two positions of two chunks: activations of stages 0 and 2, and gradients of stage 2, go from position 0 to 1."""
    schedules = schedules_of("interleaved", 2, 2, 2)
    slow = [StageTimes(1.0, 1.0, to_next_s=4.0 if stage % 2 == 0 else 0.0) for stage in range(4)]
    got = timeline(schedules, 2, slow, [0.0, 0.0])
    starts = [span.start_s for span in got.spans if span.position == 1 and span.kind is Pass.FORWARD]
    assert starts == [5.0, 9.0, 13.0, 17.0], "four messages of 4 s, one after the other"


def step_s(schedules: Sequence[Schedule], chunks: int, times: Sequence[StageTimes]) -> float:
    got: Timeline = timeline(schedules, chunks, times, [0.0] * len(schedules))
    return got.step_s


def schedules_of(name: ScheduleName, positions: int, chunks: int, micro_batches: int) -> list[Schedule]:
    return [make_schedule(name, position, positions, chunks, micro_batches) for position in range(positions)]


def random_times(rng: random.Random, stage: int, stages: int, name: ScheduleName) -> StageTimes:
    return StageTimes(
        forward_s=rng.choice((0.0, 1.0, rng.random())),
        backward_s=rng.choice((1.0, 2 * rng.random())),
        weight_s=rng.random() if name == "zero-bubble" else 0.0,
        to_next_s=rng.choice((0.0, rng.random(), 3 * rng.random())) if stage < stages - 1 else 0.0,
        to_previous_s=rng.choice((0.0, rng.random(), 3 * rng.random())) if stage > 0 else 0.0,
    )


Node = tuple[Pass | str, int, int]


def relaxed_ends(schedules: Sequence[Schedule], times: Sequence[StageTimes]) -> dict[Node, float]:
    """When each pass ends, by relaxing all constraints until nothing changes: slow, and blind to any order."""
    positions, last = len(schedules), len(times) - 1
    edges: list[tuple[Node, Node, float]] = []
    for position, schedule in enumerate(schedules):
        before: dict[object, Node] = {}
        for action in schedule:
            stage, index = action.chunk * positions + position, action.micro_batch
            node: Node = (action.kind, stage, index)
            edges.append((before.get("rank", ("start", 0, 0)), node, times[stage].of(action.kind)))
            before["rank"] = node
            link: Node | None = None
            if action.kind is Pass.FORWARD and stage < last:
                link, receiver, takes_s = (
                    ("next", stage, index),
                    (Pass.FORWARD, stage + 1, index),
                    times[stage].to_next_s,
                )
            elif action.kind is Pass.BACKWARD and stage > 0:
                link, receiver = ("previous", stage, index), (Pass.BACKWARD, stage - 1, index)
                takes_s = times[stage].to_previous_s
            if link is not None:
                queue = (position, receiver[1] % positions)
                edges.append((node, link, takes_s))
                edges.append((before.get(queue, ("start", 0, 0)), link, takes_s))
                edges.append((link, receiver, times[receiver[1]].of(receiver[0])))
                before[queue] = link
    ends: dict[Node, float] = {node: 0.0 for edge in edges for node in edge[:2]}
    changed = True
    while changed:
        changed = False
        for source, target, takes_s in edges:
            if ends[source] + takes_s > ends[target] + 1e-12:
                ends[target], changed = ends[source] + takes_s, True
    return {node: end for node, end in ends.items() if isinstance(node[0], Pass)}


def slow_step_s(schedules: Sequence[Schedule], ends: dict[Node, float], tails: Sequence[float]) -> float:
    finish = []
    for position, schedule in enumerate(schedules):
        own = [ends[a.kind, a.chunk * len(schedules) + position, a.micro_batch] for a in schedule]
        finish.append(max(own) + tails[position])
    return max(finish)
