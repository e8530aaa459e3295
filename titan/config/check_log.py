"""What settings of the label log and of slow students may not say. Each finding is one line: setting, value, remedy."""

from collections.abc import Iterator

from titan.config.distillation import LabelSettings
from titan.config.settings import TEACHER, RunConfig, StudentSettings

FILES_OF_A_LOG = 8
"""How many files a limited log is made of at least, in each replica that writes."""


def log_mistakes(config: RunConfig) -> Iterator[str]:
    """Everything wrong with how much of a log is kept, where, and with who may pause whom."""
    labels, default = config.labels, LabelSettings()
    if any(config.teaches(role) for role in config.roles):
        yield from _limit_mistakes(config)
    else:
        for name in ("keep", "max_bytes", "when_full", "segment_bytes", "copy_to"):
            if getattr(labels, name) != getattr(default, name):
                yield f"labels.{name} is set, but this run writes no label log; leave it out"
    for student in config.students:
        yield from _slow_mistakes(config, student)
    if _somebody_waits(config) and labels.wait_s >= config.cluster.step_timeout_s:
        yield (
            f"labels.wait_s is {labels.wait_s:g}, and cluster.step_timeout_s {config.cluster.step_timeout_s:g}: the "
            "other students would give up before the pause is over; make labels.wait_s smaller"
        )


def log_segment_bytes(labels: LabelSettings, writers: int) -> int:
    """Size of a file of a log that so many replicas write: a limited log has several, or no old one could go."""
    if labels.max_bytes is None:
        return labels.segment_bytes
    return min(labels.segment_bytes, labels.max_bytes // (FILES_OF_A_LOG * writers))


def _somebody_waits(config: RunConfig) -> bool:
    bounded = config.labels.max_bytes is not None or config.recovery.min_free_bytes > 0
    full = bounded and config.labels.when_full == "wait"
    return full or any(student.backpressure == "wait" for student in config.students)


def _limit_mistakes(config: RunConfig) -> Iterator[str]:
    labels = config.labels
    if labels.keep == "needed" and not config.students:
        yield "labels.keep is 'needed', but no student of this run learns from its log; set it to 'all'"
    if labels.max_bytes is None and not config.recovery.min_free_bytes:
        if labels.when_full != "drop":
            yield (
                f"labels.when_full is {labels.when_full!r}, but labels.max_bytes is absent, and so is "
                "recovery.min_free_bytes; set one of them, or leave all out"
            )
        return
    if labels.when_full == "wait" and labels.keep == "all" and labels.max_bytes is not None:
        yield (
            "labels.when_full is 'wait' and labels.keep is 'all', so no student could ever make room; set labels.keep "
            "to 'needed'"
        )
    if labels.when_full == "drop":
        for student in config.students:
            if config.teaches(student.name):
                yield (
                    f"labels.when_full is 'drop', but {student.name} teaches others and cannot leave out a step; "
                    "set it to 'wait' or 'stop'"
                )
    if labels.max_bytes is None:
        return
    least = _step_bytes(config)
    steps = labels.max_bytes // least
    wanted = config.checkpoint.every_steps
    held = max((config.steps_in_hand(student) for student in config.students), default=0)
    if labels.when_full == "wait" and steps <= 2 * wanted + held:
        yield (
            f"labels.max_bytes is {labels.max_bytes}, room for {steps} steps, but students make room only every "
            f"{wanted} steps (checkpoint.every_steps); allow at least {(3 * wanted + held) * least}, or save more often"
        )


def _step_bytes(config: RunConfig) -> int:
    """At least so many bytes does a step take."""
    labels, data = config.labels, config.data
    tokens = data.batch_size * data.sequence_length
    budget = labels.bytes_per_token if labels.codec in ("sampled", "top_k") else None
    return max(1, int(tokens * (budget or 1.0)))


def _slow_mistakes(config: RunConfig, student: StudentSettings) -> Iterator[str]:
    here, how = f"students.{student.name}", student.backpressure
    if how == "spill":
        if student.max_lag is not None:
            yield (
                f"{here}.max_lag is {student.max_lag}, but backpressure 'spill' has no bound; set it to 'skip' or "
                "'wait', or leave max_lag out"
            )
        return
    if student.max_lag is None:
        yield f"{here}.backpressure is {how!r}, which needs {here}.max_lag; say how many steps behind is too far"
    if how == "skip" and config.teaches(student.name):
        yield f"{here}.backpressure is 'skip', but it teaches others and cannot leave out a step; set it to 'wait'"
    if how == "wait" and student.teacher == TEACHER and config.teacher.log is not None:
        yield (
            f"{here}.backpressure is 'wait', but teacher.source is {config.teacher.source!r}, and another run's "
            "teacher waits for nobody; set it to 'spill' or 'skip'"
        )
