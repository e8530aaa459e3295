"""What a rank is told and what it reports, as plain data."""

from dataclasses import dataclass, field
from pathlib import Path

from titan.checkpoint.fence import Fence, Generation, fence_path
from titan.config.settings import TEACHER, Role, RunConfig
from titan.plan.pace import Pace

ADDRESS_FILE = "label_service.json"


@dataclass(frozen=True)
class RankSpec:
    """What a rank must know before it meets the others."""

    config: RunConfig
    role: str
    rank: int
    run_folder: Path
    corpus_folder: Path
    pace: Pace | None = None
    """On a paced device: the time its passes take."""
    label_token: str = field(default="", repr=False)
    """What the label service asks for; empty where labels are read from files."""
    home: str = ""
    """Where the run folder can be had, `grpc+tcp://HOST:PORT`; empty where this host sees it itself."""
    init: Path | None = None
    """Checkpoint that the role's weights start from, if not at random; of a frozen teacher its Hugging Face folder."""
    copy_folder: Path | None = None
    """Second copy of the role's own label log, if it makes one and is to have a copy."""
    expected_busy_s: tuple[float, ...] = ()
    """By rank of the role: seconds its passes of a step should take; empty where nothing is known."""
    generation: Generation | None = None
    """Which start of the role this rank belongs to; None where nobody starts it again."""

    @property
    def settings(self) -> Role:
        """What trains."""
        return self.config.roles[self.role]

    @property
    def initial_seed(self) -> int:
        """Of the role's initial weights."""
        own = {student.name: student.seed for student in self.config.students}.get(self.role)
        return self.config.run.seed if own is None else own

    @property
    def fence(self) -> Fence | None:
        """To be asked before anything is written for the role."""
        if self.generation is None:
            return None
        return Fence(fence_path(self.run_folder, self.role), self.generation)

    @property
    def checkpoint_folder(self) -> Path:
        """Checkpoints of the role."""
        return self.run_folder / "checkpoints" / self.role

    @property
    def label_address(self) -> Path | str:
        """Where the label service leaves its address, or its address."""
        return self.home or self.run_folder / ADDRESS_FILE

    @property
    def teacher(self) -> str:
        """Whose labels the role learns."""
        return {student.name: student.teacher for student in self.config.students}.get(self.role, TEACHER)

    @property
    def label_folder(self) -> Path:
        """The label log of the role's teacher."""
        return self.run_folder / "labels" / self.teacher

    @property
    def own_label_folder(self) -> Path:
        """The label log of a role that teaches."""
        return self.run_folder / "labels" / self.role


@dataclass(frozen=True)
class RoleReport:
    """How a role ended; the same on all its ranks."""

    role: str
    step: int
    params: int
    tokens: int
    train_seconds: float
    heldout_bits_per_byte: float | None
    stopped: bool
    paused: bool
    """Stopped, but not for good: the role goes on in another layout."""
    extra: dict[str, float]
    """Label accounting of a student."""
