"""Where a rank finds what the run keeps: on storage that its host sees, or at the run's home on the driver's host."""

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from titan.checkpoint.fence import read_generation
from titan.checkpoint.files import Files, LocalFiles
from titan.config.pretrained import CONFIG_FILE
from titan.data.shards import INDEX_FILE
from titan.distill.log.upkeep import LocalUpkeep, LogUpkeep
from titan.distill.rank import RankSpec
from titan.distill.service.home import PIECE_BYTES, Home
from titan.errors import DataError, RunError

CORPUS = "corpus"
"""What the prepared corpus is called among the folders that the home offers."""
SEE_S = 15.0
"""How long a network file system may take to show what the driver has just written."""
LOOK_S = 0.1


class Storage:
    """What one rank keeps and finds again."""

    def __init__(self, spec: RankSpec):
        self.spec = spec
        self.home: Home | None = None
        if spec.home:
            assert spec.generation is not None, "a rank that goes to the run's home has a generation to show"
            timeout_s = spec.config.cluster.step_timeout_s
            self.home = Home(spec.home, spec.label_token, spec.role, spec.generation, timeout_s, spec.run_folder)

    def files(self, folder: Path) -> Files:
        """Files of the run folder, or of a folder in it."""
        if self.home is None:
            return LocalFiles(folder, self.spec.fence)
        name = folder.relative_to(self.spec.run_folder).as_posix()
        return self.home.files("" if name == "." else name)

    def upkeep(self) -> LogUpkeep:
        """Of the role's own label log."""
        if self.home is None:
            return LocalUpkeep(self.spec.own_label_folder, self.spec.copy_folder, self.spec.fence)
        return self.home.log()

    def initial_weights(self) -> Files:
        """The checkpoint of another run that the role's weights start from."""
        assert self.spec.init is not None
        return LocalFiles(self.spec.init) if self.home is None else self.home.files(root=init_root(self.spec.role))

    def corpus(self) -> Path:
        """The prepared corpus on this host, got from the run's home if it is not there.

        Raises DataError if there is no place for it.
        """
        folder = self.spec.corpus_folder
        if self.home is None or (folder / INDEX_FILE).is_file():
            return folder
        try:
            with _alone(folder, self.spec.config.cluster.start_timeout_s):
                if not (folder / INDEX_FILE).is_file():
                    _fetch(self.home.files(root=CORPUS), folder)
        except OSError as error:
            raise DataError(
                f"cannot write the prepared corpus to {error.filename or folder}: {error.strerror}; make room, or set "
                "data.cache to a folder that every host can write to"
            ) from None
        return folder

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self.home is not None:
            self.home.close()


def check_storage(spec: RankSpec) -> None:
    """Before a rank does anything: raise RunError unless its host can have all that the run keeps.

    The driver has just written the role's generation, which nobody can guess, into the run folder.
    """
    if spec.generation is None:
        return
    if not spec.home:
        _check_shared(spec)
        return
    storage = Storage(spec)
    try:
        storage.files(spec.run_folder).check()
    finally:
        storage.close()
    if spec.settings.frozen and spec.init is not None and not (spec.init / CONFIG_FILE).is_file():
        raise RunError(
            f"teacher.source is {spec.config.teacher.source!r}, but this host does not see that folder; copy it to "
            "the same path on each host"
        )


def init_root(role: str) -> str:
    """What the checkpoint that a student starts from is called among the folders that the home offers."""
    return f"init-{role}"


def _check_shared(spec: RankSpec) -> None:
    """Raise RunError unless this host sees the run folder and the corpus."""
    deadline = time.monotonic() + SEE_S
    while (found := read_generation(spec.run_folder, spec.role)) != spec.generation:
        if found is not None and spec.generation is not None and found.number > spec.generation.number:
            return  # the fence has the right words
        if time.monotonic() > deadline:
            raise RunError(
                f"run.storage is 'shared', but this host does not see the run folder {spec.run_folder}; put run.dir on "
                "storage that all hosts share, or set run.storage = 'per-node'"
            )
        time.sleep(LOOK_S)
    for what, path, setting in (
        ("the prepared corpus", spec.corpus_folder / INDEX_FILE, "data.cache"),
        ("the weights to start from", spec.init, "them"),
    ):
        if path is not None and not path.exists():
            raise RunError(
                f"run.storage is 'shared', but this host does not see {what}, {path}; put {setting} on storage that "
                "all hosts share, or set run.storage = 'per-node'"
            )


def _fetch(source: Files, folder: Path) -> None:
    """Copy a corpus; its index comes last, and the folder takes its name when all is there."""
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        draft.mkdir(parents=True)
        names = source.find("*")
        for name in (*(one for one in names if one != INDEX_FILE), INDEX_FILE):
            _copy(source, name, draft / name)
        shutil.rmtree(folder, ignore_errors=True)  # what a copy that broke off may have left
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _copy(source: Files, name: str, path: Path) -> None:
    """Copy a file piece by piece. Raises DataError if it comes damaged."""
    known = source.checksum(name)
    if known is None:
        raise DataError(f"{source.path / name} is gone from the driver's host; prepare the corpus again")
    size, _ = known
    with open(path, "wb") as file:
        for start in range(0, size, PIECE_BYTES):
            file.write(source.read(name, start, min(size, start + PIECE_BYTES)) or b"")
        file.flush()
        os.fsync(file.fileno())
    if LocalFiles(path.parent).checksum(name) != known:
        raise DataError(f"{source.path / name} came damaged from the driver's host; start again")


@contextmanager
def _alone(folder: Path, timeout_s: float) -> Iterator[None]:
    """One process of this host at a time; the others find what it has done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "wb") as lock:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DataError(
                        f"waited {timeout_s:.0f} s for another process to get {folder}; is the network that slow? "
                        "(cluster.start_timeout_s sets the wait)"
                    ) from None
            time.sleep(LOOK_S)
        yield
