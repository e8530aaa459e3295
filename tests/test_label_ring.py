"""The ring of feature labels: bounded, and never a torn payload or that of another step."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.label_logs import flip
from titan.distill.log.ring import FILE_HEADER_BYTES, SLOT_HEADER_BYTES, FeatureRing, ring_path
from titan.errors import LabelError

FORK = multiprocessing.get_context("fork")


def payload(step: int, part: int = 0, most: int = 20_000) -> bytes:
    rng = np.random.default_rng([step, part])
    return rng.bytes(int(rng.integers(0, most + 1)))


def test_the_newest_steps_are_there_and_older_ones_are_gone(tmp_path: Path) -> None:
    """Beside a dictionary of the newest steps, which is what the ring stands for."""
    ring = FeatureRing.create(tmp_path, 3, slots=5, slot_bytes=20_000)
    reader = FeatureRing.open(tmp_path, 3)
    wanted: dict[int, bytes] = {}
    for step in [1, 2, 3, 4, 5, 6, 7, 9, 10, 30, 31]:
        ring.write(step, payload(step))
        wanted = {known: data for known, data in wanted.items() if known % 5 != step % 5} | {step: payload(step)}
        for asked in range(1, 40):
            assert reader.read(asked) == wanted.get(asked)
            assert reader.gone(asked) == any(known > asked and known % 5 == asked % 5 for known in wanted)
    size = FILE_HEADER_BYTES + 5 * (SLOT_HEADER_BYTES + 20_000)
    assert ring_path(tmp_path, 3).stat().st_size == size


def test_a_payload_larger_than_a_slot_is_refused(tmp_path: Path) -> None:
    ring = FeatureRing.create(tmp_path, 0, slots=2, slot_bytes=10)
    ring.write(1, b"0123456789")
    with pytest.raises(LabelError, match=r"features of step 2 take 11 bytes, .* slots of 10"):
        ring.write(2, b"01234567890")
    assert ring.read(1) == b"0123456789"


def test_any_flipped_bit_makes_features_absent_not_wrong(tmp_path: Path) -> None:
    ring = FeatureRing.create(tmp_path, 0, slots=2, slot_bytes=40)
    ring.write(3, bytes(range(33)))
    path = ring_path(tmp_path, 0)
    start = FILE_HEADER_BYTES + SLOT_HEADER_BYTES + 40  # slot 1
    used = [*range(28), *range(SLOT_HEADER_BYTES, SLOT_HEADER_BYTES + 33)]
    for place in used:
        flip(path, start + place, bit=place % 8)
        assert FeatureRing.open(tmp_path, 0).read(3) is None, place
        flip(path, start + place, bit=place % 8)
    assert FeatureRing.open(tmp_path, 0).read(3) == bytes(range(33))


def write_for_ever(folder: Path) -> None:
    ring = FeatureRing.create(folder, 0, slots=3, slot_bytes=20_000)
    step = 0
    while True:
        step += 1
        ring.write(step, payload(step))


def test_a_reader_beside_a_writer_takes_only_whole_payloads_of_the_step_it_asked_for(tmp_path: Path) -> None:
    """Another process overwrites three slots as fast as it can and is killed in the end."""
    process = FORK.Process(target=write_for_ever, args=(tmp_path,))
    process.start()
    while not ring_path(tmp_path, 0).exists():
        time.sleep(0.001)
    ring, dice = FeatureRing.open(tmp_path, 0), random.Random(1)
    taken = missed = newest = 0
    deadline = time.monotonic() + 3.0
    while time.monotonic() < deadline:
        step = max(1, newest + dice.randint(-3, 3))
        data = ring.read(step)
        if data is None:
            missed += 1
            newest += ring.gone(step) * 3
        else:
            assert data == payload(step)
            taken, newest = taken + 1, max(newest, step)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert taken > 100 and missed > 100
    for step in range(newest, newest + 10_000):
        data = ring.read(step)
        assert data is None or data == payload(step)


def test_waiting_ends_with_the_features_or_when_they_cannot_come(tmp_path: Path) -> None:
    ring = FeatureRing.create(tmp_path, 0, slots=2, slot_bytes=10)
    begin = time.monotonic()
    assert ring.wait(1, 0.05) is None and 0.05 <= time.monotonic() - begin < 1.0
    assert ring.wait(1, 10.0, give_up=lambda: True) is None
    ring.write(3, b"three")
    assert ring.wait(1, 10.0) is None, "its slot has step 3"
    assert ring.wait(3, 10.0) == b"three"
    assert time.monotonic() - begin < 3.0


def test_a_new_ring_replaces_the_old_one_and_leaves_old_readers_alone(tmp_path: Path) -> None:
    FeatureRing.create(tmp_path, 0, 2, 10).write(1, b"old")
    before = FeatureRing.open(tmp_path, 0)
    FeatureRing.create(tmp_path, 0, 2, 10)
    assert before.read(1) == b"old" and FeatureRing.open(tmp_path, 0).read(1) is None


def test_a_missing_or_foreign_ring_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="is missing: nobody sends features"):
        FeatureRing.open(tmp_path, 0)
    FeatureRing.create(tmp_path, 0, 2, 10)
    flip(ring_path(tmp_path, 0), 5)
    with pytest.raises(LabelError, match="is no ring of features"):
        FeatureRing.open(tmp_path, 0)
    ring_path(tmp_path, 0).write_bytes(b"")
    with pytest.raises(LabelError, match="is missing"):
        FeatureRing.open(tmp_path, 0)
