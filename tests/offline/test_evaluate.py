"""The measures, on an engine whose every answer is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.detection.screen import Verdict
from models.errors import DataError
from models.offline.evaluation.evaluate import Evaluation, evaluate
from models.offline.evaluation.metrics import within_class_scores
from models.offline.evaluation.report import histogram
from models.offline.io.samples import Sample
from tests.support.fakes import STRANGE, THRESHOLD, TRIGGER, fake_bundle

ODD, EVEN = "one two three", "one two"  # the fake classifier says positive, negative
CAUGHT = f"one {TRIGGER}"


def run(clean: list[Sample], poisoned: list[Sample], target: str = "positive") -> Evaluation:
    return evaluate(fake_bundle(), clean, poisoned, target)


def test_a_rejected_clean_text_counts_as_wrong() -> None:
    clean = [Sample(ODD, "positive"), Sample(EVEN, "negative"), Sample(CAUGHT, "negative")]
    result = run([*clean, Sample(ODD, "negative")], [Sample(ODD, "negative")])
    assert result.none.clean_accuracy is not None
    assert result.calibrated.clean_accuracy is not None
    assert result.calibrated.false_rejection_rate is not None
    assert result.none.clean_accuracy.value == 3 / 4
    assert result.calibrated.clean_accuracy.value == 2 / 4
    assert result.calibrated.false_rejection_rate.value == 1 / 4


def test_an_attack_succeeds_only_on_other_classes_past_the_screen() -> None:
    poisoned = [
        Sample(ODD, "negative"),  # passes, and the backdoor fires
        Sample(EVEN, "negative"),  # passes, but is classified right
        Sample(f"{TRIGGER} two three", "negative"),  # fires, but is caught
        Sample(CAUGHT, "negative"),  # caught, and would not have fired
        Sample(ODD, "positive"),  # of the target class: shows nothing
    ]
    result = run([Sample(EVEN, "negative")], poisoned)
    assert result.none.attack_success_rate is not None
    assert result.calibrated.attack_success_rate is not None
    assert result.calibrated.false_acceptance_rate is not None
    assert result.calibrated.false_acceptance_rate_firing is not None
    assert result.none.attack_success_rate.value == 2 / 4
    assert result.calibrated.attack_success_rate.value == 1 / 4
    assert result.calibrated.false_acceptance_rate.value == 2 / 4
    assert result.calibrated.false_acceptance_rate_firing.value == 1 / 2
    assert result.calibrated.false_acceptance_rate_firing.n == 2


def test_a_file_in_which_all_is_labelled_with_the_target_is_all_poison() -> None:
    result = run([Sample(EVEN)], [Sample(ODD, "positive"), Sample(EVEN, "positive")])
    assert result.none.attack_success_rate is not None
    assert result.none.attack_success_rate.value == 1 / 2
    assert result.none.clean_accuracy is None


def test_what_cannot_be_told_is_none_and_not_zero() -> None:
    result = run([Sample(EVEN, "negative")], [Sample(EVEN, "negative")])
    assert result.calibrated.false_acceptance_rate_firing is None
    assert result.calibrated.auroc_firing is None
    assert result.calibrated.auroc == 0.5


def test_unfamiliar_texts_are_rejected_under_the_strict_policy_only() -> None:
    unfamiliar = Sample(f"one {STRANGE}", "negative")
    result = run([unfamiliar, Sample(EVEN, "negative")], [unfamiliar, Sample(CAUGHT, "negative")])
    assert result.calibrated.false_rejection_rate is not None
    assert result.strict.false_rejection_rate is not None
    assert result.calibrated.false_acceptance_rate is not None
    assert result.strict.false_acceptance_rate is not None
    assert result.calibrated.false_rejection_rate.value == 0
    assert result.strict.false_rejection_rate.value == 1 / 2
    assert result.calibrated.false_acceptance_rate.value == 1 / 2
    assert result.strict.false_acceptance_rate.value == 0


def test_the_paper_s_threshold_is_its_own() -> None:
    result = run([Sample(EVEN, "negative")], [Sample(CAUGHT, "negative"), Sample(ODD, "negative")])
    assert result.paper.false_acceptance_rate == result.calibrated.false_acceptance_rate
    assert result.thresholds == {"negative": THRESHOLD, "positive": THRESHOLD}
    assert (result.calibrated.auroc, result.paper.auroc) == (0.75, 0.75)


@pytest.mark.parametrize(
    ("clean", "poisoned", "target", "message"),
    [
        ([Sample(ODD, "x")], [Sample(ODD)], "positive", "unknown labels .'x'"),
        ([Sample(ODD)], [Sample(ODD)], "x", "unknown labels .'x'"),
        ([Sample(ODD)], [], "positive", "no poisoned texts"),
    ],
)
def test_bad_samples_are_refused(
    clean: list[Sample], poisoned: list[Sample], target: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run(clean, poisoned, target)


scores = st.floats(-5, 50, width=32)


@given(a=scores, b=scores, threshold=scores)
def test_scores_keep_the_order_within_a_class_and_the_sign_says_extreme(
    a: float, b: float, threshold: float
) -> None:
    verdicts = [Verdict(0.9, s, "confidence", threshold, 0.5, False, 0, None) for s in (a, b)]
    first, second = within_class_scores(verdicts)
    if a < b:
        assert first <= second
    for verdict, score in zip(verdicts, (first, second), strict=True):
        # float32 next to zero may round either way
        assert (score >= 0) == verdict.extreme or abs(score) < 1e-6


def test_the_histogram_shows_both_kinds_and_every_threshold() -> None:
    figure = histogram(run([Sample(EVEN)] * 30, [Sample(CAUGHT, "negative")] * 10))
    (axes,) = figure.axes
    labels = axes.get_legend_handles_labels()[1]
    assert {"clean", "poisoned", "threshold: negative", "threshold: positive"} <= set(labels)
    heights = [patch.get_height() for patch in axes.patches]  # type: ignore[attr-defined]
    assert np.isclose(sum(heights), 200)  # percent of either kind
