"""What a rank is told and what it reports, as plain data; and how it comes to life. Importing this loads no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from titan.config.settings import RunConfig, StudentSettings, TeacherSettings

if TYPE_CHECKING:
    from titan.distill.role import RoleRank

TEACHER = "teacher"


@dataclass(frozen=True)
class RankSpec:
    """What a rank must know before it meets the others."""

    config: RunConfig
    role: str
    rank: int
    run_folder: Path
    corpus_folder: Path

    @property
    def settings(self) -> TeacherSettings | StudentSettings:
        """Settings of the role."""
        if self.role == TEACHER:
            return self.config.teacher
        return next(student for student in self.config.students if student.name == self.role)

    @property
    def checkpoint_folder(self) -> Path:
        """Checkpoints of the role."""
        return self.run_folder / "checkpoints" / self.role

    @property
    def label_folder(self) -> Path:
        """The teacher's label log."""
        return self.run_folder / "labels" / TEACHER


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
    extra: dict[str, float]
    """Label accounting of a student."""


def make_rank(spec: RankSpec) -> "RoleRank":
    """The rank of a spec, in a process set up for its device: that comes before megatron-core is imported."""
    from titan.platform.device import prepare_process, select_platform

    platform = select_platform(spec.config.cluster.device)
    prepare_process(platform)
    from titan.distill.student import StudentRank
    from titan.distill.teacher import TeacherRank

    return TeacherRank(spec, platform) if spec.role == TEACHER else StudentRank(spec, platform)
