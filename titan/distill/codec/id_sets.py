"""The ids that each token draws, as a set: without order they take fewer bits (Elias 1974, Fano 1971).

A token's ids are sorted. The upper bits of an id say in which of 16 equal parts of the vocabulary it lies: from the
first part to the last, one 1 for each id there, then a 0. The lower bits follow as they are. So m ids of w bits take
m (w - 3) + 16 bits instead of m w, whatever they are; tokens without ids take one bit.
"""

import numpy as np

from titan.distill.codec.bits import BitReader, BitWriter
from titan.errors import LabelError

UPPER_BITS = 4


def upper_bits(id_bits: int) -> int:
    """Of an id, those that are not written as they are."""
    return min(UPPER_BITS, id_bits)


def set_bits(id_bits: int) -> tuple[int, int]:
    """Bits for each id of a set, and for each set that is not empty."""
    return 1 + id_bits - upper_bits(id_bits), 1 << upper_bits(id_bits)


def write_id_sets(ids_E: np.ndarray, counts_N: np.ndarray, id_bits: int, writer: BitWriter) -> None:
    """ids: of all tokens in a row, rising within each; an id may stand there twice. counts: how many each token has."""
    lower, parts = id_bits - upper_bits(id_bits), 1 << upper_bits(id_bits)
    some_N = counts_N > 0
    writer.add(some_N, 1)
    writer.add_array(np.array([len(ids_E)]), "<u4")
    set_E = np.repeat(np.arange(np.count_nonzero(some_N)), counts_N[some_N])
    ones = np.zeros(len(ids_E) + parts * np.count_nonzero(some_N), np.uint8)
    ones[np.arange(len(ids_E)) + set_E * parts + (ids_E >> lower)] = 1
    writer.add(ones, 1)
    writer.add(ids_E & ((1 << lower) - 1), lower)


def read_id_sets(tokens: int, id_bits: int, reader: BitReader) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `write_id_sets`: int32 ids [E] and int64 counts [N]. Raises LabelError if they are damaged."""
    lower, parts = id_bits - upper_bits(id_bits), 1 << upper_bits(id_bits)
    some_N = reader.take(tokens, 1) > 0
    entries, sets = int(reader.take_array((1,), "<u4")[0]), int(np.count_nonzero(some_N))
    ones = np.flatnonzero(reader.take(entries + parts * sets, 1))
    if len(ones) != entries:
        raise LabelError(f"label data is damaged: {entries} ids have {len(ones)} marks")
    set_E, part_E = np.divmod(ones - np.arange(entries), parts)
    ids_E = (part_E << lower) | reader.take(entries, lower)
    counts_N = np.zeros(tokens, np.int64)
    counts_N[some_N] = np.bincount(set_E, minlength=sets)
    return ids_E.astype(np.int32), counts_N
