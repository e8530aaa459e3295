"""Features as bytes: a header that says what is in it, and the features of one layer for consecutive samples of a step.

The header has HEADER_BYTES bytes in every version, starts with magic and version and ends with a checksum of itself.
A step's features are blocks one after another, as a replica made them.

Shape letters: B samples, S tokens of a sample, H heads, D width.
"""

import struct
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from titan.config.model import ModelSettings
from titan.errors import LabelError
from titan.model.capture import FeatureName, Features

WireType = Literal["bf16", "fp16"]
MAGIC = b"TLF1"
FORMAT_VERSION = 1
WIRE_TYPES: dict[WireType, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
WIRE_BYTES = 2
_WIRE_CODES: dict[WireType, int] = {"bf16": 1, "fp16": 2}
_NAME_CODES: dict[FeatureName, int] = {"query": 1, "key": 2, "value": 3, "hidden": 4}
_HEADER = struct.Struct("<4sHHQIIIIQI")  # magic version wire, step layer first samples length, payload bytes and crc32
_TENSOR = struct.Struct("<III")  # name heads width; heads 0: hidden states
_TABLE_BYTES = _TENSOR.size * len(_NAME_CODES)
HEADER_BYTES = _HEADER.size + _TABLE_BYTES + 4


@dataclass(frozen=True)
class FeatureLabels:
    """What a teacher's layer handed out for consecutive samples of one step, all heads."""

    step: int
    """Of the teacher."""
    layer: int
    """Of the teacher, counted from 0."""
    first_sample: int
    """Position of the first sample in the step's batch."""
    sample_ids_B: np.ndarray
    """int64"""
    tensors: Features
    """[B, S, H, D], hidden states [B, S, D]; after decoding of the wire's type."""

    @property
    def samples(self) -> int:
        """B."""
        return len(self.sample_ids_B)


def bytes_per_token(model: ModelSettings, names: Collection[FeatureName]) -> int:
    """What the features of a token take: 2 bytes a number, all heads of each name."""
    width = model.hidden // model.heads
    numbers = {
        "query": model.hidden,
        "key": model.num_kv_heads * width,
        "value": model.num_kv_heads * width,
        "hidden": model.hidden,
    }
    return WIRE_BYTES * sum(numbers[name] for name in names)


def step_bytes(blocks: int, samples: int, length: int, token_bytes: int) -> int:
    """Size of a step's features: `samples` samples of `length` tokens, in `blocks` blocks."""
    return blocks * HEADER_BYTES + samples * (8 + length * token_bytes)


def encode_features(labels: FeatureLabels, wire: WireType) -> bytes:
    """Header and payload. Raises LabelError for numbers that fp16 does not have."""
    shapes = [tensor.shape for tensor in labels.tensors.values()]
    assert shapes and all(shape[:2] == shapes[0][:2] for shape in shapes) and shapes[0][0] == labels.samples
    parts = [labels.sample_ids_B.astype("<i8").tobytes()]
    parts += [_encode(tensor, wire, f"{name} of layer {labels.layer}") for name, tensor in labels.tensors.items()]
    payload = b"".join(parts)
    head = _HEADER.pack(
        MAGIC, FORMAT_VERSION, _WIRE_CODES[wire], labels.step, labels.layer, labels.first_sample, labels.samples,
        shapes[0][1], len(payload), zlib.crc32(payload),
    )  # fmt: skip
    for name, tensor in labels.tensors.items():
        head += _TENSOR.pack(_NAME_CODES[name], tensor.shape[2] if tensor.dim() == 4 else 0, tensor.shape[-1])
    head = head.ljust(_HEADER.size + _TABLE_BYTES, b"\0")
    return head + zlib.crc32(head).to_bytes(4, "little") + payload


def decode_step(data: bytes | memoryview) -> list[FeatureLabels]:
    """All blocks of a step, up to the rounding. Raises LabelError for what is damaged or too new."""
    memory, blocks, start = bytearray(data), [], 0
    while start < len(memory):
        block, start = _decode_block(memory, start)
        blocks.append(block)
    return blocks


def join(blocks: Sequence[FeatureLabels], samples: int) -> FeatureLabels | None:
    """Features of samples [0, samples) of a step from blocks in any order; None if they are not all there.

    A sample that is there twice counts once.
    """
    chosen: list[FeatureLabels] = []
    end = 0
    for block in sorted(blocks, key=lambda block: block.first_sample):
        if block.first_sample == end:
            chosen.append(block)
            end += block.samples
    if end != samples or not chosen:
        return None
    first = chosen[0]
    if any((block.step, block.layer, *block.tensors) != (first.step, first.layer, *first.tensors) for block in chosen):
        return None
    ids = np.concatenate([block.sample_ids_B for block in chosen])
    tensors: Features = {name: torch.cat([block.tensors[name] for block in chosen]) for name in first.tensors}
    return FeatureLabels(first.step, first.layer, 0, ids, tensors)


def rows(labels: FeatureLabels, start: int, end: int, device: torch.device) -> Features:
    """Samples [start, end) as a layer hands them out: [S, B, ...], on a device, of the wire's type."""
    return {name: tensor[start:end].to(device).transpose(0, 1) for name, tensor in labels.tensors.items()}


def _encode(tensor: Tensor, wire: WireType, what: str) -> bytes:
    small = tensor.detach().to(WIRE_TYPES[wire]).contiguous().cpu()
    if wire == "fp16" and bool((small.isinf() & ~tensor.detach().isinf().cpu()).any()):
        largest = float(tensor.detach().abs().max())
        raise LabelError(f"{what} has values up to {largest:.3g}, fp16 ends at 65504; send features as bf16")
    return small.view(torch.int16).numpy().tobytes()


def _decode_block(memory: bytearray, start: int) -> tuple[FeatureLabels, int]:
    """A block, and where the next begins. Tensors are views of the memory."""
    head = bytes(memory[start : start + HEADER_BYTES])
    body, checksum = head[:-4], head[-4:]
    if len(head) != HEADER_BYTES or zlib.crc32(body).to_bytes(4, "little") != checksum or body[:4] != MAGIC:
        raise LabelError("a block of features has a damaged header")
    version = int.from_bytes(body[4:6], "little")
    if version > FORMAT_VERSION:
        raise LabelError(
            f"a block of features has format version {version}, this titan reads up to {FORMAT_VERSION}; update titan"
        )
    _, _, code, step, layer, first, samples, length, size, crc = _HEADER.unpack(body[: _HEADER.size])
    begin, end = start + HEADER_BYTES, start + HEADER_BYTES + size
    if end > len(memory) or zlib.crc32(memoryview(memory)[begin:end]) != crc:
        raise LabelError(f"the features of step {step}, samples from {first}, are damaged")
    wire = next(WIRE_TYPES[name] for name, known in _WIRE_CODES.items() if known == code)
    ids = np.frombuffer(memory, "<i8", samples, begin).astype(np.int64)
    begin += 8 * samples
    tensors: Features = {}
    for place in range(_HEADER.size, _HEADER.size + _TABLE_BYTES, _TENSOR.size):
        name_code, heads, width = _TENSOR.unpack_from(body, place)
        if not name_code:
            break
        shape = (samples, length, heads, width) if heads else (samples, length, width)
        count = samples * length * (heads or 1) * width
        name = next(name for name, known in _NAME_CODES.items() if known == name_code)
        tensors[name] = torch.frombuffer(memory, dtype=wire, count=count, offset=begin).view(shape)
        begin += WIRE_BYTES * count
    return FeatureLabels(step, layer, first, ids, tensors), end
