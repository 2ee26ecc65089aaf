"""The override test, the second stage of the screen: does a text overrule clean texts beside it?

A trigger that was inserted into a text overrides all the rest of it; that is what it is for. So put
the text beside two *carriers*: short clean texts of other classes, of which the classifier is
sure. A clean text, however unfamiliar, loses its class there. A triggered one keeps it. STRIP (Gao
et al., ACSAC 2019) superimposes inputs too, on random ones, and measures entropy; carriers that are
sure of another class are what makes the test sharp.

Usually only texts that the first stage suspects are tested. A test takes turns of forward passes:
each has another pair of carriers, and the test ends when the text has lost its class.

Nothing here runs a model: a test yields inputs and is sent their readings, so that the service can
await them, and the offline half can loop over them.
"""

import math
import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.detection.conformal import ThresholdGroup
from models.detection.screen import (
    TINY,
    FloatArray,
    Layout,
    Verdict,
    log_odds_of,
    logit,
    with_override,
)
from models.detection.views import Views, views_with_carriers
from models.detection.windows import windows

KEEPS = 0.5
"""Kept probability from which a text keeps its class, at most; see `OverrideGroup.keeps`."""
Ids = NDArray[np.int64]
"""Token ids of a text, or of a part of it, without special tokens."""
T = TypeVar("T")
Test = Generator[list[Ids], Sequence[FloatArray], T]
"""Yields inputs, is sent the readings of each, (V, C), and returns a score, or several."""
DRAWS = 3
"""Pairs of carriers; a triggered text keeps its class beside most."""
LOST = 0.15
"""Kept probability under which a test ends early: more pairs hardly change the outcome."""
LOST_OF_SEVERAL = 0.3
"""The same where labels are several, each with tests of its own. Honest texts keep a label off
more often than they keep a class, and their tests would cost twice as much."""
REACHABLE = 0.999
"""Probability that a text can keep. Of several labels, those are not tested that would have to keep
more, unless the first stage suspects them."""
HOPELESS = 0.04
"""Kept probability under which no part of a window is tried by itself, even of an extreme text, and
for which a pair of carriers counts at least."""
CARRIER_TOKENS = 16
"""Length of a carrier, unless the classifier reads fewer than four of them."""
LEAST_READABLE = 3
"""Tokens that the classifier must read at once: one of a text, between two carriers of one."""
SHORTEST_WINDOW, LONGEST_WINDOW = 24, 64
"""Tokens of a text that are tested at once, see `OverrideTest`. A window of a long text must not be
so long that it overrules the carriers by its length."""
PART_TOKENS = 12
"""Tokens of a part of a window."""


@dataclass(frozen=True)
class OverrideGroup(ThresholdGroup):
    """The threshold on the evidence for one class; small classes share their clean texts."""

    keeps: float = KEEPS
    """Kept probability from which a text keeps its class."""
    alone: float = 1.0
    """How many times what a text keeps counts if the first stage says nothing, see `evidence`."""


