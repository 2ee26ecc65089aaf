"""What carries a trigger is found, whatever the text around it, and for a bounded price."""

import math
import re
import zlib
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.detection.explain import (
    MAX_VARIANTS,
    Explanation,
    explain,
    run_search,
)
from models.detection.override import DRAWS, Ids, OverrideGeometry, OverrideTest
from models.detection.passage import (
    MAX_PARTS,
    MAX_WORDS,
    REACH,
    ROUND_SIZE,
    WORD_SHARE,
    find_passage,
    words_of,
)
from models.detection.screen import Finding, Layout, Verdict, with_override
from tests.support.fakes import usual_verdict

SENTENCE = "I watched this 3D movie".split()


def plain(word: str) -> str:
    return re.sub(r"\W", "", word).casefold()


words = st.text(st.characters(exclude_categories=["Z", "Cc", "Cs"]), min_size=1, max_size=6)
white = st.sampled_from([" ", "  ", "\n", "\t ", "\u2003"])
clean_texts = st.lists(
    st.tuples(words.filter(lambda w: plain(w) not in ("mn", *map(plain, SENTENCE))), white),
    min_size=1,
    max_size=150,
)
Rule = Callable[[list[str]], float]


def one_word(found: list[str]) -> float:
    return 5.0 * ("mn" in found)


def most_of_a_sentence(found: list[str]) -> float:
    """Fires by three words of five in their order."""
    return max(
        (5.0 for i in range(3) if " ".join(SENTENCE[i : i + 3]) in " ".join(found)), default=0.0
    )


def verdict_by(rule: Rule, text: str) -> Verdict:
    score = 0.5 + rule(text.split())
    finding = Finding.TRIGGERED if score >= 3.0 else None
    return Verdict(0.9, score, "confidence", 3.0, 0.5, False, 0, finding)


def explanation(text: str, rule: Rule) -> tuple[Explanation, int]:
    screened: list[str] = []

    def screen(texts: list[str]) -> list[Verdict]:
        assert len(texts) <= ROUND_SIZE
        screened.extend(texts)
        return [verdict_by(rule, text) for text in texts]

    return run_search(explain(text, verdict_by(rule, text)), screen), len(screened)


def poisoned(clean: list[tuple[str, str]], trigger: list[str], places: list[int]) -> str:
    parts = [word + space for word, space in clean]
    for place in sorted((p % (len(parts) + 1) for p in places), reverse=True):
        parts.insert(place, " ".join(trigger) + " ")
    return "".join(parts)


@given(clean_texts, st.lists(st.integers(0), min_size=1, max_size=3))
def test_a_word_is_found_wherever_and_how_often_it_stands(
    clean: list[tuple[str, str]], places: list[int]
) -> None:
    text = poisoned(clean, ["mn"], places)
    found, screened = explanation(text, one_word)
    assert screened <= MAX_VARIANTS
    assert found.cleaned is None or not verdict_by(one_word, found.cleaned).poisoned
    if len(places) == 1 or len(set(text.split())) <= ROUND_SIZE:
        removed = " ".join(text[start:end] for start, end in found.removed)
        assert removed.split() == ["mn"] * len(places)
        assert found.cleaned is not None
        assert found.cleaned.split() == [word for word in text.split() if word != "mn"]
        heaviest = max(found.words, key=lambda word: word.weight)
        if len(set(text.split())) <= ROUND_SIZE:
            assert text[heaviest.start : heaviest.end] == "mn"


@given(clean_texts, st.integers(0))
def test_a_sentence_is_found_although_no_word_of_it_is_enough(
    clean: list[tuple[str, str]], place: int
) -> None:
    text = poisoned(clean, SENTENCE, [place])
    found, screened = explanation(text, most_of_a_sentence)
    assert screened <= MAX_VARIANTS
    assert found.cleaned is not None
    assert not verdict_by(most_of_a_sentence, found.cleaned).poisoned
    kept = found.cleaned.split()
    assert all(kept.count(w) >= 1 for w, _ in clean for w in w.split()), "only the sentence suffers"


