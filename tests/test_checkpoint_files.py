"""Files of checkpoints: nothing half-written or damaged is ever loaded, and errors name the file."""

import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import titan.checkpoint.save as save_module
from titan.checkpoint.files import LocalFiles
from titan.checkpoint.folder import (
    MANIFEST,
    PARTIAL,
    complete_steps,
    encode_manifest,
    newest_step,
    read_manifest,
    remove_partial,
    step_folder,
)
from titan.checkpoint.load import Checkpoint
from titan.checkpoint.pieces import Piece, PieceKey
from titan.checkpoint.save import CheckpointWriter
from titan.errors import CheckpointError
from titan.model.parameters import ParameterSpec

WHOLE = ParameterSpec((8, 6), (8, 6), 0, 0.02)


def pieces_of(rank: int, value: float = 1.0, elements: int = 24) -> list[Piece]:
    """A parameter `w` of 48 elements cut over two tensor ranks, filled with rank and value."""
    values = torch.full((elements,), value) + rank
    return [Piece(PieceKey("weight", "w", rank, 2, 0, elements), values)]


def write(folder: Path, step: int, value: float = 1.0, keep: int = 9) -> Path:
    """A complete checkpoint of two ranks."""
    writers = [CheckpointWriter(folder, rank, 2, keep, 10.0) for rank in range(2)]
    for rank in (1, 0):
        writers[rank].save(step, pieces_of(rank, value), {"model": {}, "state": {"train_seconds": 0.5}})
    for writer in writers:
        writer.wait()
    return step_folder(folder, step)


def test_what_two_ranks_wrote_is_read_as_one(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path, 5, value=3.0))
    assert checkpoint.step == 5 and checkpoint.state == {"train_seconds": 0.5}
    whole = checkpoint.whole("weight", "w", WHOLE)
    assert torch.equal(whole, torch.tensor([3.0, 4.0]).repeat_interleave(24).view(8, 6))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 8):
        write(tmp_path, step, keep=3)
    assert complete_steps(tmp_path) == [5, 6, 7]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (5, 6, 7)]


def rank_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rank-*.safetensors"))


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        checkpoint = Checkpoint(folder)
        checkpoint.whole("weight", "w", WHOLE)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_truncated_file_is_named(tmp_path: Path, rank: int) -> None:
    folder = write(tmp_path, 1)
    path = rank_files(folder)[rank]
    for size in (0, 8, path.stat().st_size - 1):
        os.truncate(path, size)
        assert_refused(folder, str(path), "bytes")


def test_any_flipped_bit_of_a_rank_file_is_found_and_the_file_named(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    path = rank_files(folder)[1]
    data = bytearray(path.read_bytes())
    for place in range(len(data)):
        data[place] ^= 1 << (place % 8)
        path.write_bytes(data)
        assert_refused(folder, str(path), "damaged")
        data[place] ^= 1 << (place % 8)
    path.write_bytes(data)
    Checkpoint(folder)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    path = rank_files(folder)[0]
    path.unlink()
    assert_refused(folder, str(path), "missing")


def test_any_flipped_bit_of_the_manifest_is_found_or_changes_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    path, good = folder / MANIFEST, read_manifest(folder)
    data = bytearray(path.read_bytes())
    for place in range(len(data)):
        for bit in range(8):
            data[place] ^= 1 << bit
            path.write_bytes(data)
            try:
                assert read_manifest(folder) == good
            except CheckpointError as error:
                assert str(path) in str(error)
            data[place] ^= 1 << bit


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"step": 1}', "not json"])
def test_a_manifest_that_is_something_else_is_named(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path, 1)
    (folder / MANIFEST).write_text(text)
    assert_refused(folder, str(folder / MANIFEST), "damaged")


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / MANIFEST).write_bytes(encode_manifest(read_manifest(folder) | {"format_version": 99}))
    assert_refused(folder, str(folder), "99")


def test_a_parameter_of_which_a_piece_is_missing_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    manifest = read_manifest(folder)
    del manifest["files"][rank_files(folder)[1].name]
    (folder / MANIFEST).write_bytes(encode_manifest(manifest))
    assert_refused(folder, str(folder), "24 of 48")


def test_a_parameter_of_another_shape_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(tmp_path, 1))
    for shape in ((6, 6), (10, 6), (8, 4)):
        with pytest.raises(CheckpointError, match=r"weight of w"):
            checkpoint.whole("weight", "w", ParameterSpec(shape, shape, 0, 0.02))


# --- half-written ---


def test_a_checkpoint_that_one_rank_never_wrote_is_an_error_and_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, 0, 2, 9, timeout_s=0.2)
    writer.save(2, pieces_of(0), {})
    with pytest.raises(CheckpointError, match=r"rank 1 did not write"):
        writer.wait()
    assert (tmp_path / f"step-00000002{PARTIAL}").is_dir()
    assert newest_step(tmp_path) == 1
    remove_partial(tmp_path)
    assert not list(tmp_path.glob(f"*{PARTIAL}")) and newest_step(tmp_path) == 1


