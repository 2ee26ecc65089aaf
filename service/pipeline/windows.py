"""Screening of texts to their end.

It is for a classifier elsewhere, which may read more of a text than the screen does at once, or for
a text that goes on to others who read all of it.

A text that the model cannot read at once is tokenized whole, and screened in overlapping windows of
its tokens; the worst verdict counts. Windows of characters would not do: tokenizers drop
characters, so far more of them may lie between two tokens than a window has. A trigger that is no
longer than the overlap lies whole in one of the windows.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from models.detection.screen import Verdict, worst_verdict
from models.detection.windows import windows
from service.inference.batcher import Charge, Screened, Timed
from service.inference.worker import Health
from service.pipeline.two_stage import TwoStageScreener

OVERLAP = 4
"""Windows share a fourth of the tokens that the model reads with the next one."""
WINDOWS_AT_ONCE = 8
"""Windows of a text that are in the queue at once, so that other requests come in between."""


class WindowedScreener:
    """Screens texts to their end; a text of more than `most` windows is `truncated`.

    If the classifier is the model's own, so is a text of which that reads only the beginning.

    Args:
        screener: screens each window.
        length: tokens that the model reads at once, special tokens included.
        most: windows per text.
        limit: returns after how many tokens, special tokens included, the classifier cuts a text;
            None if it reads as many as the model, or all, or if that is not known.
        own_classifier: whether texts are for the model's own classifier.
    """

    def __init__(
        self,
        screener: TwoStageScreener,
        length: int,
        most: int,
        limit: Callable[[], int | None] = lambda: None,
        *,
        own_classifier: bool = False,
    ) -> None:
        self._screener, self._length, self._most, self._limit = screener, length, most, limit
        self._size, self._own_classifier = screener.window_length, own_classifier

    @property
    def health(self) -> Health:
        """State of the inference worker."""
        return self._screener.health

    @property
    def override_test(self) -> str | None:
        """See `TwoStageScreener.override_test`."""
        return self._screener.override_test

    async def screen(self, texts: Sequence[str], charge: Charge) -> list[Timed[Screened]]:
        """Screen texts; `charge` is called for each batch of windows.

        Raises:
            Overloaded, NotReady, ScreenFailed: as `Batcher.screen` does.
        """
        answers = await self._screener.screen(texts, charge)
        return [
            await self._screen_rest(text, answer, charge) if self._is_open(answer.value) else answer
            for text, answer in zip(texts, answers, strict=True)
        ]

    async def keep(
        self, parts: Sequence[str], text: str, verdict: Verdict, charge: Charge
    ) -> list[float]:
        """See `TwoStageScreener.keep`."""
        return await self._screener.keep(parts, text, verdict, charge)

    async def _screen_rest(
        self, text: str, beginning: Timed[Screened], charge: Charge
    ) -> Timed[Screened]:
        """Screen the windows of a text, given the answer for its beginning."""
        verdict, stages = beginning.value.verdict, dict(beginning.stages)
        settled = beginning.value.settled
        tokenized = await self._screener.token_ids(text)
        stages["tokenize"] = stages.get("tokenize", 0.0) + tokenized.stages["tokenize"]
        ids = tokenized.value
        waiting, left = deque(self._windows(len(ids))), self._most
        while waiting and left and verdict is not None and not verdict.poisoned:
            batch = [waiting.popleft() for _ in range(min(WINDOWS_AT_ONCE, left, len(waiting)))]
            left -= len(batch)
            answers = await self._screener.screen_tokens([ids[window] for window in batch], charge)
            for stage in {stage for answer in answers for stage in answer.stages}:
                # Only windows that were tested have the stage of the override test.
                slowest = max(answer.stages.get(stage, 0.0) for answer in answers)
                stages[stage] = stages.get(stage, 0.0) + slowest
            for answer in answers:
                verdict = worse(verdict, answer.value.verdict)
                settled = settled and answer.value.settled
        if verdict is not None:
            verdict = replace(verdict, truncated=self._own_classifier or bool(waiting))
        return Timed(replace(beginning.value, verdict=verdict, settled=settled), stages)

    def _is_open(self, beginning: Screened) -> bool:
        """Return whether the windows of a text can change the verdict on its beginning."""
        verdict, limit = beginning.verdict, self._limit()
        if verdict is None or verdict.poisoned:
            return False
        return verdict.truncated or (limit is not None and beginning.tokens > limit)

    def _windows(self, count: int) -> list[slice]:
        """Return the windows of a text of `count` tokens, and one that ends where it is cut.

        A cut can make a trigger: a token that only begins a word becomes a word.
        """
        found = windows(count, self._size, self._length // OVERLAP)
        limit = self._limit()
        end = count if limit is None else max(1, limit - (self._length - self._size))
        cut = slice(max(0, end - self._size), end)
        return found if end >= count or cut in found else [cut, *found]


def worse(one: Verdict | None, other: Verdict | None) -> Verdict | None:
    """Return the more suspicious verdict; a missing verdict is worse than any."""
    if one is None or other is None:
        return None
    return worst_verdict([one, other])
