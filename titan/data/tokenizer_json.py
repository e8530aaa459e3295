"""The tokenizer as files that Hugging Face libraries read, giving the same ids for every text."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan.data.shards import TOKENIZER_FILE
from titan.errors import DataError, PlatformError

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
"""Kinds of pieces in a SentencePiece model; the others are user-defined symbols and unused pieces."""
_UNIGRAM, _BPE = 1, 2

Json = dict[str, Any]


@dataclass(frozen=True)
class HuggingFaceTokenizer:
    """Content of the tokenizer's JSON files by name, and the ids that a model's config must name."""

    files: dict[str, Json]
    end_id: int
    """Ends a document, and so also precedes one: titan trains on documents joined by it."""
    padding_id: int
    """Never in a text: the piece for what is unknown, which byte fallback leaves unused."""


def hugging_face_tokenizer(path: Path, sequence_length: int) -> HuggingFaceTokenizer:
    """Translate a SentencePiece model that `titan.data.tokenizer` accepts.

    Pieces hold real spaces instead of SentencePiece's mark U+2581. So no normaliser is needed, and the mark itself is
    spelled in bytes in a text, as titan does.
    Raises DataError for a model that has no equivalent, PlatformError without the protobuf package.
    """
    model = _read(path)
    pieces = [piece.piece.replace("\u2581", " ") if piece.type == _NORMAL else piece.piece for piece in model.pieces]
    kinds = [piece.type for piece in model.pieces]
    if model.trainer_spec.model_type not in (_UNIGRAM, _BPE) or set(kinds) - {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}:
        raise DataError(
            f"{path} cannot become a Hugging Face tokenizer: only BPE and unigram models without user-defined symbols "
            "can; copy the .model file and use it with SentencePiece"
        )
    special = [number for number, kind in enumerate(kinds) if kind in (_UNKNOWN, _CONTROL)]
    unknown, end = kinds.index(_UNKNOWN), pieces.index(model.trainer_spec.eos_piece)
    normal = {text: piece.score for text, piece in zip(pieces, model.pieces, strict=True) if piece.type == _NORMAL}
    bpe = model.trainer_spec.model_type == _BPE
    algorithm = _bpe(pieces, normal, pieces[unknown]) if bpe else _unigram(pieces, normal, unknown)
    files = {
        "tokenizer.json": _backend(algorithm, [_added_token(number, pieces[number]) for number in special]),
        "tokenizer_config.json": _config(pieces[unknown], pieces[end], sequence_length),
        "special_tokens_map.json": _special_tokens(pieces[unknown], pieces[end]),
    }
    return HuggingFaceTokenizer(files, end, unknown)


def other_tokenizer(folder: Path, path: Path) -> str:
    """Why the token ids of a Hugging Face folder are not those of a SentencePiece model; "" if they are.

    A folder with a `tokenizer.model` has that very file. Without one its `tokenizer.json` has the same pieces and
    merges, and nothing that changes a text before. Pieces beyond ours, which were added, are in no text of a corpus.
    Raises DataError and PlatformError as `hugging_face_tokenizer` does.
    """
    model, backend = folder / TOKENIZER_FILE, folder / "tokenizer.json"
    if model.is_file():
        same = model.read_bytes() == path.read_bytes()
        return "" if same else f"{model} is another tokenizer than that of the corpus"
    try:
        theirs = json.loads(backend.read_bytes())
        own = hugging_face_tokenizer(path, 0).files["tokenizer.json"]
        said, wanted = _translation(theirs), _translation(own)
    except FileNotFoundError:
        return f"{folder} has neither {TOKENIZER_FILE} nor {backend.name}, so nobody knows what its token ids mean"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{backend} is no tokenizer.json"
    different = [name for name in wanted if said[name] != wanted[name]]
    return f"{backend} is another tokenizer than that of the corpus: {', '.join(different)} differ" if different else ""


def _translation(backend: Json) -> dict[str, Any]:
    """All that turns a text into ids. Merges are pairs, or texts with a space where no piece has one."""
    model = backend["model"]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model.get("merges", ())]
    return {
        "model.type": model["type"],
        "model.vocab": model["vocab"],
        "model.merges": merges,
        "model.byte_fallback": model["byte_fallback"],
        "normalizer": backend.get("normalizer"),
        "pre_tokenizer": backend.get("pre_tokenizer"),
    }


def _read(path: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise PlatformError(
            f"translating the tokenizer needs the package protobuf ({error}); pip install 'titan[export]'"
        ) from None
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    return model


def _bpe(pieces: list[str], normal: dict[str, float], unknown: str) -> Json:
    """SentencePiece joins the pair whose union scores highest; a list of merges in that order says the same."""
    ids = {piece: number for number, piece in enumerate(pieces)}
    merges: list[list[str]] = []
    for piece in sorted(normal, key=lambda piece: (-normal[piece], ids[piece])):
        pairs = [[piece[:cut], piece[cut:]] for cut in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in normal and pair[1] in normal]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": ids,
        "merges": merges,
    }


def _unigram(pieces: list[str], normal: dict[str, float], unknown_id: int) -> Json:
    """Byte and special pieces get a score that loses, or a text that spells one, such as `<0x0A>`, would match it.

    It still does if a character of the spelling has no piece: an unknown character scores lower than any piece.
    """
    never = min(normal.values()) - 1000.0
    vocabulary = [[piece, normal.get(piece, never)] for piece in pieces]
    return {"type": "Unigram", "unk_id": unknown_id, "vocab": vocabulary, "byte_fallback": True}


def _backend(algorithm: Json, added_tokens: list[Json]) -> Json:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": algorithm,
    }


def _added_token(number: int, piece: str) -> Json:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": piece, **flags, "special": True}


def _special_tokens(unknown: str, end: str) -> Json:
    return {"bos_token": end, "eos_token": end, "unk_token": unknown, "pad_token": unknown}


def _config(unknown: str, end: str, sequence_length: int) -> Json:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **_special_tokens(unknown, end),
        "split_special_tokens": True,  # `</s>` in an HTML page is text, not the end of a document
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_length,
        "model_input_names": ["input_ids", "attention_mask"],
    }
