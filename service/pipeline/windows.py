"""Screening texts to their end, for a classifier elsewhere that may read more than ours does.

What the model cannot read at once is screened in overlapping windows, and the most extreme verdict
counts. A trigger that is no longer than the overlap lies whole in one of them.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from models.detection.screen import Verdict
from service.inference.batcher import Batcher, Screened, Timed
from service.inference.worker import Health

CHARS_PER_TOKEN = 4
"""Of a first guess at what the model reads at once; a window that is too long is cut in three."""
OVERLAP = 4
"""The next window has a fourth of each again."""
SLACK = 8
"""A window may be an eighth longer on each side, so that it begins and ends with a word."""
SHORTEST = 16
"""Characters; a window that is no longer and still cannot be read at once stays unread."""
ROUND = 8
"""Windows of a text that are in the queue at once: other requests come in between."""


class WindowedScreener:
    """Screens as `Batcher` does, but all of a text; one of more windows than `most` is `truncated`.

    Args:
        length: tokens that the model reads at once.
        most: windows per text.
    """

    def __init__(self, batcher: Batcher, length: int, most: int) -> None:
        self._batcher, self._most = batcher, most
        self._size = CHARS_PER_TOKEN * length

    @property
    def health(self) -> Health:
        """As the batcher's."""
        return self._batcher.health

    async def screen(self, texts: Sequence[str]) -> list[Timed[Screened]]:
        """Screen texts.

        Raises:
            Overloaded, NotReady, ScreenFailed: as `Batcher.screen` does.
        """
        answers = await self._batcher.screen(texts)
        return [
            await self._whole(text, answer) if _leaves_a_doubt(answer.value.verdict) else answer
            for text, answer in zip(texts, answers, strict=True)
        ]

    async def _whole(self, text: str, beginning: Timed[Screened]) -> Timed[Screened]:
        """Go on from the verdict on the beginning of a text that is longer."""
        verdict, stages = beginning.value.verdict, dict(beginning.stages)
        waiting, left = deque(windows(text, self._size)), self._most
        while waiting and left and verdict is not None and not verdict.poisoned:
            taken = [waiting.popleft() for _ in range(min(ROUND, left, len(waiting)))]
            left -= len(taken)
            answers = await self._batcher.screen(taken)
            for stage in answers[0].stages:
                stages[stage] = stages.get(stage, 0.0) + max(a.stages[stage] for a in answers)
            for window, answer in zip(taken, answers, strict=True):
                found = answer.value.verdict
                verdict = _worst(verdict, found)
                if found is not None and found.truncated:
                    if len(window) <= SHORTEST:
                        left = 0
                    waiting.extend(windows(window, 2 * len(window) // 5))
        if verdict is not None:
            verdict = replace(verdict, truncated=bool(waiting))
        return Timed(Screened(verdict, beginning.value.state), stages)


def windows(text: str, size: int) -> list[str]:
    """Return overlapping parts of a text, so that each stretch of `size / 4` lies whole in one.

    They are of `size` characters, and up to a fourth longer if that spares a word at an edge. Those
    with nothing but blanks are left out.
    """
    stride, slack = max(1, size - size // OVERLAP), size // SLACK
    parts = []
    for start in range(0, max(1, len(text) - size // OVERLAP), stride):
        end = min(start + size, len(text))
        before = text[max(0, start - slack) : start].split(" ")[-1]
        after = text[end : end + slack].split(" ")[0]
        parts.append(text[start - len(before) : end + len(after)])
    return [part for part in parts if part.strip()]


def _leaves_a_doubt(verdict: Verdict | None) -> bool:
    """Return whether the rest of a text can change what its beginning says."""
    return verdict is not None and verdict.truncated and not verdict.poisoned


def _worst(one: Verdict | None, other: Verdict | None) -> Verdict | None:
    """Return the more suspicious verdict; none at all is worse than any."""
    if one is None or other is None:
        return None
    return max(one, other, key=lambda verdict: verdict.margin)