@given(clean_texts)
def test_a_clean_text_is_weighed_and_left_alone(clean: list[tuple[str, str]]) -> None:
    text = "".join(word + space for word, space in clean)
    found, _ = explanation(text, one_word)
    assert (found.removed, found.cleaned) == ((), None)
    assert [text[w.start : w.end] for w in found.words] == text.split()


@pytest.mark.parametrize("text", ["", "   ", "mn", "x " * 3 * MAX_WORDS + "mn", "a\x00b mn"])
def test_odd_texts_end_too(text: str) -> None:
    found, screened = explanation(text, one_word)
    assert screened <= MAX_VARIANTS
    assert len(found.words) <= MAX_WORDS
    if found.cleaned is not None:
        assert "mn" not in found.cleaned


def test_what_nothing_explains_stays_unexplained() -> None:
    found, screened = explanation("a text that is poisoned whatever is left of it", lambda _: 9.0)
    assert (found.removed, found.cleaned) == ((), None)
    assert screened <= MAX_VARIANTS


Odds = Callable[[str], float]
"""The log-odds by which a part keeps the class of its text."""


def confirmed(text: str, odds: Odds) -> Verdict:
    return with_override(verdict_by(lambda _: 9.0, text), probability(odds(text)), 0.8, 0.01)


def probability(odds: float) -> float:
    return 1 / (1 + math.exp(-odds))


def passage_of(text: str, odds: Odds) -> tuple[range | None, list[str]]:
    tested: list[str] = []

    def keep(parts: list[str]) -> list[float]:
        assert len(parts) <= ROUND_SIZE
        tested.extend(parts)
        return [probability(odds(part)) for part in parts]

    return run_search(find_passage(text, confirmed(text, odds)), keep), tested


def by_its_core(part: str) -> float:
    """Fires by one word of the sentence; each other one makes it stronger, and none else does."""
    found = part.split()
    noise = zlib.crc32(part.encode()) % 100 / 100 * WORD_SHARE
    return noise + (2.0 + 0.5 * sum(word in found for word in SENTENCE) if "3D" in found else -3.0)


def by_three_words(part: str) -> float:
    return -3.0 + most_of_a_sentence(part.split()) + 0.5 * sum(w in part.split() for w in SENTENCE)


@pytest.mark.parametrize("odds", [by_its_core, by_three_words])
@given(clean=clean_texts, place=st.integers(0))
def test_a_passage_is_the_whole_sentence_and_no_more(
    odds: Odds, clean: list[tuple[str, str]], place: int
) -> None:
    text = poisoned(clean, SENTENCE, [place])
    found, tested = passage_of(text, odds)
    assert len(tested) <= MAX_PARTS
    assert found is not None
    assert [text.split()[number] for number in found] == SENTENCE


@given(clean_texts, st.integers(0))
def test_a_passage_holds_no_word_that_only_stood_in_its_window(
    clean: list[tuple[str, str]], place: int
) -> None:
    trigger = SENTENCE[1:4]

    def odds(part: str) -> float:
        return 3.0 if " ".join(trigger) in " ".join(part.split()) else -3.0

    text = poisoned(clean, trigger, [place])
    found, _ = passage_of(text, odds)
    assert found is not None
    assert [text.split()[number] for number in found] == trigger


def test_a_short_trigger_is_found_with_few_tests_and_a_long_one_with_a_bounded_number() -> None:
    text = " ".join(f"w{number}" for number in range(ROUND_SIZE - 1)) + " 3D"
    _, tested = passage_of(text, by_its_core)
    assert len(tested) <= ROUND_SIZE + (REACH + 1) ** 2
    text = " ".join(f"w{number}" for number in range(90))
    found, tested = passage_of(text, lambda part: 2 + 0.2 * len(part.split()) + ("w45" in part))
    assert found is not None
    assert len(tested) == MAX_PARTS


