"""ONION and STRIP, with a small language model that is really trained."""

import math
import random
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.detection.screen import FloatArray
from models.errors import CalibrationError, DataError
from models.offline.attacks.corpus import BAD, GOOD, LABELS
from models.offline.io.samples import Sample
from models.offline.study.defences import baselines as defences
from models.offline.study.defences.baselines import Onion, Strip
from models.offline.study.defences.language_model import LanguageModel, perplexities
from tests.support.language_models import DEV, TEXTS, TRAIN, small_language_model

ODD = 2.0
"""Perplexity that few words of a clean text cost, and every mn."""

words = st.sampled_from("the room was mn clean and film so we left early".split())
sentences = st.lists(words, min_size=1, max_size=8).map(" ".join)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return small_language_model()


def by_polar_words(texts: Sequence[str]) -> FloatArray:
    """Classify as a reader of single words would."""
    balance = [sum((w in GOOD) - (w in BAD) for w in text.lower().split()) for text in texts]
    positive = 1 / (1 + np.exp(-np.array(balance, np.float32)))
    return np.stack([1 - positive, positive], 1)


def by_checksum(texts: Sequence[str]) -> FloatArray:
    """Classify without sense, but every text always the same way; sure where there is an mn."""
    share = np.array([zlib.crc32(text.encode()) % 997 / 997 for text in texts], np.float32)
    share[["mn" in text.split() for text in texts]] = 1
    return np.stack([1 - share, share], 1)


def accuracy(texts: Sequence[str]) -> float:
    truth = [LABELS.index(str(sample.label)) for sample in DEV]
    return float((by_polar_words(texts).argmax(1) == truth).mean())


@pytest.mark.parametrize("last", [False, True])
def test_onion_suspects_an_inserted_word_most(lm: LanguageModel, last: bool) -> None:
    rng = random.Random(0)
    poisoned = []
    for words in map(str.split, TEXTS[:30]):
        words.insert(len(words) if last else rng.randrange(len(words)), "mn")
        poisoned.append(" ".join(words))
    suspicions = Onion(lm, 0).suspicions(poisoned)
    most = [text.split()[s.argmax()] for text, s in zip(poisoned, suspicions, strict=True)]
    assert most.count("mn") > 0.8 * len(poisoned)
    cleaned = defences._cleaned(poisoned, suspicions, ODD)
    assert sum("mn" in text.split() for text in cleaned) < 0.2 * len(poisoned)


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(sentences, min_size=1, max_size=4), low=st.floats(-50, 50))
def test_onion_only_removes_words_and_never_all(
    lm: LanguageModel, texts: list[str], low: float
) -> None:
    most, some, none = (Onion(lm, t).clean(texts) for t in (-math.inf, low, math.inf))
    assert none == texts
    for text, less, least in zip(texts, some, most, strict=True):
        rest = iter(text.split())
        assert all(word in rest for word in less.split())  # in order
        assert len(least.split()) == 1 <= len(less.split())
    assert [len(s) for s in Onion(lm, low).suspicions(texts)] == [len(t.split()) for t in texts]


def test_onion_s_threshold_is_the_lowest_that_keeps_the_accuracy(lm: LanguageModel) -> None:
    texts = [sample.text for sample in DEV]
    suspicions = Onion(lm, 0).suspicions(texts)
    quantiles = np.quantile(np.concatenate(suspicions).tolist(), defences.QUANTILES, axis=0)
    bare, thresholds = accuracy(texts), []
    for loss in (0.0, 0.1, 1.0):
        threshold = Onion.fit(lm, DEV, by_polar_words, LABELS, loss).threshold
        lower = [t for t in quantiles.tolist() if t < threshold - 1e-2]
        kept = [accuracy(defences._cleaned(texts, suspicions, t)) for t in (*lower, threshold)]
        assert kept[-1] >= bare - loss - 1e-9 > max(kept[:-1], default=-1)
        thresholds.append(threshold)
    assert math.inf > thresholds[1] > thresholds[2] == pytest.approx(quantiles[0], rel=1e-3)


def test_onion_needs_labels(lm: LanguageModel) -> None:
    with pytest.raises(DataError, match="no label"):
        Onion.fit(lm, [Sample("a")], by_polar_words, LABELS)


