"""What both sides of a label block know besides the labels, and the few numbers that a token has only one of."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from titan.distill.codec.bits import BitReader, BitWriter, width_of
from titan.distill.codec.budget import EntryBits
from titan.distill.codec.codes import HeadScale, token_uniform
from titan.distill.codec.priority import STEP, Turns, parts_of
from titan.distill.codec.raw import RawLabels

HEAD_BITS = 7
ENTROPY_BITS = 6
ENTROPY_LEVELS = (1 << ENTROPY_BITS) - 1
NORM_BITS = 16
NORM_RANGE = 32.0
"""Log-norms lie within +-32 nats: those of T >= 1 are below log(V), of T >= 1/2 above -log(V)."""
DITHER, ENTROPY_DITHER, DRAW_DITHER = 1, 3, 4
"""Purposes of a token's pseudo-random numbers. A draw's error is multiplied with the tail's, so they must not agree."""


@dataclass(frozen=True)
class Context:
    """What both sides know besides the labels."""

    step: int
    sample_ids_B: np.ndarray
    length: int
    vocab_size: int
    candidates: int = 0
    """K of the teacher's label."""
    draws: int = 0
    """M of the teacher's label."""
    temperature: float = 1.0
    has_entropy: bool = False
    head_bits: int = HEAD_BITS

    def uniform(self, purpose: int) -> np.ndarray:
        """float32 [B, S]."""
        return token_uniform(self.step, self.sample_ids_B, self.length, purpose)

    @property
    def id_bits(self) -> int:
        """Bits of a vocabulary id."""
        return width_of(self.vocab_size)

    @property
    def head_scale(self) -> HeadScale:
        """Of the head's probabilities."""
        return HeadScale(self.head_bits)

    @cached_property
    def turns(self) -> Turns:
        """Of all tokens [B, S]: the random numbers that draws are made with."""
        return Turns.of(self.step, self.sample_ids_B, self.length, self.vocab_size)

    @property
    def count_bits(self) -> int:
        """Bits of the number of head entries of a token."""
        return width_of(self.candidates + 1)

    @property
    def usual_draw(self) -> float:
        """About what a draw takes, in bits: log(p / (t u)) is 1 on average, and half of the draws have u < 2^-6."""
        return max(1, self.id_bits - 5) + 2.0 + 1.0 / STEP

    def cost(self, draw: float | np.ndarray) -> EntryBits:
        """Bits of a token's label, without what rounds a field up to whole bytes; a draw takes so many."""
        extras = self.has_entropy * ENTROPY_BITS + (self.temperature != 1.0) * NORM_BITS
        token = self.count_bits + (self.candidates > 0) + extras
        head = self.id_bits + self.head_bits
        if not self.draws:
            return EntryBits(head, 0.0, token)
        return EntryBits(head, draw, token + 2 + 32 / self.length, parts_of(self.id_bits)[0])

    def entropy_codes(self, entropy_BS: np.ndarray) -> np.ndarray:
        """uint32 codes of nats; dithered, so that the mean over many tokens is right."""
        steps = np.clip(entropy_BS / self._entropy_step, 0.0, ENTROPY_LEVELS)
        codes_BS: np.ndarray = np.minimum(steps + self.uniform(ENTROPY_DITHER), ENTROPY_LEVELS).astype(np.uint32)
        return codes_BS

    def entropy_values(self, codes_BS: np.ndarray) -> np.ndarray:
        """float32 nats."""
        centred = codes_BS.astype(np.float32) + (np.float32(0.5) - self.uniform(ENTROPY_DITHER))
        nats_BS: np.ndarray = np.maximum(centred, np.float32(0.0)) * self._entropy_step
        return nats_BS

    @property
    def _entropy_step(self) -> np.float32:
        return np.float32(np.log(max(2, self.vocab_size)) / ENTROPY_LEVELS)


def write_entropy(raw: RawLabels, context: Context, writer: BitWriter) -> None:
    """Half of log(V) / 255 nats is the largest error; the mean over many tokens is right."""
    if context.has_entropy:
        assert raw.entropy_BS is not None
        writer.add(context.entropy_codes(raw.entropy_BS), ENTROPY_BITS)


def read_entropy(context: Context, reader: BitReader) -> np.ndarray | None:
    """float32 [B, S] nats, or None where labels have none."""
    if not context.has_entropy:
        return None
    codes = reader.take(len(context.sample_ids_B) * context.length, ENTROPY_BITS)
    return context.entropy_values(codes.reshape(-1, context.length))


def write_norm(raw: RawLabels, context: Context, writer: BitWriter) -> None:
    """2^-11 nats is the largest error. Only probabilities at temperature 1 feel it: what is sent is at the log's."""
    if context.temperature != 1.0:
        assert raw.log_norm_BS is not None, "labels at a temperature other than 1 come with log_norm"
        levels = (1 << NORM_BITS) - 1
        codes = np.rint((raw.log_norm_BS + NORM_RANGE) * (levels + 1) / (2 * NORM_RANGE))
        writer.add(np.clip(codes, 0, levels).astype(np.uint32), NORM_BITS)


def read_norm(context: Context, reader: BitReader) -> np.ndarray | None:
    """float32 [B, S], or None at temperature 1."""
    if context.temperature == 1.0:
        return None
    codes = reader.take(len(context.sample_ids_B) * context.length, NORM_BITS).astype(np.float32)
    return codes.reshape(-1, context.length) * np.float32(2 * NORM_RANGE / (1 << NORM_BITS)) - np.float32(NORM_RANGE)
