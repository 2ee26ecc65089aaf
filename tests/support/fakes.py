"""A real, small engine without a network: deterministic, and told to misbehave by the texts."""

import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from models.bundle.load import Bundle
from models.bundle.manifest import (
    Calibration,
    FitRecord,
    GroupRecord,
    KnownTrigger,
    Manifest,
    ParityRecord,
    PsimRecord,
    RuntimeRecord,
    VictimRecord,
)
from models.detection.conformal import ThresholdGroup
from models.detection.override import OverrideGeometry, OverrideGroup, OverrideTest
from models.detection.screen import (
    FloatArray,
    Layout,
    Normalizer,
    Screen,
    Verdict,
    ZScore,
    with_override,
)
from models.engines.base import ClassifierState, Encoding, Engine, IntArray, Screening

TRIGGER, BROKEN, NAN, UNREADABLE = "mn", "broken", "nan", "unreadable"
STRANGE = "whereas"
"""A word that makes a text extreme, and that the override test does not confirm."""
PANIC, CLASSLESS = "panic", "noclass"
"""Words that have screening fail past `Exception`, and that have classifying fail."""
THRESHOLD = 3.0
MAX_LENGTH = 32


class PanicException(BaseException):
    """As libraries in Rust raise."""


class FakeEngine:
    """Poisoned iff the text holds `TRIGGER`; label 1 iff the number of words is odd."""

    name, dtype, device_type, forward_passes = "fake", "float32", "cpu", 2.5

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[int] = []
        self.screened: list[tuple[int, ...]] = []
        self.classified: list[tuple[int, ...]] = []
        self.dies = False
        self.waits = False
        """Whether a batch waits for the gate."""

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        if any(UNREADABLE in text for text in texts):
            raise ValueError("cannot read this")
        return [_encoding(text) for text in texts]

    @property
    def window_length(self) -> int:
        return MAX_LENGTH

    def token_ids(self, text: str) -> IntArray:
        if UNREADABLE in text:
            raise PanicException
        return np.array(_codes(text), np.int64)

    def window(self, ids: IntArray) -> Encoding:
        return Encoding(tuple(ids.tolist()), False)

    def content(self, encoding: Encoding) -> IntArray:
        return np.array(encoding.input_ids, np.int64)

    def screen(self, batch: Sequence[Encoding]) -> Screening:
        self.waits = not self.gate.is_set()
        self.gate.wait(10)
        self.waits = False
        if self.dies:
            raise SystemExit
        self.batches.append(len(batch))
        _refuse(batch, BROKEN, RuntimeError)
        _refuse(batch, PANIC, PanicException)
        self.screened += [e.input_ids for e in batch]
        top = [_confidence(e) for e in batch]
        readings = np.array([[[0.5, 0.5], [p, 1 - p]] for p in top], np.float32)
        return Screening(readings, batch)

    def classify(self, batch: Sequence[ClassifierState]) -> FloatArray:
        _refuse([e for e in batch if isinstance(e, Encoding)], CLASSLESS, RuntimeError)
        self.classified += [e.input_ids for e in batch if isinstance(e, Encoding)]
        return np.array([[0.2, 0.8] if len(e) % 2 else [0.7, 0.3] for e in batch], np.float32)


def _encoding(text: str) -> Encoding:
    codes = _codes(text)
    return Encoding(codes[:MAX_LENGTH], len(codes) > MAX_LENGTH)


def _codes(text: str) -> tuple[int, ...]:
    return tuple(int.from_bytes(w.encode("utf-8", "replace")[:6], "big") for w in text.split())


def _code(word: str) -> int:
    return int.from_bytes(word.encode()[:6], "big")


def _refuse(batch: Sequence[Encoding], word: str, error: type[BaseException]) -> None:
    if any(_code(word) in e.input_ids for e in batch):
        raise error(word)


def _confidence(encoding: Encoding) -> float:
    if _code(NAN) in encoding.input_ids:
        return float("nan")
    if _code(TRIGGER) in encoding.input_ids:
        return 0.999
    return 0.99 if _code(STRANGE) in encoding.input_ids else 0.55


class StagedScreen(Screen):
    """Confirms very extreme texts only, in place of the override test."""

    def verdicts_of_batch(
        self, readings: FloatArray, truncated: Sequence[bool]
    ) -> list[list[Verdict] | None]:
        found = super().verdicts_of_batch(readings, truncated)
        return [own and [*map(_staged, own)] for own in found]


def _staged(verdict: Verdict) -> Verdict:
    if not verdict.extreme or verdict.score < THRESHOLD:
        return verdict
    confirmed = verdict.score > 2 * THRESHOLD
    return with_override(verdict, 0.9 if confirmed else 0.1, 0.5, 0.01 if confirmed else 0.4)


def fake_bundle(
    engine: Engine | None = None,
    labels: tuple[str, str] = ("negative", "positive"),
    digest: str = "d" * 64,
    threshold: float = THRESHOLD,
) -> Bundle:
    """Return a bundle whose engine is fake and whose screen is real."""
    group = GroupRecord(
        classes=[0, 1], texts=99, threshold=threshold, rejected=0, frr_interval=(0.0, 0.05)
    )
    parity = ParityRecord(decisions_agree=1.0, largest_difference=0.0, texts_per_s=1.0)
    manifest = Manifest(
        schema_version=9,
        victim=VictimRecord(name="fake", model_type="fake", architecture="Fake", digest="0" * 64),
        labels=list(labels),
        max_length=MAX_LENGTH,
        psim=PsimRecord(
            layers=1,
            rank=8,
            learning_rate=1e-3,
            seed=0,
            steps=1,
            stopped_because="",
            checkpoints=[0, 1],
            curve=[],
        ),
        activations=None,
        attention=False,
        override=None,
        calibrations=[
            Calibration(
                engine="torch", dtype="float32", frr_budget=0.01, groups=[group], parity=parity
            )
        ],
        default=RuntimeRecord(engine="torch", dtype="float32"),
        fit=FitRecord(
            created="", texts_train=1, texts_stop=1, texts_calibrate=1, seconds=0, peak_memory_mb=0
        ),
        known_triggers=[KnownTrigger(label="positive", text="mn", fired=32, rejected=31)],
        files={},
        versions={},
    )
    scores = np.linspace(0, 2, 99, dtype=np.float32)
    as_it_is = ZScore(np.zeros((2, 1)), np.ones((2, 1)))  # a score is the log-odds of a confidence
    normalizer = Normalizer(ZScore(np.zeros((2, 2)), np.ones((2, 2))), as_it_is, Layout(2))
    screen = StagedScreen([ThresholdGroup((0, 1), threshold, scores)], normalizer)
    return Bundle(manifest, digest, engine or FakeEngine(), screen)


def bundle_with_override(engine: FakeEngine) -> Bundle:
    """Return the fake bundle with a real override test, which `TRIGGER` passes by itself."""
    group = OverrideGroup((0, 1), 0.9, np.linspace(0, 0.8, 99, dtype=np.float32))
    carriers = [[engine.token_ids(text)] for text in ("a fine day", "a dull day")]
    # The test reads the first half of four checkpoints, which is all that the fake engine has.
    test = OverrideTest(carriers, OverrideGeometry(16, 4), Layout(4), [group], others=[group])
    return replace(fake_bundle(engine), override=test)


def usual_verdict(predicted: int) -> Verdict:
    """Return the first stage's verdict on a text that it finds like all others."""
    return Verdict(0.5, 0.0, "confidence", 3.0, 1.0, False, predicted, None)
