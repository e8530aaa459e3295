"""How fast the label service is, to how many readers, and what it and they hold in memory.

    python -m benchmarks.label_service

Every reader is a process of its own, the service is another, and all share this machine's cores: the link that fills
up is the processor. So there are two questions: what all readers get together at full speed, beside the same readers on
the folder itself; and whether each of them gets what it asks for while that is less. Rounds are interleaved, and the
figures are medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import psutil

from benchmarks.figures import save_result
from titan.distill.codec.block import BlockHeader
from titan.distill.log.reader import LabelReader
from titan.distill.log.records import FINISHED, Commit
from titan.distill.log.writer import CommitWriter, LabelWriter
from titan.distill.service.client import FlightLabelReader
from titan.distill.service.process import ServiceProcess

READERS = (1, 2, 4, 8)
TOKEN = "benchmark"
TOKENS_A_STEP, BYTES_A_TOKEN = 8192, 36
STEPS = 512
"""151 MB: the log is in the page cache, as the newest steps of a run are."""
PACED_MB_S = 10.0
"""277,000 tokens a second and reader: more than any student of this machine learns."""
PACED_STEPS = 64
MEMORY_BLOCKS, MEMORY_BLOCK_BYTES = 10_000, 40_000
PROBES = 200


def make_block(step: int, size_bytes: int) -> bytes:
    """An intact block of one sample with meaningless labels: the service does not look into it."""
    payload = os.urandom(size_bytes)
    return BlockHeader(
        "full", 1, step, 0, 1, 1, 1.0, 0, 0, 0, False, False, len(payload), zlib.crc32(payload)
    ).pack() + payload  # fmt: skip


class Log:
    """A producer's log that is being written."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        self.blocks, self.commits, self.step = LabelWriter(folder, 0, 0), CommitWriter(folder, 0), 0

    def add(self, block_bytes: int) -> None:
        """One more step."""
        self.step += 1
        self.blocks.append(self.step, make_block(self.step, block_bytes), [0])
        self.commits.commit(Commit(self.step, (0,), 1, 1.0))


