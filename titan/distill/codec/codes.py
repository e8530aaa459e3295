"""Probabilities as small whole numbers, rounded with a subtractive dither.

A code is floor(y + d) for a value y in steps and a pseudo-random d in [0, 1) that the reader knows as well; it reads
code + 1/2 - d. The error is uniform within half a step whatever the value was (Schuchman 1964), so it averages out over
tokens and replays like the noise of a draw does. A constant then takes out what the curve of the scale would leave:

- a head entry: y = p^(1/4). The gradient is linear in p, and E[read] = p.
- a draw (titan.distill.codec.priority): y = log p. The gradient is linear in 1 / p, and E[1 / read] = 1 / p.
"""

from dataclasses import dataclass

import numpy as np

from titan.data.sampler import mix64

GOLDEN = np.float32(0.6180339887)
MASS_FLOOR = np.float32(2.0**-20)
"""The least probability that is left for the class that is not sent."""


def token_words(step: int, sample_ids_B: np.ndarray, length: int, purpose: int) -> np.ndarray:
    """uint64 [B, S], one a token: the same for the same step, sample, position and purpose."""
    with np.errstate(over="ignore"):
        key = mix64(np.array([(step * 8 + purpose) % 2**64], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        sample = mix64(sample_ids_B.astype(np.int64).view(np.uint64) + key)
        stirred = mix64(sample[:, None] + np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return stirred


def token_uniform(step: int, sample_ids_B: np.ndarray, length: int, purpose: int) -> np.ndarray:
    """float32 [B, S] in [0, 1), one a token."""
    words_BS = token_words(step, sample_ids_B, length, purpose)
    return (words_BS >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def dither(token_BS: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """float32 in [0, 1): of the entry in a slot, from its token's number. Neighbouring slots are far apart."""
    spread = token_BS + slots.astype(np.float32) * GOLDEN
    fraction: np.ndarray = np.minimum(spread - np.floor(spread), np.float32(1 - 2.0**-24))
    return fraction


@dataclass(frozen=True)
class HeadScale:
    """Probabilities up to one half on a scale of p^(1/4). Off by at most half a step of p^(1/4)."""

    bits: int

    @property
    def step(self) -> float:
        """Of p^(1/4)."""
        return float(0.5**0.25 / ((1 << self.bits) - 1))

    def bound(self, p: np.ndarray) -> np.ndarray:
        """Largest error of a probability that came through, absolute."""
        middle = p**0.25
        highest: np.ndarray = (middle + self.step / 2) ** 4 - p + self.step**2 / 2 * (middle + self.step) ** 2
        return highest

    def encode(self, p: np.ndarray, dither: np.ndarray) -> np.ndarray:
        """uint32 codes."""
        y = np.sqrt(np.sqrt(np.clip(p, 0.0, 0.5))) * np.float32(1 / self.step)
        codes: np.ndarray = np.minimum((y + dither).astype(np.uint32), np.uint32((1 << self.bits) - 1))
        return codes

    def decode(self, codes: np.ndarray, dither: np.ndarray) -> np.ndarray:
        """float32 probabilities, above zero. For an error e uniform within half a step, E[e^2] = s^2 / 12 and
        E[e^4] = s^4 / 80, so that (u + e)^4 - (s^2 / 2) (u + e)^2 + (7 / 240) s^4 is u^4 on average.
        """
        step = self.step
        square = np.square((codes.astype(np.float32) + (np.float32(0.5) - dither)) * np.float32(step))
        p = square * (square - np.float32(step**2 / 2)) + np.float32(7 / 240 * step**4)
        floored: np.ndarray = np.maximum(p, np.float32(step**4 / 100))
        return floored
