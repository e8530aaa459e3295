"""A fence against the dead coming back: whoever started a role last may write for it, nobody from before.

    RUN/generations/ROLE.json

The driver raises the generation before it repairs what a role's ranks left and starts new ones. Ranks look at the file
before each write that counts: labels, commits, checkpoints, ledger. So a rank on a host that could not be reached, and
was given up, ends at its next write. It may have been stopped in the microseconds between look and write; so what is
appended to is made anew before others go on with it, and a late write goes to a file that has lost its name. What is
renamed, a checkpoint or its manifest, has those microseconds and no more safety than that.
Where hosts share no storage the run's home looks, for every write that comes with the generation of who sends it.
"""

import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from titan.errors import OvertakenError
from titan.observe.files import read_json, to_json, write_whole

FOLDER = "generations"


@dataclass(frozen=True)
class Generation:
    """One start of a role's ranks."""

    number: int
    """Grows with every start, also of a resumed run."""
    id: str
    """Tells it from the same number of an earlier run in the same folder."""


@dataclass(frozen=True)
class Fence:
    """What a rank has that writes for a role."""

    path: Path
    mine: Generation

    def check(self) -> None:
        """Raise OvertakenError if another generation of the role was started since. Opens the file anew each time:
        so network file systems give what is there now.
        """
        now = _read(self.path)
        if now == self.mine:
            return
        newer = "the run folder is gone" if now is None else f"generation {now.number} has taken over"
        raise OvertakenError(
            f"generation {self.mine.number} of {self.path.stem} writes nothing more: {newer} ({self.path}); this "
            "process was given up while its host could not be reached, and nothing is left to do for it"
        )


def fence_path(run_folder: Path, role: str) -> Path:
    """Where the generation of a role stands."""
    return run_folder / FOLDER / f"{role}.json"


def take_over(run_folder: Path, role: str) -> Generation:
    """Begin a new generation of a role: from now on those before it can write no more."""
    path = fence_path(run_folder, role)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = _read(path)
    mine = Generation(1 if before is None else before.number + 1, secrets.token_hex(8))
    write_whole(path, to_json(asdict(mine)).encode())
    return mine


def read_generation(run_folder: Path, role: str) -> Generation | None:
    """The generation that may write for a role; None before the first."""
    return _read(fence_path(run_folder, role))


def _read(path: Path) -> Generation | None:
    record = read_json(path)
    return None if record is None else Generation(record["number"], record["id"])
