"""The sampler: windows of the stream, each once an epoch, in an order that depends on seed and step alone."""

import json
import pickle

import numpy as np
import pytest

from titan.config.settings import DataSettings
from titan.data.corpus import Corpus
from titan.data.prepare import prepare_corpus
from titan.data.sampler import SampleBatch, Sampler, permute
from titan.errors import DataError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    with (folder / "rows.jsonl").open("w") as stream:
        for number in range(300):
            words = (np.base_repr(number * position % 9973 + 40, 36) for position in range(number % 40 + 5))
            text = " ".join(words).lower()
            stream.write(json.dumps({"text": text}) + "\n")
    settings = DataSettings(
        sources=(str(folder / "rows.jsonl"),), vocab_size=350, heldout_fraction=0.1, shard_tokens=1000, workers=1
    )
    return Corpus.open(prepare_corpus(settings, folder / "cache"))


def epochs(sampler: Sampler, batch_size: int, count: int) -> list[np.ndarray]:
    """Sample ids of whole epochs, in order, cut from as many batches as they need."""
    size = sampler.samples_per_epoch
    ids = np.concatenate([sampler.batch(step).sample_ids for step in range(-(-size * count // batch_size))])
    return [ids[number * size : (number + 1) * size] for number in range(count)]


def same(one: SampleBatch, other: SampleBatch) -> bool:
    return np.array_equal(one.sample_ids, other.sample_ids) and np.array_equal(one.tokens, other.tokens)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4097])
def test_the_order_of_an_epoch_is_a_permutation_of_any_size(size: int) -> None:
    for epoch in range(3):
        order = permute(np.arange(size), size, seed=7, epoch=epoch)
        np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_a_place_in_an_epoch_has_its_window_whether_asked_alone_or_with_others() -> None:
    together = permute(np.arange(1000), 1000, seed=1, epoch=2)
    alone = [int(permute(np.array([place]), 1000, seed=1, epoch=2)[0]) for place in range(1000)]
    assert together.tolist() == alone


def test_a_huge_epoch_needs_no_memory() -> None:
    size = 10**15 + 37
    places = np.array([0, 1, size // 2, size - 1])
    windows = permute(places, size, seed=1, epoch=0)
    assert len(set(windows.tolist())) == 4
    assert (windows >= 0).all() and (windows < size).all()


def test_the_order_looks_random() -> None:
    """Over many seeds each window is as likely at each place, and neighbours are as likely to rise as to fall."""
    size, draws = 8, 4000
    counts = np.zeros((size, size))
    for seed in range(draws):
        counts[np.arange(size), permute(np.arange(size), size, seed, epoch=0)] += 1
    chi_square = ((counts - draws / size) ** 2 / (draws / size)).sum()
    assert chi_square < 85  # 49 degrees of freedom: 99.9 % are below
    order = permute(np.arange(100_000), 100_000, seed=5, epoch=1)
    assert abs((np.diff(order) > 0).mean() - 0.5) < 0.01
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.02


@pytest.mark.parametrize("batch_size", [1, 7, 16])
def test_every_window_comes_once_an_epoch_and_ids_never_repeat(corpus: Corpus, batch_size: int) -> None:
    sampler = Sampler(corpus, 32, batch_size, seed=3)
    size = sampler.samples_per_epoch
    assert size == (corpus.num_tokens("train") - 1) // 32
    orders = epochs(sampler, batch_size, 3)
    for number, ids in enumerate(orders):
        np.testing.assert_array_equal(np.sort(ids), np.arange(number * size, (number + 1) * size))
    assert not np.array_equal(orders[0], orders[1] - size)


def test_a_sample_holds_the_tokens_of_its_window_and_the_first_of_the_next(corpus: Corpus) -> None:
    sampler = Sampler(corpus, 32, 16, seed=3)
    stream = corpus.tokens("train", 0, corpus.num_tokens("train"))
    for step in (0, 1, 500):
        batch = sampler.batch(step)
        assert (batch.sample_ids.dtype, batch.tokens.dtype, batch.tokens.shape) == (np.int64, np.int32, (16, 33))
        for number, tokens in zip(batch.sample_ids, batch.tokens, strict=True):
            start = number % sampler.samples_per_epoch * 32
            np.testing.assert_array_equal(tokens, stream[start : start + 33])


def test_a_step_depends_on_nothing_but_corpus_seed_and_step(corpus: Corpus) -> None:
    forwards = Sampler(corpus, 32, 8, seed=3)
    seen = [forwards.batch(step) for step in range(30)]
    backwards = Sampler(pickle.loads(pickle.dumps(corpus)), 32, 8, seed=3)
    assert all(same(backwards.batch(step), seen[step]) for step in reversed(range(30)))
    assert not same(Sampler(corpus, 32, 8, seed=4).batch(0), seen[0])


def test_the_order_of_samples_does_not_depend_on_the_batch_size(corpus: Corpus) -> None:
    one, other = epochs(Sampler(corpus, 32, 5, seed=3), 5, 2), epochs(Sampler(corpus, 32, 16, seed=3), 16, 2)
    np.testing.assert_array_equal(one, other)


def test_a_batch_straddles_two_epochs(corpus: Corpus) -> None:
    sampler = Sampler(corpus, 32, 16, seed=3)
    size = sampler.samples_per_epoch
    assert size % 16
    ids = sampler.batch(size // 16).sample_ids
    assert (ids < size).sum() == size % 16
    assert ids.max() >= size


def test_held_out_windows_come_in_order_and_always_the_same(corpus: Corpus) -> None:
    sampler = Sampler(corpus, 32, 16, seed=3)
    some, everything = sampler.heldout(3), sampler.heldout(10**9)
    stream = corpus.tokens("heldout", 0, corpus.num_tokens("heldout"))
    assert everything.tokens.shape == ((len(stream) - 1) // 32, 33)
    np.testing.assert_array_equal(everything.tokens[:, :-1].ravel(), stream[: len(everything.tokens) * 32])
    assert same(some, SampleBatch(everything.sample_ids[:3], everything.tokens[:3]))
    assert same(some, Sampler(corpus, 32, 4, seed=99).heldout(3))
    assert sampler.heldout(0).tokens.shape == (0, 33)


def test_no_held_out_document_is_trained_on(corpus: Corpus) -> None:
    def documents(split: str) -> set[bytes]:
        tokens = corpus.tokens(split, 0, corpus.num_tokens(split))  # type: ignore[arg-type]
        return {part.tobytes() for part in np.split(tokens, np.flatnonzero(tokens == corpus.eod_id) + 1) if len(part)}

    assert documents("train") and documents("heldout")
    assert documents("train").isdisjoint(documents("heldout"))


def test_a_corpus_that_is_too_short_is_refused_with_its_counts(corpus: Corpus) -> None:
    train, heldout = corpus.num_tokens("train"), corpus.num_tokens("heldout")
    with pytest.raises(
        DataError, match=rf"data.sequence_length: .* needs {train + 1} tokens, the train split has {train};"
    ):
        Sampler(corpus, train, 1, seed=1)
    with pytest.raises(DataError, match=rf"the heldout split has {heldout}; .* or raise data.heldout_fraction"):
        Sampler(corpus, heldout, 1, seed=1)
    Sampler(corpus, heldout - 1, 1, seed=1)
    windows = (train - 1) // 32
    Sampler(corpus, 32, windows, seed=1).batch(1)
    with pytest.raises(
        DataError, match=rf"data.batch_size: {windows + 1} samples of 32 .* the {windows} that the corpus"
    ):
        Sampler(corpus, 32, windows + 1, seed=1)
