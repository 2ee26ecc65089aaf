"""The threshold rule and the calibration guarantee, over random score distributions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.errors import CalibrationError, ScreenError
from models.offline.calibrate import calibrate, clopper_pearson
from models.screen import (
    FloatArray,
    Group,
    Screen,
    conformal_threshold,
    is_poisoned,
    min_calibration_size,
)

budgets = st.sampled_from([0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5])
unit = st.floats(0.5, 1, width=32)


def confidences(minimum: int = 1, maximum: int = 400) -> st.SearchStrategy[FloatArray]:
    return st.integers(minimum, maximum).flatmap(lambda n: arrays(np.float32, n, elements=unit))


@given(scores=confidences(), confidence=unit, budget=budgets)
def test_poisoned_exactly_when_the_p_value_is_within_the_budget(
    scores: FloatArray, confidence: float, budget: float
) -> None:
    if len(scores) < min_calibration_size(budget):
        with pytest.raises(ValueError, match="needs"):
            conformal_threshold(scores, budget)
        return
    group = Group((0, 1), conformal_threshold(scores, budget), np.sort(scores))
    assert is_poisoned(confidence, group.threshold) == (group.p_value(confidence) <= budget + 1e-9)


@given(scores=confidences(), budget=budgets)
def test_no_more_calibration_texts_are_rejected_than_the_budget_allows(
    scores: FloatArray, budget: float
) -> None:
    if len(scores) >= min_calibration_size(budget):
        rejected = int((scores >= conformal_threshold(scores, budget)).sum())
        assert rejected + 1 <= budget * (len(scores) + 1) + 1e-9


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    budget=st.sampled_from([0.01, 0.05, 0.2]),
    shape=st.tuples(st.floats(0.3, 8), st.floats(0.3, 8)),
    classes=st.integers(2, 5),
)
def test_the_false_rejection_rate_stays_within_the_budget_on_average(
    seed: int, budget: float, shape: tuple[float, float], classes: int
) -> None:
    """Split conformal's promise: fresh clean texts are rejected at the budgeted rate at most."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.ones(classes))

    def draw(n: int) -> FloatArray:
        top = (0.5 + 0.5 * rng.beta(*shape, n)).astype(np.float32)
        rows = np.repeat(((1 - top) / (classes - 1))[:, None], classes, axis=1)
        rows[np.arange(n), rng.choice(classes, n, p=share)] = top
        return rows.astype(np.float32)

    rates = []
    for _ in range(40):
        screen = Screen(calibrate(draw(400), budget))
        fresh = draw(250)
        rates.append(np.mean([screen.judge(row).poisoned for row in fresh]))
    # Six standard errors of the mean: a bound that is off by one text in a class shows.
    assert np.mean(rates) <= budget + 6 * np.std(rates) / np.sqrt(len(rates)) + 1e-3


@given(
    rows=arrays(
        np.float32,
        st.tuples(st.integers(100, 300), st.integers(2, 6)),
        elements=st.floats(0, 1, width=32),
    )
)
def test_groups_partition_the_classes_and_each_keeps_the_budget(rows: FloatArray) -> None:
    groups = calibrate(rows, 0.05)
    assert sorted(c for g in groups for c in g.classes) == list(range(rows.shape[1]))
    assert sum(len(g.scores) for g in groups) == len(rows)
    assert all(len(g.scores) >= min_calibration_size(0.05) for g in groups)


def test_one_threshold_per_class_and_small_classes_pooled() -> None:
    rng = np.random.default_rng(0)
    rows = np.zeros((260, 4), np.float32)
    predicted = np.r_[np.zeros(120, int), np.ones(120, int), np.full(12, 2), np.full(8, 3)]
    rows[np.arange(260), predicted] = rng.uniform(0.5, 1, 260)
    groups = calibrate(rows, 0.1)
    assert [g.classes for g in groups] == [(0,), (1,), (2, 3)]
    groups = calibrate(rows, 0.01)
    assert [g.classes for g in groups] == [(1,), (0, 2, 3)]


def test_too_few_texts_say_how_many_are_needed() -> None:
    with pytest.raises(CalibrationError, match="needs 99"):
        calibrate(np.full((98, 2), 0.5, np.float32), 0.01)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_no_number_is_never_clean(bad: float) -> None:
    screen = Screen([Group((0, 1), 0.9, np.array([0.5], np.float32))])
    with pytest.raises(ScreenError):
        screen.judge(np.array([bad, 0.5], np.float32))
    with pytest.raises(ScreenError):
        screen.judge(np.array([1.0], np.float32))


def test_the_rule_at_the_threshold_itself() -> None:
    screen = Screen([Group((0, 1), float(np.float32(0.7)), np.array([0.5], np.float32))])
    assert screen.judge(np.array([0.7, 0.3], np.float32)).poisoned
    assert not screen.judge(np.array([np.nextafter(np.float32(0.7), 0), 0.3], np.float32)).poisoned


@given(n=st.integers(1, 500), data=st.data())
def test_clopper_pearson_contains_the_rate(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    low, high = clopper_pearson(k, n)
    assert 0 <= low <= k / n <= high <= 1


def test_clopper_pearson_agrees_with_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81/263 and 0/20.
    assert clopper_pearson(81, 263) == pytest.approx((0.2527, 0.3676), abs=1e-4)
    assert clopper_pearson(0, 20) == pytest.approx((0.0, 0.1684), abs=1e-4)


def test_groups_must_cover_every_class_once() -> None:
    scores = np.array([0.5], np.float32)
    for groups in ([(0,), (0,)], [(0,), (2,)], [(0, 1), (1,)]):
        with pytest.raises(ValueError, match="each once"):
            Screen([Group(c, 0.9, scores) for c in groups])


def test_one_threshold_for_all_classes_is_there_for_comparison() -> None:
    top = np.linspace(0.5, 0.99, 400, dtype=np.float32)
    rows = np.stack([top, 1 - top], 1)
    rows[::2] = rows[::2, ::-1]
    (group,) = calibrate(rows, 0.05, by_class=False)
    assert group.classes == (0, 1)
    assert group.threshold == conformal_threshold(top, 0.05)
    assert len(calibrate(rows, 0.05)) == 2
