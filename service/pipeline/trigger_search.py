"""What carries the trigger of a text, searched beside the traffic and never in its way."""

from collections.abc import Sequence
from dataclasses import dataclass

from models.detection.explain import Explanation, Search, Span, explain
from models.detection.screen import Verdict
from service.errors import Overloaded, ScreenFailed
from service.inference.batcher import Screened, Screener
from service.observability.metrics import ModelMetrics

ROUND = 8
"""Texts of a search that are in the queue at once: requests come in between."""


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A text that passes without what carried its trigger."""

    text: str
    screened: Screened
    """Of this text."""
    removed: tuple[Span, ...]
    """In characters of the original text."""


class TriggerSearch:
    """Runs a few searches at a time, and refuses others: each costs many screening passes."""

    def __init__(self, screener: Screener, metrics: ModelMetrics, searches: int) -> None:
        self._screener, self._metrics = screener, metrics
        self._free = searches

    async def explain(
        self, text: str, verdict: Verdict | None = None
    ) -> tuple[Verdict, Explanation]:
        """Return the verdict on a text, unless it is given, and what it rests on.

        Raises:
            Overloaded: as many searches as may be are running, or the queue is full.
            NotReady, ScreenFailed: as their messages say.
        """
        if not self._free:
            self._metrics.overload["searches"].inc()
            raise Overloaded("searches")
        self._free -= 1
        try:
            verdict = verdict or _verdict((await self._screened([text]))[0])
            return verdict, await self._run(explain(text, verdict))
        finally:
            self._free += 1

    async def clean(self, text: str, verdict: Verdict) -> Cleaned | None:
        """Return a poisoned text without its trigger, screened again; None if it cannot be had.

        Raises:
            Overloaded, NotReady, ScreenFailed: as `explain` does.
        """
        _, found = await self.explain(text, verdict)
        if found.cleaned is None or not found.cleaned.strip():
            return None
        (screened,) = await self._screened([found.cleaned])
        return (
            None if _verdict(screened).poisoned else Cleaned(found.cleaned, screened, found.removed)
        )

    async def _run(self, search: Search) -> Explanation:
        try:
            texts = next(search)
            while True:
                texts = search.send([_verdict(s) for s in await self._screened(texts)])
        except StopIteration as done:
            result: Explanation = done.value
            return result

    async def _screened(self, texts: Sequence[str]) -> list[Screened]:
        return [
            answer.value
            for start in range(0, len(texts), ROUND)
            for answer in await self._screener.screen(texts[start : start + ROUND])
        ]


def _verdict(screened: Screened) -> Verdict:
    if screened.verdict is None:
        raise ScreenFailed("a part of the input could not be screened")
    return screened.verdict