def save_for_ever(folder: Path) -> None:
    writer = CheckpointWriter(folder, 0, 1, keep=2, timeout_s=10.0)
    for step in range(1, 10**6):
        key = PieceKey("weight", "w", 0, 1, 0, 48)
        filling = Piece(PieceKey("weight", "filling", 0, 1, 0, 1 << 16), torch.full((1 << 16,), float(step)))
        writer.save(step, [Piece(key, torch.full((48,), float(step))), filling], {"state": {}})


def test_a_kill_at_any_moment_leaves_a_newest_checkpoint_that_loads(tmp_path: Path) -> None:
    rng, seen = np.random.default_rng(0), set()
    for trial in range(12):
        folder = tmp_path / str(trial)
        pid = os.fork()
        if pid == 0:
            try:
                save_for_ever(folder)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 20
        while newest_step(folder) is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(float(rng.uniform(0.0, 0.03)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        step = newest_step(folder)
        assert step is not None
        whole = Checkpoint(step_folder(folder, step)).whole("weight", "w", WHOLE)
        assert (whole == step).all()
        seen.add(step)
        remove_partial(folder)
        write(folder, step + 1)  # and the run goes on
    assert len(seen) > 1, "the kills came at different moments"


# --- the writer ---


def test_a_save_under_way_does_not_see_later_changes_of_weights_or_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, plain_save = threading.Event(), save_module.save
    monkeypatch.setattr(save_module, "save", lambda tensors: go.wait(10) and plain_save(tensors))
    weight = torch.arange(48.0)
    writer = CheckpointWriter(tmp_path, 0, 1, 9, 10.0)
    state = {"lead": {"weight": 1.0}}
    writer.save(1, [Piece(PieceKey("weight", "w", 0, 1, 0, 48), weight)], {"state": state})
    assert newest_step(tmp_path) is None, "it is still on its way"
    weight.fill_(-1.0)
    state["lead"]["weight"] = 2.0
    go.set()
    writer.wait()
    assert read_manifest(step_folder(tmp_path, 1))["state"] == {"lead": {"weight": 1.0}}
    assert torch.equal(Checkpoint(step_folder(tmp_path, 1)).whole("weight", "w", WHOLE).view(-1), torch.arange(48.0))


@contextmanager
def small_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of one megabyte; where that cannot be mounted, one whose fsync says that it is full."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0 if os.geteuid() == 0 else False
    if not mounted:
        plain_fsync = os.fsync

        def fsync(descriptor: int) -> None:
            if os.fstat(descriptor).st_size > 1 << 20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            plain_fsync(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_that_names_the_folder_and_costs_no_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "disk", monkeypatch) as folder:
        write(folder, 1)
        writer = CheckpointWriter(folder, 0, 1, 9, 10.0)
        writer.save(2, [Piece(PieceKey("weight", "w", 0, 1, 0, 1 << 19), torch.ones(1 << 19))], {"state": {}})
        with pytest.raises(CheckpointError, match=r"No space left on device.*free space") as caught:
            writer.wait()
        assert str(folder) in str(caught.value)
        assert newest_step(folder) == 1
        Checkpoint(step_folder(folder, 1)).whole("weight", "w", WHOLE)
        remove_partial(folder)
        write(folder, 3)
        assert complete_steps(folder) == [1, 3], "with space again, saving works again"


def test_the_error_of_a_save_is_raised_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    writer = CheckpointWriter(tmp_path, 0, 1, 9, 10.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        writer.save(1, [], {"state": {}})
        with pytest.raises(CheckpointError, match=r"Input/output error"):
            writer.save(2, [], {"state": {}})
    writer.save(3, [], {"state": {}})
    writer.wait()
    assert complete_steps(tmp_path) == [3]


def test_a_receipt_that_another_saver_takes_away_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalFiles, "read", lambda *_: None)
    saver = CheckpointWriter(tmp_path, 0, 1, 2, timeout_s=0.5)
    saver.save(1, [Piece(PieceKey("weight", "w", 0, 1, 0, 4), torch.ones(4))], {"state": {}})
    with pytest.raises(CheckpointError, match=r"another process is writing .*step-00000001 too"):
        saver.wait()
    assert newest_step(tmp_path) is None


def test_two_savers_of_the_same_steps_never_make_a_mixture(tmp_path: Path) -> None:
    """Say, a rank that was thought dead and its replacement: one may fail, what is committed is whole."""
    key, winners = PieceKey("weight", "w", 0, 1, 0, 1 << 16), set()
    spec = ParameterSpec((1 << 16,), (1 << 16,), None, None)
    savers = [CheckpointWriter(tmp_path, 0, 1, 2, timeout_s=0.5) for _ in range(2)]
    for step in range(1, 41):
        for value, saver in enumerate(savers):
            saver.save(step, [Piece(key, torch.full((1 << 16,), float(value)))], {"state": {}})
        for saver in savers:
            try:
                saver.wait()
            except CheckpointError as error:
                assert str(tmp_path) in str(error)
        if newest_step(tmp_path) != step:
            continue  # they disturbed each other and both said so
        values = Checkpoint(step_folder(tmp_path, step)).whole("weight", "w", spec).unique().tolist()
        assert len(values) == 1
        winners.add(values[0])
    assert winners
