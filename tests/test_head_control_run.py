"""A student in a run keeps its control from step to step and in its checkpoint. Without Ray, one rank a role."""

import json
from pathlib import Path
from typing import Any

from tests.worlds import run_processes
from titan.checkpoint.folder import newest_step, step_folder
from titan.checkpoint.load import Checkpoint
from titan.config.load import check_config
from titan.config.settings import TEACHER, RunConfig
from titan.data.prepare import prepare_corpus
from titan.distill.build import make_rank
from titan.distill.control import ControlTracker
from titan.distill.rank import RankSpec

MODEL = {"layers": 1, "hidden": 32, "heads": 2, "ffn": 64}


def config_of(folder: Path, steps: int) -> RunConfig:
    text = folder / "text.jsonl"
    if not text.exists():
        numbers = [f"line {n} has {n * n % 97} words and {n % 7} of {n % 11} letters" for n in range(3000)]
        text.write_text("".join(json.dumps({"text": line}) + "\n" for line in numbers))
    values: dict[str, Any] = {
        "run": {"name": "r", "dir": str(folder), "steps": steps},
        "data": {"sources": [str(text)], "vocab_size": 320, "sequence_length": 32, "batch_size": 4, "workers": 1},
        "teacher": {"model": MODEL},
        "students": [{"name": "s", "model": MODEL, "distill": {"schedule": "constant"}}],
        "checkpoint": {"every_steps": 2, "keep": 9},
        "cluster": {"device": "cpu", "step_timeout_s": 30.0},
    }
    return check_config(values)


def role(config: RunConfig, name: str, corpus: Path, run: Path) -> list[tuple[float, tuple[float, float]]]:
    """The role's whole life; of each step the control it was made with and what its draws told."""
    rank = make_rank(RankSpec(config, name, 0, run, corpus))
    rank.join("127.0.0.1", rank.open_store("127.0.0.1"))
    seen, step = [], rank.trainer.step

    def watched(*args: Any, **named: Any) -> Any:
        result = step(*args, **named)
        seen.append((named.get("control", 1.0), result.tail_fit))
        return result

    rank.trainer.step = watched  # type: ignore[method-assign]
    rank.train()
    rank.leave()
    return seen


def test_a_student_learns_each_step_with_the_control_of_the_steps_before_also_after_a_restart(tmp_path: Path) -> None:
    steps = 4
    corpus = prepare_corpus(config_of(tmp_path, steps).data, tmp_path / "data")
    config, run = config_of(tmp_path, steps), tmp_path / "r"
    run.mkdir()
    run_processes([lambda: role(config, TEACHER, corpus, run)], 60.0)
    whole = run_processes([lambda: role(config, "s", corpus, run)], 60.0)[0]
    tracker = ControlTracker()
    for control, fit in whole:
        assert control == tracker.control and fit[1] > 0
        tracker.add(*fit)
    assert len(whole) == steps and whole[0][0] == 1.0 > whole[1][0] > 0
    folder = RankSpec(config, "s", 0, run, corpus).checkpoint_folder
    assert newest_step(folder) == steps
    for file in sorted(step_folder(folder, steps).iterdir()):
        file.unlink()
    step_folder(folder, steps).rmdir()
    half = Checkpoint(step_folder(folder, 2)).state["control"]
    assert half["square"] > 0
    again = run_processes([lambda: role(config, "s", corpus, run)], 60.0)[0]
    assert again == whole[2:], "the same bits after a restart"
