"""Which words of a text the screen minds: the text without them, screened again.

Nothing here runs a model. A search yields texts to screen and is sent their verdicts, so that the
service can await them and the offline half can loop over them, see `explained`.
"""

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from models.detection.screen import Verdict

MOST_VARIANTS, AT_ONCE = 400, 64
"""Texts that are screened for one explanation, and in one round of it."""
MOST_WORDS = 1024
"""Words behind them are beyond what a model reads, and taken as they are."""
REACH, PER_WORD = 5, 0.2
"""What is found is extended by up to so many words at either end, if each lowers the score by so
much: the rest of a sentence may be no trigger any more, but it is no part of the text either."""
_WORD = re.compile(r"\S+")

Span = tuple[int, int]
"""Start and end in characters of the text, or in words of it."""
Words = Sequence[int]
"""Numbers of words, ascending."""


@dataclass(frozen=True, slots=True)
class Word:
    """A word of the text, and what the screen makes of it."""

    start: int
    end: int
    weight: float
    """By how much the score falls, beyond the threshold, without the word wherever it occurs;
    standard deviations. Of a text with more than `AT_ONCE` different words: without its
    neighbourhood."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What carries the trigger of a text."""

    words: tuple[Word, ...]
    removed: tuple[Span, ...] = ()
    """What was found without which the screen lets the text pass, in characters; nothing if it
    passes as it is, or if nothing was found."""
    cleaned: str | None = None
    """The text without it."""


Search = Generator[list[str], list[Verdict], Explanation]


def explain(text: str, verdict: Verdict) -> Search:
    """Search what carries the trigger; `verdict` is the text's.

    First each word is left out, wherever it occurs; if the text never passes, then windows of 2, 4,
    8 words and so on, of which the best that passes is trimmed at its ends. What is found in one
    place is extended where that lowers the score.
    """
    words = [match.span() for match in _WORD.finditer(text)][:MOST_WORDS]
    if not words:
        return Explanation(())
    groups = _groups([text[start:end] for start, end in words])
    verdicts = yield [_without(text, words, group) for group in groups]
    weight_of = {
        number: verdict.margin - without.margin
        for group, without in zip(groups, verdicts, strict=True)
        for number in group
    }
    weighed = tuple(Word(*span, weight_of[number]) for number, span in enumerate(words))
    if not verdict.poisoned:
        return Explanation(weighed)
    found = _best(groups, verdicts)
    if found is None:
        found = yield from _window(text, words)
    if found is None:
        return Explanation(weighed)
    if found[-1] - found[0] == len(found) - 1:  # neighbours
        found = yield from _extended(text, words, found)
    return Explanation(weighed, _joined(words, found), _without(text, words, found))


def explained(search: Search, screen: Callable[[list[str]], list[Verdict]]) -> Explanation:
    """Run a search with a function that screens texts."""
    try:
        texts = next(search)
        while True:
            texts = search.send(screen(texts))
    except StopIteration as done:
        result: Explanation = done.value
        return result


def _groups(words: Sequence[str]) -> list[list[int]]:
    """Return numbers of words that are the same, or of neighbours where those are too many."""
    same: dict[str, list[int]] = {}
    for number, word in enumerate(words):
        same.setdefault(re.sub(r"\W", "", word).casefold() or word, []).append(number)
    if len(same) <= AT_ONCE:
        return list(same.values())
    size = -(-len(words) // AT_ONCE)
    return [
        list(range(start, min(start + size, len(words)))) for start in range(0, len(words), size)
    ]


def _best(
    options: Sequence[Words], verdicts: Sequence[Verdict], per_word: float = 0.0
) -> Words | None:
    """Return the option without which the text passes most clearly, each word at a price."""
    passing = [
        (v.margin + per_word * len(options[number]), number)
        for number, v in enumerate(verdicts)
        if not v.poisoned
    ]
    return options[min(passing)[1]] if passing else None


def _window(text: str, words: Sequence[Span]) -> Generator[list[str], list[Verdict], Words | None]:
    """Return neighbouring words without which the text passes, as few as it takes."""
    found: Words | None = None
    left = MOST_VARIANTS - AT_ONCE - (REACH + 1) ** 2
    for windows in _windows(len(words)):
        left -= len(windows)
        if found is not None or left < 0:
            break
        found = _best(windows, (yield [_without(text, words, window) for window in windows]))
    while found is not None and len(found) > 1 and left > 0:
        shorter = [found[1:], found[:-1]]
        left -= len(shorter)
        trimmed = _best(shorter, (yield [_without(text, words, window) for window in shorter]))
        if trimmed is None:
            break
        found = trimmed
    return found


def _extended(
    text: str, words: Sequence[Span], found: Words
) -> Generator[list[str], list[Verdict], Words]:
    """Return neighbouring words, with those around them that are suspicious too."""
    longer = [
        range(start, end)
        for start in range(max(0, found[0] - REACH), found[0] + 1)
        for end in range(found[-1] + 1, min(len(words), found[-1] + REACH + 1) + 1)
        if end - start < len(words)
    ]
    verdicts = yield [_without(text, words, window) for window in longer]
    return _best(longer, verdicts, PER_WORD) or found


def _windows(words: int) -> Iterator[list[range]]:
    """Yield windows over so many words, each time twice as long, and at most `AT_ONCE`."""
    length = 2
    while length < words:
        starts = range(0, words - length + 1, -(-(words - length + 1) // (AT_ONCE - 1)))
        yield [range(s, s + length) for s in sorted({*starts, words - length})]
        length *= 2


def _joined(words: Sequence[Span], numbers: Words) -> tuple[Span, ...]:
    """Return spans of characters, one for neighbours."""
    spans: list[list[int]] = []
    for before, number in zip((-2, *numbers), numbers, strict=False):
        if number == before + 1:
            spans[-1][1] = words[number][1]
        else:
            spans.append(list(words[number]))
    return tuple((start, end) for start, end in spans)


def _without(text: str, words: Sequence[Span], numbers: Words) -> str:
    """Return the text without some words, and without what lies between each and the next."""
    kept, at = [], 0
    for number in numbers:
        start, end = words[number]
        kept.append(text[at:start])
        at = words[number + 1][0] if number + 1 < len(words) else end
    return "".join([*kept, text[at:]])
