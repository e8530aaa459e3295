"""The tokenizer restores every text, counts its bytes, and can be rebuilt as a Hugging Face tokenizer."""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from titan.data.sources import iter_documents, list_files
from titan.data.tokenizer import Tokenizer, train_tokenizer
from titan.errors import DataError


def stdlib_texts(every: int = 8) -> list[str]:
    files = list_files(["python-stdlib"])[::every]
    return [document.text for file in files for document in iter_documents(file, "text") or ()]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(stdlib_texts(), 2048))
    return Tokenizer(path)


SPELLINGS = ["\u2581", "<s>", "</s>", "<unk>", "<0x0A>", "\u2585", "\u2047", "\ufffd", "\ufeff", "    ", "\t\t", "\r\n"]
mixed_text = st.lists(st.one_of(st.sampled_from(SPELLINGS), st.text(st.characters(codec="utf-8"))), max_size=8).map(
    "".join
)


@given(mixed_text)
@example("")
@example("\u2581\u2581 \u2581a \u2581")
@example(" \n \x00\x7f\r\u2028\u00a0\u3000e\u0301\U0001f469\u200d\U0001f680 ")
def test_decoding_restores_any_text_and_byte_counts_add_up(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.piece_bytes()[ids].sum() == len(text.encode())
    assert not np.isin(ids, [0, 1, 2]).any()


def test_real_code_round_trips_and_is_three_bytes_a_token(tokenizer: Tokenizer) -> None:
    texts = stdlib_texts(every=20)
    lengths = [(len(tokenizer.encode(text)), len(text.encode())) for text in texts]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)
    tokens, size = map(sum, zip(*lengths, strict=True))
    assert size / tokens > 2.8


def test_special_ids_and_byte_pieces_have_the_bytes_they_decode_to(tokenizer: Tokenizer) -> None:
    lengths = tokenizer.piece_bytes()
    assert (lengths.dtype, lengths.shape) == (np.int32, (tokenizer.vocab_size,))
    assert tokenizer.eod_id == 2
    assert lengths[:3].tolist() == [0, 0, 0]
    assert lengths[3:259].tolist() == [1] * 256
    assert all(
        lengths[number] == len(tokenizer.decode([number]).encode()) for number in range(259, tokenizer.vocab_size)
    )


def test_ids_that_cut_a_character_decode_to_replacement_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001f600")
    assert len(ids) == 4
    assert tokenizer.decode(ids[:2]) == "\ufffd"


def test_our_decode_agrees_with_sentencepiece_where_that_is_lossless(tokenizer: Tokenizer) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    for text in stdlib_texts(every=50):
        ids = tokenizer.encode(text)
        assert processor.decode(ids.tolist()) == tokenizer.decode(ids) == text


def test_training_twice_gives_the_same_bytes() -> None:
    texts = stdlib_texts(every=40)
    assert train_tokenizer(texts, 500) == train_tokenizer(texts, 500)


def test_a_tokenizer_pickles(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("def f(): pass").tolist() == tokenizer.encode("def f(): pass").tolist()


def test_a_vocabulary_that_the_text_cannot_fill_is_refused_with_the_largest_size() -> None:
    text = ["the quick brown fox jumps over the lazy dog\n" * 20]
    with pytest.raises(
        DataError, match=r"data.vocab_size: the corpus holds no 4096 pieces; .* works is (\d+)$"
    ) as caught:
        train_tokenizer(text, 4096)
    largest = int(str(caught.value).split()[-1])
    train_tokenizer(text, largest)
    with pytest.raises(DataError):
        train_tokenizer(text, largest + 1)


def test_texts_of_nothing_are_refused_in_one_line() -> None:
    for texts in ([], [""], ["\n\n"]):
        with pytest.raises(DataError, match=r"^data.vocab_size: [^\n]*$"):
            train_tokenizer(texts, 300)


def test_more_characters_than_pieces_still_leave_room_for_words(tmp_path: Path) -> None:
    draw = random.Random(1)
    words = ["".join(chr(0x4E00 + draw.randrange(3000)) for _ in range(2)) for _ in range(500)]
    text = "".join(draw.choices(words, k=20000))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_tokenizer([text], 600))
    tokenizer = Tokenizer(path)
    assert tokenizer.vocab_size == 600
    assert tokenizer.decode(tokenizer.encode(text)) == text
    pieces = [tokenizer.decode([number]) for number in range(259, 600)]
    assert sum(len(piece) > 1 for piece in pieces) > 100


def test_training_reads_lines_of_any_length() -> None:
    assert train_tokenizer(["ab c" * 100_000 + "\n" + "x y z " * 1000], 270)


def test_a_file_that_is_no_lossless_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.tokenizer: '.*none.model' does not exist"):
        Tokenizer(tmp_path / "none.model")
    path = tmp_path / "bad.model"
    path.write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"data.tokenizer: .*bad.model is not a SentencePiece model"):
        Tokenizer(path)
    prefix = str(tmp_path / "lossy")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(stdlib_texts(every=60)), model_prefix=prefix, vocab_size=500, minloglevel=2
    )
    with pytest.raises(DataError, match=r"data.tokenizer: .*lossy.model does not restore every text; train it with"):
        Tokenizer(Path(f"{prefix}.model"))


def test_training_and_loading_say_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_tokenizer(stdlib_texts(every=60), 500))
    Tokenizer(path).encode("x")
    with pytest.raises(DataError):
        train_tokenizer(["a"], 4096)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_hugging_face_byte_pair_encoding_gives_the_same_ids(tokenizer: Tokenizer) -> None:
    """The recipe that export uses; U+2581 is the one character it cannot tell from a space."""
    tokenizers = pytest.importorskip("tokenizers")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    vocabulary = {processor.id_to_piece(number): number for number in range(tokenizer.vocab_size)}
    pieces = [processor.id_to_piece(number) for number in range(259, tokenizer.vocab_size)]  # by falling score
    known = set(pieces)
    merges = [
        pair
        for piece in pieces
        for pair in sorted(
            ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)) if {piece[:cut], piece[cut:]} <= known),
            key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]),
        )
    ]
    # SentencePiece numbers merged pieces before single characters; a higher score is an earlier merge.
    rebuilt = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=False, byte_fallback=True)
    )
    rebuilt.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    decoders = tokenizers.decoders
    rebuilt.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    draw = random.Random(2)
    noise = [
        "".join(draw.choices([*SPELLINGS[1:], *pieces, " ", "\n"], k=30)).replace("\u2581", " ") for _ in range(2000)
    ]
    for text in stdlib_texts(every=20) + noise:
        ids = rebuilt.encode(text, add_special_tokens=False).ids
        assert ids == tokenizer.encode(text).tolist()
        assert rebuilt.decode(ids, skip_special_tokens=False) == text