class Reader:
    """A process that reads when it is told to."""

    def __init__(self, labels: Path, address: Path):
        command = [sys.executable, "-m", "benchmarks.label_service", "--read", str(labels), str(address)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.answer() == "ready"

    def tell(self, **job: Any) -> None:
        """Give it a job."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """What it says next."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()


def be_a_reader(labels: Path, address: Path) -> None:
    """Do jobs that come on stdin: read steps by the service or from the folder, at full speed or paced."""
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        by_service = job["way"] == "service"
        reader: FlightLabelReader | LabelReader = (
            FlightLabelReader(address, TOKEN, "teacher", 60.0) if by_service else LabelReader(labels / "teacher", 60.0)
        )
        begin, size = time.perf_counter(), 0
        for step in range(1, job["steps"] + 1):
            commit = reader.wait_commit(step)
            assert commit is not None
            size += sum(map(len, reader.read_raw(commit)))
            reader.forget(step)
            if job["mb_s"]:
                time.sleep(max(0.0, begin + size / job["mb_s"] / 1e6 - time.perf_counter()))
        print(json.dumps({"seconds": time.perf_counter() - begin, "bytes": size}), flush=True)
        reader.close()


def together(readers: list[Reader], way: str, steps: int, mb_s: float | None = None) -> list[float]:
    """MB/s of each reader when all begin at once."""
    for reader in readers:
        reader.tell(way=way, steps=steps, mb_s=mb_s)
    return [answer["bytes"] / answer["seconds"] / 1e6 for answer in [reader.answer() for reader in readers]]


def measure_speed(folder: Path, rounds: int) -> dict[str, Any]:
    """MB/s to each number of readers: by the service, from the folder, and paced."""
    log = Log(folder / "labels" / "teacher")
    for _ in range(STEPS):
        log.add(TOKENS_A_STEP * BYTES_A_TOKEN)
    log.commits.end(FINISHED)
    service = ServiceProcess(folder / "labels", TOKEN, folder / "address.json")
    readers = [Reader(folder / "labels", folder / "address.json") for _ in range(max(READERS))]
    found: dict[tuple[str, int], list[list[float]]] = {}
    try:
        for number in range(rounds + 1):
            for count in READERS:
                chosen = readers[:count]
                speeds = {
                    "service": together(chosen, "service", STEPS),
                    "folder": together(chosen, "folder", STEPS),
                    "paced": together(chosen, "service", PACED_STEPS, PACED_MB_S),
                }
                for name, speed in speeds.items():
                    if number > 0:  # the first round warms up
                        found.setdefault((name, count), []).append(speed)
    finally:
        for reader in readers:
            reader.end()
        service.stop()
    return {
        name: [
            {
                "readers": count,
                "mb_s_each": statistics.median(speed for one in found[name, count] for speed in one),
                "mb_s_slowest": statistics.median(min(one) for one in found[name, count]),
                "mb_s_all": statistics.median(sum(one) for one in found[name, count]),
                "rounds_mb_s": found[name, count],
            }
            for count in READERS
        ]
        for name in ("service", "folder", "paced")
    }


def measure_memory(folder: Path) -> dict[str, Any]:
    """Resident MiB of service and reader while one follows a log of 10,000 blocks, and the delay of a step."""
    log = Log(folder / "labels" / "teacher")
    service = ServiceProcess(folder / "labels", TOKEN, folder / "address.json")
    reader = FlightLabelReader(folder / "address.json", TOKEN, "teacher", 60.0)
    mine, theirs = psutil.Process(), psutil.Process(service.pid)
    sizes, delays = [], []
    try:
        for step in range(1, MEMORY_BLOCKS + 1):
            log.add(MEMORY_BLOCK_BYTES)
            committed = time.perf_counter()
            commit = reader.wait_commit(step)
            assert commit is not None and len(reader.read_raw(commit)) == 1
            delays.append(time.perf_counter() - committed)
            reader.forget(step)
            if step % (MEMORY_BLOCKS // 10) == 0:
                sizes.append((step, *(process.memory_info().rss / 2**20 for process in (theirs, mine))))
    finally:
        reader.close()
        service.stop()
    return {
        "block_bytes": MEMORY_BLOCK_BYTES,
        "blocks_service_mib_reader_mib": sizes,
        "delay_ms_median": statistics.median(delays) * 1e3,
        "delay_ms_99": sorted(delays)[int(0.99 * len(delays))] * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--read", nargs=2, type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.read:
        be_a_reader(*asked.read)
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        speed = measure_speed(Path(one), asked.rounds)
        memory = measure_memory(Path(two))
    for name, rows in speed.items():
        for row in rows:
            print(
                f"{name:8} {row['readers']} readers: each {row['mb_s_each']:7.1f} MB/s, the slowest "
                f"{row['mb_s_slowest']:7.1f}, all {row['mb_s_all']:7.1f}"
            )
    first, last = memory["blocks_service_mib_reader_mib"][0], memory["blocks_service_mib_reader_mib"][-1]
    print(f"memory, MiB after {first[0]} and {last[0]} blocks: service {first[1]:.1f} and {last[1]:.1f}, ", end="")
    print(f"reader {first[2]:.1f} and {last[2]:.1f}")
    print(f"a committed step is read after {memory['delay_ms_median']:.1f} ms, 99 %: {memory['delay_ms_99']:.1f} ms")
    settings: dict[str, float] = {
        "tokens_a_step": TOKENS_A_STEP,
        "bytes_a_token": BYTES_A_TOKEN,
        "paced_mb_s": PACED_MB_S,
    }
    settings["load_before"] = round(load, 2)
    print(save_result("label_service", settings | speed | {"memory": memory}))


if __name__ == "__main__":
    main()
