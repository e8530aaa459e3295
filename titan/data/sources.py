"""Finds the files that `data.sources` names and streams the documents in them, in an order that never changes."""

import glob
import importlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from titan.data.readers import LARGE_FILE_BYTES, cut_file, is_text, is_text_file, read_jsonl, read_parquet
from titan.errors import DataError

PYTHON_STDLIB = "python-stdlib"
"""The built-in source: standard library of the running Python and the topics of its `help()`."""

# fmt: off
TEXT_SUFFIXES = frozenset((
    ".adoc", ".bash", ".bib", ".c", ".cc", ".cfg", ".cl", ".clj", ".cmake", ".cpp", ".cs", ".css",
    ".cu", ".cuh", ".cxx", ".dart", ".el", ".erl", ".ex", ".f", ".f90", ".go", ".h", ".hh",
    ".hpp", ".hs", ".htm", ".html", ".hxx", ".ini", ".java", ".jl", ".js", ".jsx", ".kt", ".lisp",
    ".lua", ".m", ".md", ".ml", ".mli", ".org", ".php", ".pl", ".pm", ".proto", ".py", ".pyi",
    ".pyx", ".r", ".rb", ".rs", ".rst", ".scala", ".sh", ".sql", ".swift", ".tex", ".text", ".toml",
    ".ts", ".tsx", ".txt", ".v", ".vhd", ".vim", ".xml", ".yaml", ".yml", ".zig",
))
# fmt: on
"""Endings that a folder's plain-text files must have. Data formats such as .json and .csv must be named outright."""

_RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_STDLIB_LEFT_OUT = frozenset({"site-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"})
"""Tests are 19 MB of fixtures, encodings 1.4 MB of code tables; pydoc_data is read as topics instead."""
_WILDCARDS = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Document:
    """One text. Its name is the path of its file, with `#` and the row, piece or topic where a file holds several."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read, and what tells whether it changed."""

    path: str
    size: int
    mtime_ns: int
    kind: str
    """`text`, `jsonl`, `parquet` or `topics`."""
    explicit: bool
    """Named outright in data.sources: then a binary file is a mistake; inside a folder it is left out."""


def list_files(sources: Sequence[str]) -> list[SourceFile]:
    """All files of the sources, each once, sorted by absolute path; the order of the sources does not matter.

    Raises DataError for a source that does not exist or matches nothing.
    """
    found: dict[str, SourceFile] = {}
    for source in sources:
        empty = True
        for file in _files_of(source):
            empty = False
            seen = found.get(file.path)
            if seen is None or (file.explicit and not seen.explicit):
                found[file.path] = file
        if empty:
            raise DataError(f"data.sources: {source!r} matches no text, .jsonl or .parquet file; {_remedy(source)}")
    return [found[path] for path in sorted(found)]


def iter_documents(file: SourceFile, text_field: str) -> Iterator[Document] | None:
    """The documents of one file, or None for a binary file inside a folder.

    Raises DataError, now or while iterating, for a file that cannot be read; it names the row where there is one.
    """
    try:
        documents = _documents_of(file, text_field)
    except OSError as error:
        raise _unreadable(file.path, error) from None
    return None if documents is None else _guarded(file, documents)


def _guarded(file: SourceFile, documents: Iterator[Document]) -> Iterator[Document]:
    try:
        yield from documents
    except OSError as error:
        raise _unreadable(file.path, error) from None


def _unreadable(path: str, error: OSError) -> DataError:
    return DataError(f"data.sources: cannot read {path}: {error.strerror or error}; check it and run again")


def _documents_of(file: SourceFile, text_field: str) -> Iterator[Document] | None:
    if file.kind == "jsonl":
        return _named(file.path, read_jsonl(Path(file.path), text_field))
    if file.kind == "parquet":
        return _named(file.path, read_parquet(Path(file.path), text_field))
    if file.kind == "topics":
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        return _named(file.path, iter(sorted(topics.items())))
    return _text_documents(file)


def _text_documents(file: SourceFile) -> Iterator[Document] | None:
    """A plain-text file: one document, or many when it is large."""
    path = Path(file.path)
    if file.size > LARGE_FILE_BYTES:
        if is_text_file(path):
            pieces = ((str(number), piece) for number, piece in enumerate(cut_file(path)))
            return _named(file.path, pieces)
    else:
        content = path.read_bytes()
        if is_text(content):
            return iter((Document(file.path, content.decode("utf-8")),))
    if file.explicit:
        raise DataError(f"data.sources: {file.path} is not UTF-8 text; convert or remove it")
    return None


def _named(path: str, rows: Iterator[tuple[str, str]]) -> Iterator[Document]:
    return (Document(f"{path}#{row}", text) for row, text in rows)


def _files_of(source: str) -> Iterator[SourceFile]:
    if source == PYTHON_STDLIB:
        yield from _stdlib_files()
    elif os.path.isdir(source):
        yield from _folder_files(os.path.abspath(source))
    elif os.path.exists(source):
        if not os.path.isfile(source):  # reading a pipe or a device might never end
            raise DataError(f"data.sources: {source!r} is neither a file nor a folder; write its content to a file")
        yield _source_file(os.path.abspath(source), explicit=True)
    elif _WILDCARDS & set(source):
        for match in glob.iglob(source, recursive=True):
            if os.path.isfile(match):
                yield _source_file(os.path.abspath(match), explicit=False)
    else:
        raise DataError(f"data.sources: {source!r} does not exist (looked in {os.getcwd()}); correct the path")


def _folder_files(folder: str) -> Iterator[SourceFile]:
    for parent, folders, names in os.walk(folder, onerror=_refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or not _is_taken_from_folders(name):
                continue
            path = os.path.join(parent, name)
            if os.path.isfile(path):  # a dangling link or a socket is not
                yield _source_file(path, explicit=False)


def _refuse_folder(error: OSError) -> None:
    raise _unreadable(str(error.filename), error)


def _stdlib_files() -> Iterator[SourceFile]:
    root = sysconfig.get_paths()["stdlib"]
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_LEFT_OUT]
        for name in names:
            if name.endswith(".py"):
                yield _source_file(os.path.join(parent, name), explicit=False)
    topics = os.path.join(root, "pydoc_data", "topics.py")
    if os.path.isfile(topics):
        yield _source_file(topics, explicit=False, kind="topics")


def _source_file(path: str, explicit: bool, kind: str | None = None) -> SourceFile:
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    return SourceFile(path, status.st_size, status.st_mtime_ns, kind or _kind(path), explicit)


def _kind(path: str) -> str:
    name = path.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


def _is_taken_from_folders(name: str) -> bool:
    name = name.lower()
    return name.endswith(_RECORD_SUFFIXES) or os.path.splitext(name)[1] in TEXT_SUFFIXES


def _remedy(source: str) -> str:
    return "correct the pattern" if _WILDCARDS & set(source) else "name files of other endings outright"
