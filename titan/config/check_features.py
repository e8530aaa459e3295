"""What settings of features may not say. Each finding is one line: setting, value, remedy."""

import math
from collections.abc import Iterator

from titan.config.distillation import FeatureLabelSettings
from titan.config.model import ModelSettings
from titan.config.settings import TEACHER, RunConfig, StudentSettings


def feature_mistakes(config: RunConfig) -> Iterator[str]:
    """Everything wrong with what is sent of features and what students ask for."""
    teacher, sent = config.teacher.model, config.labels.features
    asking = [student for student in config.students if student.distill.features.weights]
    if sent != FeatureLabelSettings() and not asking:
        yield "labels.features is set, but no student has distill.features; leave it out"
    if sent.layer is not None and teacher is not None and sent.layer >= teacher.layers:
        yield _no_layer("labels.features.layer", sent.layer, "teacher.model", teacher)
    for student in config.students:
        if student in asking:
            yield from _source_mistakes(config, student)
            if teacher is not None:
                yield from _head_mistakes(student, teacher)
        yield from _layer_mistakes(student)


def default_relation_heads(student: ModelSettings, teacher: ModelSettings) -> int:
    """The most relation heads that are made of whole heads of both models, so that no rotary pair is torn apart."""
    return math.gcd(student.heads, student.num_kv_heads, teacher.heads, teacher.num_kv_heads)


def _source_mistakes(config: RunConfig, student: StudentSettings) -> Iterator[str]:
    here = f"students.{student.name}"
    if config.teacher.log is not None:
        yield (
            f"{here}.distill.features is set, but teacher.source is {config.teacher.source!r} and a log keeps no "
            "features; leave them out, or train the teacher in this run"
        )
    elif student.teacher != TEACHER:
        yield (
            f"{here}.distill.features is set, but its teacher {student.teacher!r} sends none; leave them out, or "
            f"let it learn from {TEACHER!r}"
        )
    if student.distill.weight == 0:
        yield f"{here}.distill.features is set, but distill.weight is 0, so nothing is distilled; leave one of them out"


def _head_mistakes(student: StudentSettings, teacher: ModelSettings) -> Iterator[str]:
    """Relation heads have to divide everything that is cut into them."""
    asked = student.distill.features
    count, here = asked.relation_heads, f"students.{student.name}.distill.features.relation_heads"
    if count is None:
        return
    if not asked.relations:
        yield f"{here} is {count}, but no loss over relation heads has a weight; leave it out"
        return
    joined = next((name for name in ("key", "value") if name in asked.relations), "query")  # the narrowest
    for model, whose in ((student.model, "the student"), (teacher, "the teacher")):
        heads = model.heads if joined == "query" else model.num_kv_heads
        width = heads * (model.hidden // model.heads)
        if width % count:
            yield (
                f"{here} must divide the width of all {joined} heads of {whose} ({width}), got {count}; "
                f"try {default_relation_heads(student.model, teacher)}"
            )


def _layer_mistakes(student: StudentSettings) -> Iterator[str]:
    here, asked = f"students.{student.name}.distill", student.distill.features
    if not asked.weights:
        if student.distill.auxiliary_layer:
            yield f"{here}.auxiliary_layer is true, but distill.features has no weight to teach it; give attention one"
        for name in ("layer", "relation_heads"):
            if getattr(asked, name) is not None:
                yield f"{here}.features.{name} is set, but no loss of features has a weight; give one, or leave it out"
    elif student.distill.auxiliary_layer:
        for name in ("hint", "affinity"):
            if name in asked.weights:
                yield (
                    f"{here}.features.{name} is {asked.weights[name]:g}, but auxiliary_layer has no hidden states; "
                    "leave one of them out"
                )
        if asked.layer is not None:
            yield f"{here}.features.layer is {asked.layer}, but auxiliary_layer takes its place; leave one of them out"
    if asked.layer is not None and asked.layer >= student.model.layers:
        yield _no_layer(f"{here}.features.layer", asked.layer, f"students.{student.name}.model", student.model)


def _no_layer(name: str, layer: int, where: str, model: ModelSettings) -> str:
    return f"{name} is {layer}, but {where} has {model.layers} layers, counted from 0; try {model.layers - 1}"
