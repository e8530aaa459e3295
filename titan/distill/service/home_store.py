"""The other end of `home.py`: does what ranks of other hosts ask, to files of the run folder and for the run's role.

A call is a line of JSON and, behind it, bytes. Nothing is kept between calls.
"""

import json
import re
import threading
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from titan.checkpoint.fence import Fence, Generation, fence_path
from titan.checkpoint.files import LocalFiles
from titan.distill.log.retention import Retention
from titan.distill.log.upkeep import LocalUpkeep
from titan.distill.service.protocol import CHECKSUM, RUN, check_producer
from titan.errors import LabelError

WRITES = frozenset({"write", "append", "seal", "truncate", "sync", "move", "remove"})


class HomeStore:
    """Of one run. Calls may come from several threads."""

    def __init__(self, run: Path, others: Mapping[str, Path]):
        """others: folders beside the run's that may be read, by name"""
        self.run, self.roots = run, {**others, RUN: run}
        self.lock = threading.Lock()
        self.checksums: dict[tuple[Path, str, int], tuple[int, int] | None] = {}
        """By file, start of the role, and the file's time: all ranks of a start ask for the same."""

    def fence(self, role: str, number: int, identity: str) -> Fence:
        """What a generation of a role has to show. Raises LabelError for a name that is none."""
        check_producer(role)
        return Fence(fence_path(self.run, role), Generation(number, identity))

    def answer(self, body: bytes) -> bytes:
        """Do one call. Raises LabelError for one that cannot be understood or may not be; OvertakenError, OSError."""
        head, _, payload = body.partition(b"\n")
        try:
            fields = json.loads(head)
            call, role = fields.pop("call"), fields.pop("role")
            fence = self.fence(role, fields.pop("number"), fields.pop("id"))
            checksum = fields.pop("crc32")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LabelError(f"a call of a run's home is none: {head[:80]!r}; do versions differ?") from None
        if zlib.crc32(payload) != checksum:
            raise LabelError(f"{len(payload)} bytes for {fields.get('name', call)} came damaged; nothing was written")
        if "root" in fields:
            return self._file_call(call, role, fence, fields, payload)
        upkeep = LocalUpkeep(self.run / "labels" / role, None, fence)
        match call:
            case "check":
                fence.check()
                return b""
            case "size_bytes":
                return str(upkeep.size_bytes()).encode()
            case "step_bytes":
                return str(upkeep.step_bytes()).encode()
            case "retain":
                return json.dumps(asdict(upkeep.retain(Retention(**fields["rule"]), fields["expected"]))).encode()
            case "position":
                check_producer(fields["reader"])
                return json.dumps(upkeep.position(fields["reader"])).encode()
        raise LabelError(f"the run's home has no call {call!r}; do versions differ?")

    def _file_call(self, call: str, role: str, fence: Fence, fields: dict[str, Any], payload: bytes) -> bytes:
        root, name = str(fields.pop("root")), _inside(fields.pop("name"))
        if root not in self.roots:
            raise LabelError(f"the run's home has no {root!r}; do versions differ?")
        files = LocalFiles(self.roots[root], fence)
        if call in WRITES:
            changed = fields["names"] if call == "remove" else [name, *([fields["to"]] if "to" in fields else [])]
            for one in map(_inside, changed):
                if root != RUN or not _is_of(one, role):
                    raise LabelError(f"{role} may not write {one!r} of {root}")
        match call:
            case "find":
                within = files.below(name) if name else files
                return json.dumps(within.find(_inside(fields["pattern"]))).encode()
            case "read":
                data = files.read(name, fields["start"], fields["end"])
                return b"" if data is None else CHECKSUM.pack(zlib.crc32(data)) + data
            case "checksum":
                return json.dumps(self._checksum(files, name, fence.mine.id)).encode()
            case "seal":
                self._seal(files, name, **fields)
            case "write":
                files.write(name, payload, **fields)
            case "append":
                files.append(name, fields["at"], payload)
            case "truncate":
                files.truncate(name, **fields)
            case "sync":
                files.sync(name)
            case "move":
                files.move(name, fields["to"])
            case "remove":
                files.remove(*fields["names"])
            case _:
                raise LabelError(f"the run's home has no call {call!r}; do versions differ?")
        return b""

    def _checksum(self, files: LocalFiles, name: str, start: str) -> tuple[int, int] | None:
        try:
            key = files.path / name, start, (files.path / name).stat().st_mtime_ns
        except OSError:
            return None
        with self.lock:
            if key not in self.checksums:
                self.checksums = {known: found for known, found in self.checksums.items() if known[1] == start}
                self.checksums[key] = files.checksum(name)
            return self.checksums[key]

    def _seal(self, files: LocalFiles, draft: str, to: str, size: int, checksum: int) -> None:
        """A file that came in pieces is whole. One that is not goes, and nothing takes its place."""
        found = files.checksum(draft)
        if found is None and files.checksum(to) == (size, checksum):
            return  # it was sealed, and the answer was lost
        if found != (size, checksum):
            files.remove(draft)
            raise LabelError(f"{to} came damaged ({found}, expected {(size, checksum)}); nothing was written")
        files.move(draft, to)


def _inside(name: object) -> str:
    """Raise LabelError unless this is a name that cannot lead out of a folder."""
    if not isinstance(name, str) or "\0" in name or name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise LabelError(f"{name!r} is no name below the run's folder")
    return name


def _is_of(name: str, role: str) -> bool:
    """Whether a file or folder is one that ranks of a role write."""
    own = re.escape(role)
    return bool(
        re.fullmatch(rf"checkpoints/{own}/.+|ledger/{own}\.jsonl|labels/[^/]+/readers/\.?{own}\.(json|at)", name)
    )
