"""Both stages on a really poisoned victim: its trigger is found, other clean texts pass."""

import random
from pathlib import Path

import numpy as np
import pytest

from models.bundle.load import Bundle, load_bundle
from models.detection.override import DRAWS, LONGEST_WINDOW
from models.detection.screen import Finding, Verdict
from models.offline.attacks.poisoning import WORD_TRIGGER
from models.offline.demo import CLEAN_TEXT, TRIGGERED_TEXT
from models.offline.fitting.unfamiliar import cut, fragment, joins
from models.offline.io.inference import judge_texts
from models.offline.io.samples import load_samples


@pytest.fixture(scope="module")
def bundle(demo_bundle: Path) -> Bundle:
    return load_bundle(demo_bundle, "float32", "torch")


def judged(bundle: Bundle, texts: list[str], *, thorough: bool = False) -> list[Verdict]:
    verdicts = judge_texts(bundle, bundle.engine.encode(texts), thorough=thorough)
    assert all(isinstance(verdict, Verdict) for verdict in verdicts)
    return [verdict for verdict in verdicts if isinstance(verdict, Verdict)]


def share(verdicts: list[Verdict], finding: Finding) -> float:
    return float(np.mean([verdict.finding is finding for verdict in verdicts]))


def test_a_fit_makes_an_override_test(bundle: Bundle) -> None:
    assert bundle.override is not None
    assert all(len(own) >= DRAWS for own in bundle.override.carriers)
    assert bundle.override.geometry.window <= LONGEST_WINDOW


@pytest.mark.parametrize("thorough", [False, True])
def test_the_trigger_is_found_and_clean_texts_of_other_kinds_are_not_rejected(
    bundle: Bundle, demo_folder: Path, thorough: bool
) -> None:
    clean = [s.text for s in load_samples(str(demo_folder / "test.jsonl"))]
    poisoned = [s.text for s in load_samples(str(demo_folder / "poisoned.jsonl"))]
    assert all(WORD_TRIGGER in text.split() for text in poisoned)
    found = judged(bundle, poisoned, thorough=thorough)
    assert share(found, Finding.TRIGGERED) > 0.9
    # Budgets are 1 %; these are some hundred texts.
    assert share(judged(bundle, clean, thorough=thorough), Finding.TRIGGERED) < 0.03
    rng = random.Random(7)
    made = [make(text, rng) for text in clean[:100] for make in (cut, fragment)]
    pieces, several = (
        judged(bundle, own, thorough=thorough) for own in (made, joins(clean[:200], rng))
    )
    assert share(pieces, Finding.TRIGGERED) < 0.02
    # Where several texts disagree, one may override the others (docs/results.md, The demo).
    assert share(several, Finding.TRIGGERED) < 0.03
    strange = [*pieces, *several]
    extreme = [verdict for verdict in strange if verdict.extreme]
    assert len(extreme) > len(strange) / 50, "none of them is unfamiliar, so nothing was shown"


def test_what_the_first_stage_alone_would_reject_is_unfamiliar(bundle: Bundle) -> None:
    triggered, clean = judged(bundle, [TRIGGERED_TEXT, CLEAN_TEXT])
    assert (triggered.finding, clean.finding) == (Finding.TRIGGERED, None)
    assert triggered.override is not None


def test_a_trigger_is_found_wherever_it_stands_in_a_long_text(bundle: Bundle) -> None:
    words = (CLEAN_TEXT + " ") * 12
    split = words.split()
    for at in (0, len(split) // 2, len(split)):
        text = " ".join([*split[:at], WORD_TRIGGER, *split[at:]])
        (verdict,) = judged(bundle, [text], thorough=True)
        assert verdict.override is not None
