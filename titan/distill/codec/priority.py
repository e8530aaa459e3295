"""Draws by priority, with random numbers that the reader has too, and what such draws take on the wire.

Every id v of a token has a pseudo-random u(v) in (0, 1). An entry of probability p below the token's threshold t is
drawn if its priority p / u is above t, so with probability p / t, and then stands for t (priority sampling, Duffield,
Lund and Thorup 2007; with t known it is Poisson sampling). Entries of p from t on are no draws: they are the head.

u is made so that it can be read backwards: the upper bits of u are a place, and places are a permutation of the ids
(titan.ops.vocab). So a draw may be sent as its place. As u is below p / t, places are mostly low, and as u is known, so
is a bound of p: what is left, log(p / (t u)), is 1 on average whatever p is. A draw sent by id and probability, which
knows neither, takes half as much again. The price: places do not repeat, so that u of one id tells a little of the
others'. It makes no odds where t is a function of probabilities alone. Where t is the priority of a token's own next
entry, its tail is told up to 1 % too light (3 % for draws of 7 out of 40 ids), so t seldom is that.

- Places go as sets (Elias 1974, Fano 1971): of a token's rising places, one 1 for each place in the first part of them,
  then a 0, and so on. Part 0 has the lowest places, each further part as many as all before. What is left of a place
  follows as it is, in as many bits as its part needs. Tokens without draws take one bit.
- log(p / (t u)) goes in steps, rounded with a dither (titan.distill.codec.codes), as so many 0 and a 1.

Shape letters: B samples, S tokens of a sample, E draws of all tokens in a row.
"""

from dataclasses import dataclass

import numpy as np

from titan.data.sampler import mix64
from titan.distill.codec.bits import BitReader, BitWriter, width_of
from titan.distill.codec.codes import token_words
from titan.errors import LabelError

PARTS = 10
"""Of the places. Part 0 are the lowest 2^-9 of them."""
STEP = 0.6
"""Nats, of log(p / (t u))."""
CENTRE = float(np.log(np.sinh(STEP / 2) / (STEP / 2)))
"""Nats added so that E[1 / p] is right: E[e^-x] = sinh(s / 2) / (s / 2) for x uniform within half a step."""


