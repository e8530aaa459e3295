"""Mistakes in text, corpora and folders, row by row: one line each with its remedy, and nothing is lost."""

import gzip
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.bad_input.places import Place, Row, SetUp, check_row, hold, sets, small_disk, source, spoil


def jsonl(*lines: str) -> SetUp:
    return lambda place: place.write("a.jsonl", "".join(line + "\n" for line in lines))


def broken_parquet(place: Place) -> None:
    pq.write_table(pa.table({"text": [f"row {n} of a table" for n in range(500)]}), place.folder / "a.parquet")
    content = bytearray((place.folder / "a.parquet").read_bytes())
    content[20:200] = bytes(180)
    (place.folder / "a.parquet").write_bytes(content)


def texts(*parts: str) -> SetUp:
    def write(place: Place) -> None:
        for number, part in enumerate(parts):
            place.write(f"few/{number}.txt", part)

    return write


def tokenizes(name: str, changes: tuple[str, ...], says: tuple[str, ...], set_up: SetUp = lambda place: None) -> Row:
    return Row(name, sets(*changes), says, set_up)


DATA = [
    tokenizes("a source that is not there", (source("nowhere"),), ("data.sources: 'nowhere' does not exist",)),
    tokenizes("a pattern that matches nothing", (source("no/*.txt"),), ("'no/*.txt' matches no", "the pattern")),
    tokenizes(
        "a folder without text",
        (source("pictures"),),
        ("'pictures' matches no text", "outright"),
        lambda place: place.write("pictures/a.png", b"\x89PNG"),
    ),
    tokenizes("an empty corpus", (source("few"),), ("the corpus is empty", "add sources"), texts("", "", "")),
    tokenizes("a corpus of one document", (source("few"),), ("has one document", "add sources"), texts("a b c")),
    tokenizes(
        "a binary file",
        (source("a.txt"),),
        ("a.txt is not UTF-8 text; convert or remove it",),
        lambda place: place.write("a.txt", b"abc\0\x01" * 100),
    ),
    tokenizes(
        "a file in another encoding",
        (source("a.txt"),),
        ("a.txt is not UTF-8 text",),
        lambda place: place.write("a.txt", "Stra\u00dfe".encode("latin-1")),
    ),
    tokenizes(
        "a named pipe, which would never end",
        (source("pipe"),),
        ("'pipe' is neither a file nor a folder",),
        lambda place: os.mkfifo(place.folder / "pipe"),
    ),
    tokenizes("a device", (source("/dev/zero"),), ("'/dev/zero' is neither a file nor a folder",)),
    tokenizes(
        "no Parquet at all",
        (source("a.parquet"),),
        ("a.parquet cannot be read as Parquet from row 0", "replace it"),
        lambda place: place.write("a.parquet", b"no parquet"),
    ),
    tokenizes("a broken Parquet", (source("a.parquet"),), ("a.parquet", "replace it"), broken_parquet),
    tokenizes(
        "Parquet without the column",
        (source("a.parquet"),),
        ("has no column 'text'; its columns are body",),
        lambda place: pq.write_table(pa.table({"body": ["x"]}), place.folder / "a.parquet"),
    ),
    tokenizes("a line that is no JSON", (source("a.jsonl"),), ("line 2 is not JSON",), jsonl('{"text":"a"}', "{")),
    tokenizes("a line that is no object", (source("a.jsonl"),), ("line 1 is not a JSON object",), jsonl("[1]")),
    tokenizes("a line without the field", (source("a.jsonl"),), ("no field 'text'; its fields",), jsonl('{"t":1}')),
    tokenizes("a line with null for text", (source("a.jsonl"),), ("'text' is null",), jsonl('{"text":null}')),
    tokenizes(
        "a compressed file cut short",
        (source("a.jsonl.gz"),),
        ("a.jsonl.gz is damaged after line", "replace it"),
        lambda place: place.write("a.jsonl.gz", gzip.compress(os.urandom(100).hex().encode() * 99)[:150]),
    ),
    tokenizes(
        "a corpus shorter than a sequence",
        ("data.sequence_length=1000000",),
        ("data.sequence_length: a sample of 1000000 needs 1000001 tokens", "add text"),
    ),
    tokenizes(
        "a corpus smaller than a batch",
        ("data.batch_size=1000000",),
        ("data.batch_size: 1000000 samples", "add text"),
    ),
    tokenizes(
        "a vocabulary larger than the corpus allows",
        (source("few"), "data.vocab_size=4000"),
        ("data.vocab_size: the corpus holds no 4000 pieces", "the largest size that works is"),
        texts("one two three " * 9, "four five six " * 9, "seven eight " * 9),
    ),
    tokenizes("a vocabulary of ten billion", ("data.vocab_size=10000000000",), ("data.vocab_size:",)),
    tokenizes("a tokenizer that is not there", ("data.tokenizer=no.model",), ("data.tokenizer:", "no.model")),
    tokenizes(
        "a tokenizer that is none",
        ("data.tokenizer=a.model",),
        ("a.model is not a SentencePiece model",),
        lambda place: place.write("a.model", b"x" * 99),
    ),
    tokenizes("a cache below a file", ("data.cache=tiny.toml/x",), ("data.cache: cannot write", "another folder")),
    tokenizes(
        "a cache on a full disk",
        ("data.cache={disk}",),
        ("data.cache: cannot write", "No space left on device", "make room"),
        lambda place: small_disk(place, "disk"),
    ),
    tokenizes("a corrupt shard", (), ("train-00000.arrow is damaged", "delete"), spoil("train-00000.arrow", "flipped")),
    tokenizes("a shard cut short", (), ("heldout-00000", "bytes instead of"), spoil("heldout-00000.arrow", "cut")),
    tokenizes("a shard that is gone", (), ("train-00000.arrow is missing",), spoil("train-00000.arrow", "gone")),
    tokenizes("a damaged index", (), ("index.json is damaged", "delete"), spoil("index.json", "cut")),
    tokenizes("a damaged tokenizer", (), ("tokenizer.model is damaged",), spoil("tokenizer.model", "flipped")),
]


