"""How much labels count: weights follow the measured lead, a ramp, or nothing."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan.config.distillation import DistillSettings
from titan.distill.lead import LeadTracker, distillation_weight


def brute_lead(pairs: list[tuple[float, float]]) -> float:
    """Weighted mean with weights 0.95^age."""
    weights = [0.95 ** (len(pairs) - 1 - index) for index in range(len(pairs))]
    return sum(w * (student - teacher) for w, (teacher, student) in zip(weights, pairs, strict=True)) / sum(weights)


@given(st.lists(st.tuples(st.floats(0, 12), st.floats(0, 12)), min_size=1, max_size=60))
def test_the_lead_is_the_mean_difference_of_losses_with_recent_steps_counting_most(
    pairs: list[tuple[float, float]],
) -> None:
    tracker = LeadTracker()
    assert tracker.lead == 0.0
    for teacher, student in pairs:
        tracker.add(teacher, student)
    assert tracker.lead == pytest.approx(brute_lead(pairs), abs=1e-9)


def test_a_constant_schedule_has_one_weight() -> None:
    constant = DistillSettings(weight=0.7, schedule="constant")
    assert {distillation_weight(constant, lead, step, 100) for lead in (-1.0, 0.0, 2.0) for step in (1, 100)} == {0.7}


def test_a_ramp_rises_linearly_to_its_weight_and_stays() -> None:
    ramp = DistillSettings(weight=0.8, schedule="ramp", ramp_fraction=0.5)
    weights = [distillation_weight(ramp, 5.0, step, 100) for step in range(1, 101)]
    np.testing.assert_allclose(weights, [0.8 * min(1.0, step / 50) for step in range(1, 101)])
    assert weights[24] == pytest.approx(0.4) and weights[49] == weights[99] == 0.8


def test_warm_up_stable_decay_rises_stays_and_falls_to_nothing() -> None:
    wsd = DistillSettings(weight=0.5, schedule="wsd", ramp_fraction=0.1, decay_fraction=0.4)
    weights = [distillation_weight(wsd, 5.0, step, 100) for step in range(1, 101)]
    np.testing.assert_allclose(weights[:10], np.arange(1, 11) * 0.05)
    assert set(weights[9:60]) == {0.5}
    np.testing.assert_allclose(weights[60:], 0.5 * np.arange(39, -1, -1) / 40)


@given(st.floats(-20, 20))
def test_a_weight_by_lead_follows_it_between_nothing_and_the_whole(lead: float) -> None:
    by_lead = DistillSettings(weight=0.9, schedule="lead", full_lead=0.3)
    weight = distillation_weight(by_lead, lead, 1, 10)
    assert 0.0 <= weight <= 0.9
    if lead <= 0:
        assert weight == 0.0
    elif lead >= 0.3:
        assert weight == 0.9
    else:
        assert weight == pytest.approx(3.0 * lead)


def test_a_control_never_looks_at_labels() -> None:
    for schedule in ("lead", "constant", "ramp", "wsd"):
        assert distillation_weight(DistillSettings(weight=0.0, schedule=schedule), 3.0, 9, 10) == 0.0
    assert math.isfinite(distillation_weight(DistillSettings(schedule="ramp"), 0.0, 1, 1))
