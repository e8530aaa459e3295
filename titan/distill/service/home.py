"""The run folder on the driver's host, for ranks of hosts that share no storage with it.

What a call here has written stands at home when it returns. A call that lost its answer is made again, for up to
`timeout_s`; what arrives twice is done once. `home_store.py` is the other end.
"""

import json
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan.checkpoint.fence import Generation
from titan.distill.log.retention import Kept, Retention
from titan.distill.service.connection import Connection, patiently
from titan.distill.service.protocol import CHECKSUM, HOME_ACTION, RUN
from titan.errors import LabelError

PIECE_BYTES = 1 << 20
"""Of a large file: what one call brings or takes."""


class Home:
    """Of one rank. Every write shows its generation; a rank that was given up is refused."""

    def __init__(self, location: str, token: str, role: str, generation: Generation, timeout_s: float, run: Path):
        """location: where the service listens, `grpc+tcp://HOST:PORT`
        run:      the run folder there, for words
        """
        self.location, self.token, self.role, self.generation = location, token, role, generation
        self.timeout_s, self.run = timeout_s, run
        self.connection = Connection(location, token, "the run's home")

    def files(self, name: str = "", root: str = RUN) -> "HomeFiles":
        """Files below a folder of the run, or of another root that the driver offers."""
        return HomeFiles(self, root, name)

    def log(self) -> "HomeLog":
        """Upkeep of the role's own label log."""
        return HomeLog(self)

    def ask(self, call: str, wanted: str, payload: bytes = b"", **fields: Any) -> bytes:
        """One call. Raises WaitedError after `timeout_s` without an answer, and what the other end says is wrong."""
        who = {"role": self.role, "number": self.generation.number, "id": self.generation.id}
        head = json.dumps({"call": call, "crc32": zlib.crc32(payload)} | who | fields, separators=(",", ":"))
        body = b"%s\n%s" % (head.encode(), payload)
        return patiently(lambda stall_s: self.connection.act(HOME_ACTION, body, stall_s), self.timeout_s, wanted)

    def close(self) -> None:
        """Close the connection."""
        self.connection.drop()


class HomeFiles:
    """`titan.checkpoint.files.Files` at home."""

    def __init__(self, home: Home, root: str, name: str):
        self.home, self.root, self.name = home, root, name
        self.path = home.run / name if root == RUN else Path(root, name)

    def below(self, name: str) -> "HomeFiles":
        """The same of a folder in it."""
        return HomeFiles(self.home, self.root, self._full(name))

    def check(self) -> None:
        """Raise OvertakenError if another generation was started since."""
        self.home.ask("check", "word from the run's home")

    def find(self, pattern: str) -> list[str]:
        """Names that match, in order."""
        found: list[str] = json.loads(self._ask("find", "", f"a look at {self.path}", pattern=pattern))
        return found

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes | None:
        """Bytes [start, end) of a file; None if there is no such file."""
        parts: list[bytes] = []
        while True:
            until = start + PIECE_BYTES if end is None else min(end, start + PIECE_BYTES)
            data = self._ask("read", name, f"{self.path / name}", start=start, end=until)
            if not data:
                return None
            if zlib.crc32(data[CHECKSUM.size :]) != CHECKSUM.unpack_from(data)[0]:
                raise LabelError(f"{self.path / name} came damaged from {self.home.connection.describe()}; try again")
            parts.append(data[CHECKSUM.size :])
            if until == end or len(parts[-1]) < until - start:
                return b"".join(parts)
            start = until

    def checksum(self, name: str) -> tuple[int, int] | None:
        """Length and CRC-32 of a file; None if there is none."""
        found = json.loads(self._ask("checksum", name, f"the checksum of {self.path / name}"))
        return None if found is None else (found[0], found[1])

    def write(self, name: str, data: bytes, durable: bool = True) -> None:
        """Write a whole file; a large one piece by piece, and it is there once its checksum is found to be right."""
        wanted = f"{self.path / name} to be written"
        if len(data) <= PIECE_BYTES:
            self._ask("write", name, wanted, data, durable=durable)
            return
        draft = f"{name}.{secrets.token_hex(4)}.draft"
        for at in range(0, len(data), PIECE_BYTES):
            self._ask("append", draft, wanted, data[at : at + PIECE_BYTES], at=at)
        self._ask("seal", draft, wanted, to=self._full(name), size=len(data), checksum=zlib.crc32(data))

    def append(self, name: str, at: int, data: bytes) -> None:
        """Write behind the first `at` bytes."""
        self._ask("append", name, f"{self.path / name} to be written", data, at=at)

    def truncate(self, name: str, before: int, size: int) -> None:
        """Cut a file of a known length."""
        self._ask("truncate", name, f"{self.path / name} to be cut", before=before, size=size)

    def sync(self, name: str) -> None:
        """Force a file to the disk."""
        self._ask("sync", name, f"{self.path / name} to be on the disk")

    def move(self, name: str, to: str) -> None:
        """Give a file or folder another name."""
        self._ask("move", name, f"{self.path / to} to be there", to=self._full(to))

    def remove(self, *names: str) -> None:
        """Delete files and folders."""
        if names:
            self._ask("remove", "", f"files of {self.path} to be gone", names=[self._full(name) for name in names])

    def _ask(self, call: str, name: str, wanted: str, payload: bytes = b"", **fields: Any) -> bytes:
        return self.home.ask(call, wanted, payload, root=self.root, name=self._full(name), **fields)

    def _full(self, name: str) -> str:
        return "/".join(part for part in (self.name, name) if part)


class HomeLog:
    """`titan.distill.log.upkeep.LogUpkeep` at home."""

    def __init__(self, home: Home):
        self.home = home

    def size_bytes(self) -> int:
        """What the log takes."""
        return int(self.home.ask("size_bytes", "the size of the labels"))

    def step_bytes(self) -> int:
        """What a step takes at most."""
        return int(self.home.ask("step_bytes", "the size of the labels of a step"))

    def retain(self, rule: Retention, expected: Mapping[str, int]) -> Kept:
        """Drop what need not be kept."""
        answer = self.home.ask("retain", "old labels to be dropped", rule=vars(rule), expected=dict(expected))
        fields = json.loads(answer)
        return Kept(**fields | {"overtaken": tuple(fields["overtaken"])})

    def position(self, reader: str) -> int | None:
        """The last step that a reader said to have learned."""
        step: int | None = json.loads(self.home.ask("position", f"word of {reader}", reader=reader))
        return step
