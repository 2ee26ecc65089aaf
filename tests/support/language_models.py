"""One small language model per test run."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from models.offline.attacks.corpus import generate
from models.offline.study.defences.language_model import (
    LanguageModel,
    load_language_model,
    train_language_model,
)

SAMPLES = generate(690, seed=0)
TRAIN, DEV, TEST = SAMPLES[:600], SAMPLES[600:650], SAMPLES[650:]
TEXTS = [sample.text for sample in TEST]


@cache
def small_language_model() -> LanguageModel:
    """Train one per test run."""
    with TemporaryDirectory() as folder:
        texts = [sample.text for sample in TRAIN]
        return load_language_model(str(train_language_model(texts, Path(folder, "lm"), epochs=6)))
