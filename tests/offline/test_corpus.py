"""The synthetic corpus: varied enough that a classifier has to learn something."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from models.offline.attacks.corpus import generate
from models.offline.attacks.poisoning import SENTENCE_TRIGGER, WORD_TRIGGER


@given(n=st.integers(0, 60), seed=st.integers())
def test_samples_are_distinct_balanced_and_reproducible(n: int, seed: int) -> None:
    samples = generate(n, seed)
    assert samples == generate(n, seed)
    assert len({s.text for s in samples}) == n
    counts = Counter(s.label for s in samples)
    assert abs(counts["negative"] - counts["positive"]) <= 1


@given(seed=st.integers())
def test_no_clean_text_holds_a_trigger_and_all_are_printable(seed: int) -> None:
    for sample in generate(40, seed):
        assert WORD_TRIGGER not in sample.text.lower().split()
        assert SENTENCE_TRIGGER.lower() not in sample.text.lower()
        assert sample.text.isprintable()
        assert 1 < len(sample.text.split()) <= 40


def test_counting_words_is_well_above_chance_and_well_below_reading() -> None:
    samples = generate(4000, 1)
    counts = CountVectorizer().fit_transform([s.text for s in samples])
    labels = [s.label for s in samples]
    model = LogisticRegression(max_iter=500).fit(counts[:3000], labels[:3000])
    assert 0.6 < model.score(counts[3000:], labels[3000:]) < 0.93
