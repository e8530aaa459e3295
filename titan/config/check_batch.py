"""What a student's own batch size does not go with. Each finding is one line: setting, value, remedy."""

from collections.abc import Iterator

from titan.config.settings import RunConfig, StudentSettings


def batch_mistakes(config: RunConfig) -> Iterator[str]:
    """Everything wrong with batches that are not the teacher's."""
    for student in config.students:
        if config.regroups(student):
            yield from _own_batch_mistakes(config, student)
            if config.teacher.log is None:  # of a log its own codec counts
                yield from codec_mistakes(config, student, config.labels.codec)


def codec_mistakes(config: RunConfig, student: StudentSettings, codec: str) -> Iterator[str]:
    """Labels of some codecs belong to their step."""
    size, step = student.batch_size or config.data.batch_size, config.data.batch_size
    if codec == "hidden" and step % size:
        yield (
            f"{_here(student)} is {size}, but labels of codec 'hidden' come with the output weight of their step, so "
            f"no batch may span two; use a divisor of data.batch_size ({step}), or another codec"
        )


def _own_batch_mistakes(config: RunConfig, student: StudentSettings) -> Iterator[str]:
    size, step = student.batch_size or 0, config.data.batch_size
    remedy = f"leave it out, for {step} as data.batch_size says"
    if config.teaches(student.name):
        yield f"{_here(student)} is {size}, but it teaches others, step by step of its own teacher; {remedy}"
    if student.distill.features.weights:
        yield f"{_here(student)} is {size}, but distill.features come step by step of its teacher; {remedy}"
    samples = (config.run.steps - (student.start.step or 0)) * step
    if size > samples > 0:
        yield f"{_here(student)} is {size}, more than all samples from its start on ({samples}); {remedy}"


def _here(student: StudentSettings) -> str:
    return f"students.{student.name}.batch_size"
