"""What went wrong with a role: the cause among all who noticed, in one line, and whether starting again can help."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

from titan.cluster.rank_actor import RankError

RESULT_TIMEOUT_S = 30.0


class HungError(Exception):
    """A process that does not answer."""

    def __init__(self, rank: int, waited_s: float):
        super().__init__(rank, waited_s)
        self.rank, self.waited_s = rank, waited_s


@dataclass(frozen=True)
class Failure:
    """Why a role cannot go on as it is."""

    message: str
    passes: bool
    """Whether it is the kind that need not come again: a process or host that was lost, not a mistake."""
    fields: dict[str, Any] = field(default_factory=dict)
    """For the event log: role, rank, host, step, and the trace if there is one."""


def error_of(ref: Any) -> Exception | None:
    """What a finished call raised, as itself."""
    try:
        ray.get(ref, timeout=RESULT_TIMEOUT_S)
    except RayTaskError as error:
        cause: Exception = error.cause if isinstance(error.cause, Exception) else error
        return cause
    except RayError as error:
        itself: Exception = error
        return itself
    return None


def find_cause(errors: Sequence[Exception], where: Sequence[tuple[str, str, dict[str, Any]]]) -> Failure:
    """The failure behind errors of the ranks of one role.

    where: of each rank the id of its actor, where it is in words, and the same as fields
    """
    died = [error for error in errors if isinstance(error, ActorDiedError | ActorUnavailableError)]
    hung = [error for error in errors if isinstance(error, HungError)]
    own = [error for error in errors if isinstance(error, RankError) and not error.secondary]
    lost = bool(died or hung) or all(isinstance(error, RankError) and error.secondary for error in errors)
    if hung:
        _, words, fields = where[hung[0].rank]
        return Failure(f"{words}: no answer for {hung[0].waited_s:.0f} s; it hangs", lost, fields)
    for error in own:
        return Failure(str(error), lost, {**error.who, "trace": error.trace})
    for gone in died:
        for actor_id, words, fields in where:
            if getattr(gone, "actor_id", None) == actor_id:
                return Failure(f"{words}: its process was killed or crashed", lost, fields)
        return Failure(f"a rank died: {str(gone).splitlines()[0]}", lost)
    first = errors[0]
    if isinstance(first, RankError):
        return Failure(str(first), lost, {**first.who, "trace": first.trace})
    return Failure(str(first), lost)
