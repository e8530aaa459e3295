"""A label block as bytes: a header that says what is in it, and the labels of consecutive samples of one step.

The header has HEADER_BYTES bytes in every version of the format, starts with magic and version and ends with a checksum
of itself, so that a reader tells a damaged block from one that is too new for it.
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np

from titan.distill.codec.bits import BitReader, BitWriter, width_of
from titan.distill.codec.codecs import CODEC_IDS, codec_of, decode_labels, encode_labels
from titan.distill.codec.context import HEAD_BITS, Context
from titan.distill.codec.raw import CodecName, RawLabels
from titan.errors import LabelError

MAGIC = b"TLB2"
OLD_MAGIC = b"TLB1"
"""Of version 1, whose header was another."""
FORMAT_VERSION = 4
OLDEST_VERSION = 3
"""Still read, but for `sampled`, whose draws were others."""
BUDGET_BYTES = 36.0
"""Of a token's label on average, token ids apart: what RS-KD takes for 12 distinct entries (arXiv 2503.16870)."""
_HEADER = struct.Struct("<4sHBBQIIIIIIBBHdQI")
HEADER_BYTES = _HEADER.size + 4
_HAS_ENTROPY, _HAS_WEIGHT = 1, 2


class VersionError(LabelError):
    """A block that is intact, and of a version of the format that this titan does not read."""


@dataclass(frozen=True)
class BlockHeader:
    """What a block holds, readable without its payload."""

    codec: CodecName
    vocab_size: int
    step: int
    """Of the teacher."""
    first_sample: int
    """Position of the block's first sample in the step's batch."""
    samples: int
    sequence_length: int
    temperature: float
    """Of the labels."""
    entries: int
    """Candidates for the head that the teacher gave; for `hidden` the width of the hidden states."""
    draws: int
    """Draws that the teacher gave."""
    head_bits: int
    has_entropy: bool
    has_weight: bool
    """Whether the teacher's output weight is in this block."""
    payload_bytes: int
    payload_crc32: int
    version: int = FORMAT_VERSION

    def pack(self) -> bytes:
        """HEADER_BYTES bytes, the last four a checksum of the rest."""
        flags = self.has_entropy * _HAS_ENTROPY + self.has_weight * _HAS_WEIGHT
        body = _HEADER.pack(
            MAGIC, self.version, CODEC_IDS[self.codec], flags, self.step, self.first_sample, self.samples,
            self.sequence_length, self.vocab_size, self.entries, self.draws, self.head_bits, 0, 0,
            self.temperature, self.payload_bytes, self.payload_crc32,
        )  # fmt: skip
        return body + zlib.crc32(body).to_bytes(4, "little")

    @staticmethod
    def unpack(data: bytes) -> "BlockHeader":
        """Inverse of pack. Raises LabelError for bytes that are no intact header, VersionError for another version."""
        if data[:4] == OLD_MAGIC:
            raise _too_old(1)
        body, checksum = data[: _HEADER.size], data[_HEADER.size :]
        if len(data) != HEADER_BYTES or zlib.crc32(body).to_bytes(4, "little") != checksum or body[:4] != MAGIC:
            raise LabelError("a label block's header is damaged")
        version = int.from_bytes(body[4:6], "little")
        if version > FORMAT_VERSION:
            raise VersionError(
                f"a label block has format version {version}, this titan reads up to {FORMAT_VERSION}; update titan"
            )
        if version < OLDEST_VERSION or (version < FORMAT_VERSION and body[6] == CODEC_IDS["sampled"]):
            raise _too_old(version)
        _, _, codec, flags, step, first, samples, length, vocab, *rest = _HEADER.unpack(body)
        entries, draws, head_bits, _, _, temperature, size, crc = rest
        return BlockHeader(
            codec_of(codec), vocab, step, first, samples, length, temperature, entries, draws, head_bits,
            bool(flags & _HAS_ENTROPY), bool(flags & _HAS_WEIGHT), size, crc, version,
        )  # fmt: skip


@dataclass(frozen=True)
class LabelBlock:
    """Labels of consecutive samples of one step. B samples of S tokens."""

    step: int
    first_sample: int
    sample_ids_B: np.ndarray
    """int64"""
    tokens_BS1: np.ndarray
    """int32 [B, S + 1]: what the teacher saw, so that a student needs no corpus."""
    labels: RawLabels


def encode_block(block: LabelBlock, vocab_size: int, budget_bytes: float | None = None) -> bytes:
    """Header and payload.

    vocab_size:   of the tokenizer: padding of the output layer has no labels
    budget_bytes: mean size of a token's label with the codecs `sampled` and `top_k`, token ids apart, kept by each
                  sample; None sends all that the teacher gave
    """
    raw = block.labels
    samples, length = block.tokens_BS1.shape[0], block.tokens_BS1.shape[1] - 1
    context = Context(
        block.step, block.sample_ids_B, length, vocab_size, _entries(raw), _draws(raw), raw.temperature,
        raw.entropy_BS is not None and raw.codec in ("sampled", "top_k", "random"),
    )  # fmt: skip
    writer = BitWriter()
    writer.add_array(block.sample_ids_B, "<i8")
    writer.add(block.tokens_BS1, context.id_bits)
    encode_labels(raw, context, budget_bytes, writer)
    payload = writer.payload()
    header = BlockHeader(
        raw.codec, vocab_size, block.step, block.first_sample, samples, length, raw.temperature, context.candidates,
        context.draws, HEAD_BITS, context.has_entropy, raw.output_weight_VD is not None, len(payload),
        zlib.crc32(payload),
    )  # fmt: skip
    return header.pack() + payload


def decode_block(header: BlockHeader, payload: bytes) -> LabelBlock:
    """Inverse of `encode_block`, up to the rounding. Raises LabelError if the payload is damaged."""
    damaged = f"the labels of step {header.step}, samples from {header.first_sample}, are damaged"
    if len(payload) != header.payload_bytes or zlib.crc32(payload) != header.payload_crc32:
        raise LabelError(damaged)
    reader = BitReader(payload)
    sample_ids_B = reader.take_array((header.samples,), "<i8").astype(np.int64)
    tokens = reader.take(header.samples * (header.sequence_length + 1), width_of(header.vocab_size))
    context = Context(
        header.step, sample_ids_B, header.sequence_length, header.vocab_size, header.entries, header.draws,
        header.temperature, header.has_entropy, header.head_bits,
    )  # fmt: skip
    labels = decode_labels(header.codec, context, header.has_weight, reader)
    if len(reader.rest):
        raise LabelError(damaged)
    tokens_BS1 = tokens.astype(np.int32).reshape(header.samples, header.sequence_length + 1)
    return LabelBlock(header.step, header.first_sample, sample_ids_B, tokens_BS1, labels)


def _too_old(version: int) -> VersionError:
    return VersionError(f"a label block has format version {version}, which this titan no longer reads; make a new log")


def _entries(raw: RawLabels) -> int:
    array = raw.hidden_BSD if raw.codec == "hidden" else raw.ids_BSK
    return 0 if array is None or raw.codec in ("random", "full") else int(array.shape[-1])


def _draws(raw: RawLabels) -> int:
    array = raw.draw_ids_BSM if raw.codec in ("sampled", "random") else None
    return 0 if array is None else int(array.shape[-1])
