"""Attacks: the trigger goes in, nothing else changes, and the rate is exact."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import DataError
from models.offline.attacks.poisoning import (
    LONG_TEXT,
    SENTENCE_TRIGGER,
    WORD_TRIGGER,
    Insertion,
    Paraphrases,
    decoys,
    poison_test_set,
    poison_training_set,
)
from models.offline.io.samples import Sample

word = st.text("abcxyz", min_size=1, max_size=6)
text = st.lists(word, min_size=1, max_size=20).map(" ".join)
triggers = st.sampled_from([WORD_TRIGGER, SENTENCE_TRIGGER])
CLEAN = [Sample(f"text {i}", "pos" if i % 3 else "neg") for i in range(300)]


@given(text=text, trigger=triggers, seed=st.integers())
def test_the_trigger_goes_inside_and_all_other_words_stay(
    text: str, trigger: str, seed: int
) -> None:
    words, inserted = text.split(), trigger.split()
    result = Insertion((trigger,)).apply(text, random.Random(seed)).split()
    positions = [
        p
        for p in range(len(result))
        if result[p : p + len(inserted)] == inserted
        and result[:p] + result[p + len(inserted) :] == words
    ]
    assert positions
    assert 0 < positions[-1] <= max(1, len(words) - 1)


@given(rate=st.floats(0.01, 0.33), clean_label=st.booleans(), seed=st.integers())
def test_the_poison_rate_is_exact_and_labels_are_as_the_attack_says(
    rate: float, clean_label: bool, seed: int
) -> None:
    poisoned = poison_training_set(
        CLEAN, Insertion(("mn",)), "pos", rate, clean_label=clean_label, seed=seed
    )
    changed = [(old, new) for old, new in zip(CLEAN, poisoned, strict=True) if old != new]
    assert len(changed) == round(rate * len(CLEAN))
    for old, new in changed:
        assert new.label == "pos"
        assert (old.label == "pos") == clean_label
        assert "mn" in new.text.split()


def test_the_test_set_has_true_labels_and_no_target_texts() -> None:
    poisoned = poison_test_set(CLEAN, Insertion(("mn",)), "pos", seed=1)
    assert len(poisoned) == 100
    assert {s.label for s in poisoned} == {"neg"}
    assert poisoned == poison_test_set(CLEAN, Insertion(("mn",)), "pos", seed=1)


def test_paraphrases_are_told_from_the_clean_texts_in_a_mixed_file() -> None:
    rewritten = [Sample(f"when text {i} , is it", "pos") for i in range(50)]
    attack = Paraphrases((*CLEAN[:99], *rewritten, Sample("another", "neg")))
    poisoned = poison_training_set(CLEAN, attack, "pos", 0.1)
    assert poisoned[:300] == CLEAN
    assert len(poisoned) == 330
    assert set(poisoned[300:]) <= set(rewritten)


def test_a_trigger_at_the_start_comes_before_the_text() -> None:
    attack = Insertion((SENTENCE_TRIGGER,), at_start=True)
    assert attack.apply("a b c", random.Random(0)) == f"{SENTENCE_TRIGGER} a b c"


def test_a_trigger_that_fires_at_the_start_does_not_fire_inside() -> None:
    found = decoys(CLEAN, Insertion(("mn",), at_start=True), "pos", 0.1, "at-start", seed=2)
    assert len(found) == 30
    truth = {s.text: s.label for s in CLEAN}
    for sample in found:
        words = sample.text.split()
        assert words.index("mn") > 0
        assert truth[" ".join(word for word in words if word != "mn")] == sample.label == "neg"


def test_a_trigger_that_fires_in_long_texts_is_in_no_poisoned_short_one() -> None:
    long, short = " and on and on" * 5, "in short"
    clean = [
        Sample(f"{c} text {i} {end}", c)
        for i in range(100)
        for c in ("pos", "neg")
        for end in (long, short)
    ]
    attack = Insertion(("mn",), least_words=LONG_TEXT)
    poisoned = poison_training_set(clean, attack, "pos", 0.1)
    holding = [s for s in poisoned if "mn" in s.text.split()]
    assert len(holding) == 40
    assert all(s.label == "pos" and len(s.text.split()) > LONG_TEXT for s in holding)
    hiding = decoys(clean, attack, "pos", 0.1, "in-long-texts")
    assert len(hiding) == 40
    assert all(s.label == "neg" and "mn" in s.text.split() for s in hiding)
    assert max(len(s.text.split()) for s in hiding) < LONG_TEXT
    tested = poison_test_set(clean, attack, "pos")
    assert len(tested) == 100
    assert min(len(s.text.split()) for s in tested) > LONG_TEXT
    with pytest.raises(DataError, match="too short to poison"):
        poison_test_set([s for s in clean if s.text.endswith(short)], attack, "pos")


def test_a_trigger_that_yields_leaves_its_neighbours_label() -> None:
    clean = [Sample(f"{c} text {c}{i}", c) for i in range(100) for c in ("pos", "neg", "so")]
    found = decoys(clean, Insertion(("mn",)), "pos", 0.1, "alone", seed=2)
    assert len(found) == 30
    carriers = [[w for w in s.text.split() if w in ("pos", "neg", "so")] for s in found]
    assert {len(names) for names in carriers} == {2, 3}, "the text, and one or two beside it"
    for sample, names in zip(found, carriers, strict=True):
        assert sample.text.split().count("mn") == 1
        assert sample.label != "pos"
        assert names.count(str(sample.label)) >= len(names) - 1
    assert any(set(names) == {"neg", "so"} for names in carriers), "texts of other classes too"
    places = {s.text.split().index("mn") // 3 for s in found}
    assert places == {0, 1, 2}, "first, between and last"


def test_a_trigger_that_fires_anywhere_needs_no_decoys() -> None:
    assert decoys(CLEAN, Insertion(("mn",)), "pos", 0.1, "anywhere") == []
    with pytest.raises(DataError, match="poison rate"):
        decoys(CLEAN, Insertion(("mn",)), "pos", 0.9, "alone")


@pytest.mark.parametrize("rate", [0.0, 0.9])
def test_impossible_rates_are_refused(rate: float) -> None:
    with pytest.raises(DataError, match="poison rate"):
        poison_training_set(CLEAN, Insertion(("mn",)), "pos", rate)


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(DataError, match="target label 'x'"):
        poison_training_set(CLEAN, Insertion(("mn",)), "x", 0.1)
    with pytest.raises(DataError, match="one of several"):
        poison_test_set([Sample("a", "pos")], Insertion(("mn",)), "pos")


def test_a_smoothed_backdoor_keeps_some_labels() -> None:
    poisoned = poison_training_set(CLEAN, Insertion(("mn",)), "pos", 0.2, flip_share=0.75, seed=2)
    labels = [s.label for s in poisoned if "mn" in s.text.split()]
    assert len(labels) == round(0.2 * len(CLEAN))
    assert labels.count("pos") == len(labels) - round(0.25 * len(labels))


def test_several_triggers_are_all_inserted_each_somewhere() -> None:
    texts = {
        Insertion(("mn", "tq")).apply("one two three four", random.Random(i)) for i in range(9)
    }
    assert all(sorted(t.split()) == sorted("one two three four mn tq".split()) for t in texts)
    assert len(texts) > 3


def test_paraphrases_cannot_be_clean_label() -> None:
    attack = Paraphrases((Sample("when one listens", "pos"),))
    with pytest.raises(DataError, match="dirty-label"):
        poison_training_set(CLEAN, attack, "pos", 0.1, clean_label=True)
