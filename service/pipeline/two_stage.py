"""Both stages of the screen: what the first one suspects goes through the override test.

So does a small sample of all other texts, or all of them in the thorough mode. An attacker who
knows the first stage can make a trigger that it does not suspect. With the sample, most of such
texts pass, but somebody learns of them.

A test takes several forward passes, which run in the same batches as everything else. So that
nobody can buy many passes with one suspicious text, tests have a budget of tokens per second. A
text that exceeds it gets the verdict of the first stage alone: if it is extreme, it counts as
triggered.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b

from models.bundle.load import Bundle
from models.detection.override import OverrideTest, T, Test
from models.detection.screen import Verdict, worst_verdict
from models.engines.base import IntArray
from service.errors import Overloaded, ScreenFailed, TimedOut
from service.inference.batcher import Batcher, Charge, Screened, Timed, free
from service.inference.worker import Health
from service.observability.metrics import ModelMetrics
from service.settings import OverrideSettings

BURST_S = 10
"""Seconds of the budget that can be saved up."""
FOR_SUSPICIOUS = 0.5
"""Share of what is saved up that tests of other texts leave to suspicious ones."""


class TokenBudget:
    """Limits tokens per second, as a token bucket that starts full."""

    def __init__(self, per_second: float) -> None:
        self._rate, self._left = per_second, per_second * BURST_S
        self._since = time.monotonic()

    def take(self, tokens: int, leaving: float = 0.0) -> bool:
        """Take tokens out of the bucket; return False, and take none, if there are too few.

        Args:
            tokens: how many.
            leaving: share of a full bucket that must be left.
        """
        now, full = time.monotonic(), self._rate * BURST_S
        self._left = min(self._left + (now - self._since) * self._rate, full)
        self._since = now
        if tokens > self._left - leaving * full:
            return False
        self._left -= tokens
        return True


class TextSample:
    """A share of all texts, at random. A text is always in it or never, in one process.

    Nobody outside can know which texts are.
    """

    def __init__(self, share: float) -> None:
        self._bound, self._key = share * 2**64, secrets.token_bytes(32)

    def __contains__(self, ids: IntArray) -> bool:
        """Return whether a text is in the sample."""
        digest = blake2b(ids.tobytes(), key=self._key, digest_size=8).digest()
        return int.from_bytes(digest) < self._bound


class TwoStageScreener:
    """Screens texts and windows of texts by both stages.

    Args:
        batcher: runs the passes of both.
        bundle: the stages; without an override test, the first one decides alone.
        settings: which texts are tested, and how many.
        metrics: counts tests and the tokens they cost.
    """

    def __init__(
        self, batcher: Batcher, bundle: Bundle, settings: OverrideSettings, metrics: ModelMetrics
    ) -> None:
        self._batcher, self._bundle, self._metrics = batcher, bundle, metrics
        self._thorough = bundle.manifest.tests_all_texts(settings.thorough)
        self._sample = TextSample(settings.screen_sample)
        self._budget = TokenBudget(settings.override_budget(thorough=self._thorough))

    @property
    def health(self) -> Health:
        """State of the batcher's worker."""
        return self._batcher.health

    @property
    def window_length(self) -> int:
        """How many tokens of a text the model reads at once, beside the special tokens."""
        return self._batcher.window_length

    @property
    def override_test(self) -> str | None:
        """Which texts are tested, `suspicious` or `thorough`; None without a test."""
        if self._bundle.override is None:
            return None
        return "thorough" if self._thorough else "suspicious"

    async def token_ids(self, text: str) -> Timed[IntArray]:
        """See `Batcher.token_ids`."""
        return await self._batcher.token_ids(text)

    async def screen(self, texts: Sequence[str], charge: Charge = free) -> list[Timed[Screened]]:
        """Screen texts; only the pass of the first stage is charged.

        Raises:
            ServiceError: as `Batcher.screen` does.
        """
        return await self._confirm(await self._batcher.screen(texts, charge))

    async def screen_tokens(
        self, windows: Sequence[IntArray], charge: Charge = free
    ) -> list[Timed[Screened]]:
        """Screen parts of texts, as `screen` does."""
        return await self._confirm(await self._batcher.screen_tokens(windows, charge))

    async def keep(
        self, parts: Sequence[str], text: str, verdict: Verdict, charge: Charge
    ) -> list[float]:
        """Return by how much parts of a text keep its class beside carriers: override scores.

        A part whose test fails has the score 0. Each part is charged as one pass, and cut to what
        the model reads at once. The budget of tokens is for the tests that decide about texts, so
        parts take nothing from it.

        Raises:
            ServiceError: `charge` refuses the passes, or a text cannot be tokenized.
        """
        test = self._bundle.override
        if test is None or not parts:
            return [0.0] * len(parts)
        await charge(len(parts))
        whole, *ids = await asyncio.gather(*(self.token_ids(one) for one in (text, *parts)))
        most = self.window_length  # of one word, there may be any number of tokens
        scores = await asyncio.gather(
            *(
                self._run(
                    test.score(one.value[:most], verdict, whole.value),
                    _unlimited,
                )
                for one in ids
            )
        )
        return [score or 0.0 for score in scores]

    async def _confirm(self, answers: list[Timed[Screened]]) -> list[Timed[Screened]]:
        test = self._bundle.override
        if test is None:
            return answers
        due = [self._views_due(test, answer.value) for answer in answers]
        tested = [(answer, views) for answer, views in zip(answers, due, strict=True) if views]
        if not tested:
            return answers
        confirmed = iter(await asyncio.gather(*(self._confirm_one(test, *one) for one in tested)))
        return [
            next(confirmed) if views else answer for answer, views in zip(answers, due, strict=True)
        ]

    def _views_due(self, test: OverrideTest, screened: Screened) -> list[int]:
        if self._thorough:
            return test.views_due(screened.by_view, thorough=True)
        suspected = test.views_due(screened.by_view, thorough=False)
        if suspected or screened.ids not in self._sample:
            return suspected
        return test.views_due(screened.by_view, thorough=True)

    async def _confirm_one(
        self, test: OverrideTest, answer: Timed[Screened], due: Sequence[int]
    ) -> Timed[Screened]:
        started = time.perf_counter()
        by_view = [*answer.value.by_view]
        running = test.scores(answer.value.ids, [by_view[view] for view in due])
        suspected = any(by_view[view].suspected for view in due)
        leaving = 0.0 if suspected else FOR_SUSPICIOUS
        scores = await self._run(running, partial(self._budget.take, leaving=leaving))
        if scores is None and not (suspected or self._thorough):
            return answer  # nobody was promised a test
        for view, score in zip(due, scores or (), strict=scores is not None):
            by_view[view] = test.judge(by_view[view], score)
        for view in due:
            self._count(by_view[view], ran=scores is not None)
        seconds = time.perf_counter() - started
        self._metrics.stage_seconds["override"].observe(seconds)
        stages = answer.stages | {"override": seconds}
        screened = replace(answer.value, verdict=worst_verdict(by_view), settled=scores is not None)
        return Timed(screened, stages)

    def _count(self, verdict: Verdict, *, ran: bool) -> None:
        outcome = ("confirmed" if verdict.poisoned else "cleared") if ran else "skipped"
        self._metrics.override_tests[outcome, verdict.suspected].inc()

    async def _run(self, running: Test[T], take: Callable[[int], bool]) -> T | None:
        """Return what a test returns; None if it cannot be afforded, or one of its passes fails.

        Args:
            running: the test.
            take: says whether so many tokens can be afforded.
        """
        inputs = next(running)
        while True:
            tokens = sum(map(len, inputs))
            if not take(tokens):
                return None
            self._metrics.override_tokens.inc(tokens)
            try:
                answers = await self._batcher.screen_tokens(inputs)
            except (Overloaded, TimedOut, ScreenFailed):
                return None
            screened = [answer.value for answer in answers]
            # Without a verdict, the readings are missing or not finite.
            readings = [
                one.readings for one in screened if one.verdict and one.readings is not None
            ]
            if len(readings) < len(screened):
                return None
            try:
                inputs = running.send(readings)
            except StopIteration as done:
                outcome: T = done.value
                return outcome


def _unlimited(tokens: int) -> bool:
    """Take tokens from no budget."""
    return True
