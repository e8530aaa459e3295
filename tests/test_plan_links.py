"""Links between nodes are measured on a Ray cluster, and the planner goes by them."""

import json
import queue
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from torch import Tensor

from tests.runs import titan
from titan.cluster import links
from titan.cluster.links import LinkEnd, LinkNode, MeasuredPair, link_nodes, links_of, measure_links, pairs_to_measure
from titan.config.planning import InventorySettings, load_inventory, load_plan, load_profile
from titan.config.settings import ClusterSettings
from titan.errors import ConfigError, PlatformError
from titan.parallel import link as measuring
from titan.parallel.link import SIZES, LinkTime, measure_transport
from titan.parallel.transport import Arrival, Transport
from titan.plan.cost import Costs
from titan.plan.fleet import make_fleet
from titan.plan.profile import Profile
from titan.plan.search.role import plan_role

PLAN = """
name = "joined"
profile = "profile.json"
[task]
vocab_size = 1000
sequence_length = 128
batch_size = 8
precision = "fp32"
model = { layers = 4, hidden = 256, heads = 4, ffn = 512 }
[search]
tensor = [1]
[inventory]
nodes = [
  { name = "a", kind = "fast", devices = 1, memory_gb = 40, island = "left" },
  { name = "b", kind = "slow", devices = 1, memory_gb = 40, island = "right" },
]
"""
PROFILE = {"peaks": [{"kind": "fast", "tflops": 0.1}, {"kind": "slow", "tflops": 0.1}]}


