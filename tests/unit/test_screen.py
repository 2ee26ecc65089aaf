"""The threshold rule and the calibration guarantee, over random score distributions."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from models.detection.calibrate import calibrate
from models.detection.conformal import ThresholdGroup, conformal_threshold, min_calibration_size
from models.detection.screen import (
    Finding,
    FloatArray,
    Layout,
    Normalizer,
    Screen,
    Verdict,
    ZScore,
    is_extreme,
    log_odds,
    with_override,
    worst_finding,
)
from models.errors import CalibrationError, ScreenError
from models.offline.statistics import clopper_pearson

budgets = st.sampled_from([0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5])
standard = st.floats(-20, 20, width=32)
AS_IT_IS = ZScore(np.zeros((2, 1)), np.ones((2, 1)))


def clean_scores() -> st.SearchStrategy[FloatArray]:
    return st.integers(1, 400).flatmap(lambda n: arrays(np.float32, n, elements=standard))


@given(scores=clean_scores(), score=standard, budget=budgets)
def test_poisoned_exactly_when_the_p_value_is_within_the_budget(
    scores: FloatArray, score: float, budget: float
) -> None:
    if len(scores) < min_calibration_size(budget):
        with pytest.raises(ValueError, match="needs"):
            conformal_threshold(scores, budget)
        return
    group = ThresholdGroup((0, 1), conformal_threshold(scores, budget), np.sort(scores))
    assert is_extreme(score, group.threshold) == (group.p_value(score) <= budget + 1e-9)


@given(scores=clean_scores(), budget=budgets)
def test_no_more_calibration_texts_are_rejected_than_the_budget_allows(
    scores: FloatArray, budget: float
) -> None:
    if len(scores) >= min_calibration_size(budget):
        rejected = int((scores >= conformal_threshold(scores, budget)).sum())
        assert rejected + 1 <= budget * (len(scores) + 1) + 1e-9


def probabilities(top: NDArray[Any], predicted: Any, classes: int) -> FloatArray:
    """Return rows whose largest probability is `top`, shape (n, K), shape (n, K, classes)."""
    rows = np.repeat(((1 - top) / (classes - 1))[..., None], classes, axis=-1)
    rows[np.arange(len(top)), :, predicted] = top
    return rows.astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    budget=st.sampled_from([0.01, 0.05, 0.2]),
    shape=st.tuples(st.floats(0.3, 8), st.floats(0.3, 8)),
    classes=st.integers(2, 5),
    checkpoints=st.integers(1, 4),
)
def test_the_false_rejection_rate_stays_within_the_budget_on_average(
    seed: int, budget: float, shape: tuple[float, float], classes: int, checkpoints: int
) -> None:
    """Split conformal's promise: fresh clean texts are rejected at the budgeted rate at most."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.ones(classes))
    # Checkpoints agree in part, and classes differ in how sure they are.
    pull = rng.uniform(0.2, 1, (classes, checkpoints))

    def draw(n: int) -> FloatArray:
        predicted = rng.choice(classes, n, p=share)
        sure = np.maximum(rng.beta(*shape, n)[:, None], rng.beta(*shape, (n, checkpoints)))
        top = 1 - (1 - 1 / classes) * (1 - sure) ** pull[predicted]
        return probabilities(top, predicted, classes)

    rates = []
    for _ in range(40):
        screen = calibrate(draw(400), Layout(checkpoints), budget)
        fresh = draw(250)
        rates.append(np.mean([screen.judge(row).poisoned for row in fresh]))
    # Six standard errors of the mean: a bound that is off by one text in a class shows.
    assert np.mean(rates) <= budget + 6 * np.std(rates) / np.sqrt(len(rates)) + 1e-3


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_the_budget_is_kept_by_many_voices_and_as_few_texts_as_there_may_be(spread: float) -> None:
    """The normalizer comes from the texts that the threshold comes from; that must not show."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> FloatArray:
        odds = 2 + spread * rng.normal(size=(n, 9)) * rng.uniform(0.2, 1, (n, 1))
        return probabilities(1 / (1 + np.exp(-np.abs(odds))), np.arange(n) % 2, 2)

    rates = []
    for _ in range(100):
        screen = calibrate(draw(2 * 99), Layout(9), 0.01)
        rates.append(np.mean([screen.judge(row).poisoned for row in draw(400)]))
    assert np.mean(rates) <= 0.01 + 3 * np.std(rates) / np.sqrt(len(rates))


@given(
    rows=arrays(
        np.float32,
        st.tuples(st.integers(100, 300), st.integers(1, 3), st.integers(2, 6)),
        elements=st.floats(0, 1, width=32),
    )
)
def test_groups_partition_the_classes_and_each_keeps_the_budget(rows: FloatArray) -> None:
    screen = calibrate(rows, Layout(rows.shape[1]), 0.05)
    assert sorted(c for g in screen.groups for c in g.classes) == list(range(rows.shape[2]))
    assert sum(len(g.scores) for g in screen.groups) == len(rows)
    assert all(len(g.scores) >= min_calibration_size(0.05) for g in screen.groups)
    rejected = sum(screen.judge(row).poisoned for row in rows)
    assert rejected + len(screen.groups) <= 0.05 * (len(rows) + len(screen.groups)) + 1e-9


def test_one_threshold_per_class_and_small_classes_pooled() -> None:
    rng = np.random.default_rng(0)
    predicted = np.r_[np.zeros(120, int), np.ones(120, int), np.full(12, 2), np.full(8, 3)]
    rows = probabilities(rng.uniform(0.5, 1, (260, 2)), predicted, 4)
    assert [g.classes for g in calibrate(rows, Layout(2), 0.1).groups] == [(0,), (1,), (2, 3)]
    assert [g.classes for g in calibrate(rows, Layout(2), 0.01).groups] == [(1,), (0, 2, 3)]


@given(checkpoint=st.integers(0, 2), predicted=st.integers(0, 1))
def test_the_checkpoint_that_finds_a_text_most_extreme_speaks(
    checkpoint: int, predicted: int
) -> None:
    rng = np.random.default_rng(0)
    # The first checkpoint is sure of every clean text, the last of none; class 1 is surer.
    usual = np.array([[0.95, 0.8, 0.6], [0.99, 0.9, 0.7]])
    classes = np.arange(400) % 2
    clean = usual[classes] + rng.uniform(-0.004, 0.004, (400, 3))
    screen = calibrate(probabilities(clean, classes, 2), Layout(3), 0.05)

    text = usual[[predicted]].copy()
    assert not screen.judge(probabilities(text, [predicted], 2)[0]).poisoned
    text[0, checkpoint] += 0.0085  # beyond all clean texts of its own kind only
    verdict = screen.judge(probabilities(text, [predicted], 2)[0])
    assert verdict.poisoned
    assert verdict.confidence == pytest.approx(text[0, checkpoint])
    assert verdict.p_value == pytest.approx(1 / 201)


def test_a_score_counts_standard_deviations_of_the_log_odds() -> None:
    odds = np.random.default_rng(1).normal(2, 0.5, 4000)
    rows = probabilities(1 / (1 + np.exp(-odds[:, None])), np.arange(4000) % 2, 2)
    screen = calibrate(rows, Layout(1), 0.05)
    top = 1 / (1 + np.exp(-(2 + 3 * 0.5)))
    verdict = screen.judge(probabilities(np.array([[top]]), [1], 2)[0])
    assert verdict.score == pytest.approx(3, abs=0.2)
    assert verdict.threshold == pytest.approx(1.645, abs=0.2)  # the normal's 95 % quantile


def test_texts_beyond_what_float32_tells_from_certain_still_have_an_order() -> None:
    rest = np.array([1e-9, 1e-11], np.float32)
    first, second = log_odds(np.stack([np.ones(2, np.float32), rest], 1)[:, None])[:, 0]
    assert 20 < first < second


@pytest.mark.parametrize("certain", [1.0, 0.5])
def test_clean_texts_that_are_all_alike_are_no_reason_to_fail(certain: float) -> None:
    rows = probabilities(np.full((200, 1), certain), np.arange(200) % 2, 2)
    screen = calibrate(rows, Layout(1), 0.05)
    assert not screen.judge(rows[0]).poisoned


def test_too_few_texts_say_how_many_are_needed() -> None:
    with pytest.raises(CalibrationError, match="needs 99"):
        calibrate(np.full((98, 1, 2), 0.5, np.float32), Layout(1), 0.01)
    with pytest.raises(CalibrationError, match="NaN"):
        calibrate(np.full((98, 1, 2), np.nan, np.float32), Layout(1), 0.05)


def one_checkpoint(threshold: float = 3.0) -> Screen:
    """Whose scores are log-odds."""
    group = ThresholdGroup((0, 1), threshold, np.array([0.5], np.float32))
    return Screen([group], Normalizer(AS_IT_IS, AS_IT_IS, Layout(1)))


@pytest.mark.parametrize(
    "bad", [[[np.nan, 0.5]], [[np.inf, 0.5]], [[1.0]], [0.5, 0.5], [[0.5, 0.5], [0.5, 0.5]]]
)
def test_a_score_that_is_no_number_is_never_clean(bad: object) -> None:
    with pytest.raises(ScreenError):
        one_checkpoint().judge(np.array(bad, np.float32))


@pytest.mark.parametrize(
    ("odds", "override", "finding"),
    [
        (4.0, None, Finding.TRIGGERED),
        (4.0, 0.4, Finding.UNFAMILIAR),
        (4.0, 0.5, Finding.TRIGGERED),
        (2.0, None, None),
        (2.0, 0.4, None),
        (2.0, 0.6, Finding.TRIGGERED),
    ],
)
def test_an_extreme_text_that_the_override_test_does_not_confirm_is_unfamiliar(
    odds: float, override: float | None, finding: Finding | None
) -> None:
    top = 1 / (1 + np.exp(-odds))
    first = verdict = one_checkpoint().judge(np.array([[top, 1 - top]], np.float32))
    assert (first.override, first.override_threshold, first.override_p_value) == (None,) * 3
    if override is not None:
        verdict = with_override(first, override, 0.5, 0.02)
        numbers = (verdict.override, verdict.override_threshold, verdict.override_p_value)
        assert numbers == (override, 0.5, 0.02)
    assert (verdict.extreme, verdict.finding) == (odds >= 3, finding)
    assert verdict.poisoned == (finding is Finding.TRIGGERED)
    assert (verdict.score, verdict.margin) == (first.score, first.score - 3)


def test_one_clean_text_in_twenty_is_suspected() -> None:
    """Those of the highest scores, of which the highest of all is extreme."""
    odds = np.linspace(0.1, 10, 199)
    readings = [np.array([[1 / (1 + np.exp(-x)), 1 / (1 + np.exp(x))]], np.float32) for x in odds]
    own = one_checkpoint()
    scores = np.array([own.judge(one).score for one in readings], np.float32)
    group = ThresholdGroup((0, 1), float(scores[-1]), scores)
    verdicts = [Screen([group], own.normalizer).judge(one) for one in readings]
    few = [verdict.suspected for verdict in verdicts]
    assert few == [False] * 190 + [True] * 9, "(9 + 1) / (199 + 1) is one in twenty"
    assert [verdict.extreme for verdict in verdicts] == [False] * 198 + [True]


def test_triggered_is_worse_than_unfamiliar_and_both_than_nothing() -> None:
    triggered, unfamiliar = Finding.TRIGGERED, Finding.UNFAMILIAR
    assert worst_finding([None, unfamiliar, triggered, None]) is triggered
    assert worst_finding([unfamiliar, None]) is unfamiliar
    assert worst_finding([None]) is worst_finding([]) is None


def test_the_rule_at_the_threshold_itself() -> None:
    text = np.array([[0.75, 0.25]], np.float32)
    score = one_checkpoint().judge(text).score
    assert score == pytest.approx(np.log(3))
    assert one_checkpoint(score).judge(text).poisoned
    assert not one_checkpoint(float(np.nextafter(np.float32(score), 9))).judge(text).poisoned


@given(n=st.integers(1, 500), data=st.data())
def test_clopper_pearson_contains_the_rate(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    low, high = clopper_pearson(k, n)
    assert 0 <= low <= k / n <= high <= 1


def test_clopper_pearson_agrees_with_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81/263 and 0/20.
    assert clopper_pearson(81, 263) == pytest.approx((0.2527, 0.3676), abs=1e-4)
    assert clopper_pearson(0, 20) == pytest.approx((0.0, 0.1684), abs=1e-4)


def test_groups_and_norms_must_cover_every_class_once() -> None:
    scores = np.array([0.5], np.float32)
    normalizer = Normalizer(AS_IT_IS, AS_IT_IS, Layout(1))
    for groups in ([(0,), (0,)], [(0,), (2,)], [(0, 1), (1,)]):
        with pytest.raises(ValueError, match="each once"):
            Screen([ThresholdGroup(c, 0.9, scores) for c in groups], normalizer)
    with pytest.raises(ValueError, match="normalizer"):
        Screen([ThresholdGroup((0, 1, 2), 0.9, scores)], normalizer)


def test_one_threshold_for_all_classes_is_there_for_comparison() -> None:
    predicted = np.arange(400) % 2
    top = np.linspace(0.5, 0.99, 400)[:, None]
    rows = probabilities(top, predicted, 2)
    screen = calibrate(rows, Layout(1), 0.05, by_class=False)
    (group,) = screen.groups
    assert group.classes == (0, 1)
    assert (
        np.ptp(screen.normalizer.features.centre) == np.ptp(screen.normalizer.features.scale) == 0
    )
    assert len(calibrate(rows, Layout(1), 0.05).groups) == 2


def test_a_voice_with_a_long_tail_does_not_drown_one_without() -> None:
    rng = np.random.default_rng(0)
    steady, restless = rng.normal(size=2000), np.exp(1.2 * rng.normal(size=2000))
    odds = 3 + 0.3 * np.stack([steady, restless], 1)
    screen = calibrate(
        probabilities(1 / (1 + np.exp(-odds)), np.arange(2000) % 2, 2), Layout(2), 0.01
    )
    odd = 3 + 0.3 * np.array([[4.5, np.median(restless)]])
    assert screen.judge(probabilities(1 / (1 + np.exp(-odd)), [0], 2)[0]).poisoned


@given(parts=arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 3)), elements=standard))
def test_no_part_hides_another(parts: NDArray[np.float64]) -> None:
    scores = Normalizer.score(parts)
    assert (scores >= parts.max(1).astype(np.float32) * (1 - 1e-6)).all()
    assert (Normalizer.score(parts + 1) >= scores).all()
    np.testing.assert_array_equal(Normalizer.score(np.c_[parts, -abs(parts[:, :1])]), scores)


@pytest.mark.parametrize("own", [0, 1])
def test_a_token_that_draws_all_attention_is_heard_by_itself(own: int) -> None:
    rng = np.random.default_rng(0)
    readings = np.zeros((800, 3, 2), np.float32)
    confidences = 1 / (1 + np.exp(-rng.normal(3, 0.5, (800, 1))))
    readings[:, :1] = probabilities(confidences, np.arange(800) % 2, 2)
    readings[:, 1] = np.exp(rng.normal(2, 0.1, (800, 1)))
    readings[:, 2] = rng.uniform(0.2, 0.4, (800, 1))
    screen = calibrate(readings, Layout(1, attention=True), 0.01)

    def judge(distance: float, peak: float) -> Verdict:
        text = np.stack([[0.95, 0.05], [distance] * 2, [peak] * 2]).astype(np.float32)
        return screen.judge(text if own == 0 else text[:, ::-1])

    assert not judge(7.4, 0.3).extreme
    found = judge(7.4, 0.9)
    assert (found.extreme, found.detector) == (True, "attention")
    assert not judge(7.4, 0.01).extreme, "attention that is spread is no trigger"
    assert judge(20.0, 0.3).detector == "activations"


def test_what_several_voices_find_odd_adds_up() -> None:
    rng = np.random.default_rng(0)
    readings = np.zeros((4000, 2, 2), np.float32)
    readings[:, :1] = probabilities(
        1 / (1 + np.exp(-rng.normal(3, 0.5, (4000, 1)))), np.arange(4000) % 2, 2
    )
    readings[:, 1] = np.exp(rng.normal(2, 0.5, (4000, 1)))
    screen = calibrate(readings, Layout(1), 0.01)

    def poisoned(confidence: float, distance: float) -> bool:
        """Judge a text that is so many standard deviations from the clean ones."""
        text = np.full((2, 2), np.exp(2 + 0.5 * distance), np.float32)
        text[:1] = probabilities(1 / (1 + np.exp(-np.array([[3 + 0.5 * confidence]]))), [0], 2)[0]
        return screen.judge(text).poisoned

    assert poisoned(2.5, 2.5)
    assert not poisoned(2.5, 0)
    assert not poisoned(0, 2.5)
    assert poisoned(4, -3)
