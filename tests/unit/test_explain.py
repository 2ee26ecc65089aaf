"""What carries a trigger is found, whatever the text around it, and for a bounded price."""

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.detection.explain import (
    MAX_VARIANTS,
    MAX_WORDS,
    ROUND_SIZE,
    Explanation,
    explain,
    run_search,
)
from models.detection.screen import Finding, Verdict

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