class Clock:
    """Time that passes with messages only."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Told(Transport):
    """Messages that take the time one tells, between two threads."""

    def __init__(self, out: "queue.Queue[Tensor]", come: "queue.Queue[Tensor]", link: LinkTime, clock: Clock):
        self.out, self.come, self.link, self.clock = out, come, link, clock
        self.largest = 0

    def send(self, tensor: Tensor, peer: int, channel: int) -> None:
        self.clock.now += self.link.seconds(tensor.numel())  # the other end is waiting
        self.largest = max(self.largest, tensor.numel())
        self.out.put(tensor.clone())

    def expect(self, into: Tensor, peer: int, channel: int) -> Arrival:
        came = self.come

        class Coming(Arrival):
            def wait(self) -> Tensor:
                return into.copy_(came.get(timeout=10))

        return Coming()

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("bytes_per_s", "largest"), [(1e9, SIZES[2]), (1e7, SIZES[1])])
def test_what_is_measured_is_what_messages_take_and_slow_links_get_no_large_ones(
    monkeypatch: pytest.MonkeyPatch, bytes_per_s: float, largest: int
) -> None:
    clock, link = Clock(), LinkTime(latency_s=0.01, bytes_per_s=bytes_per_s)
    monkeypatch.setattr(measuring, "time", clock)
    there, back = queue.Queue[Tensor](), queue.Queue[Tensor]()
    ends = (Told(there, back, link, clock), Told(back, there, link, clock))
    cpu = torch.device("cpu")
    other = threading.Thread(target=measure_transport, args=(ends[1], 1, cpu), daemon=True)
    other.start()
    found = measure_transport(ends[0], 0, cpu)
    other.join(timeout=10)
    assert not other.is_alive()
    assert found.latency_s == pytest.approx(link.latency_s)
    assert found.bytes_per_s == pytest.approx(link.bytes_per_s)
    assert ends[0].largest == largest


def node(name: str, kind: str = "fast", island: str | None = None, devices: int = 2) -> LinkNode:
    return LinkNode(name, name, kind, island or kind, "cpu", devices)


def test_all_pairs_of_few_nodes_are_measured_and_three_of_two_islands_with_many() -> None:
    few = [node(f"n{index}") for index in range(8)]
    assert len(pairs_to_measure(few)) == 28
    many = [node(f"{kind}{index}", kind) for kind in ("fast", "slow") for index in range(20)] + [node("one", "third")]
    pairs = {(one.name, other.name) for one, other in pairs_to_measure(many)}
    inside = {("fast0", "fast1"), ("fast0", "fast19"), ("fast18", "fast19")}
    inside |= {tuple(name.replace("fast", "slow") for name in pair) for pair in inside}  # type: ignore[misc]
    between = {("fast0", "slow0"), ("fast0", "slow19"), ("fast19", "slow19")}
    third = {(f"{kind}{index}", "one") for kind in ("fast", "slow") for index in (0, 19)}
    assert pairs == inside | between | third


def test_the_slowest_pair_of_two_islands_counts() -> None:
    a, b, c = node("a", "fast", "left"), node("b", "fast", "left"), node("c", "slow", "right")
    pairs = [
        MeasuredPair(a, b, 2, LinkTime(1e-4, 2e9)),
        MeasuredPair(a, c, 2, LinkTime(1e-3, 1e9)),
        MeasuredPair(b, c, 2, LinkTime(1e-5, 5e8)),
    ]
    found = {link.between: (link.latency_s, link.gb_per_s) for link in links_of(pairs)}
    assert found == {("left", "left"): (1e-4, 2.0), ("left", "right"): (1e-5, 0.5)}


def ray_node(name: str, number: int, **resources: float) -> dict[str, Any]:
    built_in = {"CPU": 4.0, "memory": 1e9, "object_store_memory": 1e9, f"node:{name}": 1.0}
    return {"NodeName": name, "NodeID": f"id{number:04}", "Alive": True, "Resources": built_in | resources}


def test_a_node_is_of_the_kinds_it_was_started_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nodes = [
        ray_node("c", 0, fast=2.0), ray_node("a", 1, slow=3.0, rack=1.0), ray_node("b", 2), ray_node("b", 3, GPU=8.0),
        ray_node("dead", 4, fast=9.0) | {"Alive": False},
    ]  # fmt: skip
    monkeypatch.setattr(ray, "nodes", lambda: nodes)

    def told(settings: ClusterSettings, kind: str | None, inventory: InventorySettings | None) -> list[tuple[Any, ...]]:
        found = link_nodes(settings, kind, inventory)
        return [(each.name, each.kind, each.island, each.device, each.devices) for each in found]

    plan = tmp_path / "inventory.json"
    plan.write_text(
        json.dumps(
            {
                "nodes": [
                    {"name": "f", "kind": "fast", "devices": 2, "memory_gb": 1, "island": "left"},
                    {"name": "s", "kind": "slow", "devices": 3, "memory_gb": 1},
                ]
            }
        )
    )
    known = [("a", "slow", "slow", "cpu", 3), ("c", "fast", "left", "cpu", 2)]
    assert told(ClusterSettings(), None, load_inventory(plan)) == known
    any_kind = told(ClusterSettings(), "mine", None)
    assert any_kind == [
        ("a", "rack", "rack", "cpu", 1),
        ("a", "slow", "slow", "cpu", 3),
        ("b/id0002", "mine", "mine", "cpu", 4),
        ("b/id0003", "mine", "mine", "cuda", 8),
        ("c", "fast", "fast", "cpu", 2),
    ]
    assert ("b/id0003", "cpu", "cpu", "cpu", 4) in told(ClusterSettings(device="cpu"), None, None)


def test_one_node_has_no_link_to_measure() -> None:
    with pytest.raises(ConfigError, match=r"there is no link to measure between fewer than two nodes: a \(fast\)"):
        measure_links(ClusterSettings(address="there:1"), [node("a")])


def test_an_end_that_is_not_reached_is_told_within_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MESSAGE_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    begin = time.monotonic()
    with pytest.raises(Exception, match=r"timed out|refused|failed to connect|could not connect"):
        LinkEnd("cpu").measure(1, "127.0.0.1", port)
    assert time.monotonic() - begin < 10


def test_pairs_that_do_not_reach_each_other_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(one: LinkNode, other: LinkNode, ends: object) -> MeasuredPair:
        if other.name == "c":
            raise PlatformError(f"no link between {one.name} and {other.name}: refused")
        return MeasuredPair(one, other, 1, LinkTime(0.0, 1.0))

    monkeypatch.setattr(links, "_measure_pair", measured)
    nodes = [node(name) for name in "abc"]
    with pytest.raises(PlatformError, match="between a and c: refused; no link between b and c: refused"):
        links._measure_all(pairs_to_measure(nodes), {})


# --- a cluster of two nodes ---


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two Ray nodes on this host, of unlike kinds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        memory = {"object_store_memory": 100 << 20, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"fast": 2}} | memory)
        try:
            made.add_node(num_cpus=2, resources={"slow": 1}, object_store_memory=100 << 20)
            yield made
        finally:
            made.shutdown()


def plain_bytes_per_s() -> float:
    """The slow obvious way: a thread that reads everything from a socket, and one large message after the other."""
    payload, times = bytearray(SIZES[-1]), []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def read() -> None:
            connection, _ = server.accept()
            with connection:
                for _ in range(5):
                    left = len(payload)
                    while left:
                        left -= len(connection.recv(min(left, 1 << 20)))
                    connection.sendall(b"!")

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        with socket.create_connection(server.getsockname(), timeout=20) as connection:
            for _ in range(5):
                begin = time.perf_counter()
                connection.sendall(payload)
                connection.recv(1)
                times.append(time.perf_counter() - begin)
        reader.join(timeout=10)
    return len(payload) / sorted(times)[2]


def ends_alive() -> list[int]:
    """Processes that measure links."""
    return [p.pid for p in psutil.process_iter(["cmdline"]) if "ray::LinkEnd" in " ".join(p.info["cmdline"] or [])]


@pytest.mark.slow
def test_a_profile_gets_the_links_of_a_cluster_and_the_planner_goes_by_them(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    old = {"links": [{"between": ["slow", "fast"], "gb_per_s": 123}, {"between": ["slow", "slow"], "gb_per_s": 7}]}
    (tmp_path / "profile.json").write_text(json.dumps(PROFILE | old))
    done = titan("doctor", "--profile", "profile.json", "--address", cluster.address, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "GB/s each" in done.stdout and "links between nodes: profile.json" in done.stdout
    deadline = time.monotonic() + 20
    while ends_alive() and time.monotonic() < deadline:  # Ray ends them a moment later
        time.sleep(0.1)
    assert not ends_alive()

    profile = load_profile(tmp_path / "profile.json")
    assert len(profile.peaks) == 2, "what the file had is kept"
    by_islands = {frozenset(link.between): link for link in profile.links}
    assert by_islands[frozenset({"slow"})].gb_per_s == 7.0
    assert len(by_islands) == len(profile.links) == 2
    link = by_islands[frozenset({"fast", "slow"})]
    plain = plain_bytes_per_s() / 1e9
    assert plain / 20 < link.gb_per_s < 20 * plain, f"a plain socket gives {plain:.2f} GB/s"
    assert 0 <= link.latency_s < 0.1

    settings, inventory, _ = load_plan(tmp_path / "plan.toml")
    own = tuple(each.model_copy(update={"island": None}) for each in inventory.nodes)
    inventory = inventory.model_copy(update={"nodes": own})
    with pytest.raises(ConfigError, match="no link between fast and slow"):
        plan_role(Costs(settings.task, make_fleet(inventory), Profile(settings.task, profile)), settings.search)
    costs = Costs(settings.task, make_fleet(inventory, profile.links), Profile(settings.task, profile))
    plan = plan_role(costs, settings.search.model_copy(update={"mixed": False}))  # two stages, a link between them
    assert plan.devices == {"fast": 1, "slow": 1}
    moved = settings.task.batch_size // plan.layout.micro_batches * 128 * 256 * 4
    assert plan.prediction.times[0].to_next_s == pytest.approx(link.latency_s + moved / (link.gb_per_s * 1e9))


@pytest.mark.slow
def test_a_run_with_a_cluster_measures_blocks_here_and_links_by_the_islands_of_its_inventory(
    cluster: Cluster, tmp_path: Path
) -> None:
    nodes = PLAN[PLAN.index("[inventory]") + len("[inventory]\n") :]
    (tmp_path / "inventory.toml").write_text(nodes)
    (tmp_path / "run.toml").write_text(
        "[run]\nname = 'joined'\nsteps = 1\n[data]\nsources = ['.']\nvocab_size = 300\nsequence_length = 16\n"
        "batch_size = 2\n[teacher]\nmodel = { layers = 1, hidden = 32, heads = 2, ffn = 64 }\n"
        "[cluster]\ndevice = 'cpu'\ninventory = 'inventory.toml'\n"
    )
    done = titan("doctor", "--profile", "out.json", "--run", "run.toml", "--kind", "fast", "--samples", "1",
                 "--address", cluster.address, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    profile = load_profile(tmp_path / "out.json")
    assert {block.kind for shape in profile.shapes for block in shape.blocks} == {"fast"}
    assert {frozenset(link.between) for link in profile.links} == {frozenset({"fast"}), frozenset({"left", "right"})}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--address", "127.0.0.1:1"), "--address 127.0.0.1:1: needs --profile, the file to write links into"),
        (("--address", "there", "--profile", "p.json"), "--address there: want host:port of a running Ray"),
        (("--address", "127.0.0.1:1", "--profile", "p.json"), "cluster.address is 127.0.0.1:1, but no Ray answers"),
        (("--address", "127.0.0.1:1", "--profile", "no/p.json"), "--profile no/p.json: no is no folder; make it first"),
        (("--profile", "p.json"), "--profile p.json: needs --run RUN.toml, which names the models to measure, or"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = titan("doctor", *arguments, cwd=tmp_path, timeout_s=30)
    assert done.returncode in (1, 2) and done.stderr.startswith(f"titan: {told}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
