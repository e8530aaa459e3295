"""The label service gives what the folder gives, to any number of readers, through kills and hangs of either side."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.flight as flight
import pytest

from tests.label_logs import MANIFEST, Producer
from tests.label_logs import encoded as a_block
from tests.label_nodes import TOKEN, Log, Node, encoded, label_node, learn, same
from titan.distill.log.manifest import write_manifest
from titan.distill.log.reader import DroppedError, LabelReader
from titan.distill.log.records import COMMITS, FINISHED, Commit
from titan.distill.log.retention import Retention, retain, write_place
from titan.distill.log.ring import FeatureRing
from titan.distill.log.segment import segments_of
from titan.distill.log.verify import verify_log
from titan.distill.service.client import FlightLabelReader
from titan.distill.service.connection import Connection
from titan.distill.service.process import ServiceProcess
from titan.distill.service.protocol import LabelTicket, check_producer, unpack, write_address
from titan.distill.service.replica import ReplicaWriter, bring_up
from titan.distill.service.server import serve
from titan.errors import LabelError


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with label_node(tmp_path) as node:
        yield node


@pytest.mark.parametrize("seed", range(6))
def test_the_service_gives_what_the_folder_gives(node: Node, seed: int) -> None:
    rng = np.random.default_rng(seed)
    log = Log(node.labels, start=int(rng.integers(0, 3)) * 7, segment_bytes=int(rng.integers(1, 3000)))
    for _ in range(30):
        cuts = sorted(rng.choice(np.arange(1, 12), int(rng.integers(0, 4)), replace=False).tolist())
        log.add(0, *cuts, 12)
    log.commits.end(FINISHED)
    node.serve()
    near, far = LabelReader(log.folder, 5.0), node.reader(credits=int(rng.integers(1, 6)))
    far.poll()
    step = 0
    while True:
        step += int(rng.choice([0, 1, 1, 1, 1, 2, 5]))
        commit = near.wait_commit(step)
        assert far.wait_commit(step) == commit
        assert (far.first_step, far.last_committed, far.ended) == (near.first_step, near.last_committed, near.ended)
        if commit is None:
            break
        for _ in range(int(rng.integers(0, 3))):
            first = int(rng.integers(0, 12))
            span = (first, None if rng.random() < 0.3 else int(rng.integers(first + 1, 13)))
            (near_blocks, near_size), (far_blocks, far_size) = near.read(commit, *span), far.read(commit, *span)
            assert near_size == far_size
            same(near_blocks, far_blocks)
            assert near.read_raw(commit, *span) == [bytes(data) for data in far.read_raw(commit, *span)]
        if rng.random() < 0.8:
            near.forget(commit.step)
            far.forget(commit.step)
        step = max(step, commit.step)
    near.close()


def test_a_reader_catches_up_and_then_follows_live_to_the_end(node: Node) -> None:
    log = Log(node.labels)
    for _ in range(20):
        log.add(0, 2, 4)
    node.serve()

    def write() -> None:
        for _ in range(20):
            time.sleep(0.01)
            log.add(0, 1, 4)
        log.commits.end(FINISHED)

    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(write)
        assert learn(node.reader(), 1) == list(range(1, 41))
        written.result()
    assert learn(node.reader(), 35) == list(range(35, 41)), "who joins late begins where it asks to"


def test_a_step_arrives_soon_after_its_commit(node: Node) -> None:
    log, reader = Log(node.labels), node.reader()
    node.serve()
    log.add(0, 4)
    assert reader.wait_commit(1) is not None
    delays = []
    for step in range(2, 12):
        waiting = threading.Timer(0.05, log.add, (0, 4))
        waiting.start()
        assert reader.wait_commit(step) is not None
        delays.append(time.time() - (log.folder / COMMITS).stat().st_mtime)
        waiting.join()
    assert sorted(delays)[5] < 0.1, delays


def test_readers_of_unlike_pace_and_share_all_get_their_own(node: Node) -> None:
    log = Log(node.labels)
    for _ in range(40):
        log.add(0, 3, 6, 9)
    log.commits.end(FINISHED)
    service = node.serve()
    spans = [(0, 3), (3, 6), (6, None), (0, None), (2, 4)]

    def run(number: int) -> list[list[tuple[int, int]]]:
        reader, found = node.reader(credits=number + 1), []
        for step in range(1, 41):
            commit = reader.wait_commit(step)
            assert commit is not None
            blocks, _ = reader.read(commit, *spans[number])
            found.append([(block.step, block.first_sample) for block in blocks])
            reader.forget(step)
            time.sleep(0.002 * number)
        return found

    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(run, range(5)))
    wants = [(0,), (3,), (6,), (0, 3, 6), (0, 3)]
    for got, want in zip(found, wants, strict=True):
        assert got == [[(step, first) for first in want] for step in range(1, 41)]
    assert service.stats()["steps"] >= 5 * 40


def test_parts_that_nobody_reads_are_not_sent(node: Node) -> None:
    log = Log(node.labels)
    for _ in range(40):
        log.add(0, 1, 8)
    log.commits.end(FINISHED)
    service = node.serve()
    learn(node.reader(), 1, (0, 1))
    first_only = service.traffic.blocks
    assert 40 <= first_only <= 48, "a block a step, and a few that were fetched ahead before the first read"
    reader = node.reader()
    for step in range(1, 41):  # who follows commits only, as one waiting for the teacher's lead, gets no blocks
        assert reader.wait_commit(step) is not None
        reader.forget(step)
    assert service.traffic.blocks == first_only


def test_dropped_steps_are_skipped_as_from_the_folder(node: Node) -> None:
    log = Log(node.labels, segment_bytes=1)
    for _ in range(30):
        log.add(0, 4)
    node.serve()
    near, far = LabelReader(log.folder, 5.0), node.reader(credits=2)
    first = far.wait_commit(1)
    assert first is not None
    write_place(log.folder, "other", 20)
    kept = retain(log.folder, Retention("needed"))
    assert kept.first_step > 10
    for step in (5, 6, kept.first_step, 25):
        assert far.wait_commit(step) == near.wait_commit(step)
    assert far.first_step == near.first_step == kept.first_step
    with pytest.raises(DroppedError, match=f"step 1 of teacher was dropped; {kept.first_step} is the first"):
        far.read(first)
    near.close()


def test_waiting_ends_with_the_log_or_when_asked_or_in_time(node: Node) -> None:
    log = Log(node.labels)
    log.add(0, 4)
    node.serve()
    reader = node.reader(timeout_s=1.0)
    asked = iter([False, False, True])
    assert reader.wait_commit(2, lambda: next(asked)) is None
    begin = time.monotonic()
    with pytest.raises(LabelError, match="waited 1 s for labels of step 2 of teacher, the last committed is 1 at"):
        reader.wait_commit(2)
    assert time.monotonic() - begin < 2.0
    log.commits.end("stopped")
    assert reader.wait_commit(2) is None
    assert reader.ended is not None and reader.ended.reason == "stopped"
    with pytest.raises(LabelError, match="waited 1 s for labels of step 1 of nobody, the last committed is 0"):
        node.reader("nobody", timeout_s=1.0).wait_commit(1)


def test_a_service_that_never_comes_is_waited_for_in_vain_and_named(node: Node) -> None:
    reader = node.reader(timeout_s=0.5)
    for ask in (lambda: reader.wait_commit(1), reader.poll, reader.manifest):
        with pytest.raises(
            LabelError, match=r"waited 0 s for .*: there is no address .*label_service.json; is its node"
        ):
            ask()
    write_address(node.address, "127.0.0.1", 1)
    with pytest.raises(LabelError, match=r"label service at grpc\+tcp://127.0.0.1:1.*is its node alive"):
        reader.wait_commit(1)
    node.address.write_text("{")
    with pytest.raises(LabelError, match="is not the address of a label service; delete it"):
        reader.wait_commit(2)


def test_a_wrong_token_is_refused_in_one_line_that_shows_no_token(node: Node) -> None:
    Log(node.labels).add(0, 4)
    node.serve()
    for wrong in ("another", TOKEN + "x", TOKEN[:-1], ""):
        reader = FlightLabelReader(node.address, wrong, "teacher", 20.0)
        begin = time.monotonic()
        for ask in (lambda reader=reader: reader.wait_commit(1), reader.poll, reader.manifest):
            with pytest.raises(LabelError) as caught:
                ask()
            message = str(caught.value)
            assert "refuses the token of this run" in message and "\n" not in message
            assert TOKEN not in message and (not wrong or f" {wrong} " not in message)
        assert time.monotonic() - begin < 5.0, "no use in trying again"
        reader.close()
    replica = ReplicaWriter(node.address, "another", "teacher", 0, 5.0)
    with pytest.raises(LabelError, match="refuses the token"):
        replica.append(1, encoded(1, 0, 4))
    replica.close()


def test_damage_is_found_by_the_reader_and_named(node: Node) -> None:
    log = Log(node.labels)
    for _ in range(5):
        log.add(0, 4)
    segment = segments_of(log.folder, 0)[0]
    data = bytearray(segment.read_bytes())
    data[len(data) // 2 + 90] ^= 1  # in the payload of step 3
    segment.write_bytes(data)
    node.serve()
    reader = node.reader()
    for step in (1, 2, 3, 4):
        commit = reader.wait_commit(step)
        assert commit is not None
        if step != 3:
            assert reader.read(commit)[1]
            continue
        with pytest.raises(LabelError, match=r"sent for step 3 of teacher: the labels of step 3.* are damaged"):
            reader.read(commit)
    with open(log.folder / COMMITS, "ab") as file:
        file.write(b'{"crc32":1,"record":{"end":"no"}}\n')
    with pytest.raises(LabelError, match=r"commits\.jsonl is damaged at byte \d+, after step 5"):
        node.reader().wait_commit(6)


def test_features_come_through_or_are_gone(node: Node) -> None:
    node.serve()
    reader = node.reader()
    with pytest.raises(LabelError, match="nobody sends features"):
        reader.features(1, 0, wait_s=0.1)
    ring = FeatureRing.create(node.labels / "teacher", 0, slots=2, slot_bytes=1000)
    ring.write(1, b"one" * 300)
    assert bytes(reader.features(1, 0, wait_s=0.0) or b"") == b"one" * 300
    assert reader.features(2, 0, wait_s=0.1) is None, "not there yet"
    late = threading.Timer(0.2, ring.write, (2, b"two"))
    late.start()
    assert bytes(reader.features(2, 0, wait_s=5.0) or b"") == b"two"
    ring.write(3, b"three")
    assert reader.features(1, 0, wait_s=5.0) is None, "overwritten: said at once"
    late.join()
    ring.close()


@pytest.mark.parametrize("name", ["..", "a/b", "", "/etc", ".hidden", "a\n"])
def test_a_producer_is_a_plain_name(name: str, node: Node) -> None:
    with pytest.raises(LabelError, match="must be the name of a role"):
        check_producer(name)
    node.serve()
    connection = Connection(node.address, TOKEN)
    with pytest.raises(LabelError, match="must be the name of a role"):
        list(connection.labels(LabelTicket(name, 1, 1), 5.0))
    connection.drop()


def test_other_messages_are_refused() -> None:
    for data in (b"", b"[]", b"{}", b'{"kind":"Receipt"}', b'{"kind":"LabelTicket"}', b"\xff"):
        with pytest.raises(LabelError, match="is no LabelTicket"):
            unpack(data, LabelTicket)


def test_too_many_calls_are_told_to_come_again(node: Node) -> None:
    log = Log(node.labels)
    log.add(0, 4)
    service = serve(node.labels, TOKEN)
    node.cleanup.append(service.close)
    service.max_streams = 1
    write_address(node.address, "127.0.0.1", service.port)
    first, second, third = node.reader(), node.reader(timeout_s=0.5), node.reader()
    assert first.wait_commit(1) is not None  # and its next window waits in the only place
    with pytest.raises(LabelError, match=r"127.0.0.1:\d+: 1 calls are under way"):
        second.wait_commit(1)
    second.close()
    leave = threading.Timer(0.5, first.close)
    leave.start()
    assert third.wait_commit(1) is not None
    leave.join()
    third.close()
    service.max_streams = 2
    connection = Connection(node.address, TOKEN)
    stats = json.loads(connection.act("stats", b"", 5.0))
    assert stats["producers"] == ["teacher"]
    assert connection.act("health", b"", 5.0) == b"ok"
    with pytest.raises(LabelError, match="has no action 'more'"):
        connection.act("more", b"", 5.0)
    connection.drop()


def test_the_second_copy_is_the_first(node: Node, tmp_path: Path) -> None:
    log = Log(tmp_path / "primary", segment_bytes=2000)
    node.serve().replicas.segment_bytes = 2000
    writers = [ReplicaWriter(node.address, TOKEN, "teacher", part, 5.0) for part in range(2)]
    writers[0].manifest(b"{}")
    writers[0].manifest(b"{}")
    assert node.reader().manifest() == b"{}"
    with pytest.raises(LabelError, match="is of another log"):
        writers[0].manifest(b"other")
    for step in range(1, 21):
        blocks = [encoded(step, 0, 3), encoded(step, 3, 5)]
        for part, block in enumerate(blocks):
            log.append(part, block)
            assert writers[part].append(step, block, durable=step % 5 == 0) == len(block)
            if step % 3 == 0:
                writers[part].append(step, block)  # its receipt was lost
        log.commit(range(2), 8)
        record = Commit(step, (0, 1), 8, 1.0 / 3 + step)
        writers[0].commit(record, durable=step % 5 == 0)
        writers[1].commit(record)
    log.commits.end(FINISHED)
    writers[0].end(FINISHED)
    copy = node.labels / "teacher"
    assert (copy / COMMITS).read_bytes() == (log.folder / COMMITS).read_bytes()
    for part in range(2):
        mine, theirs = segments_of(log.folder, part), segments_of(copy, part)
        assert [path.name for path in mine] == [path.name for path in theirs]
        assert [path.read_bytes() for path in mine] == [path.read_bytes() for path in theirs]
    assert learn(node.reader(), 1) == list(range(1, 21))
    for writer in writers:
        writer.close()


def test_what_does_not_fit_the_second_copy_is_refused(node: Node) -> None:
    node.serve()
    writer = ReplicaWriter(node.address, TOKEN, "teacher", 0, 5.0)
    block = encoded(1, 0, 4)
    with pytest.raises(LabelError, match=r"step 1 was committed before its parts \[0\] came"):
        writer.commit(Commit(1, (0,), 4, 1.0))
    with pytest.raises(LabelError, match="came damaged"):
        writer.append(1, block[:-1] + bytes([block[-1] ^ 1]))
    with pytest.raises(LabelError, match="header is damaged"):
        writer.append(1, b"x" * 200)
    writer.append(1, block)
    writer.commit(Commit(1, (0,), 4, 1.0))
    with pytest.raises(LabelError, match=r"a commit of step 3 came to the replica .*, which ends at step 1"):
        writer.commit(Commit(3, (0,), 4, 1.0))
    assert node.reader().wait_commit(1) == Commit(1, (0,), 4, 1.0)
    writer.close()


def test_a_second_copy_goes_on_after_its_end_and_after_a_torn_write(node: Node) -> None:
    node.serve().close()
    folder = node.labels / "teacher"
    for start in range(3):
        service = serve(node.labels, TOKEN)
        write_address(node.address, "127.0.0.1", service.port)
        writer = ReplicaWriter(node.address, TOKEN, "teacher", 0, 5.0)
        for step in range(3 * start + 1, 3 * start + 4):
            writer.append(step, encoded(step, 0, 2))
            writer.append(step, encoded(step, 2, 2))
            writer.commit(Commit(step, (0,), 4, 1.0))
            writer.end("stopped")  # and the producer resumes, with or without a restart of the service
        writer.close()
        service.close()
        segment = segments_of(folder, 0)[-1]
        with open(segment, "ab") as file:
            file.write(encoded(3 * start + 4, 0, 2)[:-10])  # a kill in the middle of a write
        with open(folder / COMMITS, "ab") as file:
            file.write(b'{"crc32":12')
    near = LabelReader(folder, 5.0)
    assert [near.wait_commit(step).step for step in range(1, 10)] == list(range(1, 10))  # type: ignore[union-attr]
    for step in range(1, 10):
        commit = near.wait_commit(step)
        assert commit is not None and len(near.read(commit)[0]) == 2
    near.close()


def test_a_producer_that_was_killed_finds_its_second_copy_as_it_finds_the_log(node: Node, tmp_path: Path) -> None:
    log, copy = Producer(tmp_path / "primary" / "teacher", dp=2), node.labels / "teacher"
    write_manifest(log.folder, MANIFEST)
    node.serve()

    def writer(part: int) -> ReplicaWriter:
        made = ReplicaWriter(node.address, TOKEN, "teacher", part, 5.0)
        node.cleanup.append(made.close)
        return made

    def up() -> int:
        return bring_up(log.folder, node.address, TOKEN, "teacher", 5.0)

    log.steps(1, 6)
    assert up() == 6
    assert up() == 0
    one, two = writer(0), writer(1)
    log.append(7)
    log.commit(7)  # and was killed before the copy had the commit; of step 8 the copy has a part, in another layout
    one.append(7, a_block(7, 0, 4))
    one.append(8, a_block(8, 0, 4))
    assert up() == 1
    for step in (8, 9):
        log.append(step)
        log.commit(step)
    one.append(8, a_block(8, 0, 1))
    one.append(8, a_block(8, 2, 1))
    two.append(8, a_block(8, 1, 1))
    two.append(8, a_block(8, 3, 1))
    one.commit(Commit(8, (0, 1), 4, 0.8))
    assert up() == 1
    assert (copy / COMMITS).read_bytes() == (log.folder / COMMITS).read_bytes()
    assert not verify_log(copy).findings
    for part in range(2):
        assert segments_of(copy, part)[0].read_bytes() == segments_of(log.folder, part)[0].read_bytes()
    one.append(10, a_block(10, 0, 4))
    one.commit(Commit(10, (0,), 4, 1.0))
    with pytest.raises(LabelError, match=r"ends at step 9, its second copy at .* at step 10: .*copy the second copy"):
        up()
    log.close()


def test_a_service_that_cannot_start_says_why(node: Node) -> None:
    taken = node.serve()
    with pytest.raises(LabelError, match=rf"cannot listen on 127.0.0.1:{taken.port}"):
        ServiceProcess(node.labels, TOKEN, node.labels.parent / "other.json", port=taken.port)
    with pytest.raises(LabelError, match="needs a token"):
        ServiceProcess(node.labels, "", node.labels.parent / "other.json")


def test_the_service_needs_no_torch() -> None:
    code = (
        "import sys, titan.distill.service.server; print([m for m in ('torch', 'ray', 'megatron') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_without_the_door_nothing_answers(node: Node) -> None:
    client = flight.FlightClient(f"grpc+tcp://127.0.0.1:{node.serve().port}")
    for ask in (lambda: list(client.do_action("stats")), lambda: list(client.list_flights())):
        with pytest.raises(flight.FlightUnauthenticatedError):
            ask()
    client.close()
