"""How a rank comes to life. Importing this loads no torch; calling it does, in the order that CPU needs."""

from typing import TYPE_CHECKING

from titan.config.settings import TEACHER
from titan.distill.rank import RankSpec

if TYPE_CHECKING:
    from titan.distill.role import RoleRank


def warm_up() -> None:
    """Set this process up for a CPU and import what ranks need there, before it is known which rank this will be."""
    from titan.platform.device import prepare_process, select_platform

    prepare_process(select_platform("cpu"))
    import titan.distill.student
    import titan.distill.teacher  # noqa: F401


def make_rank(spec: RankSpec) -> "RoleRank":
    """The rank of a spec, in a process set up for its device: that comes before megatron-core is imported."""
    from titan.distill.storage import check_storage

    check_storage(spec)
    from titan.platform.device import prepare_process, select_platform

    platform = select_platform(spec.config.cluster.device)
    prepare_process(platform)
    from titan.distill.student import StudentRank
    from titan.distill.teacher import TeacherRank

    return TeacherRank(spec, platform) if spec.role == TEACHER else StudentRank(spec, platform)
