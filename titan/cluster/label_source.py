"""What ranks begin with: the label log that students learn from, this run's or another's, and initial weights."""

from pathlib import Path

from titan.checkpoint.folder import find_checkpoint
from titan.checkpoint.pretrained import fingerprint
from titan.config.check import would_bias
from titan.config.check_batch import codec_mistakes
from titan.config.settings import TEACHER, RunConfig
from titan.data.corpus import Corpus
from titan.distill.log.manifest import MANIFEST, check_manifest, log_manifest, sign_log
from titan.distill.log.reader import LabelReader
from titan.distill.log.records import FINISHED
from titan.distill.storage import CORPUS, init_root
from titan.errors import ConfigError, LabelError


def provide_labels(config: RunConfig, corpus: Corpus, folder: Path) -> None:
    """Make `labels/teacher` of a run folder what its students learn from. Raises LabelError if that does not fit.

    A log of the run's own is signed, or found to be signed; another run's is linked to, and stays where it is.
    """
    here = folder / "labels" / TEACHER
    if config.teacher.log is None:
        if here.is_symlink():
            raise LabelError(f"{here} is another run's log; start a new run to train a teacher")
        frozen = config.teacher.pretrained
        weights = "" if frozen is None else fingerprint(Path(frozen))
        sign_log(here, log_manifest(config, corpus, folder, TEACHER, weights=weights))
        return
    source = find_log(config, corpus)
    here.parent.mkdir(exist_ok=True)
    if here.is_symlink():
        here.unlink()  # resumed where the log has another place
    here.symlink_to(source)


def find_log(config: RunConfig, corpus: Corpus) -> Path:
    """The folder of the log that `teacher.source` names.

    Raises ConfigError if there is none, or the run asks of it what it has not; LabelError, one line a reason, if it is
    of another tokenizer, vocabulary or sequence length.
    """
    named = Path(config.teacher.log or "")
    folder = next((place for place in (named, named / "labels" / TEACHER) if (place / MANIFEST).is_file()), None)
    if folder is None:
        raise ConfigError(
            f"teacher.source is {config.teacher.source!r}, but there is no label log; give log: and the folder of a "
            "run with students, or labels/NAME in it"
        )
    found = check_manifest(folder, log_manifest(config, corpus, folder, TEACHER), "offline")
    mistakes = []
    if found.batch_size != config.data.batch_size:
        mistakes.append(f"data.batch_size is {config.data.batch_size}, the log has {found.batch_size} samples a step")
    if found.temperature != config.labels.temperature and found.codec not in ("full", "hidden"):
        mistakes.append(f"labels.temperature is {config.labels.temperature:g}, the log's is {found.temperature:g}")
    unfit = [mistake for student in config.students for mistake in codec_mistakes(config, student, found.codec)]
    if unfit:
        raise ConfigError("\n".join(unfit))
    for student in config.students:
        loss = student.distill.loss
        if would_bias(loss, found.codec):
            mistakes.append(f"students.{student.name}.distill.loss is {loss!r}, the log's labels are {found.codec!r}")
    reader = LabelReader(folder, timeout_s=0.0)
    reader.poll()
    if reader.ended is not None and reader.ended.reason == FINISHED and reader.last_committed < config.run.steps:
        mistakes.append(f"run.steps is {config.run.steps}, the log ends with step {reader.last_committed}")
    reader.close()
    if mistakes:
        raise ConfigError(
            "\n".join(f"{mistake} ({folder}); set it to fit, or name another log" for mistake in mistakes)
        )
    return folder.resolve()


def initial_weights(config: RunConfig, role: str) -> Path | None:
    """The checkpoint that a role's weights start from, of a frozen teacher its Hugging Face folder; None: at random."""
    if role == TEACHER and config.teacher.pretrained is not None:
        return Path(config.teacher.pretrained).absolute()
    named = {student.name: student.init for student in config.students}.get(role)
    return None if named is None else find_checkpoint(Path(named)).absolute()


def home_folders(config: RunConfig, corpus_folder: Path) -> dict[str, Path]:
    """What hosts that share no storage with the driver's get from there, besides the run folder, by name."""
    starts = {init_root(student.name): initial_weights(config, student.name) for student in config.students}
    return {CORPUS: corpus_folder.absolute()} | {name: folder for name, folder in starts.items() if folder is not None}