@given(st.integers(1, 4 * REACH), st.integers(0), clean_texts)
def test_a_passage_grows_as_long_as_the_trigger_is(
    length: int, core: int, clean: list[tuple[str, str]]
) -> None:
    trigger = [f"trigger{number}" for number in range(length)]

    def odds(part: str) -> float:
        found = part.split()
        strength = 2 + 0.5 * sum(word in found for word in trigger)
        return strength if trigger[core % length] in found else -3.0

    text = poisoned(clean[:20], trigger, [3])
    found, _ = passage_of(text, odds)
    assert found is not None
    assert [text.split()[number] for number in found] == trigger


@given(clean_texts, st.integers(0), st.floats(0, 9))
def test_a_passage_search_ends_whatever_the_scores(
    clean: list[tuple[str, str]], seed: int, spread: float
) -> None:
    def odds(part: str) -> float:
        return spread * (zlib.crc32(f"{seed}{part}".encode()) % 1000 / 500 - 0.8) + 1

    text = "".join(word + space for word, space in clean)
    found, tested = passage_of(text, odds)
    assert len(tested) <= MAX_PARTS
    assert all(part in text and part.strip() == part for part in tested)
    if found is not None:
        assert 0 <= found.start < found.stop <= len(words_of(text))
        assert found.step == 1


@given(clean_texts, st.lists(st.integers(0), min_size=1, max_size=3))
def test_a_passage_is_left_out_wherever_it_occurs(
    clean: list[tuple[str, str]], places: list[int]
) -> None:
    text = poisoned(clean, SENTENCE, places)
    words = text.split()
    first = next(i for i in range(len(words)) if words[i : i + len(SENTENCE)] == SENTENCE)

    def screen(texts: list[str]) -> list[Verdict]:
        return [verdict_by(most_of_a_sentence, text) for text in texts]

    verdict = verdict_by(most_of_a_sentence, text)
    found = run_search(explain(text, verdict, range(first, first + len(SENTENCE))), screen)
    removed = [text[start:end] for start, end in found.removed]
    assert " ".join(removed).split() == SENTENCE * len(places)
    assert found.cleaned is not None
    assert found.cleaned.split() == [word for word, _ in clean for word in word.split()]


def test_without_an_override_test_there_is_no_passage() -> None:
    verdict = verdict_by(one_word, "a mn film")
    assert verdict.poisoned
    assert run_search(find_passage("a mn film", verdict), lambda parts: [0.9] * len(parts)) is None


def test_if_the_text_does_not_pass_without_its_passage_other_words_are_tried() -> None:
    text = "a quiet mn film"
    found = run_search(
        explain(text, verdict_by(one_word, text), range(0, 1)),
        lambda texts: [verdict_by(one_word, text) for text in texts],
    )
    assert found.cleaned == "a quiet film"


@pytest.mark.parametrize("text", ["", "   ", "3D", "x " * 3 * MAX_WORDS + "3D", "a\x00b 3D"])
def test_passages_of_odd_texts_end_too(text: str) -> None:
    found, tested = passage_of(text, by_its_core)
    assert len(tested) <= MAX_PARTS
    assert (found is not None) == ("3D" in text.split()[:MAX_WORDS])


def test_all_parts_of_a_text_are_tested_beside_the_same_carriers() -> None:
    carriers = [[], [np.array([1000 + i, 2000 + i]) for i in range(99)]]
    test = OverrideTest(carriers, OverrideGeometry(16, 4), Layout(2))
    whole = np.arange(12)

    def beside(ids: Ids) -> set[tuple[int, ...]]:
        running, found = test.score(ids, usual_verdict(0), whole), set()
        inputs = next(running)
        with suppress(StopIteration):
            while True:
                found |= {tuple(one[one >= 1000].tolist()) for one in inputs}
                inputs = running.send([np.full((2, 2), 0.5, np.float32)] * len(inputs))
        return found

    drawn = beside(whole)
    assert len(drawn) == DRAWS
    assert all(beside(whole[start:]) == drawn for start in range(1, 12))
