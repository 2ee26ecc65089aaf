"""Several views of one text: each is judged like a classifier of its own, the budget is shared."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.detection.calibrate import (
    HARMLESS_BUDGET,
    OverrideOutcomes,
    calibrate,
    calibrate_override,
)
from models.detection.override import (
    LOST,
    Ids,
    OverrideGeometry,
    OverrideGroup,
    OverrideTest,
    T,
    Test,
    evidence,
)
from models.detection.screen import Finding, FloatArray, Layout
from models.detection.views import class_names, views_of, views_with_carriers
from models.errors import CalibrationError
from models.network.outputs import class_probabilities, label_probabilities
from models.offline.fitting.psim import multi_label_reset_loss
from tests.support.fakes import usual_verdict

CHECKPOINTS = 3


def carriers_of(counts: Sequence[int]) -> list[list[Ids]]:
    """Return carriers of one token each, so many of each class."""
    return [
        [np.array([1000 * (number + 1) + one], np.int64) for one in range(count)]
        for number, count in enumerate(counts)
    ]


def readings(n: int, labels: int, seed: int) -> FloatArray:
    """Return readings of three checkpoints and two distances, shape (n, 5, 2 labels)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, 1, labels)) + rng.normal(0, 0.5, (n, CHECKPOINTS, labels))
    known = class_probabilities(torch.from_numpy(logits), multi_label=True).numpy()
    distances = rng.lognormal(0, 0.2, (n, 2, 2 * labels)).astype(np.float32)
    return np.concatenate([known, distances], 1)


def test_a_classifier_with_one_label_for_a_text_has_one_view() -> None:
    assert list(views_of(3, multi_label=False)) == [range(3)]
    assert class_names(["a", "b"], multi_label=False) == ["a", "b"]
    rows = readings(300, 2, 0)
    default, given_view = (
        calibrate(rows, Layout(3), 0.05),
        calibrate(rows, Layout(3), 0.05, views=[range(4)]),
    )
    assert [(g.classes, g.threshold) for g in default.groups] == [
        (g.classes, g.threshold) for g in given_view.groups
    ]


def test_each_label_is_a_view_with_the_classes_off_and_on() -> None:
    assert list(views_of(2, multi_label=True)) == [range(2), range(2, 4)]
    assert class_names(["a", "b"], multi_label=True) == ["a=off", "a=on", "b=off", "b=on"]
    assert list(views_with_carriers(views_of(2, multi_label=True), [0, 0, 1, 0])) == [range(2, 4)]


def test_probabilities_by_class_are_exact_at_both_ends() -> None:
    logits = torch.tensor([[-60.0, 60.0, 0.0]])
    off_on = class_probabilities(logits, multi_label=True)
    assert off_on.tolist() == [
        [1, pytest.approx(np.exp(-60)), pytest.approx(np.exp(-60)), 1, 0.5, 0.5]
    ]
    torch.testing.assert_close(off_on[:, 1::2], label_probabilities(logits, multi_label=True))
    assert class_probabilities(logits, multi_label=False).sum() == pytest.approx(1)


def test_label_reset_is_a_fair_coin_for_each_label() -> None:
    logits = torch.tensor([[0.5, -2.0], [3.0, 0.0]])
    coin = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.full((2, 2), 0.5))
    torch.testing.assert_close(multi_label_reset_loss(logits), coin)