@dataclass(frozen=True)
class Turns:
    """The numbers u of some tokens, by the formula of titan.ops.vocab: a place of w bits, and 24 bits behind it."""

    a: np.ndarray
    """uint32, odd; all arithmetic is modulo 2^32. [B, S] or [E]"""
    b: np.ndarray
    c: np.ndarray
    """Odd."""
    d: np.ndarray
    width: int
    """w, bits of an id."""

    @classmethod
    def of(cls, step: int, sample_ids_B: np.ndarray, length: int, vocab_size: int) -> "Turns":
        """Of all tokens of some samples: [B, S]."""
        first_BS = token_words(step, sample_ids_B, length, 0)
        halves = [(word & np.uint64(0xFFFFFFFF), word >> np.uint64(32)) for word in (first_BS, mix64(first_BS))]
        (a, b), (c, d) = [(low.astype(np.uint32) | np.uint32(1), high.astype(np.uint32)) for low, high in halves]
        return cls(a, b, c, d, width_of(vocab_size))

    def at(self, tokens_E: np.ndarray) -> "Turns":
        """Of some of the tokens, by their number in the row of all: [E]."""
        a, b, c, d = (x.ravel()[tokens_E] for x in (self.a, self.b, self.c, self.d))
        return Turns(a, b, c, d, self.width)

    def places(self, ids: np.ndarray) -> np.ndarray:
        """int64 [..., M] of ids [..., M]; or [E] of one id each."""
        a, b, c, _ = self._beside(ids)
        x = a * ids.astype(np.uint32) + b & self._mask
        x ^= x >> self._half
        x = c * x & self._mask
        x ^= x >> self._half
        places: np.ndarray = x.astype(np.int64)
        return places

    def ids(self, places_E: np.ndarray) -> np.ndarray:
        """int32: inverse of `places`."""
        x = places_E.astype(np.uint32)
        x ^= x >> self._half  # of at least half of the bits, so it undoes itself
        x = _inverse(self.c) * x & self._mask
        x ^= x >> self._half
        ids_E: np.ndarray = (_inverse(self.a) * (x - self.b) & self._mask).astype(np.int32)
        return ids_E

    def uniform(self, ids: np.ndarray, places: np.ndarray | None = None) -> np.ndarray:
        """float64 u of ids; their places, where they are known already."""
        places = self.places(ids) if places is None else places
        _, _, c, d = self._beside(ids)
        fraction = c * ids.astype(np.uint32) + d >> np.uint32(8)
        numbers: np.ndarray = (places + (fraction + 0.5) * 2.0**-24) * 2.0**-self.width
        return numbers

    def _beside(self, ids: np.ndarray) -> list[np.ndarray]:
        numbers = (self.a, self.b, self.c, self.d)
        return [x if x.ndim == ids.ndim else x[..., None] for x in numbers]

    @property
    def _mask(self) -> np.uint32:
        return np.uint32((1 << self.width) - 1)

    @property
    def _half(self) -> np.uint32:
        return np.uint32((self.width + 1) // 2)


def _inverse(odd: np.ndarray) -> np.ndarray:
    """Modulo 2^32."""
    inverse = odd
    for _ in range(5):  # Newton: each time twice as many bits are right, of the number itself 3
        inverse = inverse * (np.uint32(2) - odd * inverse)
    result: np.ndarray = inverse
    return result


def parts_of(width: int) -> tuple[int, list[int]]:
    """How many parts places of so many bits have, and the bits that are left of a place in each."""
    parts = min(PARTS, width + 1)
    lowest = width - parts + 1
    return parts, [lowest, *range(lowest, width)]


def part_of(places: np.ndarray, width: int) -> np.ndarray:
    """int64: part of each place."""
    parts, _ = parts_of(width)
    lengths = np.frexp(places.astype(np.float64))[1]  # bits of a place, 0 for place 0
    part: np.ndarray = np.maximum(lengths - (width - parts + 1), 0).astype(np.int64)
    return part


def draw_bits(places: np.ndarray, log_ratio: np.ndarray, width: int) -> np.ndarray:
    """float64: what each draw takes, without the zeros of its token's set; rounding of the ratio is left out."""
    _, left = parts_of(width)
    bits: np.ndarray = np.array(left)[part_of(places, width)] + 2.0 + log_ratio / STEP
    return bits


def write_places(places_E: np.ndarray, counts_N: np.ndarray, width: int, writer: BitWriter) -> None:
    """places: of all tokens in a row, rising within each; counts: how many each token has."""
    parts, left = parts_of(width)
    some_N = counts_N > 0
    writer.add(some_N, 1)
    writer.add_array(np.array([len(places_E)]), "<u4")
    set_E, part_E = np.repeat(np.arange(np.count_nonzero(some_N)), counts_N[some_N]), part_of(places_E, width)
    ones = np.zeros(len(places_E) + parts * np.count_nonzero(some_N), np.uint8)
    ones[np.arange(len(places_E)) + set_E * parts + part_E] = 1
    writer.add(ones, 1)
    for part, bits in enumerate(left):
        writer.add(places_E[part_E == part] & ((1 << bits) - 1), bits)


def read_places(tokens: int, width: int, reader: BitReader) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `write_places`: int64 places [E] and counts [N]. Raises LabelError if they are damaged."""
    parts, left = parts_of(width)
    some_N = reader.take(tokens, 1) > 0
    entries, sets = int(reader.take_array((1,), "<u4")[0]), int(np.count_nonzero(some_N))
    ones = np.flatnonzero(reader.take(entries + parts * sets, 1))
    if len(ones) != entries:
        raise LabelError(f"label data is damaged: {entries} draws have {len(ones)} marks")
    set_E, part_E = np.divmod(ones - np.arange(entries), parts)
    if entries and set_E[-1] >= sets:
        raise LabelError(f"label data is damaged: a draw is in set {set_E[-1] + 1} of {sets}")
    places_E = np.zeros(entries, np.int64)
    for part, bits in enumerate(left):
        here_E = part_E == part
        places_E[here_E] = reader.take(int(np.count_nonzero(here_E)), bits) + ((1 << bits) if part else 0)
    counts_N = np.zeros(tokens, np.int64)
    counts_N[some_N] = np.bincount(set_E, minlength=sets)
    return places_E, counts_N


def write_ratios(log_ratio_E: np.ndarray, dither_E: np.ndarray, writer: BitWriter) -> None:
    """log_ratio: log(p / (t u)), at least 0."""
    ends_E = np.cumsum(np.floor(log_ratio_E / STEP + dither_E).astype(np.int64) + 1)
    ones = np.zeros(int(ends_E[-1]) if len(ends_E) else 0, np.uint8)
    ones[ends_E - 1] = 1
    writer.add_array(np.array([len(ones)]), "<u4")
    writer.add(ones, 1)


def read_ratios(dither_E: np.ndarray, reader: BitReader) -> np.ndarray:
    """float64 [E]: inverse of `write_ratios` up to rounding, with E[1 / p] right. Raises LabelError if damaged."""
    ones = np.flatnonzero(reader.take(int(reader.take_array((1,), "<u4")[0]), 1))
    if len(ones) != len(dither_E):
        raise LabelError(f"label data is damaged: {len(dither_E)} draws have {len(ones)} probabilities")
    read_E: np.ndarray = (np.diff(ones, prepend=-1) - 0.5 - dither_E) * STEP + CENTRE
    return read_E
