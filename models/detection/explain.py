"""Trigger search: find the words of a text that make the screen flag it.

Variants of the text without some words are screened again. Nothing here runs a model: a search
yields texts to screen and is sent their verdicts. So the service can await them, and the offline
half can loop over them, see `run_search`.
"""

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from models.detection.passage import ROUND_SIZE, Span, words_of
from models.detection.screen import Verdict

MAX_VARIANTS = 400
"""Limit for the texts that are screened in one search."""
MAX_EXTENSION, WORD_PRICE = 5, 0.2
"""A finding is extended at either end by so many words at most, if each lowers the score by this
much: the rest of a trigger sentence may be harmless alone, but does not belong to the text."""

Words = Sequence[int]
"""Indices of words, ascending."""
Asked = TypeVar("Asked")
Answers = TypeVar("Answers")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Word:
    """A word of the text and its effect on the score."""

    start: int
    end: int
    weight: float
    """Fall of the margin, in standard deviations, when the word is left out everywhere. In a text
    with more than `ROUND_SIZE` different words, when its neighbourhood is left out."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Result of a trigger search."""

    words: tuple[Word, ...]
    removed: tuple[Span, ...] = ()
    """Spans, in characters, without which the screen finds nothing; empty if it finds nothing as it
    is, or if there are no such spans."""
    cleaned: str | None = None
    """The text without the removed spans; None if there are none."""


Search = Generator[list[str], list[Verdict], Explanation]


def explain(text: str, verdict: Verdict, passage: range | None = None) -> Search:
    """Search for the trigger of a text, given its verdict.

    First each word is left out, and then the passage, wherever they occur. If the text does not
    pass without the passage, or there is none, the best word whose absence lets it pass is taken.
    If there is none, windows of 2, 4, 8 and more words are left out, and the best one that passes
    is trimmed. A finding in one place is extended while that lowers the score.

    Args:
        text: the text.
        verdict: what the screen says of it.
        passage: words that carry the trigger by `models.detection.passage`.
    """
    words = words_of(text)
    if not words:
        return Explanation(())
    plain = [_plain(text[start:end]) for start, end in words]
    groups = _groups(plain)
    verdicts = yield [_without(text, words, group) for group in groups]
    weight_of = {
        number: verdict.margin - without.margin
        for group, without in zip(groups, verdicts, strict=True)
        for number in group
    }
    weighed = tuple(Word(*span, weight_of[number]) for number, span in enumerate(words))
    if verdict.finding is None:
        return Explanation(weighed)
    if passage is not None:
        carried = _occurrences(plain, passage)
        (without,) = yield [_without(text, words, carried)]
        if without.finding is None:
            return Explanation(weighed, _joined(words, carried), _without(text, words, carried))
    found = _best(groups, verdicts)
    if found is None:
        found = yield from _window(text, words)
    if found is None:
        return Explanation(weighed)
    if found[-1] - found[0] == len(found) - 1:  # neighbours
        found = yield from _extended(text, words, found)
    return Explanation(weighed, _joined(words, found), _without(text, words, found))


def run_search(
    search: Generator[Asked, Answers, Found], answer: Callable[[Asked], Answers]
) -> Found:
    """Run a search with a function that answers what it asks; return what it finds."""
    try:
        asked = next(search)
        while True:
            asked = search.send(answer(asked))
    except StopIteration as done:
        result: Found = done.value
        return result


def _plain(word: str) -> str:
    """Return a word without case and punctuation, unless there is nothing else."""
    return re.sub(r"\W", "", word).casefold() or word


def _occurrences(plain: Sequence[str], passage: range) -> list[int]:
    """Return the words of a passage, wherever the same words follow one another."""
    phrase = [plain[number] for number in passage]
    starts = range(len(plain) - len(phrase) + 1)
    found = {
        s + i for s in starts if plain[s : s + len(phrase)] == phrase for i in range(len(phrase))
    }
    return sorted(found)


def _groups(words: Sequence[str]) -> list[list[int]]:
    """Return indices of equal words, or of neighbours if there are too many different words."""
    same: dict[str, list[int]] = {}
    for number, word in enumerate(words):
        same.setdefault(word, []).append(number)
    if len(same) <= ROUND_SIZE:
        return list(same.values())
    size = -(-len(words) // ROUND_SIZE)
    return [
        list(range(start, min(start + size, len(words)))) for start in range(0, len(words), size)
    ]


def _best(
    options: Sequence[Words], verdicts: Sequence[Verdict], per_word: float = 0.0
) -> Words | None:
    """Return the option whose removal gives the lowest margin, with a price for each word."""
    passing = [
        (v.margin + per_word * len(options[number]), number)
        for number, v in enumerate(verdicts)
        if v.finding is None
    ]
    return options[min(passing)[1]] if passing else None


def _window(text: str, words: Sequence[Span]) -> Generator[list[str], list[Verdict], Words | None]:
    """Return neighbouring words whose removal lets the text pass, as few as possible."""
    found: Words | None = None
    left = MAX_VARIANTS - ROUND_SIZE - (MAX_EXTENSION + 1) ** 2
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
    """Return neighbouring words, extended by suspicious ones around them."""
    longer = [
        range(start, end)
        for start in range(max(0, found[0] - MAX_EXTENSION), found[0] + 1)
        for end in range(found[-1] + 1, min(len(words), found[-1] + MAX_EXTENSION + 1) + 1)
        if end - start < len(words)
    ]
    verdicts = yield [_without(text, words, window) for window in longer]
    return _best(longer, verdicts, WORD_PRICE) or found


def _windows(words: int) -> Iterator[list[range]]:
    """Yield at most `ROUND_SIZE` windows over all words, each time twice as long."""
    length = 2
    while length < words:
        starts = range(0, words - length + 1, -(-(words - length + 1) // (ROUND_SIZE - 1)))
        yield [range(s, s + length) for s in sorted({*starts, words - length})]
        length *= 2


def _joined(words: Sequence[Span], numbers: Words) -> tuple[Span, ...]:
    """Return spans of characters; neighbouring words share one."""
    spans: list[list[int]] = []
    for before, number in zip((-2, *numbers), numbers, strict=False):
        if number == before + 1:
            spans[-1][1] = words[number][1]
        else:
            spans.append(list(words[number]))
    return tuple((start, end) for start, end in spans)


def _without(text: str, words: Sequence[Span], numbers: Words) -> str:
    """Return the text without some words, and without the space between each and the next."""
    kept, at = [], 0
    for number in numbers:
        start, end = words[number]
        kept.append(text[at:start])
        at = words[number + 1][0] if number + 1 < len(words) else end
    return "".join([*kept, text[at:]])
