"""Passage search: find the words of a triggered text that pass the override test by themselves.

A trigger overrides clean texts beside it, and the text around the trigger does not. So parts of the
text are put between the carriers, each by itself. The shortest part that keeps the class is the
core of the trigger. The rest of a trigger sentence does little alone, but makes the core stronger,
and other words do not.

Nothing here runs a model: a search yields parts of the text and is sent their override scores. All
parts must be tested beside the same carriers, or their scores could not be compared.
"""

import math
import re
from collections.abc import Generator, Iterable, Iterator, Sequence

from models.detection.screen import Verdict, logit

MAX_PARTS, ROUND_SIZE = 256, 64
"""Limits for the parts that are tested in one search, and in one round of it."""
MAX_WORDS = 1024
"""Words after these are more than a model reads, and stay as they are."""
LONGEST_PART = 64
"""Words of a part; the override test looks at no more at once."""
REACH = 5
"""Words by which a passage grows at either end in one round."""
WORD_SHARE = 0.005
"""A word belongs to a passage if it raises the log-odds by this share of all that the trigger
raises them."""
_WORD = re.compile(r"\S+")

Span = tuple[int, int]
"""Start and end in characters of the text."""
Search = Generator[list[str], list[float], range | None]
"""Yields parts, is sent the score of each, and returns indices of words."""


def words_of(text: str) -> list[Span]:
    """Return the words of a text that a search looks at."""
    return [match.span() for match in _WORD.finditer(text)][:MAX_WORDS]


def find_passage(text: str, verdict: Verdict) -> Search:
    """Search for the words of a text that carry its trigger; return None if no part does alone.

    Windows of 1, 2, 4 and more words are tested until one keeps the class of the text, as the
    override test has it. It is trimmed, and then grows by words that make it stronger.
    """
    if verdict.override is None or verdict.override_threshold is None or not verdict.poisoned:
        return None
    parts = _Parts(text, logit(verdict.override_threshold))
    core: range | None = None
    for windows in _windows(len(parts.words)):
        yield from parts.test(windows)
        core = parts.best(windows)
        if core is not None:
            break
    if core is None:
        return None
    core = yield from _trimmed(parts, core)
    return (yield from _grown(parts, core, logit(verdict.override)))


class _Parts:
    """Parts of a text, as windows of its words, and the log-odds by which they keep its class."""

    def __init__(self, text: str, least: float) -> None:
        self.words = words_of(text)
        self._text, self._least = text, least
        self._odds: dict[range, float] = {}

    def test(self, windows: Iterable[range]) -> Generator[list[str], list[float], None]:
        """Test those that are new, as many as may be tested yet."""
        new = [window for window in windows if window not in self._odds]
        new = new[: MAX_PARTS - len(self._odds)]
        if new:
            scores = yield [
                self._text[self.words[window[0]][0] : self.words[window[-1]][1]] for window in new
            ]
            self._odds |= zip(new, map(logit, scores), strict=True)

    def best(self, windows: Sequence[range], price: float = 0.0) -> range | None:
        """Return the strongest window, with a price for each word; None if none is triggered."""
        worth = {
            window: self._odds[window] - price * len(window)
            for window in windows
            if self._odds.get(window, -math.inf) >= self._least
        }
        return max(worth, key=lambda window: worth[window]) if worth else None

    @property
    def weakest(self) -> float:
        """The log-odds of a part without the trigger."""
        return min(self._odds.values())


def _trimmed(parts: _Parts, core: range) -> Generator[list[str], list[float], range]:
    """Return the core without words at its ends that it does not need."""
    step = len(core) // 2
    while step:
        shorter = [core[step:], core[:-step]]
        yield from parts.test(shorter)
        found = parts.best(shorter)
        core = core if found is None else found
        step = step // 2 if found is None else min(step, len(core) // 2)
    return core


def _grown(parts: _Parts, core: range, whole: float) -> Generator[list[str], list[float], range]:
    """Return the core with the words around it that make it stronger.

    Args:
        parts: what is known.
        core: where to begin.
        whole: log-odds of the whole text.
    """
    price = WORD_SHARE * (whole - parts.weakest)
    while True:
        longer = [
            range(start, end)
            for start in range(core.start, max(0, core.start - REACH) - 1, -1)
            for end in range(core.stop, min(len(parts.words), core.stop + REACH) + 1)
        ]
        yield from parts.test(longer)
        best = (
            parts.best(longer, price) or core
        )  # the core comes first: it is kept if it is as good
        if core.start - best.start < REACH and best.stop - core.stop < REACH:
            return best
        core = best


def _windows(words: int) -> Iterator[list[range]]:
    """Yield at most `ROUND_SIZE` windows that cover all words, each time twice as long."""
    length = 1 if words <= ROUND_SIZE else -(-2 * words // ROUND_SIZE)
    while length <= min(words, LONGEST_PART):
        starts = range(0, words - length + 1, -(-length // 2))
        yield [range(start, start + length) for start in sorted({*starts, words - length})]
        length *= 2
