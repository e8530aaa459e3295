"""The secret that everyone who talks to a Ray cluster must know: made for a local Ray, brought along to others.

Ray checks it on every call (RAY_AUTH_MODE=token). It travels in files and environment variables only: never in a
config, a log or the arguments of a process.
"""

import fcntl
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import grpc
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from titan.config.environment import ray_auth_mode, ray_token, restore_variables, set_ray_auth
from titan.errors import PlatformError

FILE = "titan-ray-token-"
"""How the names of token files begin, in the folder for temporary files. Who made one holds a lock on it."""
PROBE = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""A question that every Ray head answers at once, with an empty message for an argument."""
PROBE_TIMEOUT_S = 5.0
Answer = Literal["welcome", "refused", "silent"]


@contextmanager
def local_token() -> Iterator[None]:
    """A token of this process's own for the Ray that is started inside, in a file that only this user can read."""
    if ray_auth_mode() == "disabled":
        yield
        return
    _remove_orphans()
    handle, draft = tempfile.mkstemp(prefix=f".{FILE}")  # mode 600
    path = Path(draft).with_name(Path(draft).name.removeprefix("."))
    try:
        with os.fdopen(handle, "w") as file:
            with suppress(OSError):  # a file system without locks: nobody can tell that a token is an orphan there
                fcntl.flock(file, fcntl.LOCK_EX)  # for as long as this process lives
            file.write(secrets.token_hex(32))
            file.flush()
            os.rename(draft, path)
            with _auth("token", str(path)):
                yield
    finally:
        for left in (Path(draft), path):
            left.unlink(missing_ok=True)


def _remove_orphans() -> None:
    """Delete tokens of this user's processes that were killed before they could."""
    for path in Path(tempfile.gettempdir()).glob(f"{FILE}*"):
        with suppress(OSError):
            known = path.lstat()
            if not stat.S_ISREG(known.st_mode) or known.st_uid != os.getuid():
                continue
            with path.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


@contextmanager
def joining_token(address: str) -> Iterator[None]:
    """Show the user's token to the Ray that is joined inside, unless that Ray takes anyone.

    A Ray that is only known as `auto` is left to Ray, which looks for a token itself.
    """
    if address == "auto":
        yield
        return
    mode = ray_auth_mode()
    if mode is None:
        mode = "disabled" if ask(address, None) == "welcome" else "token"
    with _auth(mode):
        yield


@contextmanager
def _auth(mode: str, token_file: str | None = None) -> Iterator[None]:
    """Ray's authentication inside; Ray itself reads the variables once, unless it is told to read them again."""
    before = set_ray_auth(mode, token_file)
    _read_again()
    try:
        yield
    finally:
        restore_variables(before)
        _read_again()


def check_token(address: str) -> None:
    """Raise PlatformError unless the Ray at `host:port` wants a token and takes ours.

    Ray itself would try for 20 seconds, and not say why it gave up.
    """
    if ray_auth_mode() == "disabled":
        if ask(address, None) == "refused":
            raise PlatformError(
                f"cluster.address is {address}, a Ray that wants a token, but RAY_AUTH_MODE is 'disabled'; unset it "
                "and set RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
            )
        return
    if ask(address, None) == "welcome":
        raise PlatformError(
            f"cluster.address is {address}, a Ray that lets anyone in who reaches it; start it with "
            "RAY_AUTH_MODE=token, or set RAY_AUTH_MODE=disabled here if everyone on its network may run code on it"
        )
    token = ray_token()
    if token is None:
        raise PlatformError(
            f"cluster.address is {address}, a Ray that wants a token, and there is none here; set "
            "RAY_AUTH_TOKEN_PATH to a file with the cluster's token, or RAY_AUTH_TOKEN to the token"
        )
    if ask(address, token) == "refused":
        raise PlatformError(
            f"cluster.address is {address}, a Ray that refuses our token: it is another cluster's; set "
            "RAY_AUTH_TOKEN_PATH to a file with this cluster's token, or RAY_AUTH_TOKEN to the token"
        )


def ask(address: str, token: str | None) -> Answer:
    """Whether the Ray at `host:port` lets in who shows this token; `silent` if none answers in time."""
    shown = [("authorization", f"Bearer {token}")] if token is not None else []
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(PROBE)(b"", metadata=shown, timeout=PROBE_TIMEOUT_S)
        except grpc.RpcError as error:
            return "refused" if error.code() is grpc.StatusCode.UNAUTHENTICATED else "silent"
    return "welcome"


def _read_again() -> None:
    """Let Ray, which read the variables when it was imported, look at them again."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
