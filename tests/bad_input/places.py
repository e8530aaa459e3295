"""What tests of bad input share: a place to make mistakes in, and what a mistake must become."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.runs import write_tiny_config
from titan.checkpoint.folder import encode_manifest, step_folder
from titan.cli.main import main
from titan.config.load import dump_config, load_config
from titan.data.prepare import prepare_corpus
from titan.distill.codec.block import LabelBlock, encode_block
from titan.distill.codec.raw import RawLabels
from titan.distill.log.records import Commit
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


def source(*sources: str) -> str:
    return f"data.sources={json.dumps(list(sources), separators=(',', ':'))}"


def checkpoint_of(place: Place, role: str = "teacher") -> Path:
    return step_folder(place.old / "checkpoints" / role, STEP)


def labels_of(place: Place) -> Path:
    return place.old / "labels/teacher"


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


def spoil(name: str, how: str) -> SetUp:
    """Damage a file of the prepared corpus."""

    def change(place: Place) -> None:
        damage(place.corpus / name, how)

    return change


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


def make_place(folder: Path) -> Path:
    """tiny.toml, its corpus, and runs/old as it would be after STEP steps, but for numbers in the checkpoints."""
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


def check_row(row: Row, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The mistake is told in one line with its remedy, and nothing is lost."""
    row.set_up(place)
    before = content_of(place.folder)
    command = row.command
    for name, word in place.words.items():
        command = command.replace(f"{{{name}}}", word)
    place.patch.setattr(sys, "argv", ["titan", *command.split()])
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


def run_main(monkeypatch: pytest.MonkeyPatch, command: str) -> object:
    monkeypatch.setattr(sys, "argv", ["titan", *command.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code
