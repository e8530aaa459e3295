"""Files below a folder of a run, as its ranks read and write them.

`LocalFiles` are on a disk that this process sees. `titan.distill.service.home` has those on the driver's host, for
hosts that share no storage with it. Any call may come twice, because its answer was lost: the second changes nothing.
"""

import glob
import os
import shutil
import threading
import zlib
from pathlib import Path
from typing import Protocol

from titan.checkpoint.fence import Fence
from titan.errors import RunError
from titan.observe.files import cut_anew

BLOCK_BYTES = 1 << 22


class Files(Protocol):
    """Files by their names below `path`. What cannot be had of the system is an OSError, wherever the files are."""

    path: Path
    """The folder, for words."""

    def below(self, name: str) -> "Files":
        """The same of a folder in it."""

    def check(self) -> None:
        """Raise OvertakenError if another generation of the role was started since; every write does so too."""

    def find(self, pattern: str) -> list[str]:
        """Names that match, such as `step-*/manifest.json`, in order."""

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes | None:
        """Bytes [start, end) of a file, fewer where it ends; None if there is no such file."""

    def checksum(self, name: str) -> tuple[int, int] | None:
        """Length and CRC-32 of a file; None if there is none."""

    def write(self, name: str, data: bytes, durable: bool = True) -> None:
        """Write a file, and the folders it is in, so that it is complete or absent, even after a power cut."""

    def append(self, name: str, at: int, data: bytes) -> None:
        """Write behind the first `at` bytes, which are all there are. Raises RunError if others stand there."""

    def truncate(self, name: str, before: int, size: int) -> None:
        """Cut a file of `before` bytes to `size`; one that is not there is made. Raises RunError for another length."""

    def sync(self, name: str) -> None:
        """Force a file to the disk."""

    def move(self, name: str, to: str) -> None:
        """Give a file or folder another name, durably."""

    def remove(self, *names: str) -> None:
        """Delete files, and folders with all that is in them, as far as they are there."""


class LocalFiles:
    """Files that this process sees itself."""

    def __init__(self, path: Path, fence: Fence | None = None):
        """fence: asked before anything is changed; None where nobody else can write"""
        self.path, self.fence = path, fence

    def below(self, name: str) -> "LocalFiles":
        """The same of a folder in it."""
        return LocalFiles(self.path / name, self.fence)

    def check(self) -> None:
        """Raise OvertakenError if another generation was started since."""
        if self.fence is not None:
            self.fence.check()

    def find(self, pattern: str) -> list[str]:
        """Names that match, in order."""
        return sorted(glob.glob(pattern, root_dir=self.path))

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes | None:
        """Bytes [start, end) of a file; None if there is no such file."""
        try:
            with open(self.path / name, "rb") as file:
                file.seek(start)
                return file.read(-1 if end is None else max(0, end - start))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def checksum(self, name: str) -> tuple[int, int] | None:
        """Length and CRC-32 of a file; None if there is none."""
        size = checksum = 0
        try:
            with open(self.path / name, "rb") as file:
                while block := file.read(BLOCK_BYTES):
                    size, checksum = size + len(block), zlib.crc32(block, checksum)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return size, checksum

    def write(self, name: str, data: bytes, durable: bool = True) -> None:
        """Write a whole file."""
        self.check()
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            with open(draft, "wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            self.check()  # what was written took time
            draft.rename(path)
        finally:
            draft.unlink(missing_ok=True)

    def append(self, name: str, at: int, data: bytes) -> None:
        """Write behind the first `at` bytes. What a call that broke off has left there is completed."""
        self.check()
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self.check()  # with the file open, which whoever takes over makes anew
            size = os.fstat(descriptor).st_size
            there = os.pread(descriptor, len(data), at)
            if size < at or not data.startswith(there):
                raise RunError(f"{path} has {size} bytes, and not those that belong behind the first {at}; restore it")
            done = len(there)
            while done < len(data):
                done += os.pwrite(descriptor, memoryview(data)[done:], at + done)
        finally:
            os.close(descriptor)

    def truncate(self, name: str, before: int, size: int) -> None:
        """Cut a file of a known length. It is a new one then: who has the old one open writes to nothing."""
        self.check()
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        found = path.stat().st_size
        if found not in (before, size):
            raise RunError(f"{path} has {found} bytes instead of {before}: somebody else writes it; end that first")
        cut_anew(path, size)

    def sync(self, name: str) -> None:
        """Force a file to the disk."""
        descriptor = os.open(self.path / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def move(self, name: str, to: str) -> None:
        """Give a file or folder another name."""
        self.check()
        source, target = self.path / name, self.path / to
        if target.exists() and not source.exists():
            return
        self.sync(name)
        self.check()  # that may have taken time
        source.rename(target)
        LocalFiles(target.parent).sync(".")

    def remove(self, *names: str) -> None:
        """Delete files and folders."""
        self.check()
        for name in names:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def files_of(place: Path | Files, fence: Fence | None = None) -> Files:
    """Files in a folder, which may be given as one that this process sees."""
    return LocalFiles(place, fence) if isinstance(place, Path) else place
