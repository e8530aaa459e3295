"""Loading: whole parameters from pieces, one at a time, so that any layout loads any other."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan.checkpoint.files import Files, files_of
from titan.checkpoint.folder import read_manifest
from titan.checkpoint.pieces import PieceKey
from titan.checkpoint.save import FORMAT_VERSION
from titan.errors import CheckpointError
from titan.model.parameters import ParameterSpec

LENGTH_BYTES, FLOAT_BYTES = 8, 4


class _Stored(NamedTuple):
    """A piece, and the bytes of a file that it is."""

    key: PieceKey
    file: str
    start: int
    end: int


class Checkpoint:
    """A complete checkpoint, verified on opening; of tensors only what is asked for is read."""

    def __init__(self, place: Path | Files):
        """Raises CheckpointError, naming the file, if anything is missing or damaged."""
        self.files = files_of(place)
        self.folder = self.files.path
        self.manifest = read_manifest(self.files)
        version = self.manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{self.folder} has checkpoint format {version}, this titan reads {FORMAT_VERSION}")
        self.sources: dict[tuple[str, str], list[_Stored]] = defaultdict(list)
        for name, receipt in self.manifest["files"].items():
            _verify(self.files, name, receipt)
            for stored in _stored(self.files, name):
                self.sources[stored.key.kind, stored.key.name].append(stored)

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
        slices: dict[tuple[int, int], list[_Stored]] = defaultdict(list)
        for stored in self.sources[kind, name]:
            slices[stored.key.tensor, stored.key.tp].append(stored)
        result = torch.empty(spec.shape)
        filled = 0
        for (tensor, tp), parts in slices.items():
            local = torch.empty(spec.local_shape(tp)).view(-1)
            for key, file, start, end in parts:
                count = (end - start) // FLOAT_BYTES
                if key.end > local.numel() or count != key.end - key.start:
                    raise CheckpointError(
                        f"{self.folder}: {kind} of {name} does not fit a parameter of shape {spec.shape}; "
                        "the checkpoint is of another model"
                    )
                data = bytearray(self.files.read(file, start, end) or b"")
                if len(data) != end - start:
                    raise CheckpointError(f"{self.folder / file} has changed while it was read; start again")
                local[key.start : key.end] = torch.frombuffer(data, dtype=torch.float32) if data else torch.empty(0)
                filled += count
            spec.paste(result, local, tensor, tp)
        if filled != result.numel():
            raise CheckpointError(
                f"{self.folder} holds {filled} of {result.numel()} elements of {kind} of {name}; "
                "the checkpoint is of another model or incomplete"
            )
        return result


def _verify(files: Files, name: str, receipt: dict[str, int]) -> None:
    """Raise CheckpointError unless a file has the length and checksum of its receipt."""
    path, remedy = files.path / name, f"delete {files.path}, the run then goes on from the checkpoint before it"
    found = files.checksum(name)
    if found is None:
        raise CheckpointError(f"{path} is missing; {remedy}")
    size, checksum = found
    if size != receipt["bytes"]:
        raise CheckpointError(f"{path} has {size} bytes instead of {receipt['bytes']}; {remedy}")
    if checksum != receipt["crc32"]:
        raise CheckpointError(f"{path} is damaged (checksum {checksum}, expected {receipt['crc32']}); {remedy}")


def _stored(files: Files, name: str) -> list[_Stored]:
    """The pieces of a safetensors file: eight bytes, length of the header; the header, JSON; the tensors' bytes."""
    try:
        begin = LENGTH_BYTES + int.from_bytes(files.read(name, 0, LENGTH_BYTES) or b"", "little")
        header = json.loads(files.read(name, LENGTH_BYTES, begin) or b"")
        header.pop("__metadata__", None)
        if any(entry["dtype"] != "F32" for entry in header.values()):
            raise ValueError("it has tensors that are not float32")
        places = {key: entry["data_offsets"] for key, entry in header.items()}
        return [_Stored(PieceKey.parse(key), name, begin + start, begin + end) for key, (start, end) in places.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{files.path / name} is no safetensors file of a checkpoint ({error}); delete {files.path}"
        ) from None
