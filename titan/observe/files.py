"""Files of a run folder, written and read as whole lines or whole files, so that a crash never leaves half of one."""

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from titan.config.load import load_config
from titan.config.settings import RunConfig
from titan.errors import ConfigError, RunError

Record = dict[str, Any]
"""One JSON object."""

RUN_FILES = ("config.toml", "metrics.jsonl", "events.jsonl")


def require_run_folder(folder: Path) -> None:
    """Raise RunError, with the runs that there are, unless `folder` holds a run."""
    if any((folder / name).is_file() for name in RUN_FILES):
        return
    problem = "has none of " + ", ".join(RUN_FILES) if folder.is_dir() else "does not exist"
    parent = folder if folder.is_dir() else folder.parent
    runs = sorted(path.parent.name for path in parent.glob("*/config.toml"))
    remedy = f"runs in {parent}: {', '.join(runs[:8])}" if runs else "name the folder of a run, such as runs/NAME"
    raise RunError(f"{folder} is not a run folder: it {problem}; {remedy}")


def read_config(folder: Path) -> RunConfig:
    """Settings of a run, from its config.toml; RunError if they are absent or not those of this version."""
    require_run_folder(folder)
    path = folder / "config.toml"
    if not path.is_file():
        raise RunError(f"{path} is missing; copy the settings the run was started with there")
    try:
        return load_config(path)
    except ConfigError as error:
        first = str(error).partition("\n")[0]
        raise RunError(f"{path} is not what titan wrote ({first}); restore it, or use the version of the run") from None


def open_lines(path: Path) -> FileIO:
    """Open a file of JSON lines for appending; a torn last line, which a crash left, is cut off first."""
    length = whole_lines_bytes(path)
    file = path.open("ab", buffering=0)
    if file.seek(0, os.SEEK_END) > length:
        file.truncate(length)
    return file


def append_line(file: FileIO, record: Mapping[str, object]) -> None:
    """Append one JSON line in one write, so that readers and other writers never see half of it.

    Raises OSError. On a full disk the part that it took is cut off again: the next line must not go on in that one.
    """
    line = to_json(record).encode() + b"\n"
    written = file.write(line)
    if written < len(line):
        begin = file.tell() - written
        try:
            write_all(file.fileno(), line[written:])
        except OSError:
            file.truncate(min(begin, file.seek(0, os.SEEK_END)))
            raise


def write_all(descriptor: int, data: bytes) -> None:
    """A nearly full disk takes a part of a write without an error; only the next write says why."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def read_lines(path: Path) -> list[Record]:
    """All whole JSON lines of a file, [] if there is no file; the end of a line still being written is left out.

    Raises RunError for a line in the middle that is not a JSON object.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise RunError(f"line {number} of {path} is damaged (not a JSON object); delete that line")
        records.append(record)
    return records


class LinesTail:
    """Reads on in a file of JSON lines that grows."""

    def __init__(self, path: Path):
        self._path, self._offset = path, 0

    def read(self) -> list[Record]:
        """Whole lines since the last call; lines that are no JSON objects are passed over."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        length = data.rfind(b"\n") + 1
        self._offset += length
        records = []
        for line in data[:length].splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                records.append(record)
        return records


def read_json(path: Path) -> Record | None:
    """A JSON object from a file, None if there is no file; RunError if it is damaged."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise RunError(f"{path} is damaged (not a JSON object); delete it")
    return record


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there completely or not at all, whatever interrupts this."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def cut_anew(path: Path, size: int) -> None:
    """Leave the first `size` bytes of a file, in a new file of its name: who has the old one open writes to nothing.

    On a full disk it is cut where it is.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(path, draft)
        with draft.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        os.truncate(path, size)
    finally:
        draft.unlink(missing_ok=True)


def was_replaced(path: Path, descriptor: int) -> bool:
    """Whether a file that is open has lost its name to another."""
    try:
        now = path.stat()
    except FileNotFoundError:
        return False
    try:
        return not os.path.samestat(now, os.fstat(descriptor))
    except OSError as error:
        if error.errno != errno.ESTALE:  # how NFS says that what is open has been replaced by another host
            raise
        return True


def to_json(value: object, indent: int | None = None) -> str:
    """Strict JSON: numbers that are not finite become null, types that JSON does not know become text."""
    try:
        return json.dumps(value, allow_nan=False, default=str, indent=indent)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, default=str, indent=indent)


def whole_lines_bytes(path: Path) -> int:
    """Length of a file up to its last line end; 0 if there is no file."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
