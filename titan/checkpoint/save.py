"""Saving: every rank snapshots its pieces, then writes them in the background; the lead commits."""

import copy
import json
import os
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from titan.checkpoint.fence import Fence
from titan.checkpoint.folder import MANIFEST, PARTIAL, encode_manifest, keep_newest, step_folder
from titan.checkpoint.pieces import Piece
from titan.errors import CheckpointError

FORMAT_VERSION = 1


class CheckpointWriter:
    """Writes the checkpoints of one rank; at most one is on its way.

    The stall of the training loop is the copy into host memory. Ranks meet only through files, so no collective runs
    in the background.
    """

    def __init__(
        self, role_folder: Path, rank: int, ranks: int, keep: int, timeout_s: float, fence: Fence | None = None
    ):
        """fence: asked before anything is written; None where nobody else can write"""
        self.role_folder, self.rank, self.ranks, self.keep, self.timeout_s = role_folder, rank, ranks, keep, timeout_s
        self.fence = fence
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def save(self, step: int, pieces: Sequence[Piece], manifest: dict[str, Any]) -> None:
        """Snapshot tensors and manifest now, write behind. Raises what went wrong with the checkpoint before."""
        self.wait()
        snapshot = {str(piece.key): piece.values.detach().float().cpu().clone() for piece in pieces}
        described = copy.deepcopy(manifest) | {"step": step, "format_version": FORMAT_VERSION}
        arguments = (step, snapshot, described)
        self.thread = threading.Thread(target=self._write, args=arguments, name=f"checkpoint-{step}")
        self.thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint on its way. Raises CheckpointError if it could not be written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            if isinstance(error, OSError):
                raise CheckpointError(
                    f"cannot write a checkpoint to {self.role_folder}: {error.strerror or error}; free space or make "
                    "it writable, then `titan resume` goes on from the checkpoint before it"
                ) from error
            raise error

    def _write(self, step: int, snapshot: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        try:
            final = step_folder(self.role_folder, step)
            partial = final.with_name(final.name + PARTIAL)
            self._check_fence()
            partial.mkdir(parents=True, exist_ok=True)
            data = save(snapshot)
            checksum = zlib.crc32(data)
            # the checksum in the name keeps two writers of one step, say a rank thought dead, out of each other's files
            name = f"rank-{self.rank:05d}-{checksum:08x}.safetensors"
            write_durably(partial / name, data)
            self._check_fence()  # what was written above took time
            receipt = {"name": name, "bytes": len(data), "crc32": checksum}
            write_durably(partial / f"rank-{self.rank:05d}.json", json.dumps(receipt).encode())
            if self.rank == 0:
                self._commit(partial, final, manifest)
        except Exception as error:  # reported by the next wait(), in the training thread
            self.error = error

    def _commit(self, partial: Path, final: Path, manifest: dict[str, Any]) -> None:
        """Wait for every rank's receipt, then make the folder a checkpoint by renaming it."""
        files = {}
        deadline = time.monotonic() + self.timeout_s
        for rank in range(self.ranks):
            receipt = partial / f"rank-{rank:05d}.json"
            while not receipt.is_file():
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"rank {rank} did not write its part of {final} within {self.timeout_s:.0f} s; is "
                        f"{self.role_folder} on storage that all ranks share?"
                    )
                time.sleep(0.02)
            content = json.loads(receipt.read_text())
            files[content.pop("name")] = content
        self._check_fence()
        write_durably(partial / MANIFEST, encode_manifest(manifest | {"files": files}))
        for rank in range(self.ranks):
            (partial / f"rank-{rank:05d}.json").unlink()
        sync_folder(partial)
        self._check_fence()
        partial.rename(final)
        sync_folder(final.parent)
        keep_newest(self.role_folder, self.keep)

    def _check_fence(self) -> None:
        if self.fence is not None:
            self.fence.check()


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file so that it is either absent or complete, even after a power cut."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