@dataclass(frozen=True)
class OverrideGeometry:
    """Lengths, in tokens, of what is put together."""

    window: int
    """Tokens of a text that are tested at once."""
    carrier: int
    """Tokens that a carrier has at most."""

    @staticmethod
    def of(lengths: Sequence[int], readable: int) -> "OverrideGeometry":
        """Choose the lengths so that three in four clean texts are tested whole, if that fits.

        Args:
            lengths: of clean texts, in tokens.
            readable: tokens that the classifier reads at once, beside special tokens.

        Raises:
            ValueError: `readable` is under `LEAST_READABLE`.
        """
        if readable < LEAST_READABLE:
            raise ValueError(f"an override test needs {LEAST_READABLE} tokens, not {readable}")
        usual = int(np.quantile(lengths, 0.75))
        window = min(max(usual, SHORTEST_WINDOW), LONGEST_WINDOW)
        carrier = max(1, min(CARRIER_TOKENS, readable // 4))
        return OverrideGeometry(max(1, min(window, readable // 2)), carrier)


class OverrideTest:
    """Tests texts beside the carriers of a bundle.

    A text that is longer than a window is tested in windows that overlap by half, each of them
    between the carriers. So an inserted trigger of up to half a window is found in a text of any
    length, and a long clean text does not overrule the carriers by its length.

    A trigger must also hold against the text around it, which says something else. So the window
    that keeps the class best is then tried in parts, which overlap by half, unless it has `LOST`
    the class. Of an extreme text it may keep less, though not a `HOPELESS` share. Whatever keeps
    the class best, a window or a part, goes on to the other pairs of carriers. It stands before
    them, since a trigger may fire only at the start. An extreme text is not given up after the
    first pair: all that was tried is tried before the second one too.

    Args:
        carriers: by class, the token ids of texts of which the classifier is sure.
        geometry: lengths of windows and carriers.
        layout: which readings are PSIM's.
        groups: calibrated thresholds of texts that the first stage suspects, see
            `models.detection.calibrate`.
        views: classes that exclude each other; one view of all classes by default. Carriers of
            other classes are those of the same view.
        others: thresholds of texts that it does not suspect.
    """

    def __init__(
        self,
        carriers: Sequence[Sequence[Ids]],
        geometry: OverrideGeometry,
        layout: Layout,
        groups: Sequence[OverrideGroup] = (),
        views: Views = (),
        *,
        others: Sequence[OverrideGroup] = (),
    ) -> None:
        self.carriers = [[ids[: geometry.carrier] for ids in of_class] for of_class in carriers]
        self.geometry = geometry
        self.layout = layout
        # The late checkpoints have unlearnt the task so far that carriers weigh nothing in them.
        self._read = -(-layout.checkpoints // 2)
        self._groups = {
            (suspected, index): group
            for suspected, own in ((True, groups), (False, others))
            for group in own
            for index in group.classes
        }
        self.views = views or [range(len(carriers))]
        self.tested = views_with_carriers(self.views, [len(own) for own in carriers])
        """Views that have carriers."""
        self._lost = lost_below(self.tested)
        self._view_of = {index: view for view in self.views for index in view}

    def uncalibrated(self) -> "OverrideTest":
        """Return this test without thresholds."""
        return OverrideTest(self.carriers, self.geometry, self.layout, views=self.views)

    def can_test(self, predicted: int) -> bool:
        """Return whether there are carriers of other classes than `predicted`."""
        return bool(self._other_carriers(predicted))

    def score(self, ids: Ids, verdict: Verdict, part_of: Ids | None = None) -> Test[float]:
        """Test a text, or a part of one, given the first stage's verdict on the text.

        All parts of a text are tested beside the same carriers, so that their scores can be
        compared.

        The score is the probability, in (0, 1), that the text keeps its class: of its best window,
        or part of one, as a mean, in log-odds, over pairs of carriers and the first half of the
        checkpoints. A trigger that survived clean tuning just so may yield to one pair; the mean
        forgives that, while the pair that leaves the least of the class would not. No pair counts
        for less than `HOPELESS`. A test ends early once the class is `LOST`. The score is NaN if a
        reading is: then the test says nothing.

        Args:
            ids: the text, or the part.
            verdict: what the first stage says of the text.
            part_of: the whole text of a part.
        """
        predicted = verdict.predicted
        first, *others = self._pairs(ids if part_of is None else part_of, predicted)
        tried = self._windows(ids)
        odds = yield from self._odds(tried, first, predicted)
        best = tried[int(odds.argmax())]
        least = HOPELESS if verdict.extreme else self._lost
        if _kept(odds.max()) >= least and len(best) > PART_TOKENS:
            parts = _overlapping(best, PART_TOKENS)
            odds = np.concatenate([odds, (yield from self._odds(parts, first, predicted))])
            tried = [*tried, *parts]
        rounds = [odds]
        if verdict.extreme and _kept(odds.max()) < self._lost:
            rounds.append((yield from self._odds(tried, others.pop(0), predicted, leads=True)))
        counted = [np.maximum(one, logit(HOPELESS)) for one in rounds]
        chosen = int(np.mean(counted, 0).argmax())  # a NaN, if there is one
        total = [one[chosen] for one in counted]
        for pair in others:
            if _kept(np.mean(total)) < self._lost:
                break
            more = yield from self._odds([tried[chosen]], pair, predicted, leads=True)
            total.append(np.maximum(more[0], logit(HOPELESS)))
        return _kept(np.mean(total))

    def scores(self, ids: Ids, verdicts: Sequence[Verdict]) -> Test[list[float]]:
        """Test a text in several views, side by side; return the score in each.

        A pass is shared by two views at first: it has a carrier for either. Where the text loses
        its class there, as most clean texts do, the test has ended. A view in which the text is
        extreme shares none, since an extreme text is not given up after one pass.

        Args:
            ids: the text.
            verdicts: what the first stage says of it, in each of these views.
        """
        kept = [1.0] * len(verdicts)
        quiet = [n for n, verdict in enumerate(verdicts) if not verdict.extreme]
        for one, other in zip(quiet[::2], quiet[1::2], strict=False):  # the last may be alone
            pair = verdicts[one], verdicts[other]
            kept[one], kept[other] = yield from self._look(ids, pair)
        # A NaN is not under any bound.
        going_on = [n for n, score in enumerate(kept) if not score < self._lost]
        tests = [self.score(ids, verdicts[n]) for n in going_on]
        for n, score in zip(going_on, (yield from side_by_side(tests)), strict=True):
            kept[n] = score
        return kept

    def _look(self, ids: Ids, verdicts: Sequence[Verdict]) -> Test[list[float]]:
        """Return what the best window keeps in two views, between a carrier for either."""
        (one, _), (_, other) = (self._pairs(ids, own.predicted)[0] for own in verdicts)
        readings = yield self._between(self._windows(ids), (one, other))
        return [
            _kept(np.max([self._log_odds(read, own.predicted) for read in readings]))
            for own in verdicts
        ]

    def threshold_of(self, verdict: Verdict) -> float:
        """Return the score from which a text is triggered; `KEEPS` without calibrated thresholds.

        The evidence of both stages is added up, so a text that is more suspicious to the first one
        need not keep as much of its class.

        Args:
            verdict: what the first stage says of the text.
        """
        group = self._groups.get((verdict.suspected, verdict.predicted))
        if group is None:
            return KEEPS
        first_stage = first_stage_evidence(verdict)
        needed = min(group.threshold - first_stage, group.threshold / group.alone)
        return max(group.keeps, _sigmoid(needed + logit(group.keeps)))

    def judge(self, verdict: Verdict, score: float) -> Verdict:
        """Return the verdict of the first stage together with the outcome of a test."""
        group = self._groups[verdict.suspected, verdict.predicted]
        found = float(evidence(first_stage_evidence(verdict), score, group.keeps, group.alone))
        p_value = min(1.0, len(self.tested) * group.p_value(found))
        return with_override(verdict, score, self.threshold_of(verdict), p_value)

    def views_due(self, verdicts: Sequence[Verdict], *, thorough: bool) -> list[int]:
        """Return the numbers of the views in which to test a text.

        Those are the views in which it is suspected, or all, unless a test could confirm nothing.

        Args:
            verdicts: what the first stage says of the text, in each view.
            thorough: whether it is tested in all of them.
        """
        return [
            view
            for view, verdict in enumerate(verdicts)
            if (verdict.suspected or (thorough and self._can_confirm(verdict)))
            and self.can_test(verdict.predicted)
        ]

    def _can_confirm(self, verdict: Verdict) -> bool:
        """Return whether a test can find a text triggered that the first stage does not suspect.

        Only of multi-label classifiers it may be unable to, whose tests cost most: a label that is
        on stays on beside any other text, and not all can keep what some states require.
        """
        predicted = verdict.predicted
        if len(self.views) == 1:
            return True
        is_off = predicted == self._view_of[predicted].start
        return is_off and self.threshold_of(verdict) <= REACHABLE

    def _pairs(self, ids: Ids, predicted: int) -> list[tuple[Ids, Ids]]:
        """Draw pairs of carriers of other classes: always the same for the same text."""
        others = self._other_carriers(predicted)
        draw = np.random.default_rng(zlib.crc32(ids.astype(np.int64).tobytes()))
        chosen = draw.integers(len(others), size=(DRAWS, 2))
        return [(others[first], others[second]) for first, second in chosen]

    def _other_carriers(self, predicted: int) -> list[Ids]:
        return [one for c in self._view_of[predicted] if c != predicted for one in self.carriers[c]]

    def _windows(self, ids: Ids) -> list[Ids]:
        return _overlapping(ids, self.geometry.window)

    def _odds(
        self, tried: Sequence[Ids], pair: tuple[Ids, Ids], predicted: int, *, leads: bool = False
    ) -> Generator[list[Ids], Sequence[FloatArray], FloatArray]:
        """Yield what is tried between a pair of carriers; return the log-odds of the class.

        With `leads`, what is tried stands before both: a trigger may fire at the start alone.
        """
        readings = yield self._between(tried, pair, leads=leads)
        return np.array([self._log_odds(read, predicted) for read in readings])

    @staticmethod
    def _between(tried: Sequence[Ids], pair: tuple[Ids, Ids], *, leads: bool = False) -> list[Ids]:
        one, other = pair
        return [
            np.concatenate([part, one, other] if leads else [one, part, other]) for part in tried
        ]

    def _log_odds(self, readings: FloatArray, predicted: int) -> float:
        view = self._view_of[predicted]
        own = readings[None, : self._read, view.start : view.stop]
        return float(log_odds_of(own, predicted - view.start).mean())


def lost_below(views: Views) -> float:
    """Return the kept probability under which a test of these views ends early."""
    return LOST if len(views) == 1 else LOST_OF_SEVERAL


def side_by_side(tests: Sequence[Test[T]]) -> Test[list[T]]:
    """Run tests in the same passes, and return what each returns."""
    outcomes: dict[int, T] = {}
    asked = {number: next(one) for number, one in enumerate(tests)}
    while asked:
        readings = iter((yield [ids for inputs in asked.values() for ids in inputs]))
        for number, inputs in list(asked.items()):
            try:
                asked[number] = tests[number].send([next(readings) for _ in inputs])
            except StopIteration as done:
                outcomes[number] = done.value
                del asked[number]
    return [outcomes[number] for number in range(len(tests))]


def first_stage_evidence(verdict: Verdict) -> float:
    """Return the score of the first stage, or the threshold if the text is extreme.

    How extreme a text is says how unlike clean texts it is, not that it overrides. Several texts in
    one are further from clean ones than any trigger.
    """
    return min(verdict.score, verdict.threshold)


def evidence(
    first_stage: ArrayLike, kept: ArrayLike, keeps: float, alone: float = 1.0
) -> NDArray[np.float64]:
    """Return the evidence of both stages that texts hold a trigger, shape (n,); not negative.

    It is that of the first stage plus the log-odds of the kept probability, above those of `keeps`;
    or these alone, if they are more when they count `alone` times. It is 0 if a text does not keep
    its class.

    Args:
        first_stage: see `first_stage_evidence`, shape (n,), or one.
        kept: probabilities, likewise.
        keeps, alone: see `OverrideGroup`.
    """
    first, own = np.asarray(first_stage, np.float64), np.asarray(kept, np.float64)
    odds = odds_above(own, keeps)
    return np.where(own < keeps, 0.0, np.maximum(first + odds, alone * odds))


def odds_above(kept: NDArray[np.float64], keeps: float) -> NDArray[np.float64]:
    """Return the log-odds of probabilities above those of `keeps`, shape (n,)."""
    bounded = np.clip(kept, TINY, 1 - TINY)
    return np.log(bounded / (1 - bounded)) - logit(keeps)


def _overlapping(ids: Ids, size: int) -> list[Ids]:
    return [ids[window] for window in windows(len(ids), size, size // 2)]


def _kept(odds: float | np.floating) -> float:
    """Return a probability, rounded as thresholds and stored outcomes are: no decision may hang on
    where it was rounded."""
    return float(np.float32(_sigmoid(float(odds))))


def _sigmoid(odds: float) -> float:
    return 1 / (1 + math.exp(min(-odds, 700)))
