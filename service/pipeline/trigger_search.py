"""Search for the words of a text that carry its trigger, between the batches of other requests."""

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from models.detection.explain import Answers, Asked, Explanation, Found, explain
from models.detection.passage import Span, find_passage
from models.detection.screen import Verdict
from service.errors import Overloaded, ScreenFailed
from service.inference.batcher import Charge, Screened, Screener
from service.observability.metrics import ModelMetrics

TEXTS_AT_ONCE, CHARS_AT_ONCE = 8, 16_384
"""Texts of a search that are in the queue at once, so that requests come in between. A text that is
longer goes alone: it may have many windows."""

Turns = AbstractAsyncContextManager[None]
AT_ONCE: Turns = nullcontext()
"""Searches that need not wait for others."""


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A text in which nothing is found once its trigger is removed."""

    text: str
    """The text without its trigger."""
    screened: Screened
    """Result of screening `text`."""
    removed: tuple[Span, ...]
    """Removed spans, in characters of the original text."""


class TriggerSearch:
    """Searches for triggers; each search costs many forward passes.

    Explanations are limited in number, and others are refused. Sanitizing is not: its searches take
    turns, a few texts at a time, so that none holds up the others, and no explanation does.

    Args:
        screener: screens variants of texts.
        metrics: counts refused explanations.
        explanations: that may run at a time.
    """

    def __init__(self, screener: Screener, metrics: ModelMetrics, explanations: int) -> None:
        self._screener, self._metrics = screener, metrics
        self._free = explanations
        self._sanitizing = asyncio.Lock()

    async def explain(self, text: str, charge: Charge) -> tuple[Verdict, Explanation]:
        """Return the verdict on a text, and its reasons.

        Raises:
            Overloaded: the limit of explanations is reached, or the queue is full.
            NotReady, ScreenFailed: as `Batcher.screen` does.
            ServiceError: `charge` refuses a pass.
        """
        if not self._free:
            self._metrics.overload["searches"].inc()
            raise Overloaded("searches")
        self._free -= 1
        try:
            (verdict,) = await self._screen([text], charge, AT_ONCE)
            return verdict, await self._search(text, verdict, charge, AT_ONCE)
        finally:
            self._free += 1

    async def clean(self, text: str, verdict: Verdict, charge: Charge) -> Cleaned | None:
        """Return a triggered text without its trigger, screened again; None if none was found.

        What is left must have no finding at all: an unfamiliar rest may hold a part of the trigger.

        Raises:
            Overloaded, NotReady, ScreenFailed: as `Batcher.screen` does.
            ServiceError: `charge` refuses a pass.
        """
        found = await self._search(text, verdict, charge, self._sanitizing)
        if found.cleaned is None or not found.cleaned.strip():
            return None
        async with self._sanitizing:
            (answer,) = await self._screener.screen([found.cleaned], charge)
        if _verdict(answer.value).finding:
            return None
        return Cleaned(found.cleaned, answer.value, found.removed)

    async def _search(
        self, text: str, verdict: Verdict, charge: Charge, turns: Turns
    ) -> Explanation:
        async def keep(parts: list[str]) -> list[float]:
            scores = []
            for batch in _batches(parts):
                async with turns:
                    scores += await self._screener.keep(batch, text, verdict, charge)
            return scores

        async def screen(texts: list[str]) -> list[Verdict]:
            return await self._screen(texts, charge, turns)

        passage = None
        if self._screener.override_test:
            passage = await _run(find_passage(text, verdict), keep)
        return await _run(explain(text, verdict, passage), screen)

    async def _screen(self, texts: Sequence[str], charge: Charge, turns: Turns) -> list[Verdict]:
        verdicts = []
        for batch in _batches(texts):
            async with turns:
                answers = await self._screener.screen(batch, charge)
            verdicts += [_verdict(answer.value) for answer in answers]
        return verdicts


async def _run(
    search: Generator[Asked, Answers, Found], answer: Callable[[Asked], Awaitable[Answers]]
) -> Found:
    """Run a search, as `run_search` does."""
    try:
        asked = next(search)
        while True:
            asked = search.send(await answer(asked))
    except StopIteration as done:
        result: Found = done.value
        return result


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the texts in order, at least one at a time."""
    batch: list[str] = []
    for text in texts:
        if batch and (
            len(batch) == TEXTS_AT_ONCE or sum(map(len, batch)) + len(text) > CHARS_AT_ONCE
        ):
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def _verdict(screened: Screened) -> Verdict:
    if screened.verdict is None:
        raise ScreenFailed("a part of the input could not be screened")
    return screened.verdict
