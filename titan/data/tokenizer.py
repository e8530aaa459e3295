"""Text to token ids and back, without loss: a SentencePiece BPE model with byte fallback, and how it is trained."""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from titan.errors import DataError

SPACE_MARK = "\u2581"
"""SentencePiece writes this character for a space inside pieces, so it cannot tell it from a space in a text."""

_CHARACTER_COVERAGE = 0.9995
"""Share of a corpus' characters that get a piece; the others are spelled in bytes."""
_LOWEST_COVERAGE = 0.98
_FIXED_PIECES = 259
"""<unk>, <s>, </s> and 256 bytes."""
_CHUNK_CHARACTERS = 1000
"""Training text is fed in chunks of whole lines: 1.4 s for 10 MB, and pieces such as ":\\n" can form."""
_LONGEST_CHUNK = 4000
"""A longer line is cut; SentencePiece counts positions in 16 bits and aborts beyond."""
_PROBE = "  a\n\n\tb\r\n  \u00e9\u4e2d\U0001f600 \x00 <s> "
_NEEDS = "train it with byte_fallback, </s>, identity normalisation, no dummy prefix and no space removal"

Ids = npt.NDArray[np.int32]


class Tokenizer:
    """A SentencePiece model file. Pickles as its path.

    path: the .model file;  vocab_size: its pieces;  eod_id: ends a document (`</s>`)
    Raises DataError where the file is no such model, or one that cannot restore every text.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._processor = _open(self.path)
        self.vocab_size: int = self._processor.get_piece_size()
        self.eod_id: int = self._processor.eos_id()
        if self.eod_id < 0 or self.decode(self.encode(_PROBE)) != _PROBE:
            raise DataError(f"data.tokenizer: {self.path} does not restore every text; {_NEEDS}")

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[Path]]:
        return Tokenizer, (self.path,)

    def encode(self, text: str) -> Ids:
        """Ids of a text, [tokens] int32, without special ids.

        The character U+2581 becomes its three bytes: a piece with it would come back as a space.
        """
        if SPACE_MARK not in text:
            return np.asarray(self._processor.encode(text), np.int32)
        ids: list[int] = []
        for number, part in enumerate(text.split(SPACE_MARK)):
            if number:
                ids.extend(self._space_mark_ids)
            ids.extend(self._processor.encode(part))
        return np.asarray(ids, np.int32)

    def decode(self, ids: Sequence[int] | Ids) -> str:
        """The text of the ids. Special ids are nothing; bytes that are not UTF-8 become U+FFFD."""
        return b"".join([self._bytes_of_id[number] for number in ids]).decode("utf-8", errors="replace")

    def piece_bytes(self) -> Ids:
        """UTF-8 bytes each id decodes to, [vocab_size] int32: 1 for a byte piece, 0 for a special one."""
        return np.asarray([len(text) for text in self._bytes_of_id], np.int32)

    @cached_property
    def _bytes_of_id(self) -> tuple[bytes, ...]:
        return tuple(_bytes_of(self._processor, number) for number in range(self.vocab_size))

    @cached_property
    def _space_mark_ids(self) -> list[int]:
        return [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> bytes:
    """A SentencePiece model of exactly `vocab_size` pieces, trained on the texts; equal texts give equal bytes.

    Raises DataError with the largest size that works when the texts hold too few pieces.
    """
    model = io.BytesIO()
    texts, coverage = _fit_characters(texts, vocab_size)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chunks(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=coverage,
            required_chars=SPACE_MARK,  # or a space in another text would be spelled as the bytes of its mark
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=1 << 24,  # longer chunks would be left out in silence
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(_training_failure(str(error), vocab_size)) from None
    return model.getvalue()


def _open(path: Path) -> sentencepiece.SentencePieceProcessor:
    if not path.is_file():
        raise DataError(f"data.tokenizer: {str(path)!r} does not exist; give a SentencePiece .model file")
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load(str(path))
    except (RuntimeError, OSError):
        raise DataError(f"data.tokenizer: {path} is not a SentencePiece model; give another or leave it out") from None
    return processor


def _bytes_of(processor: sentencepiece.SentencePieceProcessor, number: int) -> bytes:
    piece: str = processor.id_to_piece(number)
    if processor.is_byte(number):
        return bytes([int(piece[3:5], 16)])
    if processor.is_control(number) or processor.is_unknown(number):
        return b""
    return piece.replace(SPACE_MARK, " ").encode()


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """The texts cut before newlines: SentencePiece drops newlines at the end of what it is fed, so they lead."""
    for text in texts:
        start = 0
        while start < len(text):
            end = text.find("\n", start + _CHUNK_CHARACTERS, start + _LONGEST_CHUNK)
            end = min(len(text), start + _LONGEST_CHUNK) if end < 0 else end
            yield text[start:end]
            start = end


def _fit_characters(texts: Sequence[str], vocab_size: int) -> tuple[Sequence[str], float]:
    """Texts and character coverage that leave at least half of the vocabulary to longer pieces.

    A Chinese corpus has more characters than a small vocabulary has room for. SentencePiece takes no coverage below
    0.98; beyond that the rare characters become tabs, which it never puts into a piece.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    kept = counts.most_common(max(1, (vocab_size - _FIXED_PIECES) // 2))
    share = sum(count for _, count in kept) / max(1, counts.total())
    if share >= _LOWEST_COVERAGE or not counts:
        return texts, max(_LOWEST_COVERAGE, min(_CHARACTER_COVERAGE, share))
    rare = dict.fromkeys((ord(character) for character in counts.keys() - dict(kept).keys()), "\t")
    return [text.translate(rare) for text in texts], 1.0


def _training_failure(message: str, vocab_size: int) -> str:
    largest = re.search(r"value <= (\d+)", message)
    if largest:
        return f"data.vocab_size: the corpus holds no {vocab_size} pieces; the largest size that works is {largest[1]}"
    reason = message.strip().splitlines()[-1]
    return f"data.vocab_size: SentencePiece cannot train {vocab_size} pieces: {reason}; lower it or add text"
