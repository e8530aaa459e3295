"""Which label logs a command is about."""

from pathlib import Path

from titan.errors import LabelError
from titan.observe.files import require_run_folder


def label_folders(run: Path, producer: str | None = None) -> list[Path]:
    """Logs of a run. Raises LabelError if it has none, or none of that role."""
    require_run_folder(run)
    folders = sorted(path for path in (run / "labels").glob("*") if path.is_dir())
    if not folders:
        raise LabelError(f"{run} has no labels: none of its students learn from a teacher, or it has not started")
    chosen = [folder for folder in folders if producer in (None, folder.name)]
    if not chosen:
        names = ", ".join(folder.name for folder in folders)
        raise LabelError(f"--producer {producer}: {run} has logs of {names}")
    return chosen


def only_log(run: Path, producer: str | None = None) -> Path:
    """The log of a run. Raises LabelError if it has none, or several to choose from."""
    folders = label_folders(run, producer)
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise LabelError(f"{run} has logs of {names}; choose one with --producer")
    return folders[0]
