"""A Ray head on this host that wants a token, for tests that join one."""

import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))  # no package: it is run where titan may not be installed

from ray_node import free_port, own_address, start_head

OPTIONS = ("--num-cpus=2", f"--object-store-memory={100 << 20}")


@dataclass(frozen=True)
class Head:
    """Where a head is, and the file with its token."""

    address: str
    token: str
    token_file: Path


@contextmanager
def ray_head() -> Iterator[Head]:
    """A head with room for eight CPU ranks; in the end nothing of it is left."""
    with tempfile.TemporaryDirectory(prefix="titan-ray-", dir="/tmp") as name:
        folder, token, port = Path(name), secrets.token_hex(32), free_port()
        token_file = folder / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(token)
        node = start_head(folder, port, token, (*OPTIONS, f"--temp-dir={folder}/ray"))
        try:
            yield Head(f"{own_address()}:{port}", token, token_file)
        finally:
            node.stop()
