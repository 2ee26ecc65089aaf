"""A bundle in the caller's own process: `load` it, and call it with texts."""

import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from models.bundle.judge import judge_readings
from models.bundle.load import Bundle, load_bundle
from models.detection.screen import Finding, FloatArray, Verdict
from models.detection.views import FIRES
from models.engines.base import ClassifierState, DtypeName, Encoding, EngineName
from models.engines.batching import in_batches
from models.errors import DataError, EngineError, PsimError, ScreenError
from models.texts import check_text
from service.pipeline.policy import Policy
from service.schemas import Decision
from service.settings import Mode

CHUNK = 512
"""Texts that are judged together; between chunks, other threads get their turn."""
ModeName = Literal["enforce", "flag", "shadow"]
UnfamiliarName = Literal["flag", "reject", "allow"]
StrPath = str | os.PathLike[str]


class LabelScore(NamedTuple):
    """A label, and the classifier's probability of it; `dict` takes a list of them."""

    label: str
    score: float


@dataclass(frozen=True, slots=True)
class GuardResult:
    """What was found in one text, and what the classifier says of it."""

    decision: Decision
    """What the policy does with the text: `allow`, `flag` or `reject`."""
    verdict: Verdict
    """The details of the screen's finding."""
    predicted_class: str
    """The class whose clean texts this one was compared with: a label, or `LABEL=on` or `LABEL=off`
    of a multi-label classifier."""
    scores: tuple[LabelScore, ...] | None
    """Of all labels, best first; None if the text was rejected, and so not classified. Those of a
    multi-label classifier do not sum to 1."""
    labels: tuple[str, ...] | None
    """Those that fire, best first, of a multi-label classifier; None of others, and if rejected."""

    @property
    def finding(self) -> Finding | None:
        """`triggered` or `unfamiliar`; None if nothing was found."""
        return self.verdict.finding

    @property
    def truncated(self) -> bool:
        """Whether the text is longer than the classifier reads; the rest has no influence."""
        return self.verdict.truncated

    @property
    def rejected(self) -> bool:
        """Whether the text was not classified."""
        return self.decision is Decision.REJECT

    @property
    def label(self) -> str | None:
        """The best label; None if the text was rejected."""
        return self.scores[0].label if self.scores else None


class Guard:
    """A classifier behind its screen. `load` returns one.

    It may be called from several threads. A lock lets one of them compute at a time, and the others
    wait. It cannot be pickled: each process has to `load` its own.

    Args:
        bundle: the screen and the classifier; its engine belongs to the guard from now on.
        policy: decides which texts are classified.
        thorough: whether all texts are tested, not only suspicious ones. None tests all of a
            multi-label classifier's.
    """

    def __init__(self, bundle: Bundle, policy: Policy, *, thorough: bool | None = None) -> None:
        self._bundle, self._policy, self._thorough = bundle, policy, thorough
        self._lock = threading.Lock()

    @property
    def labels(self) -> list[str]:
        """The classifier's labels, in the order of its configuration."""
        return list(self._bundle.manifest.labels)

    @property
    def multi_label(self) -> bool:
        """Whether a text may have any number of the labels."""
        return self._bundle.manifest.multi_label

    @property
    def digest(self) -> str:
        """SHA-256 of the bundle's manifest; answers of the service name it `bundle`."""
        return self._bundle.digest

    def __call__(self, texts: Iterable[str]) -> list[GuardResult]:
        """Screen texts, and classify those that may pass; return one result per text, in order.

        Texts of similar length are batched together.

        Raises:
            DataError: a text is not a string, blank, too long to be meant, or not valid Unicode;
                then none has been screened. The message has the number of the text, from 0.
            ScreenError, EngineError: a text cannot be judged, or not be classified; then no text is
                answered.
        """
        if isinstance(texts, str):
            raise DataError("the guard takes a list of texts, not one string")
        checked = [_checked(number, text) for number, text in enumerate(texts)]
        chunks = (range(len(checked))[at : at + CHUNK] for at in range(0, len(checked), CHUNK))
        return [one for chunk in chunks for one in self._judge(chunk, [checked[i] for i in chunk])]

    def _judge(self, numbers: range, texts: Sequence[str]) -> list[GuardResult]:
        """Return the results for texts, given their numbers in the call."""
        engine = self._bundle.engine
        with self._lock:
            encodings = engine.encode(texts)
            screened = in_batches(self._screen, encodings)
            verdicts = _require_verdicts(
                numbers,
                judge_readings(
                    self._bundle,
                    encodings,
                    [readings for readings, _ in screened],
                    lambda inputs: [readings for readings, _ in in_batches(self._screen, inputs)],
                    thorough=self._thorough,
                ),
            )
            decisions = [self._policy.decide(verdict) for verdict in verdicts]
            passed = [i for i, one in enumerate(decisions) if one is not Decision.REJECT]
            rows = in_batches(engine.classify, [screened[i][1] for i in passed])
        for i, row in zip(passed, rows, strict=True):
            if not np.isfinite(row).all():
                raise EngineError(f"text {numbers[i]}: the classifier gave no finite probabilities")
        probabilities = dict(zip(passed, rows, strict=True))
        return [
            self._result(verdict, decision, probabilities.get(i))
            for i, (verdict, decision) in enumerate(zip(verdicts, decisions, strict=True))
        ]

    def _screen(self, batch: Sequence[Encoding]) -> Iterable[tuple[FloatArray, ClassifierState]]:
        return zip(*self._bundle.engine.screen(batch), strict=True)

    def _result(
        self, verdict: Verdict, decision: Decision, probabilities: FloatArray | None
    ) -> GuardResult:
        scores = labels = None
        if probabilities is not None:
            pairs = map(LabelScore, self.labels, probabilities.tolist())
            scores = tuple(sorted(pairs, key=lambda pair: -pair.score))
            if self.multi_label:
                labels = tuple(label for label, score in scores if score >= FIRES)
        predicted = self._bundle.manifest.classes[verdict.predicted]
        return GuardResult(decision, verdict, predicted, scores, labels)


