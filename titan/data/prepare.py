"""Turns the sources into a corpus folder: survey the documents, train a tokenizer, write shards, then the index."""

import fcntl
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from titan.config.settings import DataSettings
from titan.data.shards import INDEX_FILE, TOKENIZER_FILE, Shard, write_atomically, write_json
from titan.data.sources import SourceFile, list_files
from titan.data.survey import Survey, survey_documents
from titan.data.tokenize import tokenize_documents
from titan.data.tokenizer import Tokenizer, train_tokenizer
from titan.errors import DataError

FORMAT = 1
"""Grows when the same sources would give other tokens or other files."""

_SURVEY_FILE = "survey.npz"
_REPORT_BYTES = 1 << 20


@dataclass(frozen=True)
class PrepareProgress:
    """How far a phase is: `reading` and `tokenizing` count bytes of text, `tokenizer` bytes of its training text."""

    phase: str
    done: int
    total: int
    unit: str


Report = Callable[[PrepareProgress], None]


def prepare_corpus(settings: DataSettings, cache: Path, report: Report | None = None) -> Path:
    """The folder `cache/<fingerprint>` with the corpus of these settings, made now unless it is there.

    A run that was killed goes on where it stopped: shards that were finished stay. Processes that prepare the same
    corpus at once take turns, and all but the first find it done.
    Raises DataError for sources or a tokenizer that cannot be used, and when the cache cannot be written.
    """
    _refuse_reimport()
    report = report or (lambda progress: None)
    files = list_files(settings.sources)
    fingerprint = _fingerprint(settings, files)
    folder = cache / fingerprint
    if (folder / INDEX_FILE).is_file():
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _turn(folder, report):
            if not (folder / INDEX_FILE).is_file():
                _prepare(settings, files, folder, report)
    except OSError as error:
        raise DataError(
            f"data.cache: cannot write {folder}: {error.strerror or error}; "
            "make room or choose another folder, and run again (finished shards are kept)"
        ) from None
    return folder


def _prepare(settings: DataSettings, files: Sequence[SourceFile], folder: Path, report: Report) -> None:
    for left_behind in folder.glob("*.tmp"):
        left_behind.unlink()
    survey = _survey(settings, files, folder, report)
    tokenizer = Tokenizer(folder / TOKENIZER_FILE)
    advance = _meter("tokenizing", int(survey.lengths[survey.fates > 0].sum()), report)
    shards = tokenize_documents(files, settings, survey, tokenizer, folder, advance)
    if _fingerprint(settings, list_files(settings.sources)) != folder.name:
        raise DataError(f"data.sources: files changed while {folder} was prepared; run again")
    write_json(folder / INDEX_FILE, _index(settings, folder, survey, tokenizer, shards))
    (folder / _SURVEY_FILE).unlink()


def _survey(settings: DataSettings, files: Sequence[SourceFile], folder: Path, report: Report) -> Survey:
    """The survey, with the tokenizer model in the folder before the survey is."""
    path = folder / _SURVEY_FILE
    if path.is_file():
        return Survey.load(path)
    advance = _meter("reading", sum(file.size for file in files), report)
    survey, texts = survey_documents(files, settings.text_field, settings.heldout_fraction, advance)
    if settings.tokenizer is None:
        size = sum(len(text) for text in texts)
        report(PrepareProgress("tokenizer", 0, size, "bytes"))
        model = train_tokenizer(texts, settings.vocab_size)
        report(PrepareProgress("tokenizer", size, size, "bytes"))
    else:
        model = Tokenizer(Path(settings.tokenizer)).path.read_bytes()
    write_atomically(folder / TOKENIZER_FILE, lambda temporary: temporary.write_bytes(model))
    survey.save(path)
    return survey


def _fingerprint(settings: DataSettings, files: Sequence[SourceFile]) -> str:
    """Names what goes into a corpus: settings that change it, and path, size and time of each file."""
    digest = hashlib.sha256(json.dumps([FORMAT, _settings_that_matter(settings)]).encode())
    for file in files:
        digest.update(json.dumps(astuple(file)).encode())
    return digest.hexdigest()[:16]


def _settings_that_matter(settings: DataSettings) -> dict[str, Any]:
    matter = settings.model_dump(include={"text_field", "heldout_fraction", "shard_tokens"})
    if settings.tokenizer is None:
        return matter | {"vocab_size": settings.vocab_size}
    return matter | {"tokenizer": _file_checksum(Path(settings.tokenizer))}


def _index(
    settings: DataSettings, folder: Path, survey: Survey, tokenizer: Tokenizer, shards: dict[str, list[Shard]]
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "fingerprint": folder.name,
        "settings": _settings_that_matter(settings),
        "sources": list(settings.sources),
        "counts": survey.counts(),
        "tokenizer": {
            "sha256": _file_checksum(tokenizer.path),
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
        },
        "shards": {
            split: [asdict(shard) | {"file_bytes": (folder / shard.name).stat().st_size} for shard in shards[split]]
            for split in shards
        },
    }


def _file_checksum(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"data.tokenizer: cannot read {path}: {error.strerror}; give a .model file") from None


def _meter(phase: str, total: int, report: Report) -> Callable[[int], None]:
    """A function of the bytes done that reports at the start, at the end and every megabyte between."""
    reported = -_REPORT_BYTES

    def advance(done: int) -> None:
        nonlocal reported
        if done - reported >= _REPORT_BYTES or done >= total > reported:
            reported = done
            report(PrepareProgress(phase, done, total, "bytes"))

    return advance


def _refuse_reimport() -> None:
    """Raise DataError in a process that is only importing the script that started it.

    The processes that tokenize import the script again. One that calls `prepare_corpus` while it is imported would
    have each of them wait for the lock of the process that waits for them.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise DataError(
            "prepare_corpus is called while the script is imported, and processes that tokenize import it again; "
            "put the call under `if __name__ == '__main__':`, or set data.workers to 1"
        )


@contextmanager
def _turn(folder: Path, report: Report) -> Iterator[None]:
    """Wait until no other process prepares this folder. The kernel frees the lock of a process that dies."""
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(PrepareProgress("waiting for another process that does", 0, 0, "bytes"))
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
