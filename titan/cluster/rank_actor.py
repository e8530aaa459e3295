"""The thin Ray skin around a rank: every method hands on to the plain class of titan.distill."""

import errno
import os
import socket
import sys
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from titan.distill.build import make_rank, warm_up
from titan.distill.rank import RankSpec, RoleReport
from titan.errors import OvertakenError, PeerLostError, TitanError, WorkerError

if TYPE_CHECKING:
    from titan.distill.role import RoleRank


@dataclass(frozen=True)
class Whereabouts:
    """Where the process of a rank is."""

    host: str
    node_id: str
    """As Ray names the node."""
    pid: int


class RankActor:
    """One rank as an actor. `train` runs for the whole run in one thread; questions are answered in another."""

    def __init__(self) -> None:
        self.spec: RankSpec | None = None
        self.rank: RoleRank | None = None

    def build(self, spec: RankSpec) -> Whereabouts:
        """Import what training needs and make the rank; most of a start's time."""
        self.spec = spec
        self.rank = self._say_where(lambda: make_rank(spec))
        return _here()

    def warm_up(self) -> Whereabouts:
        """Import what a rank on a CPU needs; which rank that is, `build` tells later, or never."""
        warm_up()
        return _here()

    def open_store(self) -> tuple[str, int]:
        """Host and port at which the ranks of the role meet."""
        host = ray.util.get_node_ip_address()
        return host, self._say_where(lambda: self._built.open_store(host))

    def join(self, host: str, port: int) -> None:
        """Meet the other ranks and restore the newest checkpoint."""
        self._say_where(lambda: self._built.join(host, port))

    def train(self) -> RoleReport:
        """Train to the end of the run, or until asked to stop."""
        report: RoleReport = self._say_where(lambda: self._built.train())
        self._built.leave()
        return report

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def request_stop(self, for_good: bool = True) -> None:
        """Stop after the step under way; not for good if the role goes on in another layout."""
        self._built.request_stop(for_good)

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def heed_disk(self, low: bool) -> None:
        """Whether the disk that the role's labels go to is nearly full."""
        self._built.heed_disk(low)

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def take_news(self, heard: int) -> tuple[int, list[Any]]:
        """Metrics and events from number `heard` on; an answer, even an empty one, shows that the process lives."""
        return self.rank.take_news(heard) if self.rank is not None else (heard, [])

    @property
    def _built(self) -> "RoleRank":
        assert self.rank is not None, "build() comes first"
        return self.rank

    def _say_where(self, action: Any) -> Any:
        """Run an action; an exception leaves with role, rank, step and host, as one message that pickles."""
        try:
            return action()
        except Exception as error:
            assert self.spec is not None
            step = self.rank.step if self.rank is not None else 0
            who = {"role": self.spec.role, "rank": self.spec.rank, "host": socket.gethostname(), "step": step}
            cause = str(error) if isinstance(error, TitanError) else f"{type(error).__name__}: {error}"
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                what = error.filename or self.spec.run_folder
                cause = f"cannot write to {what}: {error.strerror}; make room, then `titan resume` goes on from there"
            where = f"{who['role']} rank {who['rank']} on {who['host']}, step {who['step']}"
            noticed = not isinstance(error, TitanError) and "gloo" in str(error).lower()
            secondary = noticed or isinstance(error, PeerLostError)
            if isinstance(error, OvertakenError):  # nobody listens any more: it stays in Ray's log of this process
                print(f"{where}: {cause}", file=sys.stderr, flush=True)
            raise RankError(f"{where}: {cause}", who, secondary, traceback.format_exc()) from None


def _here() -> Whereabouts:
    return Whereabouts(socket.gethostname(), ray.get_runtime_context().get_node_id(), os.getpid())


class RankError(WorkerError):
    """What an actor raises: the message, who it was, whether it only noticed another's failure, and the traceback."""

    def __init__(self, message: str, who: dict[str, Any], secondary: bool, trace: str):
        super().__init__(message, who, secondary, trace)
        self.who, self.secondary, self.trace = who, secondary, trace

    def __str__(self) -> str:
        return str(self.args[0])
