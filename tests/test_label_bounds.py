"""Who pauses for whom, and what makes room: without ranks, the files are real."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.label_logs import Producer, assert_whole, read_all
from tests.runs import write_tiny_config
from titan.cluster.preflight import forbidden_changes
from titan.config.load import load_config
from titan.config.settings import RunConfig
from titan.distill.follow import Follower
from titan.distill.keeper import LogKeeper
from titan.distill.log.reader import DroppedError, LabelReader
from titan.distill.log.records import Commit
from titan.distill.log.retention import drop_before, first_kept, log_bytes, read_places, write_place, write_position
from titan.distill.log.upkeep import LocalUpkeep
from titan.distill.place import PlaceTeller
from titan.errors import ConfigError, LabelError

WAIT = ("students.late.backpressure=wait", "students.late.max_lag=3")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.toml, in which `late` starts with the teacher."""
    path = write_tiny_config(tmp_path_factory.mktemp("bounds"))
    path.write_text(path.read_text().replace("start = { lead = 0.05 }\n", ""))
    return path


def settings(tiny: Path, *overrides: str) -> RunConfig:
    return load_config(tiny, list(overrides))


# --- settings ---


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["students.late.backpressure=skip"],
            "students.late.backpressure is 'skip', which needs students.late.max_lag",
        ),
        (["students.late.max_lag=4"], "students.late.max_lag is 4, but backpressure 'spill' has no bound"),
        (
            ["students.early.teacher=late", "students.late.backpressure=skip", "students.late.max_lag=4"],
            "students.late.backpressure is 'skip', but it teaches others",
        ),
        (
            ["students.early.teacher=late", "labels.max_bytes=1000000"],
            "labels.when_full is 'drop', but late teaches others",
        ),
        (["labels.when_full=wait"], "labels.when_full is 'wait', but labels.max_bytes is absent"),
        (
            ["labels.when_full=wait", "labels.max_bytes=10000000"],
            "labels.when_full is 'wait' and labels.keep is 'all', so no student could ever make room",
        ),
        (
            ["labels.when_full=wait", "labels.keep=needed", "labels.max_bytes=100000"],
            "labels.max_bytes is 100000, room for 10 steps, but students make room only every 10 steps",
        ),
        (
            ["students.late.backpressure=wait", "students.late.max_lag=4"],
            "labels.wait_s is 120, and cluster.step_timeout_s 60",
        ),
        (["labels.copy_to=a\0b"], "labels.copy_to is"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_a_remedy(tiny: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(tiny, *overrides)
    assert said in str(caught.value)


def test_a_run_without_a_log_of_its_own_has_no_use_for_log_settings(tiny: Path) -> None:
    text = tiny.read_text().replace("[teacher]\n", '[teacher]\nsource = "log:elsewhere"\n')
    path = tiny.with_name("late.toml")
    path.write_text(text)
    wait = ("students.late.backpressure=wait", "students.late.max_lag=3", "labels.wait_s=9")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["labels.keep=needed", "labels.copy_to=there", *wait])
    lines = str(caught.value).splitlines()
    assert any("labels.keep is set, but this run writes no label log" in line for line in lines)
    assert any("labels.copy_to is set, but this run writes no label log" in line for line in lines)
    assert any("another run's teacher waits for nobody" in line for line in lines)
    alone = tiny.with_name("alone.toml")
    text = tiny.read_text()
    head, rest = text[: text.index("[[students]]")], text[text.index("[checkpoint]") :]
    alone.write_text(head + "[labels]\nwithout_students = true\n" + rest)
    with pytest.raises(ConfigError, match=r"labels\.keep is 'needed', but no student of this run"):
        load_config(alone, ["labels.keep=needed"])


def test_what_changes_no_label_may_change_when_a_run_is_resumed(tiny: Path) -> None:
    changes = (*WAIT, "labels.wait_s=9", "labels.keep=needed", "labels.max_bytes=900000", "labels.when_full=wait")
    changes += ("labels.segment_bytes=9000", "labels.copy_to=there", "students.late.distill.weight=0.5")
    assert forbidden_changes(settings(tiny), settings(tiny, *changes)) == ["students.late.distill.weight"]


# --- pauses and room ---


class Ranks:
    """The collective of some ranks that are threads."""

    def __init__(self, count: int):
        self.barrier, self.values = threading.Barrier(count, timeout=20), [[0.0]] * count

    def world(self, rank: int) -> Any:
        def total(values: list[float]) -> list[float]:
            self.values[rank] = values
            self.barrier.wait()
            sums = [sum(column) for column in zip(*self.values, strict=True)]
            self.barrier.wait()
            return sums

        count = len(self.values)
        place, layout = SimpleNamespace(rank=rank), SimpleNamespace(num_ranks=count)
        return SimpleNamespace(is_lead=rank == 0, sum_over_ranks=total, place=place, layout=layout)


@dataclass
class Kept:
    """A keeper, and what it told."""

    keeper: LogKeeper
    events: list[dict[str, Any]] = field(default_factory=list)


def keeper(config: RunConfig, folder: Path, world: Any = None, copy: Path | None = None) -> Kept:
    events: list[dict[str, Any]] = []
    spec = SimpleNamespace(config=config, role="teacher", own_label_folder=folder)
    world = world or Ranks(1).world(0)
    log = LocalUpkeep(folder, copy)
    made = LogKeeper(spec, world, log, lambda event, **more: events.append({"event": event, **more}), 0.0)  # type: ignore[arg-type]
    return Kept(made, events)


def teach(kept: Kept, steps: int, made: Callable[[int], None], asked: Callable[[], float] = lambda: 0.0) -> None:
    """As the loop of a teacher does."""
    for step in range(1, steps + 1):
        if kept.keeper.hold(step, asked):
            return
        vote = kept.keeper.vote(step)
        made(step)
        total = kept.keeper.world.sum_over_ranks([vote])[0]
        kept.keeper.due = total > 0


@pytest.mark.parametrize("max_lag", [0, 1, 4])
def test_a_teacher_is_never_further_ahead_of_a_student_it_waits_for_and_never_waits_needlessly(
    tiny: Path, tmp_path: Path, max_lag: int
) -> None:
    config = settings(tiny, *WAIT[:1], f"students.late.max_lag={max_lag}", "labels.wait_s=20")
    ranks, committed, lags = Ranks(3), [0], []
    told = [keeper(config, tmp_path, ranks.world(rank)) for rank in range(3)]
    early = threading.Event()

    def made(step: int) -> None:
        committed[0] = step
        if step == max_lag + 1:
            early.set()

    def learn() -> None:
        assert early.wait(10), "it may get so far without the student"
        for step in range(1, 31):
            while committed[0] < step:
                time.sleep(0.001)
            time.sleep(0.004)
            lags.append(committed[0] - step)
            write_position(tmp_path, "late", step)

    threads = [threading.Thread(target=teach, args=(kept, 30, lambda step: None)) for kept in told[1:]]
    threads.append(threading.Thread(target=learn))
    for thread in threads:
        thread.start()
    teach(told[0], 30, made)
    for thread in threads:
        thread.join(20)
    assert committed == [30] and len(lags) == 30
    assert max(lags) == max_lag, "the bound is kept, and used"
    assert told[0].events == [] and told[0].keeper.waited_s > 0.02


def test_a_student_that_is_silent_is_waited_for_so_long_and_again_once_it_has_caught_up(
    tiny: Path, tmp_path: Path
) -> None:
    kept = keeper(settings(tiny, *WAIT[:2], "labels.wait_s=0.3"), tmp_path)
    begin, steps = time.monotonic(), []
    teach(kept, 12, steps.append)
    assert steps == list(range(1, 13)) and 0.3 < time.monotonic() - begin < 3
    (overdue,) = kept.events
    assert (overdue["event"], overdue["student"], overdue["step"], overdue["lag"]) == ("student_overdue", "late", 5, 4)
    assert kept.keeper.waited_s == pytest.approx(overdue["waited_s"], abs=0.2)
    write_position(tmp_path, "late", 9)
    assert kept.keeper.vote(12) == 0.0 and kept.events[-1]["event"] == "student_caught_up"
    assert kept.keeper.vote(13) == 1.0, "step 14 has to wait again"


def test_a_pause_ends_with_a_wish_to_stop(tiny: Path, tmp_path: Path) -> None:
    kept = keeper(settings(tiny, *WAIT[:2], "labels.wait_s=30"), tmp_path)
    steps, begin = [], time.monotonic()
    teach(kept, 12, steps.append, lambda: 1.0 if time.monotonic() > begin + 0.2 else 0.0)
    assert steps == [1, 2, 3, 4] and time.monotonic() - begin < 5


def test_who_does_not_wait_costs_no_look_at_any_file(tiny: Path, tmp_path: Path) -> None:
    kept = keeper(settings(tiny), tmp_path / "nowhere")
    teach(kept, 5, lambda step: kept.keeper.tidy(True))
    assert not kept.keeper.may_pause and kept.events == [] and not (tmp_path / "nowhere").exists()


def bounded(tiny: Path, *overrides: str) -> RunConfig:
    """A limit below what a config may say: the blocks of these tests are small."""
    config = settings(tiny, "checkpoint.every_steps=1", *overrides, "labels.max_bytes=100000")
    labels = config.labels.model_copy(update={"max_bytes": 6000})
    return config.model_copy(update={"labels": labels})


def test_a_full_log_drops_the_oldest_steps_and_stays_below_its_limit(tiny: Path, tmp_path: Path) -> None:
    log, copy = tmp_path / "log", tmp_path / "copy"
    producers = [Producer(folder, 2, segment_bytes=300) for folder in (log, copy)]
    kept = keeper(bounded(tiny), log, copy=copy)
    sizes = []

    def made(step: int) -> None:
        for producer in producers:
            producer.steps(step, step)
        sizes.append(log_bytes(log))
        kept.keeper.tidy(False)

    teach(kept, 40, made)
    assert max(sizes) <= 6000 and min(sizes[20:]) > 3000, "most of the room is used"
    first = first_kept(log)
    assert 1 < first < 40 and first_kept(copy) == first
    for folder in (log, copy):
        for step, blocks in read_all(folder, 40, first=first).items():
            assert_whole(blocks, step)
    assert kept.events and all(event["event"] == "labels_dropped" for event in kept.events)
    assert kept.events[-1]["first_step"] == first
    with pytest.raises(LabelError, match=r"labels\.when_full is 'stop'"):
        stopping = keeper(bounded(tiny, "labels.when_full=stop"), log)
        stopping.keeper.max_bytes = 1000
        stopping.keeper.tidy(False)


def test_a_full_log_that_waits_pauses_until_checkpoints_made_room_and_gives_up_in_the_end(
    tiny: Path, tmp_path: Path
) -> None:
    waits = ("labels.keep=needed", "labels.when_full=wait", "labels.wait_s=0.5")  # patience for the second part only
    producer = Producer(tmp_path, 2, segment_bytes=300)
    kept = keeper(bounded(tiny, *waits), tmp_path)
    steps: list[int] = []

    def made(step: int) -> None:
        producer.steps(step, step)
        steps.append(step)
        kept.keeper.tidy(False)

    with pytest.raises(LabelError, match=r"no student made room for 0.5 s \(labels.wait_s\)"):
        teach(kept, 40, made)
    full = steps[-1]
    assert 5 < full < 30 and first_kept(tmp_path) == 0 and log_bytes(tmp_path) <= 6000
    done = threading.Event()

    def learn() -> None:
        for step in range(1, 41):
            time.sleep(0.03)
            for name in ("early", "late"):
                write_place(tmp_path, name, min(step, steps[-1]))
        done.set()

    kept = keeper(bounded(tiny, *waits[:2], "labels.wait_s=30"), tmp_path)
    thread = threading.Thread(target=learn)
    thread.start()
    for step in range(full + 1, 41):
        assert kept.keeper.hold(step, lambda: 0.0) == 0.0
        made(step)
        assert log_bytes(tmp_path) <= 6000
        assert first_kept(tmp_path) <= 1 + min(read_places(tmp_path).values(), default=0), "nothing needed is gone"
        kept.keeper.due = kept.keeper.vote(step + 1) > 0
    thread.join(20)
    assert done.is_set() and kept.keeper.waited_s > 0.2


def test_what_no_student_needs_goes_at_checkpoints_alone(tiny: Path, tmp_path: Path) -> None:
    Producer(tmp_path, 2, segment_bytes=300).steps(1, 20).close()
    kept = keeper(settings(tiny, "labels.keep=needed"), tmp_path)
    write_place(tmp_path, "late", 15)
    kept.keeper.tidy(True)
    assert first_kept(tmp_path) <= 6, "early begins after step 5 and has no checkpoint"
    write_place(tmp_path, "early", 12)
    before = first_kept(tmp_path)
    kept.keeper.tidy(False)
    assert first_kept(tmp_path) == before
    kept.keeper.tidy(True)
    assert before < first_kept(tmp_path) <= 13


def test_a_place_is_told_once_the_checkpoint_is_whole(tmp_path: Path) -> None:
    log, checkpoints = tmp_path / "log", tmp_path / "checkpoints"
    write_place(log, "small", 30)
    teller = PlaceTeller(log, "small", checkpoints, live=True)
    assert read_places(log) == {}, "it begins anew and needs everything"
    teller.saving(10)
    (checkpoints / "step-00000010.partial").mkdir(parents=True)
    teller.tell(11)
    assert read_places(log) == {} and (log / "readers" / "small.at").read_text() == "11\n"
    (checkpoints / "step-00000010.partial" / "manifest.json").write_text("{}")
    (checkpoints / "step-00000010.partial").rename(checkpoints / "step-00000010")
    time.sleep(0.11)
    teller.tell(11)
    assert read_places(log) == {"small": 10}
    assert PlaceTeller(log, "small", checkpoints, live=False).saved == 10


# --- ranks of a student ---


class Sight:
    """A reader to which steps before `first` are gone from its n-th look on, when read or before."""

    def __init__(self, last: int, gone: dict[int, int], unreadable: set[tuple[int, int]]):
        self.last, self.gone, self.unreadable, self.looks = last, gone, unreadable, 0
        self.ended, self.last_committed = None, last

    def wait_commit(self, step: int, give_up: Callable[[], bool]) -> Commit | None:
        self.looks += 1
        first = max((first for look, first in self.gone.items() if look <= self.looks), default=1)
        found = max(step, first)
        return Commit(found, (0,), 4, 0.0) if found <= self.last else None

    def read(self, commit: Commit) -> tuple[list[Any], int]:
        if (self.looks, commit.step) in self.unreadable:
            raise DroppedError(f"{commit.step}")
        return [commit.step], 1


@pytest.mark.parametrize("seed", range(6))
def test_all_ranks_of_a_student_take_the_same_steps_whatever_each_sees_dropped(seed: int) -> None:
    draw, count, last = random.Random(seed), 3, 30
    sights = []
    for _ in range(count):
        gone = {look: look + draw.randrange(6) for look in draw.sample(range(2, 25), 4)}
        sights.append(Sight(last, gone, {(look, look + draw.randrange(4)) for look in draw.sample(range(2, 25), 4)}))
    ranks, taken = Ranks(count), [[] for _ in range(count)]

    def learn(rank: int) -> None:
        follower = Follower(sights[rank], ranks.world(rank), True, lambda: False)  # type: ignore[arg-type]
        step = 0
        while (found := follower.next(step + 1)) is not None:
            assert [end for _, end, _ in found.skipped(step + 1)] in ([], [found.commit.step])
            step = found.commit.step
            taken[rank].append(step)

    threads = [threading.Thread(target=learn, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert taken[0] == taken[1] == taken[2] and taken[0][-1] == last
    assert taken[0] == sorted(set(taken[0])) and len(taken[0]) < last, "some were dropped"


def test_a_student_that_skips_jumps_to_the_newest_step_when_it_is_too_far_behind(tmp_path: Path) -> None:
    Producer(tmp_path, segment_bytes=300).steps(1, 20).close()
    drop_before(tmp_path, 8)
    log = Follower(LabelReader(tmp_path, 1.0), Ranks(1).world(0), True, lambda: False)
    for step, max_lag, learned, lag, skipped in (
        (3, 5, 20, 0, [(3, 20, "further behind than max_lag 5")]),
        (15, 5, 15, 5, []),
        (14, 5, 20, 0, [(14, 20, "further behind than max_lag 5")]),
        (3, 17, first_kept(tmp_path), 20 - first_kept(tmp_path), [(3, first_kept(tmp_path), "dropped from the log")]),
        (3, None, first_kept(tmp_path), 20 - first_kept(tmp_path), [(3, first_kept(tmp_path), "dropped from the log")]),
    ):
        found = log.next(step, max_lag)
        assert found is not None
        assert (found.commit.step, found.lag, list(found.skipped(step))) == (learned, lag, skipped), step
        assert_whole(found.blocks, learned)
