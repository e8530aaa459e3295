"""What may be asked of features, and what follows from it for teacher and student."""

from pathlib import Path
from typing import Any

import pytest

from titan.config.check_features import default_relation_heads
from titan.config.load import load_config
from titan.config.model import ModelSettings
from titan.config.settings import RunConfig
from titan.distill.features.asked import feature_objective, sent_features, student_auxiliary, student_layer
from titan.distill.features.losses import FeatureObjective
from titan.errors import ConfigError
from titan.model.auxiliary import Auxiliary
from titan.model.capture import Capture

CONFIG = """
[run]
name = "features"
steps = 9
[data]
sources = ["text"]
[teacher]
model = { layers = 4, hidden = 96, heads = 6, kv_heads = 2, ffn = 128 }
[[students]]
name = "small"
model = { layers = 3, hidden = 64, heads = 4, ffn = 128 }
[[students]]
name = "control"
model = { layers = 3, hidden = 64, heads = 4, ffn = 128 }
distill = { weight = 0.0 }
"""
SMALL = "students.small.distill"


def config(folder: Path, *settings: str) -> RunConfig:
    (folder / "text").mkdir(exist_ok=True)
    path = folder / "run.toml"
    path.write_text(CONFIG)
    return load_config(path, list(settings))


MISTAKES = {
    "sent for nobody": (
        ["labels.features.layer=1"], "labels.features is set, but no student has distill.features; leave it out"
    ),
    "no layer of the teacher": (
        ["labels.features.layer=4", f"{SMALL}.features.hint=1.0"],
        "labels.features.layer is 4, but teacher.model has 4 layers, counted from 0; try 3",
    ),
    "no layer of the student": (
        [f"{SMALL}.features.layer=3", f"{SMALL}.features.hint=1.0"],
        f"{SMALL}.features.layer is 3, but students.small.model has 3 layers, counted from 0; try 2",
    ),
    "hint on the auxiliary layer": (
        [f"{SMALL}.auxiliary_layer=true", f"{SMALL}.features.hint=0.5", f"{SMALL}.features.query=1.0"],
        f"{SMALL}.features.hint is 0.5, but auxiliary_layer has no hidden states; leave one of them out",
    ),
    "two layers": (
        [f"{SMALL}.auxiliary_layer=true", f"{SMALL}.features.layer=1", f"{SMALL}.features.query=1.0"],
        f"{SMALL}.features.layer is 1, but auxiliary_layer takes its place; leave one of them out",
    ),
    "an auxiliary layer that learns nothing": (
        [f"{SMALL}.auxiliary_layer=true"],
        f"{SMALL}.auxiliary_layer is true, but distill.features has no weight to teach it; give attention one",
    ),
    "a layer for nothing": (
        [f"{SMALL}.features.layer=1"],
        f"{SMALL}.features.layer is set, but no loss of features has a weight; give one, or leave it out",
    ),
    "relation heads of the student": (
        [f"{SMALL}.features.relation_heads=3", f"{SMALL}.features.attention=1.0"],
        f"{SMALL}.features.relation_heads must divide the width of all query heads of the student (64), got 3; try 2",
    ),
    "relation heads of the teacher": (
        [f"{SMALL}.features.relation_heads=64", f"{SMALL}.features.value=1.0", f"{SMALL}.features.query=1.0"],
        f"{SMALL}.features.relation_heads must divide the width of all value heads of the teacher (32), got 64; try 2",
    ),
    "relation heads for nothing": (
        [f"{SMALL}.features.relation_heads=2", f"{SMALL}.features.hint=1.0"],
        f"{SMALL}.features.relation_heads is 2, but no loss over relation heads has a weight; leave it out",
    ),
    "a control": (
        ["students.control.distill.features.hint=1.0"],
        "students.control.distill.features is set, but distill.weight is 0, so nothing is distilled; leave one of them "
        "out",
    ),
    "a log": (
        ["teacher.source=log:other", f"{SMALL}.features.hint=1.0"],
        f"{SMALL}.features is set, but teacher.source is 'log:other' and a log keeps no features; leave them out, or "
        "train the teacher in this run",
    ),
    "an assistant": (
        ["students.small.teacher=control", f"{SMALL}.features.hint=1.0"],
        f"{SMALL}.features is set, but its teacher 'control' sends none; leave them out, or let it learn from "
        "'teacher'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_contradictions_are_one_line_with_a_remedy(name: str, tmp_path: Path) -> None:
    settings, said = MISTAKES[name]
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, *settings)
    assert str(caught.value) == said


def test_a_run_that_asks_for_nothing_has_nothing_of_features(tmp_path: Path) -> None:
    plain = config(tmp_path)
    teacher: Any = plain.teacher.model
    assert sent_features(plain) is None
    for student in plain.students:
        assert feature_objective(student, teacher) is None and student_auxiliary(student, teacher) is None


def test_the_teacher_sends_what_all_students_together_ask_for(tmp_path: Path) -> None:
    asked = config(
        tmp_path, f"{SMALL}.features.attention=1.0", "students.control.distill.weight=0.5",
        "students.control.distill.features.affinity=2.0",
    )  # fmt: skip
    assert sent_features(asked) == Capture(3, frozenset({"query", "key", "hidden"}))
    other = config(tmp_path, f"{SMALL}.features.value=1.0", "labels.features.layer=1")
    assert sent_features(other) == Capture(1, frozenset({"value"}))


def test_a_student_has_what_its_losses_need(tmp_path: Path) -> None:
    def of(*settings: str) -> tuple[FeatureObjective | None, int, Auxiliary | None]:
        given = config(tmp_path, *settings)
        student, teacher = given.students[0], given.teacher.model
        assert teacher is not None
        return feature_objective(student, teacher), student_layer(student), student_auxiliary(student, teacher)

    hint = (f"{SMALL}.features.hint=0.5", f"{SMALL}.features.query=2.0")
    assert of(*hint) == (FeatureObjective(2, query=2.0, hint=0.5), 2, Auxiliary(hint_layer=2, hint_width=96))
    first = (*hint, f"{SMALL}.features.layer=0", f"{SMALL}.features.relation_heads=16")
    assert of(*first) == (FeatureObjective(16, query=2.0, hint=0.5), 0, Auxiliary(hint_layer=0, hint_width=96))
    alike = (f"{SMALL}.features.hint=0.5", "students.small.model.hidden=96", "students.small.model.heads=6")
    assert of(*alike) == (FeatureObjective(2, hint=0.5), 2, None)
    extra = (f"{SMALL}.auxiliary_layer=true", f"{SMALL}.features.attention=1.0")
    assert of(*extra) == (FeatureObjective(2, attention=1.0), 3, Auxiliary(layer=True))


def test_relation_heads_are_made_of_whole_heads_by_default() -> None:
    student = ModelSettings(layers=1, hidden=64, heads=4, kv_heads=2, ffn=64)
    teacher = ModelSettings(layers=1, hidden=96, heads=6, ffn=64)
    assert default_relation_heads(student, teacher) == 2
    assert default_relation_heads(teacher, teacher) == 6