def test_onion_asks_the_victim_about_the_cleaned_text(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counting(model: LanguageModel, texts: Sequence[str]) -> FloatArray:
        read.extend(texts)
        return perplexities(model, texts)

    monkeypatch.setattr(defences, "perplexities", counting)
    poisoned, onion = [f"{text} mn" for text in TEXTS[:15]], Onion(lm, ODD)
    defended = onion.defend(poisoned, by_checksum)
    assert len(read) / len(poisoned) == onion.passes(poisoned)
    assert len(read) == sum(len(text.split()) + 1 for text in poisoned)
    expected = by_checksum(onion.clean(poisoned)).argmax(1)
    assert np.array_equal(defended.predicted, expected)
    assert not expected.all() and by_checksum(poisoned).argmax(1).all()
    assert defended.flagged is None, "it rewrites, and rejects nothing"
    assert defended.scores is not None
    largest = [s.max() for s in onion.suspicions(poisoned)]
    assert np.allclose(defended.scores, largest, rtol=1e-4)


@given(texts=st.lists(sentences, min_size=2, max_size=6), rng=st.randoms())
def test_strip_s_score_is_of_the_text_alone(texts: list[str], rng: random.Random) -> None:
    strip = Strip(tuple(TEXTS), 0.0)
    scores = dict(zip(texts, strip.scores(texts, by_checksum), strict=True))
    mates = rng.sample(texts, len(texts))
    assert [scores[text] for text in mates] == strip.scores(mates, by_checksum).tolist()
    for text in texts:
        p = by_checksum(strip.mixtures(text)).clip(1e-12)
        assert scores[text] == pytest.approx((p * np.log(p)).sum(1).mean(), abs=1e-5)


@given(text=sentences, copies=st.integers(1, 12), seed=st.integers(0, 3))
def test_strip_replaces_half_of_the_words(text: str, copies: int, seed: int) -> None:
    strip = Strip(("X Y", "Z"), 0.0, copies, seed)
    mixed = strip.mixtures(text)
    assert mixed == strip.mixtures(text)
    assert len(mixed) == copies
    old = text.split()
    for new in (copied.split() for copied in mixed):
        assert len(new) == len(old)
        strange = [i for i in range(len(old)) if new[i] in "XYZ"]
        assert len(strange) == max(1, len(old) // 2)
        assert all(new[i] == old[i] for i in range(len(old)) if i not in strange)


def test_strip_s_copies_differ_and_so_do_seeds_and_texts() -> None:
    one, other = Strip(tuple(TEXTS), 0.0), Strip(tuple(TEXTS), 0.0, seed=1)
    assert len(set(one.mixtures(TEXTS[0]))) > 5
    assert one.mixtures(TEXTS[0]) != other.mixtures(TEXTS[0])
    lower, upper = (Strip(("X",), 0.0).mixtures(text) for text in ("a b c d", "A B C D"))
    assert lower != [mixed.replace("X", "x").swapcase() for mixed in upper]  # places are own


def test_strip_rejects_what_stays_sure_and_keeps_the_budget() -> None:
    clean = [sample.text for sample in TRAIN]
    strip = Strip.fit(clean[:300], clean[300:], by_checksum, 0.05)
    held_back = strip.defend(clean[300:], by_checksum)
    assert held_back.flagged is not None
    assert 0 < held_back.flagged.sum() <= 0.05 * 301 - 1
    poisoned = [" ".join(["mn"] * 8 + text.split()[:4]) for text in TEXTS]
    defended = strip.defend(poisoned, by_checksum)
    assert defended.flagged is not None
    assert defended.flagged.all() and defended.predicted.all()
    assert defended.scores is not None and (defended.scores > -0.01).all()
    assert np.array_equal(strip.defend(TEXTS, by_checksum).predicted, by_checksum(TEXTS).argmax(1))


def test_strip_counts_the_passes_that_it_needs() -> None:
    asked: list[str] = []

    def counting(texts: Sequence[str]) -> FloatArray:
        asked.extend(texts)
        return by_checksum(texts)

    strip = Strip(tuple(TEXTS), 0.0, copies=7)
    strip.defend(TEXTS, counting)
    assert len(asked) / len(TEXTS) == strip.passes(TEXTS) + 1


@pytest.mark.parametrize(
    ("pool", "dev", "error", "message"),
    [
        ([], TEXTS, DataError, "no clean texts"),
        (TEXTS, TEXTS[:18], CalibrationError, "18 clean texts are too few .* needs 19"),
    ],
)
def test_strip_refuses_too_few_texts(
    pool: list[str], dev: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Strip.fit(pool, dev, by_checksum, 0.05)
