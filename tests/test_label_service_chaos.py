"""The label service through kills and hangs of either side, and over many blocks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.label_nodes import TOKEN, Log, Node, encoded, follow, label_node, learn, opaque
from titan.distill.log.records import COMMITS, FINISHED, Commit
from titan.distill.log.segment import segments_of
from titan.distill.service.connection import Connection
from titan.distill.service.protocol import read_address
from titan.distill.service.replica import ReplicaWriter


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with label_node(tmp_path) as node:
        yield node


@pytest.mark.slow
def test_a_killed_service_that_comes_back_elsewhere_loses_nothing(node: Node) -> None:
    log = Log(node.labels)
    ports: set[str | None] = set()
    reader = node.reader(timeout_s=60.0)
    done = threading.Event()

    def write() -> None:
        while not done.wait(0.01):
            log.add(0, 2, 4)
        log.commits.end(FINISHED)

    with ThreadPoolExecutor(2) as pool:
        written, learned = pool.submit(write), pool.submit(learn, reader, 1)
        for _ in range(3):
            service = node.spawn()
            ports.add(read_address(node.address))
            time.sleep(0.3)
            service.kill()
        service = node.spawn()
        time.sleep(0.2)
        done.set()
        written.result()
        assert learned.result() == list(range(1, log.step + 1))
    assert len(ports) == 3 and log.step > 50


@pytest.mark.slow
def test_a_second_copy_survives_kills_of_its_service(node: Node, tmp_path: Path) -> None:
    log = Log(tmp_path / "primary")
    service = node.spawn()
    writer = ReplicaWriter(node.address, TOKEN, "teacher", 0, 60.0)
    node.cleanup.append(writer.close)

    def write() -> None:
        for step in range(1, 201):
            for first in (0, 2):
                block = encoded(step, first, 2)
                log.append(0, block)
                writer.append(step, block)
            writer.commit(Commit(step, (0,), 4, 1.0 / 3 + step))
            log.commit(range(1), 4)

    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(write)
        for _ in range(3):
            time.sleep(0.15)
            service.kill()
            service = node.spawn()
        written.result()
    copy = node.labels / "teacher"
    assert (copy / COMMITS).read_bytes() == (log.folder / COMMITS).read_bytes()
    assert segments_of(copy, 0)[0].read_bytes() == segments_of(log.folder, 0)[0].read_bytes()


@pytest.mark.slow
def test_a_hung_service_is_left_for_the_new_one(node: Node) -> None:
    log = Log(node.labels)
    for _ in range(10):
        log.add(0, 4)
    hung = node.spawn()
    reader = node.reader(timeout_s=60.0, credits=2)
    assert reader.wait_commit(1) is not None
    os.kill(hung.pid, signal.SIGSTOP)
    begin = time.monotonic()
    node.spawn()  # on another port; the old one keeps its connections and says nothing
    log.commits.end(FINISHED)
    assert learn(reader, 1) == list(range(1, 11))
    assert time.monotonic() - begin < 10.0


@pytest.mark.slow
def test_a_service_that_hung_for_a_while_goes_on(node: Node) -> None:
    log = Log(node.labels)
    for _ in range(10):
        log.add(0, 4)
    log.commits.end(FINISHED)
    hung = node.spawn()
    reader = node.reader(timeout_s=60.0, credits=2)
    assert reader.wait_commit(1) is not None
    os.kill(hung.pid, signal.SIGSTOP)
    threading.Timer(1.0, os.kill, (hung.pid, signal.SIGCONT)).start()
    assert learn(reader, 1) == list(range(1, 11))


@pytest.mark.slow
def test_readers_that_hang_cost_the_others_nothing_and_are_let_go(node: Node) -> None:
    log = Log(node.labels)
    for _ in range(30):
        log.append(0, opaque(log.step + 1, 4 << 20))
        log.commit(range(1), 1)
    log.commits.end(FINISHED)
    node.spawn()
    connection = Connection(node.address, TOKEN)

    def pass_s() -> float:
        begin, reader = time.monotonic(), node.reader()
        for step in range(1, 31):
            commit = reader.wait_commit(step)
            assert commit is not None and len(reader.read_raw(commit)) == 1
            reader.forget(step)
        return time.monotonic() - begin

    alone = sorted(pass_s() for _ in range(3))[1]
    code = (
        "print(reader.wait_commit(1), flush=True)\n"
        "while True:\n  for step in range(1, 28):\n    reader.read_raw(reader.wait_commit(step)); reader.forget(step)\n"
    )
    hung = [follow(node, code) for _ in range(3)]
    for process in hung:
        assert process.stdout is not None and "Commit" in process.stdout.readline()
    time.sleep(0.3)
    for process in hung:
        os.kill(process.pid, signal.SIGSTOP)
    assert json.loads(connection.act("stats", b"", 5.0))["streams"] > 0, "some hang in the middle of a stream"
    beside = sorted(pass_s() for _ in range(3))[1]
    assert beside < 2.0 * alone + 0.2, (alone, beside)
    deadline = time.monotonic() + 10.0
    while json.loads(connection.act("stats", b"", 5.0))["streams"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert json.loads(connection.act("stats", b"", 5.0))["streams"] == 0, "their calls ended in time"
    for process in hung:
        os.kill(process.pid, signal.SIGCONT)
    connection.drop()


@pytest.mark.slow
def test_memory_stays_constant_over_ten_thousand_blocks(node: Node) -> None:
    log, size = Log(node.labels, segment_bytes=8 << 20), 20_000
    service, reader = node.spawn(), node.reader()
    mine, theirs = psutil.Process(), psutil.Process(service.pid)
    sizes = []
    for step in range(1, 10_001):
        log.append(0, opaque(step, size))
        log.commit(range(1), 1)
        if step % 50 == 0:  # live, never far behind
            for known in range(step - 49, step + 1):
                commit = reader.wait_commit(known)
                assert commit is not None and len(reader.read_raw(commit)[0]) > size
                reader.forget(known)
        if step % 2000 == 0:
            sizes.append((mine.memory_info().rss, theirs.memory_info().rss))
    grown = np.diff(np.array(sizes), axis=0).sum(axis=0) / 2**20
    assert (grown < 8.0).all(), f"MiB grown by this process and the service from block 2000 to 10000: {grown}"


@pytest.mark.slow
def test_the_service_ends_when_told_even_with_a_hung_reader(node: Node) -> None:
    log = Log(node.labels)
    for _ in range(8):
        log.append(0, opaque(log.step + 1, 8 << 20))
        log.commit(range(1), 1)
    service = node.spawn()
    code = "while True:\n  commit = reader.wait_commit(1)\n  print(len(reader.read_raw(commit)), flush=True)\n"
    process = follow(node, code + "  reader.wait_commit(8)\n")
    assert process.stdout is not None and process.stdout.readline()
    os.kill(process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    service.stop()
    assert service.process.returncode == 0 and time.monotonic() - begin < 5.0
    assert TOKEN not in node.address.with_suffix(".log").read_text()


@pytest.mark.slow
def test_the_service_dies_with_its_parent(node: Node) -> None:
    code = (
        "import time; from pathlib import Path\n"
        "from titan.distill.service.process import ServiceProcess\n"
        f"service = ServiceProcess(Path({str(node.labels)!r}), {TOKEN!r}, Path({str(node.address)!r}))\n"
        "print(service.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert TOKEN not in " ".join(psutil.Process(pid).cmdline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10.0)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
