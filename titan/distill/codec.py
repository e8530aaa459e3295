"""Label blocks as bytes: the head of each token's distribution exactly enough, the rest as one bucket.

A log-probability is a multiple of 2^-11 nats in 16 bits: at most 2^-12 nats off, so a probability is at most 0.025 %
off; 32 nats are the floor. Ids take 16 bits where the vocabulary allows, else 32.
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np

from titan.errors import LabelError

MAGIC = b"TLB1"
CODEC_TOP_K = 1
STEPS_PER_NAT = 2048
_HEADER = struct.Struct("<4sHHQIIIHBBQI")  # magic codec flags step first samples length k id_bytes 0 payload crc
HEADER_BYTES = _HEADER.size + 4
_HAS_NORM = 1


@dataclass(frozen=True)
class BlockHeader:
    """What a block holds, readable without its payload."""

    step: int
    first_sample: int
    """Position of the block's first sample in the step's batch."""
    samples: int
    sequence_length: int
    top_k: int
    id_bytes: int
    has_norm: bool
    payload_bytes: int
    payload_crc32: int

    def pack(self) -> bytes:
        """HEADER_BYTES bytes, the last four a checksum of the rest."""
        body = _HEADER.pack(
            MAGIC, CODEC_TOP_K, _HAS_NORM if self.has_norm else 0, self.step, self.first_sample, self.samples,
            self.sequence_length, self.top_k, self.id_bytes, 0, self.payload_bytes, self.payload_crc32,
        )  # fmt: skip
        return body + zlib.crc32(body).to_bytes(4, "little")

    @staticmethod
    def unpack(data: bytes) -> "BlockHeader":
        """Inverse of pack. Raises LabelError if the bytes are no intact header."""
        body, checksum = data[: _HEADER.size], data[_HEADER.size :]
        if len(data) != HEADER_BYTES or zlib.crc32(body).to_bytes(4, "little") != checksum:
            raise LabelError("a label block's header is damaged")
        magic, codec, flags, *fields = _HEADER.unpack(body)
        if magic != MAGIC or codec != CODEC_TOP_K:
            raise LabelError(f"a label block has codec {codec}, this titan reads {CODEC_TOP_K}")
        step, first, samples, length, top_k, id_bytes, _, payload, crc = fields
        return BlockHeader(step, first, samples, length, top_k, id_bytes, bool(flags & _HAS_NORM), payload, crc)


@dataclass(frozen=True)
class LabelBlock:
    """Labels of consecutive samples of one step. B samples of S tokens, K entries a token."""

    step: int
    first_sample: int
    sample_ids_B: np.ndarray
    """int64"""
    tokens_BS1: np.ndarray
    """int32 [B, S + 1]: what the teacher saw, so that a student needs no corpus."""
    ids_BSK: np.ndarray
    """int32, most likely first."""
    log_prob_BSK: np.ndarray
    """float32 at temperature 1."""
    log_norm_BS: np.ndarray | None
    """float32: log of the sum of p^(1/T) at the log's temperature T; None at T = 1."""

    def log_prob_at(self, temperature: float) -> np.ndarray:
        """float32 [B, S, K]: log of the tempered probabilities, exact over the whole vocabulary."""
        if self.log_norm_BS is None:
            assert temperature == 1.0, "a log without norms is a log at temperature 1"
            return self.log_prob_BSK
        tempered: np.ndarray = self.log_prob_BSK / np.float32(temperature) - self.log_norm_BS[..., None]
        return tempered.astype(np.float32)


def encode_block(block: LabelBlock, vocab_size: int) -> bytes:
    """Header and payload."""
    id_type = np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")
    quantised = np.clip(np.rint(-block.log_prob_BSK * STEPS_PER_NAT), 0, 0xFFFF)
    arrays = [
        block.sample_ids_B.astype("<i8"),
        block.tokens_BS1.astype(id_type),
        block.ids_BSK.astype(id_type),
        quantised.astype("<u2"),
    ]
    if block.log_norm_BS is not None:
        arrays.append(block.log_norm_BS.astype("<f4"))
    payload = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    samples, length, top_k = block.ids_BSK.shape
    header = BlockHeader(
        block.step, block.first_sample, samples, length, top_k, id_type.itemsize,
        block.log_norm_BS is not None, len(payload), zlib.crc32(payload),
    )  # fmt: skip
    return header.pack() + payload


def decode_block(header: BlockHeader, payload: bytes) -> LabelBlock:
    """Inverse of `encode_block`, up to the rounding. Raises LabelError if the payload is damaged."""
    if len(payload) != header.payload_bytes or zlib.crc32(payload) != header.payload_crc32:
        raise LabelError(f"the labels of step {header.step}, samples from {header.first_sample}, are damaged")
    samples, length, top_k = header.samples, header.sequence_length, header.top_k
    id_type = f"<u{header.id_bytes}"
    offset = 0

    def take(kind: str, *shape: int) -> np.ndarray:
        nonlocal offset
        array = np.frombuffer(payload, dtype=kind, count=int(np.prod(shape)), offset=offset).reshape(shape)
        offset += array.nbytes
        return array

    sample_ids = take("<i8", samples)
    tokens = take(id_type, samples, length + 1).astype(np.int32)
    ids = take(id_type, samples, length, top_k).astype(np.int32)
    log_prob = take("<u2", samples, length, top_k).astype(np.float32) / np.float32(-STEPS_PER_NAT)
    norm = take("<f4", samples, length) if header.has_norm else None
    return LabelBlock(header.step, header.first_sample, sample_ids, tokens, ids, log_prob, norm)
