"""Bad input, row by row: each mistake is one line with its remedy, never a traceback, and nothing is lost."""

import contextlib
import fcntl
import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.runs import processes_under, titan, weights, write_tiny_config
from titan.checkpoint.folder import encode_manifest, step_folder
from titan.cli.main import main
from titan.config.load import dump_config, load_config
from titan.data.prepare import prepare_corpus
from titan.distill.codec.block import LabelBlock, encode_block
from titan.distill.codec.raw import RawLabels
from titan.distill.log.records import COMMITS, Commit
from titan.distill.log.segment import segment_path
from titan.distill.log.writer import CommitWriter, LabelWriter

STEP = 10
"""Where the run `old`, on which bad commands are tried, was stopped."""


@dataclass
class Place:
    """What a row may change before its command: a folder with tiny.toml, runs/data and the stopped run runs/old."""

    folder: Path
    stack: ExitStack
    patch: pytest.MonkeyPatch
    words: dict[str, str] = field(default_factory=dict)
    """Put into the command where it says {name}."""

    @property
    def old(self) -> Path:
        return self.folder / "runs/old"

    @property
    def corpus(self) -> Path:
        return next(path.parent for path in (self.folder / "runs/data").glob("*/index.json"))

    def write(self, name: str, content: str | bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


SetUp = Callable[[Place], object]


@dataclass(frozen=True)
class Row:
    """A mistake and what becomes of it."""

    name: str
    command: str
    """Words of a command line, separated by blanks."""
    says: tuple[str, ...]
    """All of these are in what is printed as error."""
    set_up: SetUp = lambda place: None
    exit_code: int = 1
    mistakes: int = 1


def sets(*changes: str) -> str:
    return "run tiny.toml " + " ".join(f"--set {change}" for change in changes)


def bad_setting(name: str, change: str, *says: str) -> Row:
    return Row(name, sets(*change.split()), says, exit_code=2)


def bad_stages(name: str, stages: str, *says: str) -> Row:
    """Stages of the student `late`, which has one layer."""
    return bad_setting(name, f"students.late.layout.stages={stages}", *says)


CONFIG = [
    bad_setting("a misspelt setting", "run.stepz=3", "run.stepz is no setting", "did you mean steps?"),
    bad_setting("a setting of another section", "teacher.heads=2", "did you mean teacher.model.heads?"),
    bad_setting("a misspelt setting of a student", "students.early.start.laed=1", "students.early.start.laed", "lead?"),
    bad_setting("text for a number", "run.steps=many", "run.steps is 'many'", "want a whole number"),
    bad_setting("a fraction for a whole number", "data.batch_size=2.5", "data.batch_size is 2.5", "whole number"),
    bad_setting("a number for text", "run.name=5", "run.name is 5", "want text, in quotes"),
    bad_setting("text for a list", "data.sources=abc", "data.sources is 'abc'", "want a list"),
    bad_setting("a list without entries", "data.sources=[]", "data.sources is []", "want at least 1"),
    bad_setting("a number for yes or no", "teacher.model.tied=1", "teacher.model.tied is 1", "true or false"),
    bad_setting("a number that is not finite", "teacher.optimizer.learning_rate=inf", "inf", "want a finite number"),
    bad_setting("a number that is no number", "labels.temperature=nan", "labels.temperature is nan", "finite"),
    bad_setting("no steps", "run.steps=0", "run.steps is 0", "want greater than 0"),
    bad_setting("a word that is no choice", "teacher.precision=fp8", "'fp8'", "'fp32', 'bf16' or 'fp16'"),
    bad_setting("a value for a section", "teacher=3", "teacher is 3", "want a section: [teacher]"),
    bad_setting("one student where a list belongs", "students={}", "begin each student with a line [[students]]"),
    bad_setting("a name that is a path", "run.name=../up", "run.name is '../up'", "use letters, digits"),
    bad_setting("an empty name", "run.name=", "run.name is ''", "use letters, digits"),
    bad_setting("a vocabulary without room for bytes", "data.vocab_size=100", "100", "greater than or equal to 300"),
    bad_setting("heads that do not divide", "students.late.model.hidden=33", "of heads (2), got 33; try 32"),
    bad_setting("an odd width of heads", "teacher.model.hidden=66", "must be even", "got 66 / 2"),
    bad_setting("kv_heads that do not divide", "students.late.model.kv_heads=3", "kv_heads must divide heads (2)"),
    bad_setting("fewer layers than stages", "students.late.layout.pp=2", "late.layout.pp is 2", "more stages than"),
    bad_setting("layers that do not add up", "students.early.layout.layers=[1,2]", "adds up to 3", "model has 2"),
    bad_setting("a list of layers too short", "students.early.layout.layers=[2]", "1 entries, pp is 2", "a stage"),
    bad_setting("tp that does not divide", "teacher.layout.tp=3", "teacher.layout.tp is 3", "at most 2"),
    bad_setting("an optimizer cut in odd parts", "teacher.layout.shard=3", "shard is 3; use 1 or dp (1)"),
    bad_setting(
        "sequence_parallel on a length that does not divide",
        "teacher.layout.sequence_parallel=true data.sequence_length=33",
        "data.sequence_length (33)",
        "use 32",
    ),
    bad_setting("micro_batches that do not divide", "teacher.layout.micro_batches=3", "is 3", "use 2 or 4"),
    bad_setting(
        "micro_batches of a huge batch",
        "data.batch_size=1000000007 teacher.layout.micro_batches=3 students.early.layout.micro_batches=1",
        "use 1 or 1000000007",
    ),
    bad_setting("more replicas than samples", "teacher.layout.dp=16", "dp is 16", "a micro-batch has 8 samples"),
    bad_setting(
        "tp beside stages", "teacher.layout.stages=[{layers=2}]", "layout.tp is 2 beside stages", "leave it out"
    ),
    bad_stages("no stages", "[]", "layout.stages is []", "want at least 1"),
    bad_stages("a stage without layers", "[{layers=0}]", "stages.0.layers", "want greater than 0"),
    bad_stages("a stage that does not say its layers", "[{tp=1}]", "stages.0.layers is missing"),
    bad_stages("stages that leave a gap", "[{layers=1},{layers=1}]", "stages have 2 layers, the model has 1"),
    bad_stages("a share too few", "[{layers=1,dp=2,shares=[3]}]", "stages.0.shares has 1 entries, dp is 2"),
    bad_stages("a share of nothing", "[{layers=1,dp=2,shares=[1,9]}]", "stages.0.shares is [1, 9]", "8 samples"),
    bad_stages("a replica on no island", "[{layers=1,dp=3,islands=[1,1]}]", "stages.0.islands adds up to 2, dp is 3"),
    bad_stages("state shared by islands", "[{layers=1,dp=2,shard=2,islands=[1,1]}]", "stages.0.shard is 2", "use 1"),
    bad_stages("tp of a stage that does not divide", "[{layers=1,tp=3}]", "stages.0.tp is 3", "power of two"),
    bad_stages("chunks that are not listed", "[{layers=[1,1]}]", "stages.0.layers has 2 entries", "chunks is 1"),
    bad_setting(
        "fp16 in one stage only",
        "students.late.model.layers=2 students.late.layout.stages=[{layers=1,precision='fp16'},{layers=1}]",
        "late.layout.stages mix fp16 with fp32",
    ),
    bad_setting(
        "more chunks than layers",
        "students.early.layout.chunks=2 students.early.layout.schedule=interleaved",
        "2 x 2, more than",
        "fewer chunks",
    ),
    bad_setting(
        "an interleaved schedule of one chunk", "students.early.layout.schedule=interleaved", "1 chunks", "use '1f1b'"
    ),
    bad_setting(
        "micro_batches that do not go round",
        "teacher.model.layers=4 teacher.layout.pp=2 teacher.layout.schedule=interleaved teacher.layout.chunks=2 "
        "teacher.layout.micro_batches=1",
        "micro_batches is 1; the interleaved schedule wants a multiple of the stages (2), use 2",
    ),
    bad_setting("two students of one name", "students.early.name=late", "'late' is used 2 times"),
    bad_setting("a student named teacher", "students.late.name=teacher", "taken by the teacher", "choose another"),
    bad_setting("a start by step and by lead", "students.late.start.step=3", "step (3) and lead", "keep one"),
    bad_setting("a start beyond the end", "students.early.start.step=40", "start.step is 40, run.steps is 40"),
    bad_setting(
        "a loss of shares that are not the teacher's",
        "labels.codec=random students.late.distill.loss=mse",
        "distill.loss is 'mse'",
        "'forward_kl'",
    ),
    bad_setting("draws that nobody makes", "labels.codec=top_k labels.draws=3", "labels.draws is set", "leave it out"),
    bad_setting(
        "a loss that draws bias", "students.late.distill.loss=jsd", "students.late.distill.loss is 'jsd'", "top_k"
    ),
    bad_setting("labels larger than the vocabulary", "labels.top_k=600", "top_k is 600", "vocab_size (512)"),
    bad_setting(
        "a final rate without a schedule",
        "teacher.optimizer.schedule=constant teacher.optimizer.final_fraction=0.5",
        "final_fraction is 0.5, but schedule is 'constant'; leave it out",
    ),
    bad_setting("an address that is none", "cluster.address=somewhere", "'somewhere'", "want host:port"),
    bad_setting("an address with an impossible port", "cluster.address=a:99999", "'a:99999'", "want host:port"),
    bad_setting(
        "a dashboard for a cluster that is joined",
        "cluster.address=a:6379 cluster.dashboard_port=8265",
        "dashboard_port is 8265",
        "leave it out",
    ),
    bad_setting("an impossible port", "cluster.dashboard_port=70000", "70000", "less than or equal to 65535"),
    bad_setting("a path with a NUL", 'run.dir="a\\u0000b"', "run.dir is 'a\\x00b'", "no NUL"),
    bad_setting("bytes that are no text", "run.name=a\udcff", "no Unicode text"),
    bad_setting("--set without a value", "run.steps", "--set run.steps: want a.b=value"),
    bad_setting("--set without a name", "=3", "--set =3: want a.b=value"),
    bad_setting("--set with an empty part", "run..steps=3", "want a.b=value"),
    bad_setting("--set into a value", "run.name.x=3", "'name' is a value, not a section"),
    bad_setting("--set of a student that is not there", "students.nobody.model.layers=3", "there are early, late"),
    bad_setting("--set of no particular student", "students.model=3", "say which one"),
    Row(
        "several mistakes at once",
        sets("run.stepz=1", "run.steps=few", "teacher.layout.tp=two", "students.late.model.width=3"),
        ("run.stepz", "run.steps is 'few'", "teacher.layout.tp is 'two'", "students.late.model.width"),
        exit_code=2,
        mistakes=4,
    ),
    Row(
        "several contradictions at once",
        sets("teacher.layout.tp=4", "students.late.layout.pp=4", "students.early.start.step=99"),
        ("teacher.layout.tp is 4", "students.late.layout.pp is 4", "students.early.start.step is 99"),
        exit_code=2,
        mistakes=3,
    ),
    Row("several bad --set at once", sets("a", "b"), ("--set a:", "--set b:"), exit_code=2, mistakes=2),
    Row(
        "a setting left out",
        "run tiny.toml",
        ("run.steps is missing and has no default; add it",),
        lambda place: rewrite(place.folder / "tiny.toml", "steps = 40\n", ""),
        exit_code=2,
    ),
    Row("no TOML", "run a.toml", ("a.toml is no TOML", "line 2"), lambda p: p.write("a.toml", "[run]\n= 3\n"), 2),
    Row(
        "a list a thousand deep",
        "run a.toml",
        ("a.toml is no TOML",),
        lambda place: place.write("a.toml", "a = " + "[" * 5000 + "]" * 5000),
        2,
    ),
    Row(
        "a number of 5000 digits",
        "run a.toml",
        ("a.toml is no TOML",),
        lambda place: place.write("a.toml", "a = " + "9" * 5000),
        2,
    ),
    Row("a binary file for a config", "run a", ("no UTF-8", "give the path"), lambda p: p.write("a", b"\xff\xfe\0"), 2),
    Row("a config that is not there", "run no.toml", ("cannot read no.toml", "give the path"), exit_code=2),
    Row("a folder for a config", "plan runs", ("cannot read runs", "Is a directory"), exit_code=2),
    Row("an unknown option", "run tiny.toml --fast", ("No such option: --fast", "--help"), exit_code=2),
    Row("an unknown command", "train tiny.toml", ("No such command 'train'", "--help"), exit_code=2),
    Row("a command without its file", "run", ("Missing argument 'RUN.toml'", "--help"), exit_code=2),
    Row(
        "ranks that are not there",
        sets("teacher.layout.dp=64", "data.batch_size=64"),
        ("layouts need 131 ranks", "there is room for", "use smaller layouts"),
        exit_code=2,
    ),
]


def take_port(place: Place) -> None:
    """A socket that listens and never says a word."""
    taken = place.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    place.words["port"] = str(taken.getsockname()[1])
    place.patch.setattr("titan.cluster.preflight.CONNECT_TIMEOUT_S", 0.2)


CLUSTER = [
    Row(
        "a dashboard port that is taken",
        sets("cluster.dashboard_port={port}"),
        ("cluster.dashboard_port is", "Address already in use", "choose another"),
        take_port,
    ),
    Row(
        "an address where nobody listens",
        sets("cluster.address=127.0.0.1:9"),
        ("cluster.address is 127.0.0.1:9", "Connection refused", "ray start --head"),
    ),
    Row(
        "an address of something that is no Ray",
        sets("cluster.address=127.0.0.1:{port}"),
        ("cluster.address is 127.0.0.1:", "no answer within", "leave it out for a local Ray"),
        take_port,
    ),
    Row(
        "a device that is not there",
        sets("cluster.device=cuda"),
        ("cluster.device is 'cuda'", "set cluster.device to 'auto' or 'cpu'"),
        lambda place: place.patch.setattr("titan.cluster.session._may_have_accelerator", lambda: False),
    ),
]


def source(*sources: str) -> str:
    return f"data.sources={json.dumps(list(sources), separators=(',', ':'))}"


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


def spoil(name: str, how: str) -> SetUp:
    """Damage a file of the prepared corpus."""

    def change(place: Place) -> None:
        damage(place.corpus / name, how)

    return change


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


def checkpoint_of(place: Place, role: str = "teacher") -> Path:
    return step_folder(place.old / "checkpoints" / role, STEP)


def labels_of(place: Place) -> Path:
    return place.old / "labels/teacher"


def other_model(place: Place) -> None:
    shutil.rmtree(checkpoint_of(place))
    shutil.copytree(checkpoint_of(place, "late"), checkpoint_of(place))


def other_sources(place: Place) -> None:
    """The corpus is gone, and what the sources give now has another name."""
    rewrite(place.old / "events.jsonl", place.corpus.name, "0123456789abcdef")


def cut_log(place: Place) -> None:
    lines = (labels_of(place) / COMMITS).read_bytes().splitlines(keepends=True)
    (labels_of(place) / COMMITS).write_bytes(b"".join(lines[:4]))


def resumes(name: str, says: tuple[str, ...], set_up: SetUp = lambda place: None, more: str = "") -> Row:
    return Row(f"resuming {name}", f"resume runs/old {more}", says, set_up)


RESUME = [
    Row("resuming what is not there", "resume runs/no", ("runs/no is no run folder", "give the folder")),
    Row("resuming a folder that is no run", "resume runs/data", ("runs/data is no run folder", "config.toml")),
    resumes(
        "with a damaged config",
        ("config.toml is not what titan wrote", "restore it"),
        lambda place: place.write("runs/old/config.toml", "[run]\nname = "),
    ),
    Row(
        "resuming with changes that may not be",
        "resume runs/old --set run.steps=99 --set teacher.model.hidden=32 --set data.batch_size=16",
        (
            "run.steps cannot change when a run is resumed",
            "teacher.model.hidden cannot change",
            "data.batch_size cannot change",
            "start a new run",
        ),
        exit_code=2,
        mistakes=3,
    ),
    resumes("a run that is training", ("in use by another titan",), lambda place: hold(place)),
    resumes(
        "where a rank's file was cut short",
        ("rank-00000.safetensors has", "bytes instead of", "the checkpoint before it"),
        lambda place: damage(checkpoint_of(place) / "rank-00000.safetensors", "cut"),
    ),
    resumes(
        "where a rank's file is gone",
        ("rank-00000.safetensors is missing", "the checkpoint before it"),
        lambda place: damage(checkpoint_of(place, "late") / "rank-00000.safetensors", "gone"),
    ),
    resumes(
        "from a damaged manifest",
        ("manifest.json is damaged", "the checkpoint before it"),
        lambda place: damage(checkpoint_of(place) / "manifest.json", "cut"),
    ),
    resumes("from a checkpoint of another model", ("is of another model", "hidden 32 there, 64"), other_model),
    resumes(
        "with a damaged label record",
        ("commits.jsonl is damaged at byte", "restore it"),
        lambda place: damage(labels_of(place) / COMMITS, "flipped"),
    ),
    resumes("with a label log cut short", ("ends at step 4", f"of step {STEP}", "restore it"), cut_log),
    resumes(
        "without the label log",
        ("ends at step 0", "restore it"),
        lambda place: (labels_of(place) / COMMITS).unlink(),
    ),
    resumes(
        "with labels that are gone",
        ("part-000", "restore the part files"),
        lambda place: segment_path(labels_of(place), 0, 1).unlink(),
    ),
    resumes(
        "with labels that are damaged",
        ("part-000/0000000001.segment (intact up to byte 0)", "restore the part files"),
        lambda place: damage(segment_path(labels_of(place), 0, 1), "flipped", 10),
    ),
    resumes("on a corrupt shard", ("train-00000.arrow is damaged", "delete"), spoil("train-00000.arrow", "flipped")),
    resumes("on other sources", ("the run began with corpus", "put the folder or the sources back"), other_sources),
    resumes(
        "with damaged metrics",
        ("line 1 of runs/old/metrics.jsonl is damaged",),
        lambda place: place.write("runs/old/metrics.jsonl", "{\n"),
    ),
]

ROWS = [*CONFIG, *CLUSTER, *DATA, *FOLDER, *RESUME]


# --- what rows are set up with ---


def rewrite(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def damage(path: Path, how: str, at: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[at if at is not None else len(content) // 2] ^= 1
        path.write_bytes(content)


def hold(place: Place) -> None:
    """What another driver does that trains in runs/old."""
    handle = os.open(place.old, os.O_RDONLY)
    place.stack.callback(os.close, handle)
    fcntl.flock(handle, fcntl.LOCK_EX)


def small_disk(place: Place, word: str, option: str = "size=64k") -> None:
    """A full or read-only file system, or, where mounting is not permitted, calls that fail as on one."""
    folder = place.folder / "disk"
    folder.mkdir()
    place.words[word] = str(folder)
    error = OSError(30, "Read-only file system") if option == "ro" else OSError(28, "No space left on device")
    if mount(place.stack, folder, option):
        with contextlib.suppress(OSError), (folder / "full").open("wb", buffering=0) as file:
            while option != "ro":
                file.write(bytes(4096))
        return

    def fail(*_: object, **__: object) -> None:
        raise error

    place.patch.setattr(Path, "mkdir", fail) if option == "ro" else place.patch.setattr(os, "fsync", fail)


def mount(stack: ExitStack, folder: Path, option: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", option, "titan-test", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
    if done:
        stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
    return done


def content_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.toml, its corpus, and runs/old as it would be after STEP steps, but for numbers in the checkpoints."""
    folder = tmp_path_factory.mktemp("bad")
    config = load_config(write_tiny_config(folder), ["run.name=old"])
    corpus = prepare_corpus(config.data, folder / "runs/data")
    old = folder / "runs/old"
    for role, model in [("teacher", config.teacher.model), *((s.name, s.model) for s in config.students)]:
        checkpoint = step_folder(old / "checkpoints" / role, STEP)
        checkpoint.mkdir(parents=True)
        (checkpoint / "rank-00000.safetensors").write_bytes(bytes(1000))
        files = {"rank-00000.safetensors": {"bytes": 1000, "crc32": 0}}
        manifest = {"step": STEP, "model": model.model_dump(), "vocab_size": 512, "files": files}
        (checkpoint / "manifest.json").write_bytes(encode_manifest(manifest))
    write_labels(old / "labels/teacher")
    (old / "config.toml").write_text(dump_config(config))
    events = [
        {"event": "run_started", "pid": 1, "host": "elsewhere"},
        {"event": "data_ready", "corpus": f"runs/data/{corpus.name}"},
        {"event": "run_finished", "status": "stopped"},
    ]
    (old / "events.jsonl").write_text("".join(json.dumps({"time": "", **event}) + "\n" for event in events))
    return folder


def write_labels(folder: Path) -> None:
    folder.mkdir(parents=True)
    labels, commits = LabelWriter(folder, 0, 0), CommitWriter(folder, 0)
    ids = np.tile(np.arange(4, dtype=np.int32), (8, 32, 1))
    raw = RawLabels("top_k", ids_BSK=ids, log_prob_BSK=np.full(ids.shape, np.log(0.2), np.float32))
    for step in range(1, STEP + 1):
        block = LabelBlock(step, 0, np.arange(8), np.zeros((8, 33), np.int32), raw)
        labels.append(step, encode_block(block, 512))
        commits.commit(Commit(step, (0,), 8, 5.0))
    commits.end("stopped")


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    folder = tmp_path / "here"
    shutil.copytree(original, folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("TITAN_CACHE", raising=False)

    def started(*_: object) -> None:
        raise AssertionError("Ray was to be started")

    monkeypatch.setattr("titan.cluster.launch.ray_session", started)
    with ExitStack() as stack:
        yield Place(folder, stack, monkeypatch)


@pytest.mark.parametrize("row", ROWS, ids=[row.name.replace(" ", "-") for row in ROWS])
def test_a_mistake_is_one_line_and_loses_nothing(
    row: Row, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row.set_up(place)
    before = content_of(place.folder)
    command = row.command
    for name, word in place.words.items():
        command = command.replace(f"{{{name}}}", word)
    monkeypatch.setattr(sys, "argv", ["titan", *command.split()])
    begin = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        main()
    assert time.monotonic() - begin < 10.0
    out, err = capsys.readouterr()
    assert ended.value.code == row.exit_code, err
    assert "Traceback" not in out + err
    assert len(err.splitlines()) == row.mistakes, err
    assert all(line.startswith("titan: ") for line in err.splitlines()), err
    assert not [words for words in row.says if words not in err], err
    after = content_of(place.folder)
    assert not [path for path, content in before.items() if after.get(path) != content]


def test_the_table_is_as_long_as_was_promised_and_its_names_differ() -> None:
    assert len(ROWS) >= 40
    assert len({row.name for row in ROWS}) == len(ROWS)


# --- what is not a row: no mistake, or more than one command ---


def run_main(monkeypatch: pytest.MonkeyPatch, command: str) -> object:
    monkeypatch.setattr(sys, "argv", ["titan", *command.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_a_run_that_could_not_start_leaves_no_folder_in_the_way_of_the_next(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_main(monkeypatch, sets(source("nowhere"))) == 1
    assert not (place.folder / "runs/tiny").exists()
    small_disk(place, "disk")
    assert run_main(monkeypatch, sets(f"run.dir={place.folder}/disk", "data.cache=runs/data")) == 1
    assert not (place.folder / "disk/tiny").exists()


def test_resuming_a_finished_run_says_so_and_starts_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for role in ("teacher", "early", "late"):
        checkpoint_of(place, role).rename(step_folder(place.old / "checkpoints" / role, 40))
    place.write("runs/old/summary.json", json.dumps({"status": "finished"}))
    before = content_of(place.folder)
    assert run_main(monkeypatch, "resume runs/old") in (0, None)
    out, err = capsys.readouterr()
    assert "runs/old is finished, step 40 of 40: nothing is left to do" in out and not err
    assert content_of(place.folder) == before


def test_a_resumed_run_needs_no_sources_while_its_corpus_is_there(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(place.old / "config.toml", "/text", "/gone")
    with pytest.raises(AssertionError, match="Ray was to be started"):
        run_main(monkeypatch, "resume runs/old")
    events = [json.loads(line) for line in (place.old / "events.jsonl").read_text().splitlines()]
    assert {event["corpus"] for event in events if event["event"] == "data_ready"} == {f"runs/data/{place.corpus.name}"}


def test_a_run_that_fails_leaves_a_summary_and_a_report_that_say_so(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match="Ray was to be started"):
        run_main(monkeypatch, "run tiny.toml")
    run = place.folder / "runs/tiny"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["roles"]) == ("failed", {})
    assert "This run is not finished (failed)" in (run / "report.html").read_text()
    assert run_main(monkeypatch, "status runs/tiny") in (0, None)


def test_a_script_without_a_main_guard_is_told_so_instead_of_hanging(place: Place) -> None:
    place.write(
        "script.py",
        "from pathlib import Path\nimport titan.data.tokenize\nfrom titan.config.load import load_config\n"
        "from titan.data.prepare import prepare_corpus\ntitan.data.tokenize._PROCESS_BYTES = 1\n"
        "config = load_config(Path('tiny.toml'), ['data.workers=2', 'data.vocab_size=600'])\n"
        "prepare_corpus(config.data, Path('cache'))\n",
    )
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "DataError: prepare_corpus is called while the script is imported" in done.stderr
    assert "put the call under `if __name__ == '__main__':`" in done.stderr


def test_a_plan_shows_every_stage_and_starts_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content_of(place.folder)
    assert run_main(monkeypatch, "plan tiny.toml") in (0, None)
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert [
        "teacher",
        "0",
        "embedding",
        "+",
        "0-1",
        "+",
        "head",
        "2",
        "1",
        "0-1",
        "74,048",
        os.uname().nodename,
    ] in rows
    assert ["1", "1", "+", "head", "1", "1", "1", "26,720", os.uname().nodename] in rows
    assert not err
    assert run_main(monkeypatch, "plan tiny.toml --json") in (0, None)
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_ranks"] == 5 and list(plan["roles"]) == ["teacher", "early", "late"]
    assert content_of(place.folder) == before


# --- the real thing ---

ROLES = ("teacher", "late")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small.toml, one rank a role, and its finished run runs/small."""
    folder = tmp_path_factory.mktemp("real")
    text = write_tiny_config(folder).read_text().replace("{ tp = 2 }", "{ tp = 1 }").replace("steps = 40", "steps = 30")
    head, early, late = text.split("[[students]]")
    late = late.replace("lead = 0.05", "step = 2")
    assert "early" in early
    (folder / "small.toml").write_text("[[students]]".join((head, late)).replace('"tiny"', '"small"'))
    result = titan("run", "small.toml", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def only_line(result: subprocess.CompletedProcess[str]) -> str:
    """What a command that failed said, of which Ray's own remarks are no part."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("titan: "))
    return line


def back_to(workplace: Path, name: str, step: int) -> Path:
    """A copy of the finished run as if it had been killed soon after a checkpoint."""
    run = workplace / "runs" / name
    shutil.copytree(workplace / "runs/small", run)
    for role in ROLES:
        shutil.rmtree(step_folder(run / "checkpoints" / role, 30))
    assert step == 20
    (run / "summary.json").unlink()
    return run


@pytest.fixture(scope="module")
def flipped(workplace: Path) -> Path:
    """Killed at step 20 with all that a kill leaves behind, and a bit of the teacher's checkpoint flipped since."""
    run = back_to(workplace, "flipped", 20)
    damage(next(step_folder(run / "checkpoints/teacher", 20).glob("*.safetensors")), "flipped")
    (run / "checkpoints/late/step-00000030.partial").mkdir()
    (run / "checkpoints/late/step-00000030.partial/rank-00000.json").write_text("{")
    for name in (
        "metrics.jsonl",
        "events.jsonl",
        f"labels/teacher/{COMMITS}",
        "labels/teacher/part-000/0000000001.segment",
    ):
        with (run / name).open("ab") as file:
            file.write(b'{"torn')
    return run


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_flipped_bit_in_a_checkpoint_is_one_line_with_a_remedy(flipped: Path, workplace: Path) -> None:
    checkpoints = content_of(flipped / "checkpoints/teacher") | content_of(flipped / "checkpoints/late/step-00000020")
    line = only_line(titan("resume", "runs/flipped", cwd=workplace))
    assert "teacher rank 0 on" in line and "is damaged (checksum" in line and "the checkpoint before it" in line
    assert {path: path.read_bytes() for path in checkpoints} == checkpoints
    assert json.loads((flipped / "summary.json").read_text())["status"] == "failed"
    assert (flipped / "report.html").is_file()
    assert processes_under(workplace) == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_its_remedy_leads_to_the_same_bits_whatever_the_kill_left_behind(flipped: Path, workplace: Path) -> None:
    if step_folder(flipped / "checkpoints/teacher", 20).exists():
        shutil.rmtree(step_folder(flipped / "checkpoints/teacher", 20))
    result = titan("resume", "runs/flipped", cwd=workplace)
    assert result.returncode == 0, result.stderr
    for role in ROLES:
        expected, found = weights(workplace / "runs/small", role, 30), weights(flipped, role, 30)
        assert all((expected[key] == found[key]).all() for key in expected), role
    assert json.loads((flipped / "summary.json").read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_flipped_bit_in_the_labels_is_one_line_and_no_label_is_lost(workplace: Path) -> None:
    run = back_to(workplace, "mislabelled", 20)
    shutil.rmtree(run / "checkpoints/late")
    path = segment_path(run / "labels/teacher", 0, 1)
    damage(path, "flipped", path.stat().st_size * 3 // 10 + 500)
    labels = path.read_bytes()
    line = only_line(titan("resume", "runs/mislabelled", cwd=workplace))
    assert "late rank 0 on" in line and "the labels of step" in line and "restore the file" in line
    assert path.read_bytes()[: len(labels)] == labels
    assert processes_under(workplace) == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_disk_that_fills_while_training_is_one_line_and_the_run_goes_on_when_there_is_room(workplace: Path) -> None:
    disk = workplace / "disk"
    disk.mkdir()
    with ExitStack() as stack:
        if not mount(stack, disk, "size=1m"):
            pytest.skip("this machine permits no mounts")
        changes = ["--set", f"run.dir={disk}", "--set", "data.cache=runs/data"]
        line = only_line(titan("run", "small.toml", *changes, cwd=workplace))
        assert "No space left on device" in line and "resume" in line
        assert processes_under(workplace) == []
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert titan("status", f"{disk}/small", cwd=workplace).returncode == 0
        result = titan("resume", f"{disk}/small", cwd=workplace)
        assert result.returncode == 0, result.stderr
        for role in ROLES:
            expected, found = weights(workplace / "runs/small", role, 30), weights(disk / "small", role, 30)
            assert all((expected[key] == found[key]).all() for key in expected), role
