"""Which window of the corpus each sample of each step is: a pure function of corpus, seed and step."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from titan.data.corpus import Corpus
from titan.data.shards import Split
from titan.errors import DataError

_ROUNDS = 8
"""Feistel rounds: four already look random; eight keep that for a handful of windows."""

_U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class SampleBatch:
    """Samples of a step.

    sample_ids: [batch] int64, epoch * samples_per_epoch + window: unique over the run
    tokens:     [batch, sequence_length + 1] int32; position t is read to predict position t + 1
    """

    sample_ids: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]


class Sampler:
    """Draws the batches of a run; keeps no state, so a run resumes from its step alone.

    Window i of the train stream covers tokens [i * S, i * S + S + 1). An epoch visits every window once, in an
    order drawn from (seed, epoch); a batch may straddle two epochs.
    Raises DataError when a split has no window, or the train split fewer than a batch.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, batch_size: int, seed: int) -> None:
        self._corpus, self._length, self._batch_size, self._seed = corpus, sequence_length, batch_size, seed
        self.samples_per_epoch = self._num_windows("train")
        self._num_heldout = self._num_windows("heldout")
        if self.samples_per_epoch < batch_size:
            raise DataError(
                f"data.batch_size: {batch_size} samples of {sequence_length} tokens are more than the "
                f"{self.samples_per_epoch} that the corpus has ({corpus.num_tokens('train')} train tokens); "
                f"add text to data.sources, or lower data.batch_size or data.sequence_length"
            )

    def batch(self, step: int) -> SampleBatch:
        """The samples of a step, counted from 0."""
        positions = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        epochs, places = np.divmod(positions, self.samples_per_epoch)
        windows = np.empty_like(places)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            windows[inside] = permute(places[inside], self.samples_per_epoch, self._seed, int(epoch))
        return SampleBatch(epochs * self.samples_per_epoch + windows, self._windows("train", windows))

    def heldout(self, samples: int) -> SampleBatch:
        """The first held-out windows, at most `samples` of them, in order; ids count from 0 in the held-out stream."""
        windows = np.arange(min(samples, self._num_heldout), dtype=np.int64)
        return SampleBatch(windows, self._windows("heldout", windows))

    def _windows(self, split: Split, windows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        tokens = np.empty((len(windows), self._length + 1), np.int32)
        for row, window in enumerate(windows):
            tokens[row] = self._corpus.tokens(split, int(window) * self._length, self._length + 1)
        return tokens

    def _num_windows(self, split: Split) -> int:
        num_tokens = self._corpus.num_tokens(split)
        windows = (num_tokens - 1) // self._length
        if windows < 1:
            raise DataError(
                f"data.sequence_length: a sample of {self._length} needs {self._length + 1} tokens, the {split} split "
                f"has {num_tokens}; add text to data.sources or lower data.sequence_length"
                + (" or raise data.heldout_fraction" if split == "heldout" else "")
            )
        return windows


def permute(places: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The images of `places` under a permutation of range(size) that (seed, epoch) picks; memory is O(1) in size.

    A Feistel network permutes the next power of four; what lands outside walks on along its cycle until it is inside.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.frombuffer(hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest(), "<u8")
    images = _feistel(places.astype(np.uint64), np.uint64(half), keys)
    while (outside := images >= np.uint64(size)).any():
        images[outside] = _feistel(images[outside], np.uint64(half), keys)
    return images.astype(np.int64)


def _feistel(values: _U64, half: np.uint64, keys: _U64) -> _U64:
    """A permutation of range(4 ** half): each round adds a keyed hash of one half of the bits to the other."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (mix64(right ^ key) & mask)
    return (left << half) | right


def mix64(values: _U64) -> _U64:
    """The finaliser of splitmix64: uint64 to uint64, all bits stirred."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
