"""The override test: what is put together, when it ends, and what its thresholds promise."""

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.detection.calibrate import (
    CLEARLY,
    HARMLESS_BUDGET,
    OverrideOutcomes,
    calibrate_override,
)
from models.detection.conformal import allowed_rejections, min_calibration_size
from models.detection.override import (
    CARRIER_TOKENS,
    DRAWS,
    HOPELESS,
    KEEPS,
    LEAST_READABLE,
    LONGEST_WINDOW,
    LOST,
    PART_TOKENS,
    SHORTEST_WINDOW,
    Ids,
    OverrideGeometry,
    OverrideGroup,
    OverrideTest,
    evidence,
)
from models.detection.screen import (
    Finding,
    FloatArray,
    Layout,
    Verdict,
)
from models.errors import CalibrationError
from models.offline.io.inference import run_tests
from tests.support.fakes import FakeEngine, fake_bundle, usual_verdict

CHECKPOINTS, CLASSES = 3, 3
WORDS = 1000
"""Ids of texts are below, those of carriers above: the class times this, and a number."""


def carriers_of(counts: Sequence[int], length: int = 1) -> list[list[Ids]]:
    return [
        [np.full(length, (label + 1) * WORDS + number, np.int64) for number in range(count)]
        for label, count in enumerate(counts)
    ]


def sized_test(
    window: int = 8,
    counts: Sequence[int] = (4, 4, 4),
    groups: Sequence[OverrideGroup] = (),
    others: Sequence[OverrideGroup] = (),
) -> OverrideTest:
    geometry = OverrideGeometry(window, 1)
    return OverrideTest(carriers_of(counts), geometry, Layout(CHECKPOINTS), groups, others=others)


def readings_of(ids: Ids) -> FloatArray:
    """Return what a classifier without rhyme or reason reads, the same for the same ids."""
    rng = np.random.default_rng(zlib.crc32(ids.tobytes()))
    return rng.dirichlet(np.full(CLASSES, 0.5), CHECKPOINTS).astype(np.float32)


def run(test: OverrideTest, ids: Ids, predicted: int) -> tuple[float, list[list[Ids]]]:
    """Return the score of a text, and the turns of inputs that it took."""
    running, turns = test.score(ids, usual_verdict(predicted)), []
    inputs = next(running)
    while True:
        turns.append(inputs)
        try:
            inputs = running.send([readings_of(one) for one in inputs])
        except StopIteration as done:
            return done.value, turns


texts = st.lists(st.integers(0, WORDS - 1), max_size=120).map(lambda ids: np.array(ids, np.int64))


