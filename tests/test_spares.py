"""The pool of spare processes, with Ray played by a few lists: who gets which, and what becomes of those that fail."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from titan.cluster import spares as module
from titan.cluster.rank_actor import Whereabouts
from titan.cluster.spares import SparePool
from titan.config.load import load_config
from titan.observe.events import EventLog, read_events

ROOT = Path(__file__).parents[1]


class Ref:
    """A call that has not returned until it is given a value or an error."""

    def __init__(self) -> None:
        self.done, self.value, self.error = False, None, None

    def give(self, value: Any = None, error: Exception | None = None) -> None:
        self.done, self.value, self.error = True, value, error


class Actor:
    """Answers questions as long as it is well."""

    def __init__(self, name: str, node: str):
        self.name, self.node, self.health = name, node, "well"
        self.up = Ref()
        self.warm_up = SimpleNamespace(remote=lambda: self.up)
        self.take_news = SimpleNamespace(remote=self._answer)

    def come_up(self) -> "Actor":
        self.up.give(Whereabouts("host", self.node, id(self)))
        return self

    def _answer(self, heard: int) -> Ref:
        ref = Ref()
        if self.health == "well":
            ref.give((heard, []))
        elif self.health == "dead":
            ref.give(error=RuntimeError("actor died"))
        return ref


class Cluster:
    """What the pool sees of Ray, and a clock that a test moves."""

    def __init__(self) -> None:
        self.now_s, self.nodes, self.on_cpu = 1000.0, {"a": 4, "b": 4, "head": 0}, True
        self.actors: list[Actor] = []
        self.ended: list[Actor] = []
        self.killed: list[Whereabouts] = []

    def start(self, name: str, node: str) -> Actor:
        self.actors.append(Actor(name, node))
        return self.actors[-1]

    def wait(self, refs: list[Ref], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[Ref], list[Ref]]:
        assert 0 <= timeout <= 1.0, "the driver must not wait for long"
        return [ref for ref in refs if ref.done], [ref for ref in refs if not ref.done]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    cluster = Cluster()
    fake = SimpleNamespace(
        wait=cluster.wait, get=lambda ref: ref.value, kill=lambda actor, no_restart: cluster.ended.append(actor)
    )
    monkeypatch.setattr(module, "ray", fake)
    monkeypatch.setattr(module, "error_of", lambda ref: ref.error)
    monkeypatch.setattr(module, "start_spare", cluster.start)
    monkeypatch.setattr(module, "kill_processes", lambda places, headless=False: cluster.killed.extend(places))
    monkeypatch.setattr(module, "free_slots", lambda config, used: dict(cluster.nodes))
    monkeypatch.setattr(module, "ranks_are_on_cpu", lambda config: cluster.on_cpu)
    monkeypatch.setattr(module.time, "monotonic", lambda: cluster.now_s)
    yield cluster


def make_pool(folder: Path, spares: int) -> SparePool:
    return SparePool(load_config(ROOT / "configs/quickstart.toml", [f"recovery.spares={spares}"]), EventLog(folder))


def look(pool: SparePool, cluster: Cluster, calm: bool = True, times: int = 1) -> None:
    for _ in range(times):
        cluster.now_s += module.LOOK_EVERY_S + 0.1
        pool.look(calm)


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if event["event"] == name]


def test_each_node_that_has_room_for_ranks_gets_its_spares_once_nothing_else_starts(
    tmp_path: Path, cluster: Cluster
) -> None:
    pool = make_pool(tmp_path, 2)
    look(pool, cluster, calm=False)
    assert cluster.actors == []
    look(pool, cluster, times=3)
    assert sorted(actor.node for actor in cluster.actors) == ["a", "a", "b", "b"]
    cluster.nodes["c"] = 4  # a node that joins
    look(pool, cluster)
    assert [actor.node for actor in cluster.actors[4:]] == ["c", "c"]


def test_a_rank_gets_a_spare_of_its_own_node_that_is_ready_and_answers(tmp_path: Path, cluster: Cluster) -> None:
    pool = make_pool(tmp_path, 2)
    look(pool, cluster)
    on_a = [actor.come_up() for actor in cluster.actors if actor.node == "a"]
    on_b = [actor for actor in cluster.actors if actor.node == "b"]
    on_b[0].come_up()  # the other one still imports
    assert pool.take(["a", "a", "b"]) == [None, None, None]  # nobody has looked since
    look(pool, cluster, calm=False)
    assert pool.take(["b", "b", "a", "c"]) == [on_b[0], None, on_a[0], None]
    on_b[1].come_up()
    look(pool, cluster, calm=False)
    on_a[1].health, on_b[1].health = "hung", "dead"
    assert pool.take(["a", "b"]) == [None, None]
    assert [place.pid for place in cluster.killed] == [id(on_a[1]), id(on_b[1])]
    assert cluster.ended == [on_a[1], on_b[1]]
    look(pool, cluster)
    assert sorted(actor.node for actor in cluster.actors[4:]) == ["a", "a", "b", "b"]  # what was taken or lost


@pytest.mark.parametrize("health", ["dead", "hung"])
def test_a_spare_that_dies_or_hangs_while_it_waits_is_replaced(tmp_path: Path, cluster: Cluster, health: str) -> None:
    pool = make_pool(tmp_path, 1)
    look(pool, cluster)
    ill, well = (actor.come_up() for actor in cluster.actors)
    look(pool, cluster, times=8)
    assert len(cluster.actors) == 2 and len(events(tmp_path, "spare_up")) == 2
    ill.health = health
    look(pool, cluster, times=8)
    assert cluster.ended == [ill] and [actor.node for actor in cluster.actors] == ["a", "b", "a"]
    assert pool.take(["b"]) == [well]
    assert len(events(tmp_path, "spare_lost")) == 1


def test_spares_that_do_not_come_up_are_not_tried_again_at_once(tmp_path: Path, cluster: Cluster) -> None:
    pool = make_pool(tmp_path, 1)
    look(pool, cluster)
    cluster.actors[0].up.give(error=RuntimeError("no memory"))
    look(pool, cluster, times=5)
    assert len(cluster.actors) == 2 and events(tmp_path, "spare_lost")[0]["why"] == "no memory"
    cluster.now_s += module.AFTER_TROUBLE_S
    look(pool, cluster)
    assert [actor.node for actor in cluster.actors] == ["a", "b", "a"]
    cluster.now_s += 301.0  # longer than cluster.start_timeout_s
    look(pool, cluster)
    assert cluster.ended == cluster.actors


def test_at_the_end_all_are_ended_also_those_that_were_not_up(tmp_path: Path, cluster: Cluster) -> None:
    pool = make_pool(tmp_path, 1)
    look(pool, cluster)
    cluster.actors[0].come_up()
    look(pool, cluster)
    pool.close()
    assert cluster.ended == cluster.actors and [place.pid for place in cluster.killed] == [id(cluster.actors[0])]


def test_there_are_none_beside_accelerators_and_none_unless_asked_for(tmp_path: Path, cluster: Cluster) -> None:
    look(make_pool(tmp_path, 0), cluster, times=3)
    cluster.on_cpu = False
    look(make_pool(tmp_path, 1), cluster, times=3)
    assert cluster.actors == [] and len(events(tmp_path, "no_spares")) == 1
