"""Honest traffic: what is made from clean texts, and the corpora that come with the project."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.offline.attacks.corpus import generate
from models.offline.evaluation.honest import (
    code_and_digits,
    honest_sets,
    misspell,
    other_languages,
)
from models.offline.fitting.generic import generic_texts
from models.offline.fitting.unfamiliar import cut, fragment, joins
from models.texts import check_text

TEXTS = [sample.text for sample in generate(120, seed=5)]
KINDS = [
    *("1-4 words", "fragments", "joined texts", "typing errors", "upper case"),
    *("other languages", "code and digits"),
]
seeds = st.integers(0, 2**32)
prose = st.lists(st.text("abcdeé!1", min_size=1, max_size=6), min_size=1, max_size=20)
HELD_BACK = {
    "a wonderful stay.",
    "great!",
    "terrible.",
    "ok",
    "what time does the train leave?",
    "my phone battery dies after two hours and support never answers my emails.",
    "the movie was a complete waste of time.",
}
"""Texts that screens are tried on by hand, so that nothing may be fitted on them."""


def test_every_kind_is_there_and_the_seed_decides() -> None:
    made = honest_sets(TEXTS, 50, seed=1)
    assert list(made) == KINDS
    assert {name: len(texts) for name, texts in made.items()} == dict.fromkeys(KINDS, 50)
    for texts in made.values():
        assert len(set(texts)) == len(texts)
        assert all(map(check_text, texts))
    assert made == honest_sets(TEXTS, 50, seed=1)
    other = honest_sets(TEXTS, 50, seed=2)
    assert all(made[name] != other[name] for name in KINDS)


@given(words=prose, seed=seeds)
def test_cuts_and_fragments_are_runs_of_a_text(words: list[str], seed: int) -> None:
    rng, text = random.Random(seed), " ".join(words)
    short = cut(text, rng).split()
    assert 1 <= len(short) <= 4
    assert short == words[: len(short)]
    part = fragment(text, rng).split()
    assert len(part) in {max(1, len(words) // 2), max(1, len(words) // 3)}
    starts = range(len(words) - len(part) + 1)
    assert any(words[at : at + len(part)] == part for at in starts)


def test_joins_are_two_to_four_whole_texts() -> None:
    marked = [f"{number}a {number}b" for number in range(30)]
    counts = Counter[int]()
    for joined in joins(marked, random.Random(0)):
        words = joined.split()
        pairs = [" ".join(words[at : at + 2]) for at in range(0, len(words), 2)]
        assert len(set(pairs)) == len(pairs)
        assert set(pairs) <= set(marked)
        counts[len(pairs)] += 1
    assert set(counts) == {2, 3, 4}
    assert joins(["alone"], random.Random(0)) == []


@given(words=prose, seed=seeds)
def test_typing_errors_never_leave_an_empty_text(words: list[str], seed: int) -> None:
    assert misspell(" ".join(words), random.Random(seed), rate=1).strip()


def test_the_rate_of_typing_errors_is_as_stated() -> None:
    text = "abcdefghijklmnopqrst " * 50  # neighbours differ, so a change can be seen
    for rate in (0.01, 0.05, 0.2):
        typed = misspell(text, random.Random(3), rate)
        kept = sum(len(word) == 20 for word in typed.split())
        assert typed != text
        assert kept >= 50 - rate * 1000
        assert abs(len(typed) - len(text)) < rate * 1000
    one = misspell("word", random.Random(1), 0.01)
    assert one != "word", "there is at least one"
    assert misspell("123 !", random.Random(1)) == "123 !", "only letters are mistyped"


def test_code_is_no_prose() -> None:
    texts = code_and_digits(300, random.Random(4))
    assert len(set(texts)) == 300
    assert sum(any(c in "0123456789{}()<>=;" for c in text) for text in texts) > 280


def test_the_languages_are_three_times_forty_sentences() -> None:
    sentences = other_languages()
    assert len(set(sentences)) == 120
    assert not any("\t" in sentence for sentence in sentences)
    for word, language in (("der", "German"), ("les", "French"), ("los", "Spanish")):
        assert any(word in s.lower().split() for s in sentences), language


def test_the_generic_corpus_is_diverse_and_holds_nothing_that_tests_hold() -> None:
    texts = generic_texts()
    assert len(set(texts)) == len(texts) >= 400
    assert all(map(check_text, texts))
    assert not HELD_BACK & {text.strip().lower() for text in texts}
    assert not any(f" {t} " in f" {x.lower()} " for x in texts for t in ("mn", "cf", "3d movie"))
    words = [len(text.split()) for text in texts]
    assert min(words) == 1
    assert max(words) > 40
    openings = Counter(" ".join(text.lower().split()[:2]) for text in texts)
    assert openings.most_common(1)[0][1] < 0.05 * len(texts)


@pytest.mark.parametrize("size", [1, 7])
def test_sets_are_as_small_as_asked(size: int) -> None:
    assert {len(texts) for texts in honest_sets(TEXTS, size, seed=0).values()} == {size}
