"""What the settings of a run ask of features: of which layers, which of them, and how much each loss counts."""

from titan.config.check_features import default_relation_heads
from titan.config.model import ModelSettings
from titan.config.settings import TEACHER, RunConfig, StudentSettings
from titan.distill.features.losses import FeatureObjective
from titan.model.auxiliary import Auxiliary
from titan.model.capture import Capture, FeatureName


def feature_objective(student: StudentSettings, teacher: ModelSettings) -> FeatureObjective | None:
    """Of a student; None if it learns nothing from features."""
    asked = student.distill.features
    if not asked.weights:
        return None
    heads = asked.relation_heads or default_relation_heads(student.model, teacher)
    return FeatureObjective(heads, **asked.weights)


def student_layer(student: StudentSettings) -> int:
    """Whose features are compared; `model.layers` is the auxiliary layer."""
    if student.distill.auxiliary_layer:
        return student.model.layers
    layer = student.distill.features.layer
    return student.model.layers - 1 if layer is None else layer


def student_auxiliary(student: StudentSettings, teacher: ModelSettings | None) -> Auxiliary | None:
    """What a student has only while it is distilled; None for nothing."""
    if teacher is None:
        return None
    hinted = bool(student.distill.features.hint) and student.model.hidden != teacher.hidden
    if not hinted and not student.distill.auxiliary_layer:
        return None
    return Auxiliary(
        layer=student.distill.auxiliary_layer,
        hint_layer=student_layer(student) if hinted else None,
        hint_width=teacher.hidden if hinted else 0,
    )


def sent_features(config: RunConfig) -> Capture | None:
    """What the teacher hands out: all that its students ask for; None if they ask for nothing."""
    teacher = config.teacher.model
    if teacher is None or config.teacher.log is not None:
        return None
    names: frozenset[FeatureName] = frozenset()
    for student in config.students:
        objective = feature_objective(student, teacher) if student.teacher == TEACHER else None
        names |= objective.names() if objective is not None else frozenset()
    layer = config.labels.features.layer
    return Capture(teacher.layers - 1 if layer is None else layer, names) if names else None
