"""Loading: whole parameters from pieces, one at a time, so that any layout loads any other."""

import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titan.checkpoint.folder import read_manifest
from titan.checkpoint.pieces import PieceKey
from titan.checkpoint.save import FORMAT_VERSION
from titan.errors import CheckpointError
from titan.model.parameters import ParameterSpec


class Checkpoint:
    """A complete checkpoint, verified on opening; tensors are read when asked for."""

    def __init__(self, folder: Path):
        """Raises CheckpointError, naming the file, if anything is missing or damaged."""
        self.folder = folder
        self.manifest = read_manifest(folder)
        version = self.manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{folder} has checkpoint format {version}, this titan reads {FORMAT_VERSION}")
        self.sources: dict[tuple[str, str], list[tuple[PieceKey, Path]]] = defaultdict(list)
        for name, receipt in self.manifest["files"].items():
            path = folder / name
            _verify(path, receipt)
            try:
                with safe_open(path, framework="pt") as file:
                    for text in file.keys():  # noqa: SIM118  (a safetensors file is no dict)
                        key = PieceKey.parse(text)
                        self.sources[key.kind, key.name].append((key, path))
            except SafetensorError as error:
                raise CheckpointError(f"{path} is no safetensors file ({error}); delete {folder}") from None

    @property
    def step(self) -> int:
        """Optimizer steps that went into it (for a student, the teacher step it learned last)."""
        return int(self.manifest["step"])

    @property
    def state(self) -> dict[str, Any]:
        """What belongs to no parameter, as the role saved it."""
        state: dict[str, Any] = self.manifest["state"]
        return state

    def whole(self, kind: str, name: str, spec: ParameterSpec) -> Tensor:
        """One whole parameter, float32, put together from whatever pieces hold it.

        Raises CheckpointError if the checkpoint has not all of it or has it in another shape.
        """
        slices: dict[tuple[int, int], list[tuple[PieceKey, Path]]] = defaultdict(list)
        for key, path in self.sources[kind, name]:
            slices[key.tensor, key.tp].append((key, path))
        result = torch.empty(spec.shape)
        filled = 0
        for (tensor, tp), parts in slices.items():
            local = torch.empty(spec.local_shape(tp)).view(-1)
            for key, path in parts:
                with safe_open(path, framework="pt") as file:
                    values = file.get_tensor(str(key))
                if key.end > local.numel() or values.numel() != key.end - key.start:
                    raise CheckpointError(
                        f"{self.folder}: {kind} of {name} does not fit a parameter of shape {spec.shape}; "
                        "the checkpoint is of another model"
                    )
                local[key.start : key.end] = values
                filled += values.numel()
            spec.paste(result, local, tensor, tp)
        if filled != result.numel():
            raise CheckpointError(
                f"{self.folder} holds {filled} of {result.numel()} elements of {kind} of {name}; "
                "the checkpoint is of another model or incomplete"
            )
        return result


def _verify(path: Path, receipt: dict[str, int]) -> None:
    """Raise CheckpointError unless a file has the length and checksum of its receipt."""
    remedy = f"delete {path.parent}, the run then goes on from the checkpoint before it"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; {remedy}")
    if path.stat().st_size != receipt["bytes"]:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {receipt['bytes']}; {remedy}")
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    if checksum != receipt["crc32"]:
        raise CheckpointError(f"{path} is damaged (checksum {checksum}, expected {receipt['crc32']}); {remedy}")
