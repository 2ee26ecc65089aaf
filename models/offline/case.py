"""One victim of a study: its texts, what it does alone, and how a defence did on it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from models.engines.pytorch import TorchEngine
from models.guarded import guard, lora_config
from models.offline.calibrate import predict
from models.offline.data import Sample
from models.offline.fit import max_length_of
from models.offline.measures import Classes, Defended, Outcome, classes_of, outcome
from models.offline.store import Step, Store, digest_of
from models.offline.victim import load_classifier
from models.screen import FloatArray

TIMED = 64
"""Clean texts by which a defence's time is measured, beside the bare victim's on the same."""
SCORES = "scores.npz"


@dataclass
class Case:
    """A victim, and the texts that defences are fitted and measured on."""

    victim: Step
    published: Step
    """The weights that the victim was tuned from."""
    train: list[Sample]
    """Clean texts for fitting; the victim was tuned on them too, as in the paper."""
    dev: list[Sample]
    """Clean texts for choosing thresholds."""
    clean: list[Sample]
    poisoned: list[str]
    targets: list[str]
    """The attacker's label for each poisoned text."""
    paraphrased: dict[str, tuple[list[Sample], list[Sample]]]
    """By paraphraser: rewritten clean test texts, and rewritten poisoned ones of other classes."""
    seed: int
    dtype: str

    @cached_property
    def engine(self) -> TorchEngine:
        """The victim alone: its adapter is as new, and does nothing."""
        model, tokenizer = load_classifier(str(self.victim.folder / "model"))
        length = max_length_of(model, tokenizer)
        return TorchEngine(guard(model, lora_config(model, 1)), tokenizer, length, self.dtype)

    @cached_property
    def labels(self) -> list[str]:
        """Names of the victim's classes in their order."""
        return list(self.victim.result["labels"])

    @cached_property
    def inputs(self) -> dict[str, object]:
        """What every result on this case depends on."""
        texts = (self.train, self.dev, self.clean, self.poisoned, self.targets)
        return {
            "victim": self.victim.key,
            "texts": digest_of(texts),
            "dtype": self.dtype,
            "seed": self.seed,
        }

    def classify(self, texts: Sequence[str]) -> FloatArray:
        """Return the victim's probabilities, shape (len(texts), C)."""
        return predict(self.engine, self.engine.encode(texts), classifier=True)


@dataclass(frozen=True)
class Entry:
    """How one defence did."""

    name: str
    outcome: Outcome
    passes: float | None
    """Forward passes per text beside that of the victim; None if not known."""
    time: float | None
    """Seconds per text over those of the bare victim, which 1 is; None if not known."""
    details: dict[str, Any]
    """What is particular to the defence."""

    def as_row(self) -> dict[str, Any]:
        """Return what the row of a cell keeps."""
        return asdict(self.outcome) | {"passes": self.passes, "time": self.time} | self.details


@dataclass(frozen=True)
class Arena:
    """A case with the truth about it, and what the victim does alone."""

    case: Case
    truth: Classes
    targets: Classes
    predicted_clean: Classes
    predicted_poisoned: Classes

    def entry(
        self,
        name: str,
        clean: Defended,
        poisoned: Defended,
        passes: float,
        time: float,
        **details: Any,
    ) -> Entry:
        """Measure a defence against the truth."""
        fires = self.predicted_poisoned == self.targets
        measured = outcome(clean, self.truth, poisoned, self.targets, fires)
        return Entry(name, measured, passes, time, details)


def alone(store: Store, case: Case) -> Step:
    """Let the victim classify all texts without a defence; keeps the fields of `Arena`."""

    def make(folder: Path) -> object:
        np.savez(
            folder / SCORES,
            truth=classes_of(case.clean, case.labels),
            targets=classes_of([Sample("", label) for label in case.targets], case.labels),
            predicted_clean=case.classify([s.text for s in case.clean]).argmax(1),
            predicted_poisoned=case.classify(case.poisoned).argmax(1),
        )
        return {}

    return store.step("bare", case.inputs, make)


def unflagged(predicted: Classes) -> Defended:
    """Return what a defence makes of texts that rejects none."""
    return Defended(predicted, np.zeros(len(predicted), np.bool_))


def relative_time(case: Case, extra: Callable[[list[str]], object]) -> float:
    """Return the time of the victim and `extra`, over that of the victim alone, one by one."""
    texts = [s.text for s in case.clean[:TIMED]]
    seconds = []
    for run in (case.classify, extra):
        run(texts[:2])  # warm
        started = time.perf_counter()
        for text in texts:
            run([text])
        seconds.append(time.perf_counter() - started)
    return sum(seconds) / seconds[0]
