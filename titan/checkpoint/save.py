"""Saving: every rank snapshots its pieces, then writes them in the background; the lead commits."""

import copy
import json
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from titan.checkpoint.fence import Fence
from titan.checkpoint.files import Files, files_of
from titan.checkpoint.folder import MANIFEST, PARTIAL, encode_manifest, keep_newest, step_name
from titan.checkpoint.pieces import Piece
from titan.errors import CheckpointError

FORMAT_VERSION = 1
LOOK_S = 0.02
"""How often the lead looks for what the other ranks have written."""


class CheckpointWriter:
    """Writes the checkpoints of one rank; at most one is on its way.

    The stall of the training loop is the copy into host memory. Ranks meet only through files, so no collective runs
    in the background.
    """

    def __init__(
        self, place: Path | Files, rank: int, ranks: int, keep: int, timeout_s: float, fence: Fence | None = None
    ):
        """place: checkpoints of the role
        fence: of a place given as a folder: asked before anything is written; None where nobody else can write
        """
        self.files = files_of(place, fence)
        self.rank, self.ranks, self.keep, self.timeout_s = rank, ranks, keep, timeout_s
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
                    f"cannot write a checkpoint to {self.files.path}: {error.strerror or error}; free space or make "
                    "it writable, then `titan resume` goes on from the checkpoint before it"
                ) from error
            raise error

    def _write(self, step: int, snapshot: dict[str, Tensor], manifest: dict[str, Any]) -> None:
        try:
            final = step_name(step)
            partial = final + PARTIAL
            self.files.check()
            data = save(snapshot)
            checksum = zlib.crc32(data)
            # the checksum in the name keeps two writers of one step, say a rank thought dead, out of each other's files
            name = f"rank-{self.rank:05d}-{checksum:08x}.safetensors"
            self.files.write(f"{partial}/{name}", data)
            receipt = {"name": name, "bytes": len(data), "crc32": checksum}
            self.files.write(f"{partial}/{_receipt(self.rank)}", json.dumps(receipt).encode())
            if self.rank == 0:
                self._commit(partial, final, manifest)
        except Exception as error:  # reported by the next wait(), in the training thread
            self.error = error

    def _commit(self, partial: str, final: str, manifest: dict[str, Any]) -> None:
        """Wait for every rank's receipt, then make the checkpoint the newest."""
        receipts = [f"{partial}/{_receipt(rank)}" for rank in range(self.ranks)]
        deadline = time.monotonic() + self.timeout_s
        while missing := set(receipts).difference(self.files.find(f"{partial}/{_receipt('*')}")):
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"rank {receipts.index(min(missing))} did not write its part of {self.files.path / final} within "
                    f"{self.timeout_s:.0f} s; is {self.files.path} on storage that all ranks share?"
                )
            time.sleep(LOOK_S)
        files: dict[str, dict[str, Any]] = {}
        for receipt in receipts:
            content = self.files.read(receipt)
            if content is None:
                raise CheckpointError(f"another process is writing {self.files.path / final} too; end that one first")
            part = json.loads(content)
            files[part.pop("name")] = part
        self.files.write(f"{partial}/{MANIFEST}", encode_manifest(manifest | {"files": files}))
        self.files.remove(*receipts)
        self.files.move(partial, final)
        keep_newest(self.files, self.keep)


def _receipt(rank: int | str) -> str:
    """What a rank leaves beside its part once that is on the disk."""
    return f"rank-{rank if isinstance(rank, str) else f'{rank:05d}'}.json"
