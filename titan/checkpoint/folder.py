"""The checkpoints of one role on disk: what is complete, what is newest, what may go.

`checkpoints/ROLE/step-00000200/` holds one safetensors file a rank and `manifest.json`. While it is being written the
folder ends in `.partial`; the rename is the commit, so a half-written checkpoint is never taken for a whole one.
"""

import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

from titan.checkpoint.files import Files, files_of
from titan.errors import CheckpointError

MANIFEST = "manifest.json"
PARTIAL = ".partial"
FROZEN = "frozen"
"""Of a manifest: the folder that a model's weights are in, which therefore are not in the checkpoint."""


def step_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def step_folder(role_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return role_folder / step_name(step)


def complete_steps(role_folder: Path | Files) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    manifests = files_of(role_folder).find(f"step-*/{MANIFEST}")
    names = (re.fullmatch(r"step-(\d+)", manifest.rpartition("/")[0]) for manifest in manifests)
    return sorted(int(name.group(1)) for name in names if name)


def newest_step(role_folder: Path | Files) -> int | None:
    """Newest complete checkpoint, if there is one."""
    return max(complete_steps(role_folder), default=None)


def find_checkpoint(place: Path) -> Path:
    """A complete checkpoint: `place` itself, or the newest in it. Raises CheckpointError if there is none."""
    if (place / MANIFEST).is_file():
        return place
    step = newest_step(place)
    if step is None:
        raise CheckpointError(f"{place} is no checkpoint and holds none; give RUN/checkpoints/ROLE, or a step in it")
    return step_folder(place, step)


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """Manifest as JSON with a checksum of itself."""
    return json.dumps(manifest | {"crc32": _checksum(manifest)}, indent=1).encode()


def read_manifest(folder: Path | Files) -> dict[str, Any]:
    """Manifest of a complete checkpoint. Raises CheckpointError if it is missing or damaged."""
    files = files_of(folder)
    data = files.read(MANIFEST)
    if data is None:
        raise CheckpointError(f"{files.path} is no checkpoint: it has no {MANIFEST}")
    try:
        manifest = json.loads(data)
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or manifest.pop("crc32", None) != _checksum(manifest):
        raise CheckpointError(
            f"{files.path / MANIFEST} is damaged; delete {files.path.name}, the run then goes on from the checkpoint "
            "before it"
        )
    return manifest


def _checksum(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest).encode())


def remove_partial(role_folder: Path) -> None:
    """Delete what a killed run left half-written. Only when no rank of the role is running."""
    if role_folder.is_dir():
        for entry in role_folder.glob(f"step-*{PARTIAL}"):
            shutil.rmtree(entry)


def keep_newest(files: Files, keep: int) -> None:
    """Delete all complete checkpoints of a role but the newest `keep`."""
    files.remove(*(step_name(step) for step in complete_steps(files)[:-keep]))