FOLDER = [
    Row(
        "a run folder where corpora are kept",
        sets("run.name=data"),
        ("run.name is 'data'", "choose another run.name or data.cache"),
        exit_code=2,
    ),
    Row("a run folder that is taken", sets("run.name=old"), ("runs/old exists", "titan resume", "--overwrite")),
    Row(
        "a run folder of another config",
        sets("run.name=old", "run.steps=99"),
        ("runs/old exists", "choose another --set run.name"),
    ),
    Row(
        "--overwrite of a folder that is no run",
        sets("run.name=text") + " --overwrite",
        ("runs/text is no run folder", "leaves it alone"),
        lambda place: place.write("runs/text/thesis.md", "years of work"),
    ),
    Row(
        "--overwrite with a corpus that is not there",
        sets("run.name=old", source("nowhere")) + " --overwrite",
        ("'nowhere' does not exist",),
    ),
    Row(
        "--overwrite with a damaged corpus",
        sets("run.name=old") + " --overwrite",
        ("train-00000.arrow is damaged",),
        spoil("train-00000.arrow", "flipped"),
    ),
    Row(
        "--overwrite of a run that is training",
        sets("run.name=old") + " --overwrite",
        ("runs/old is in use by another titan", "titan status"),
        lambda place: hold(place),
    ),
    Row("a run folder below a file", sets("run.dir=tiny.toml/x"), ("cannot write to tiny.toml/x", "Not a directory")),
    Row("a run folder that is a file", sets("run.name=a"), ("runs/a: File exists",), lambda p: p.write("runs/a", "")),
    Row(
        "a run folder on a full disk",
        sets("run.dir={disk}", "data.cache=runs/data"),
        ("cannot write to", "No space left on device", "make room"),
        lambda place: small_disk(place, "disk"),
    ),
    Row(
        "a run folder on a disk that is read-only",
        sets("run.dir={disk}", "data.cache=runs/data"),
        ("cannot write to", "Read-only file system", "choose another run.dir"),
        lambda place: small_disk(place, "disk", "ro"),
    ),
    Row("status of no run", "status runs/no", ("runs/no is not a run folder", "runs in runs: old")),
    Row("a report of no run", "report text", ("text is not a run folder",)),
    Row(
        "a report of a run with a damaged line",
        "report runs/old",
        ("line 1 of runs/old/metrics.jsonl is damaged", "delete that line"),
        lambda place: place.write("runs/old/metrics.jsonl", "{\n"),
    ),
    Row("an export of no run", "export no --out here", ("no",)),
]


ROWS = [*DATA, *FOLDER]


@pytest.mark.parametrize("row", ROWS, ids=[row.name.replace(" ", "-") for row in ROWS])
def test_a_mistake_is_one_line_and_loses_nothing(row: Row, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    check_row(row, place, capsys)