@given(count=st.integers(0, 400), size=st.integers(1, LONGEST_WINDOW))
def test_every_run_of_half_a_window_lies_whole_in_one(count: int, size: int) -> None:
    ids = np.arange(count, dtype=np.int64) + 10 * WORDS  # all differ, and from carriers
    inputs = next(sized_test(size).score(ids, usual_verdict(0)))
    windows = [one[1:-1] for one in inputs]
    assert all(len(window) <= size for window in windows)
    if count <= size:
        assert len(windows) == 1
        assert np.array_equal(windows[0], ids)
    assert {int(i) for window in windows for i in window} == {*ids.tolist()}
    runs = [[*map(int, window)] for window in windows]
    half = min(size // 2, count)
    for start in range(count - half + 1):
        wanted = ids[start : start + half].tolist()
        assert any(
            wanted == own[i : i + half] for own in runs for i in range(len(own) - half + 1)
        ), start
    assert len(windows) <= 1 + count / max(1, size // 2), "windows of nothing new"


@given(ids=texts, predicted=st.integers(0, CLASSES - 1), counts=st.tuples(*[st.integers(1, 5)] * 3))
def test_carriers_are_of_other_classes_and_the_same_for_the_same_text(
    ids: Ids, predicted: int, counts: tuple[int, int, int]
) -> None:
    test = sized_test(window=24, counts=counts)
    _, turns = run(test, ids, predicted)
    assert 1 <= len(turns) <= DRAWS + 1
    for inputs in turns:
        (pair,) = {tuple(one[one >= WORDS].tolist()) for one in inputs}
        assert len(pair) == 2
        assert all(carrier // WORDS - 1 != predicted for carrier in pair)
    _, again = run(sized_test(window=24, counts=counts), ids.copy(), predicted)
    assert [[one.tolist() for one in turn] for turn in turns] == [
        [one.tolist() for one in turn] for turn in again
    ]


def test_texts_meet_different_carriers() -> None:
    test = sized_test(counts=(9, 9, 9))
    first = {
        tuple(next(test.score(np.array([word], np.int64), usual_verdict(0)))[0][[0, -1]])
        for word in range(50)
    }
    assert len(first) > 25


@given(ids=texts, predicted=st.integers(0, CLASSES - 1))
def test_a_test_ends_early_only_once_the_class_is_lost(ids: Ids, predicted: int) -> None:
    score, turns = run(sized_test(), ids, predicted)
    assert 0 < score <= 1
    assert (len(turns) < DRAWS) <= (score < LOST)
    assert len(turns) == DRAWS or score < KEEPS, "more pairs would have confirmed nothing"


@given(
    kept=st.floats(1e-6, 1 - 1e-6),
    threshold=st.floats(0, 20),
    first_stage=st.floats(0, 20),
    keeps=st.floats(LOST, KEEPS),
    alone=st.floats(1, 20),
)
def test_a_text_is_triggered_if_the_evidence_of_both_stages_is_enough(
    kept: float, threshold: float, first_stage: float, keeps: float, alone: float
) -> None:
    scores = np.linspace(0, 20, 99, dtype=np.float32)
    group = OverrideGroup((0, 1, 2), threshold, scores, keeps, alone)
    found = float(evidence(first_stage, kept, keeps, alone))
    verdict = replace(usual_verdict(0), score=first_stage, threshold=20.0, suspected=True)
    needed = sized_test(groups=[group]).threshold_of(verdict)
    if kept < keeps:
        assert found == 0
        assert kept < needed
    elif abs(found - threshold) > 1e-6:
        assert (kept >= needed) == (found >= threshold)


def outcome_of(
    test: OverrideTest, ids: Ids, kept: Sequence[Sequence[float]], *, extreme: bool = False
) -> tuple[float, int]:
    """Return the score if a classifier keeps these shares of the class, turn by turn, and how many
    turns it took."""
    verdict = replace(usual_verdict(0), score=9.0 if extreme else 0.0)
    running, turn = test.score(ids, verdict), 0
    inputs = next(running)
    while True:
        shares = kept[turn]
        assert len(shares) == len(inputs)
        readings = [np.array([[p, 1 - p, 0]] * CHECKPOINTS, np.float32) for p in shares]
        turn += 1
        try:
            inputs = running.send(readings)
        except StopIteration as done:
            return round(float(done.value), 4), turn


def test_the_best_window_goes_on_and_no_single_pair_decides() -> None:
    test, ids = sized_test(window=4), np.arange(12, dtype=np.int64)

    def score_of(*kept: Sequence[float]) -> float:
        return outcome_of(test, ids, kept)[0]

    windows = [0.1, 0.9, 0.2, 0.1, 0.1]
    assert score_of(windows, [0.9], [0.9]) == pytest.approx(0.9, abs=1e-4)
    last = score_of(windows, [0.9], [0.3])
    assert last == pytest.approx(0.7654, abs=1e-4), "the mean of log-odds"
    assert score_of([0.3] * 5, [0.9], [0.9]) == pytest.approx(last)
    assert score_of([0.05] * 5) == pytest.approx(0.05, abs=1e-4), "it was lost"


def test_a_trigger_that_the_rest_of_its_window_outvotes_is_found_in_a_part() -> None:
    test, ids = sized_test(window=24), np.arange(24, dtype=np.int64)
    parts = 24 // (PART_TOKENS // 2) - 1
    found = [0.1] * (parts - 1) + [0.9]
    assert outcome_of(test, ids, [[0.2], found, [0.9], [0.9]]) == (0.9, DRAWS + 1)
    whole = [[0.9], [0.1] * parts, [0.9], [0.9]]
    assert outcome_of(test, ids, whole) == (0.9, DRAWS + 1), "two that add up"
    assert outcome_of(test, ids, [[0.2], [0.1] * parts, [0.1]])[1] == 3, "lost beside the second"
    assert outcome_of(test, ids, [[0.1]]) == (0.1, 1), "lost"
    outvoted = [[0.1], found, [0.9], [0.9]]
    assert outcome_of(test, ids, outvoted, extreme=True) == (0.9, DRAWS + 1)
    hopeless = [[0.03], [0.03]]
    assert outcome_of(test, ids, hopeless, extreme=True) == (HOPELESS, 2), "no parts"
    short = ids[:PART_TOKENS]
    assert outcome_of(test, short, [[0.9]] * DRAWS) == (0.9, DRAWS), "no parts"


def test_an_extreme_text_is_not_given_up_after_one_pair() -> None:
    test, ids = sized_test(window=24), np.arange(60, dtype=np.int64)
    lost = [0.001] * 4
    assert outcome_of(test, ids, [lost]) == (HOPELESS, 1)
    assert outcome_of(test, ids, [lost, lost], extreme=True) == (HOPELESS, 2)
    # The third window yielded to the first pair alone.
    kept, turns = outcome_of(test, ids, [lost, [0.1, 0.1, 0.98, 0.1], [0.98]], extreme=True)
    assert turns == 3
    odds = np.log([HOPELESS / (1 - HOPELESS), 0.98 / 0.02, 0.98 / 0.02]).mean()
    assert kept == pytest.approx(1 / (1 + np.exp(-odds)), abs=1e-4), "no pair has a veto"
    # The first window keeps the class best on average, the second one beside the second pair.
    rounds = [[0.14, 0.05], [0.9, 0.95], [0.9]]
    odds = np.log([0.14 / 0.86, 9, 9]).mean()
    kept, _ = outcome_of(sized_test(window=8), ids[:12], rounds, extreme=True)
    assert kept == pytest.approx(1 / (1 + np.exp(-odds)), abs=1e-4)


def test_the_second_chance_of_an_extreme_text_is_at_the_start() -> None:
    ids = np.arange(9, dtype=np.int64)
    running = sized_test(window=24).score(ids, replace(usual_verdict(0), score=9.0))
    (between,) = next(running)
    (leading,) = running.send([np.array([[0.01, 0.99, 0]] * CHECKPOINTS, np.float32)])
    assert between[1:-1].tolist() == leading[:-2].tolist() == ids.tolist()


def test_parts_are_those_of_the_window_that_keeps_the_class_best_and_the_best_goes_on() -> None:
    test, ids = sized_test(window=24), np.arange(60, dtype=np.int64)
    running = test.score(ids, usual_verdict(0))

    def send(shares: Sequence[float]) -> list[list[int]]:
        readings = [np.array([[p, 1 - p, 0]] * CHECKPOINTS, np.float32) for p in shares]
        inputs = running.send(readings)
        places.append({int(np.argmax(one < WORDS)) for one in inputs})
        return [one[one < WORDS].tolist() for one in inputs]

    places = list[set[int]]()
    windows = [one[1:-1].tolist() for one in next(running)]
    parts = send([0.2] * (len(windows) - 1) + [0.3])
    assert all(len(part) == PART_TOKENS for part in parts)
    assert sorted({i for part in parts for i in part}) == windows[-1]
    assert send([0.1, 0.9] + [0.1] * (len(parts) - 2)) == [parts[1]]
    assert send([0.9]) == [parts[1]]
    assert places == [{1}, {0}, {0}], "a trigger may fire only at the start"


def test_a_reading_that_is_no_number_is_not_lost_on_the_way() -> None:
    test, ids = sized_test(window=24), np.arange(60, dtype=np.int64)
    nan = float("nan")
    whole, parts = [0.9, nan, 0.9, 0.9], [0.9, nan, 0.9]
    assert np.isnan(outcome_of(test, ids, [whole, *[[0.9]] * 9])[0])
    assert np.isnan(outcome_of(test, ids[:24], [[0.9], parts, *[[0.9]] * 9])[0])


def test_late_checkpoints_have_no_say() -> None:
    late = np.array([[0.9, 0.1, 0], [0.9, 0.1, 0], [0.01, 0.99, 0]], np.float32)
    running = sized_test().score(np.arange(3, dtype=np.int64), usual_verdict(0))
    next(running)
    with pytest.raises(StopIteration) as done:
        for _ in range(DRAWS):
            running.send([late])
    assert done.value.value == pytest.approx(0.9, abs=1e-4)


lengths = st.lists(st.integers(0, 600), min_size=1, max_size=40)


@given(lengths=lengths, readable=st.integers(LEAST_READABLE, 512))
def test_what_is_put_together_fits_into_what_the_model_reads(
    lengths: list[int], readable: int
) -> None:
    geometry = OverrideGeometry.of(lengths, readable)
    assert geometry.window >= 1
    assert 1 <= geometry.carrier <= CARRIER_TOKENS
    assert geometry.window + 2 * geometry.carrier <= readable
    assert geometry.window <= LONGEST_WINDOW
    if readable >= 2 * LONGEST_WINDOW:
        whole = np.mean([length <= geometry.window for length in lengths])
        assert geometry.window >= SHORTEST_WINDOW
        assert whole >= 0.5 or geometry.window == LONGEST_WINDOW
        longest = max(
            len(one) for one in next(_sized(geometry).score(np.arange(999), usual_verdict(0)))
        )
        assert longest <= readable


def _sized(geometry: OverrideGeometry) -> OverrideTest:
    return OverrideTest(carriers_of((2, 2, 2), length=99), geometry, Layout(CHECKPOINTS))


@pytest.mark.parametrize("readable", range(LEAST_READABLE))
def test_a_model_that_reads_next_to_nothing_has_no_test(readable: int) -> None:
    with pytest.raises(ValueError, match="needs 3 tokens"):
        OverrideGeometry.of([5], readable)


def test_a_class_without_carriers_of_others_is_not_tested() -> None:
    only_first = sized_test(counts=(3, 0, 0))
    assert [only_first.can_test(c) for c in range(3)] == [False, True, True]
    assert [sized_test(counts=(0, 0, 0)).can_test(c) for c in range(3)] == [False] * 3
    verdicts = [replace(usual_verdict(c), suspected=True) for c in range(3)]
    assert only_first.views_due(verdicts, thorough=True) == [1, 2]


def _reading(top: float) -> FloatArray:
    return np.array([[0.5, 0.5], [top, 1 - top]], np.float32)


def test_the_most_suspicious_texts_are_due_or_all() -> None:
    test = sized_test()
    verdicts = [replace(usual_verdict(0), suspected=suspected) for suspected in (False, True)]
    assert test.views_due(verdicts, thorough=False) == [1]
    assert test.views_due(verdicts, thorough=True) == [0, 1]


@pytest.mark.parametrize(
    ("threshold", "due"), [(6.8, True), (7.0, False)]
)  # log-odds of 0.999: 6.9
def test_what_no_test_could_confirm_is_tested_only_if_it_is_suspicious(
    threshold: float, due: bool
) -> None:
    geometry, views = OverrideGeometry(8, 1), [range(2), range(2, 4)]
    group = OverrideGroup((0, 1, 2), threshold, np.linspace(0, 1, 99, dtype=np.float32))
    carriers = carriers_of((1,) * 4)
    test = OverrideTest(carriers, geometry, Layout(2), views=views, others=[group])
    alone = sized_test(others=[group])
    quiet = replace(usual_verdict(0), score=0.0)

    def is_due(test: OverrideTest, verdict: Verdict) -> bool:
        return bool(test.views_due([verdict], thorough=True))

    assert is_due(test, quiet) == due
    assert is_due(alone, quiet), "a single view"
    assert is_due(test, replace(quiet, score=0.2)), "both stages count"
    assert is_due(test, replace(quiet, suspected=True))


@pytest.mark.parametrize(
    ("score", "extreme", "finding"),
    [
        (0.5, True, Finding.TRIGGERED),
        (0.5, False, Finding.TRIGGERED),
        (0.49, True, Finding.UNFAMILIAR),
        (0.49, False, None),
    ],
)
def test_the_verdict_after_a_test(score: float, extreme: bool, finding: Finding | None) -> None:
    group = OverrideGroup((0, 1, 2), 0.0, np.linspace(0, 9, 99, dtype=np.float32))
    verdict = fake_bundle().screen.judge(_reading(0.99 if extreme else 0.55))
    assert verdict.extreme == extreme
    judged = sized_test(groups=[group], others=[group]).judge(verdict, score)
    assert (judged.finding, judged.override, judged.override_threshold) == (finding, score, 0.5)
    found = float(evidence(min(verdict.score, verdict.threshold), score, KEEPS))
    assert judged.override_p_value == group.p_value(found)


def test_by_how_much_a_text_is_extreme_does_not_count() -> None:
    group = OverrideGroup((0, 1, 2), 5.0, np.linspace(0, 9, 99, dtype=np.float32))
    verdict = fake_bundle().screen.judge(_reading(0.99))
    test = sized_test(groups=[group])
    at, far, below = (
        test.judge(replace(verdict, score=score), 0.8)
        for score in (verdict.threshold, 10 * verdict.threshold, verdict.threshold / 2)
    )
    assert at.override_threshold == far.override_threshold
    assert (below.override_threshold or 0) > (at.override_threshold or 1)
    assert at.override_p_value == far.override_p_value


def outcomes(rng: np.random.Generator, n: int, shapes: Sequence[float]) -> FloatArray:
    """Draw class, score and kept probability, (n, 3); classes differ in how much is kept."""
    labels = rng.integers(len(shapes), size=n)
    kept = rng.beta(1, np.array(shapes)[labels])
    return np.column_stack([labels, rng.exponential(2, n), kept]).astype(np.float32)


def evidence_of(outcomes: FloatArray, groups: Sequence[OverrideGroup]) -> FloatArray:
    """Return how far the evidence of each text is above its threshold, shape (n,)."""
    above = np.full(len(outcomes), np.nan)
    for group in groups:
        own = np.isin(outcomes[:, 0], group.classes)
        above[own] = evidence(outcomes[own, 1], outcomes[own, 2], group.keeps) - group.threshold
    return above.astype(np.float32)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    budget=st.sampled_from([0.01, 0.05, 0.2]),
    stranger=st.floats(0.3, 3),
)
def test_thresholds_keep_both_budgets_on_average(seed: int, budget: float, stranger: float) -> None:
    rng, clean, harmless = np.random.default_rng(seed), (9.0, 4.0, 1.0), (stranger,) * 3
    rates = []
    for _ in range(60):
        known = OverrideOutcomes(outcomes(rng, 400, clean), outcomes(rng, 1800, harmless))
        groups = calibrate_override(known, [range(3)], budget)
        assert sorted(c for group in groups for c in group.classes) == [0, 1, 2]
        fresh = outcomes(rng, 400, clean), outcomes(rng, 400, harmless)
        rates.append([(evidence_of(own, groups) >= 0).mean() for own in fresh])
    on_clean, on_harmless = np.mean(rates, 0)
    error = 6 * np.std(rates, 0) / np.sqrt(len(rates)) + 1e-3
    assert on_clean <= budget + error[0]
    assert on_harmless <= HARMLESS_BUDGET + error[1]


@given(
    n=st.integers(1, 300), m=st.integers(0, 300), seed=st.integers(0, 99),
    budget=st.sampled_from([0.01, 0.05, 0.25]),
)  # fmt: skip
def test_no_more_known_texts_are_triggered_than_the_budgets_allow(
    n: int, m: int, seed: int, budget: float
) -> None:
    rng = np.random.default_rng(seed)
    known = OverrideOutcomes(outcomes(rng, n, (3, 1)), outcomes(rng, m, (1, 1)))
    if n < min_calibration_size(budget):
        with pytest.raises(CalibrationError, match="too few"):
            calibrate_override(known, [range(2)], budget)
        return
    groups = calibrate_override(known, [range(2)], budget)
    assert [group.classes for group in groups] in ([(0,), (1,)], [(1,), (0,)])
    for group in groups:
        assert LOST <= group.keeps <= KEEPS
        (others,) = evidence_by(known.harmless, [group])
        most = max(0, allowed_rejections(len(others), HARMLESS_BUDGET))
        assert (others >= group.threshold).sum() <= most
        (own,) = evidence_by(known.clean, [group])
        if len(own) < min_calibration_size(budget):  # and so it borrows those of the other class
            own = np.concatenate(evidence_by(known.clean, groups))
        assert np.array_equal(group.scores, np.sort(own))
        assert (own >= group.threshold).sum() <= allowed_rejections(len(own), budget)


def test_what_a_text_keeps_may_be_enough_by_itself_where_all_are_tested() -> None:
    """No harmless text keeps much, so a trigger that the first stage does not suspect is one."""
    rng = np.random.default_rng(0)
    clean = np.stack([np.zeros(400), rng.uniform(0, 1, 400), rng.uniform(0, 0.2, 400)], 1)
    odd = np.stack([np.zeros(1200), rng.uniform(0, 4, 1200), rng.uniform(0, 0.3, 1200)], 1)
    known = OverrideOutcomes(clean.astype(np.float32), odd.astype(np.float32))
    (usual,) = calibrate_override(known, [range(1)], 0.01)
    (group,) = calibrate_override(known, [range(1)], 0.01, thorough=True)
    assert usual.alone == 1 < group.alone
    test, quiet = sized_test(groups=[usual], others=[group]), replace(usual_verdict(0), score=0.0)
    needed, of_suspicious = (
        test.threshold_of(replace(quiet, suspected=suspected)) for suspected in (False, True)
    )
    assert needed < of_suspicious
    assert _log_odds(needed) >= _log_odds(group.keeps) + CLEARLY - 1e-3
    assert test.judge(quiet, needed + 1e-3).finding is Finding.TRIGGERED
    assert test.judge(quiet, needed - 1e-3).finding is None
    for rows, budget in ((known.clean, 0.01), (known.harmless, HARMLESS_BUDGET)):
        found = evidence(rows[:, 1], rows[:, 2], group.keeps, group.alone) >= group.threshold
        assert found.mean() <= budget


def _log_odds(probability: float) -> float:
    return float(np.log(probability / (1 - probability)))


def evidence_by(rows: FloatArray, chosen: Sequence[OverrideGroup]) -> list[FloatArray]:
    """Return the evidence of the texts of each chosen group, as it is compared with a threshold."""
    own = [rows[np.isin(rows[:, 0], group.classes)] for group in chosen]
    return [
        evidence(found[:, 1], found[:, 2], group.keeps).astype(np.float32)
        for found, group in zip(own, chosen, strict=True)
    ]


def test_a_class_that_overrides_by_nature_leaves_the_threshold_of_another_in_reach() -> None:
    """Both have few clean texts, so they share them."""
    rng = np.random.default_rng(0)
    clean = np.array([(n % 2, rng.uniform(0, 2), 0.01) for n in range(60)], np.float32)
    kept = (0.05, 0.99)  # by class
    harmless = np.array([(n % 2, 2, kept[n % 2]) for n in range(400)], np.float32)
    groups = calibrate_override(OverrideOutcomes(clean, harmless), [range(2)], 0.02)
    thresholds = {group.classes: group.threshold for group in groups}
    assert thresholds[(0,)] < 1 < 6 < thresholds[(1,)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["clean", "harmless"])
def test_scores_that_are_no_numbers_give_no_threshold(bad: float, which: str) -> None:
    known = OverrideOutcomes(*(outcomes(np.random.default_rng(0), 99, (1, 1)) for _ in "ab"))
    getattr(known, which)[3, 1] = bad
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        calibrate_override(known, [range(2)], 0.05)


@pytest.mark.parametrize(("kept", "keeps"), [(0.02, LOST), (0.3, 0.3), (0.9, KEEPS)])
def test_what_keeps_a_class_is_what_harmless_texts_of_it_do_not(kept: float, keeps: float) -> None:
    rng = np.random.default_rng(0)
    clean, harmless = outcomes(rng, 400, (9, 9)), outcomes(rng, 2000, (9, 9))
    harmless[:, 2] = kept * rng.random(2000)
    known = OverrideOutcomes(clean, harmless)
    for group in calibrate_override(known, [range(2)], 0.05):
        assert group.keeps == pytest.approx(keeps, rel=0.05)


def test_many_texts_at_once_are_scored_as_each_alone() -> None:
    """Tests end at different turns; none gets the readings of another."""
    group = OverrideGroup((0, 1), 0.3, np.linspace(0, 1, 99, dtype=np.float32))
    test = OverrideTest(carriers_of((3, 3)), OverrideGeometry(4, 1), Layout(1), [group])
    needed = test.threshold_of(replace(usual_verdict(0), suspected=True))

    class Reader(FakeEngine):
        def screen(self, batch):  # type: ignore[no-untyped-def]
            screening = super().screen(batch)
            rows = [readings_of(np.array(one.input_ids, np.int64))[:1, :2] for one in batch]
            return screening._replace(readings=np.stack(rows))

    engine = Reader()
    rng = np.random.default_rng(0)
    asked = [
        (rng.integers(WORDS, size=n), usual_verdict(int(n % 2))) for n in rng.integers(0, 20, 40)
    ]
    together = run_tests(engine, test, asked)
    alone = [run_tests(engine, test, [one])[0] for one in asked]
    assert together == alone
    assert len({*alone}) > 30
    assert min(together) < needed <= max(together)
    assert run_tests(engine, test, []) == []
