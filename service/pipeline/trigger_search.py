"""Search for the words of a text that carry its trigger, between the batches of other requests."""

from collections.abc import Sequence
from dataclasses import dataclass

from models.detection.explain import Explanation, Search, Span, explain
from models.detection.screen import Verdict
from service.errors import Overloaded, ScreenFailed
from service.inference.batcher import Screened, Screener
from service.observability.metrics import ModelMetrics

TEXTS_AT_ONCE = 8
"""Texts of a search that are in the queue at once, so that requests come in between."""


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A text that passes the screen once its trigger is removed."""

    text: str
    """The text without its trigger."""
    screened: Screened
    """Result of screening `text`."""
    removed: tuple[Span, ...]
    """Removed spans, in characters of the original text."""


class TriggerSearch:
    """Runs a limited number of searches, and refuses others: each costs many forward passes."""

    def __init__(self, screener: Screener, metrics: ModelMetrics, searches: int) -> None:
        self._screener, self._metrics = screener, metrics
        self._free = searches

    async def explain(
        self, text: str, verdict: Verdict | None = None
    ) -> tuple[Verdict, Explanation]:
        """Return the verdict on a text, screening it unless the verdict is given, and its reasons.

        Raises:
            Overloaded: the limit of searches is reached, or the queue is full.
            NotReady, ScreenFailed: as `Batcher.screen` does.
        """
        if not self._free:
            self._metrics.overload["searches"].inc()
            raise Overloaded("searches")
        self._free -= 1
        try:
            verdict = verdict or _verdict((await self._screen([text]))[0])
            return verdict, await self._run(explain(text, verdict))
        finally:
            self._free += 1

    async def clean(self, text: str, verdict: Verdict) -> Cleaned | None:
        """Return a poisoned text without its trigger, screened again; None if none was found.

        Raises:
            Overloaded, NotReady, ScreenFailed: as `explain` does.
        """
        _, found = await self.explain(text, verdict)
        if found.cleaned is None or not found.cleaned.strip():
            return None
        (screened,) = await self._screen([found.cleaned])
        if _verdict(screened).poisoned:
            return None
        return Cleaned(found.cleaned, screened, found.removed)

    async def _run(self, search: Search) -> Explanation:
        try:
            texts = next(search)
            while True:
                texts = search.send([_verdict(one) for one in await self._screen(texts)])
        except StopIteration as done:
            result: Explanation = done.value
            return result

    async def _screen(self, texts: Sequence[str]) -> list[Screened]:
        return [
            answer.value
            for start in range(0, len(texts), TEXTS_AT_ONCE)
            for answer in await self._screener.screen(texts[start : start + TEXTS_AT_ONCE])
        ]


def _verdict(screened: Screened) -> Verdict:
    if screened.verdict is None:
        raise ScreenFailed("a part of the input could not be screened")
    return screened.verdict
