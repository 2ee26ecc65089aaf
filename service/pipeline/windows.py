"""Screening of texts to their end, for a classifier that may read more of a text than the screen.

Text that the model cannot read at once is screened in overlapping windows, and the most extreme
verdict counts. A trigger that is no longer than the overlap lies whole in one of the windows.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from models.detection.screen import Verdict
from service.inference.batcher import Batcher, Charge, Screened, Timed
from service.inference.worker import Health

CHARS_PER_TOKEN = 4
"""First guess at what the model reads at once; a window that is too long is cut in three."""
OVERLAP = 4
"""Windows share a fourth of their characters with the next one."""
SLACK = 8
"""A window may be an eighth longer on each side, so that it starts and ends at a word boundary."""
SHORTEST = 16
"""Characters; a window this short that still cannot be read at once stays unread."""
WINDOWS_AT_ONCE = 8
"""Windows of a text that are in the queue at once, so that other requests come in between."""


class WindowedScreener:
    """Screens texts to their end; a text of more than `most` windows is `truncated`.

    Args:
        batcher: screens each window.
        length: tokens that the model reads at once.
        most: windows per text.
    """

    def __init__(self, batcher: Batcher, length: int, most: int) -> None:
        self._batcher, self._most = batcher, most
        self._size = CHARS_PER_TOKEN * length

    @property
    def health(self) -> Health:
        """State of the batcher's worker."""
        return self._batcher.health

    async def screen(self, texts: Sequence[str], charge: Charge) -> list[Timed[Screened]]:
        """Screen texts; `charge` is called for each batch of windows.

        Raises:
            Overloaded, NotReady, ScreenFailed: as `Batcher.screen` does.
        """
        answers = await self._batcher.screen(texts, charge)
        return [
            await self._screen_rest(text, answer, charge)
            if _is_open(answer.value.verdict)
            else answer
            for text, answer in zip(texts, answers, strict=True)
        ]

    async def _screen_rest(
        self, text: str, beginning: Timed[Screened], charge: Charge
    ) -> Timed[Screened]:
        """Screen the windows of a text, given the answer for its beginning."""
        verdict, stages = beginning.value.verdict, dict(beginning.stages)
        waiting, left = deque(windows(text, self._size)), self._most
        while waiting and left and verdict is not None and not verdict.poisoned:
            batch = [waiting.popleft() for _ in range(min(WINDOWS_AT_ONCE, left, len(waiting)))]
            left -= len(batch)
            answers = await self._batcher.screen(batch, charge)
            for stage in answers[0].stages:
                stages[stage] = stages.get(stage, 0.0) + max(a.stages[stage] for a in answers)
            for window, answer in zip(batch, answers, strict=True):
                found = answer.value.verdict
                verdict = _worse(verdict, found)
                if found is not None and found.truncated:
                    if len(window) <= SHORTEST:
                        left = 0
                    waiting.extend(windows(window, 2 * len(window) // 5))
        if verdict is not None:
            verdict = replace(verdict, truncated=bool(waiting))
        return Timed(Screened(verdict, beginning.value.state), stages)


def windows(text: str, size: int) -> list[str]:
    """Return overlapping windows, so that each stretch of `size / 4` characters lies whole in one.

    Windows have `size` characters, and up to a fourth more where that keeps a word at an edge
    whole. Blank windows are left out.
    """
    stride, slack = max(1, size - size // OVERLAP), size // SLACK
    parts = []
    for start in range(0, max(1, len(text) - size // OVERLAP), stride):
        end = min(start + size, len(text))
        before = text[max(0, start - slack) : start].split(" ")[-1]
        after = text[end : end + slack].split(" ")[0]
        parts.append(text[start - len(before) : end + len(after)])
    return [part for part in parts if part.strip()]


def _is_open(verdict: Verdict | None) -> bool:
    """Return whether the rest of a text can change the verdict on its beginning."""
    return verdict is not None and verdict.truncated and not verdict.poisoned


def _worse(one: Verdict | None, other: Verdict | None) -> Verdict | None:
    """Return the more suspicious verdict; a missing verdict is worse than any."""
    if one is None or other is None:
        return None
    return max(one, other, key=lambda verdict: verdict.margin)