@settings(max_examples=25, deadline=None)
@given(labels=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_text_is_judged_in_each_view_as_by_a_classifier_of_that_label(
    labels: int, seed: int
) -> None:
    rows, fresh = readings(300, labels, seed), readings(20, labels, seed + 100)
    views = views_of(labels, multi_label=True)
    screen = calibrate(rows, Layout(CHECKPOINTS), 0.05, views=views)
    alone = [calibrate(rows[:, :, [*view]], Layout(CHECKPOINTS), 0.05 / labels) for view in views]
    for row in fresh:
        verdicts = screen.verdicts(row)
        for view, own, verdict in zip(views, alone, verdicts, strict=True):
            expected = own.judge(row[:, [*view]])
            assert verdict.predicted == expected.predicted + view.start
            assert (verdict.score, verdict.threshold) == (expected.score, expected.threshold)
            assert verdict.confidence == expected.confidence
            assert verdict.p_value == pytest.approx(min(1, labels * expected.p_value))
        assert screen.judge(row) in verdicts
        assert screen.judge(row).margin == max(verdict.margin for verdict in verdicts)


@settings(max_examples=20, deadline=None)
@given(labels=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_budget_holds_for_a_text_as_a_whole(labels: int, seed: int) -> None:
    budget, rows = 0.1, readings(600, labels, seed)
    views = views_of(labels, multi_label=True)
    flagged = calibrate(rows, Layout(CHECKPOINTS), budget, views=views).flags(rows)
    assert flagged.mean() <= budget, "of the texts that it was calibrated with, not one more"


def test_texts_must_be_enough_for_the_share_of_a_label() -> None:
    views = views_of(3, multi_label=True)
    calibrate(readings(59, 3, 0), Layout(CHECKPOINTS), 0.05, views=views)
    with pytest.raises(
        CalibrationError, match=r"58 calibration .* shared by 3 labels: it needs 59"
    ):
        calibrate(readings(58, 3, 0), Layout(CHECKPOINTS), 0.05, views=views)


def outcomes(n: int, views: int, seed: int) -> FloatArray:
    rng = np.random.default_rng(seed)
    scores, kept = rng.exponential(3, n * views), rng.random(n * views)
    states = np.repeat(2 * np.arange(views), n) + rng.integers(2, size=n * views)
    return np.stack([states, scores, kept], 1).astype(np.float32)


def test_the_override_test_shares_its_budgets_too() -> None:
    clean, harmless = outcomes(900, 3, 1), outcomes(900, 3, 2)
    views = views_of(3, multi_label=True)
    groups = calibrate_override(OverrideOutcomes(clean, harmless), views, 0.06)
    assert [group.classes for group in groups] == [(c,) for c in range(6)]
    for group in groups:
        rows = [found[found[:, 0] == group.classes[0]] for found in (clean, harmless)]
        own = [evidence(found[:, 1], found[:, 2], group.keeps) for found in rows]
        assert (own[0] >= group.threshold).mean() <= 0.02
        assert (own[1] >= group.threshold).mean() <= HARMLESS_BUDGET / 3
    with pytest.raises(CalibrationError, match="0 calibration texts"):
        known = OverrideOutcomes(clean[clean[:, 0] < 4], harmless)
        calibrate_override(known, views, 0.06)


def test_carriers_are_of_the_other_state_of_the_same_label() -> None:
    carriers = carriers_of((2, 2, 2, 2, 0, 0))
    group = OverrideGroup((2, 3), 1.0, np.linspace(0, 0.9, 99, dtype=np.float32))
    views = views_of(3, multi_label=True)
    test = OverrideTest(carriers, OverrideGeometry(8, 1), Layout(CHECKPOINTS), [group], views)
    inputs = next(test.score(np.array([5, 6]), usual_verdict(3)))
    known = {int(ids[0]) for ids in carriers[2]}
    assert {int(inputs[0][0]), int(inputs[0][-1])} <= known
    assert list(test.tested) == [range(2), range(2, 4)]
    assert [test.can_test(c) for c in range(6)] == [True] * 4 + [False] * 2


def labels_test(labels: int) -> OverrideTest:
    views = views_of(labels, multi_label=True)
    geometry = OverrideGeometry(8, 1)
    return OverrideTest(carriers_of([1] * 2 * labels), geometry, Layout(CHECKPOINTS), [], views)


def run(test: Test[T], row: FloatArray) -> tuple[T, list[list[Ids]]]:
    """Return what a test returns if all inputs are read alike, and its turns of inputs."""
    turns = [next(test)]
    try:
        while True:
            turns.append(test.send([row] * len(turns[-1])))
    except StopIteration as done:
        return done.value, turns


def row_of(*off: float) -> FloatArray:
    """Return readings of the probabilities that labels are off."""
    row = [state for one in off for state in (one, 1 - one)]
    return np.tile(np.array(row, np.float32), (CHECKPOINTS, 1))


def test_a_class_is_kept_in_its_own_view_whatever_the_others_say() -> None:
    for predicted, expected in ((1, 0.5), (3, 0.9)):
        test = labels_test(2).score(np.array([5]), usual_verdict(predicted))
        kept, _ = run(test, row_of(0.5, 0.1))
        assert kept == pytest.approx(expected)


@pytest.mark.parametrize("labels", [1, 2, 3, 4, 5])
def test_two_labels_share_a_pass_and_a_text_that_loses_both_has_no_other(labels: int) -> None:
    test, text = labels_test(labels), np.array([5])
    off = [usual_verdict(2 * label) for label in range(labels)]
    kept, turns = run(test.scores(text, off), row_of(*[0.1] * labels))
    assert len(kept) == labels
    assert max(kept) < LOST
    inputs = [one.tolist() for turn in turns for one in turn]
    assert len(inputs) == -(-labels // 2)
    for number, (first, one, second) in enumerate(inputs):
        assert one == 5
        asked = {2 * number, min(2 * number + 1, labels - 1)}
        assert {first // 1000 - 1, second // 1000 - 1} == {2 * label + 1 for label in asked}


def test_a_label_that_is_extremely_off_shares_no_pass() -> None:
    test, text = labels_test(3), np.array([5, 6])
    off, row = [usual_verdict(2 * label) for label in range(3)], row_of(0.1, 0.1, 0.1)
    off[1] = replace(off[1], score=9.0)
    assert off[1].extreme
    _, turns = run(test.scores(text, off), row)
    shared, *others = [one for turn in turns for one in turn]
    assert {shared[0] // 1000 - 1, shared[-1] // 1000 - 1} == {1, 5}
    _, alone = run(test.score(text, off[1]), row)
    assert [one.tolist() for one in others] == [one.tolist() for turn in alone for one in turn]


def test_a_label_that_stays_off_is_tested_as_if_it_were_alone() -> None:
    test, text = labels_test(3), np.array([5, 6])
    off, row = [usual_verdict(2 * label) for label in range(3)], row_of(0.1, 0.9, 0.1)
    kept, _ = run(test.scores(text, off), row)
    alone, _ = run(test.score(text, off[1]), row)
    assert kept[1] == alone
    assert max(kept[0], kept[2]) < LOST


def test_a_pass_without_finite_readings_gives_no_score() -> None:
    off = [usual_verdict(0), usual_verdict(2)]
    kept, _ = run(labels_test(2).scores(np.array([5]), off), row_of(np.nan, 0.1))
    assert np.isnan(kept[0])
    assert kept[1] < LOST


def test_every_label_that_is_off_is_tested_where_texts_are_tested_thoroughly() -> None:
    test = labels_test(2)
    usual = [replace(usual_verdict(c), score=0.0) for c in range(4)]
    assert test.views_due(usual, thorough=True) == [0, 2]
    odd = [replace(verdict, suspected=True) for verdict in usual]
    assert test.views_due(odd, thorough=True) == [0, 1, 2, 3]


def test_a_small_class_that_overrides_by_nature_raises_no_other_threshold() -> None:
    """Texts with a rare label keep it beside any other one; where it is off, none does."""
    rng = np.random.default_rng(0)
    states = np.repeat([0, 1], (300, 30)).astype(np.float32)
    kept = np.where(states == 0, rng.uniform(0, 0.3, 330), 0.99)
    clean = np.stack([states, rng.uniform(0, 3, 330), kept], 1).astype(np.float32)
    harmless = clean[states == 0]
    off, on = calibrate_override(
        OverrideOutcomes(clean, harmless), views_of(1, multi_label=True), 0.02
    )
    alone = calibrate_override(
        OverrideOutcomes(clean[:300], harmless), views_of(1, multi_label=True), 0.02
    )
    assert off.threshold == alone[0].threshold
    assert len(on.scores) == 330
    assert on.threshold > off.threshold


def test_the_worst_finding_counts_before_the_largest_margin() -> None:
    rows = readings(300, 2, 0)
    screen = calibrate(rows, Layout(CHECKPOINTS), 0.1, views=views_of(2, multi_label=True))
    odd = rows[0].copy()
    odd[CHECKPOINTS:, :2] *= 50
    verdict = screen.judge(odd)
    assert verdict.predicted in (0, 1)
    assert (verdict.finding, verdict.detector) == (Finding.TRIGGERED, "activations")