def load(
    path: StrPath,
    *,
    key: StrPath | None = None,
    engine: EngineName | None = None,
    dtype: DtypeName | None = None,
    thorough: bool | None = None,
    mode: ModeName = "enforce",
    unfamiliar: UnfamiliarName = "flag",
) -> Guard:
    """Check a bundle as the service does, load it, and try it on one text.

    Args:
        path: folder of the bundle.
        key: file of the public key that the bundle must be signed with; None skips the check.
        engine: `torch` or `openvino`; None leaves it to the bundle.
        dtype: `float32` or `bfloat16`; None leaves it to the bundle.
        thorough: whether all texts are tested, not only suspicious ones. None tests all of a
            multi-label classifier's.
        mode: what happens to a triggered text. `enforce` rejects it: it is not classified. `flag`
            classifies and marks it. `shadow` allows it.
        unfamiliar: what `enforce` does with an unfamiliar text: `flag`, `reject` or `allow` it.

    Raises:
        BundleError: the bundle is not as its manifest says, not signed with the key, or not for
            this engine and dtype.
        PsimError: there is no such mode, or decision on unfamiliar texts.
    """
    _require_one_of("mode", mode, get_args(ModeName))
    _require_one_of("unfamiliar", unfamiliar, get_args(UnfamiliarName))
    bundle = load_bundle(Path(path), dtype, engine, None if key is None else Path(key))
    # The classifier reads no more of a text than the screen, so an over-long one is harmless.
    policy = Policy(Mode(mode), overlong_is_suspicious=False, unfamiliar=Decision(unfamiliar))
    return Guard(bundle, policy, thorough=thorough)


def _require_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise PsimError(f"{name} is {value!r}; give one of {', '.join(known)}")


def _checked(number: int, text: object) -> str:
    try:
        return check_text(text)
    except DataError as error:
        raise DataError(f"text {number}: {error}") from None


def _require_verdicts(
    numbers: Iterable[int], found: Sequence[Verdict | ScreenError]
) -> list[Verdict]:
    verdicts = []
    for number, verdict in zip(numbers, found, strict=True):
        if isinstance(verdict, ScreenError):
            raise ScreenError(f"text {number}: {verdict}") from verdict
        verdicts.append(verdict)
    return verdicts
