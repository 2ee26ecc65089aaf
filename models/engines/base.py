"""Runtimes that execute the guarded model; each has a threshold calibrated for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from models.detection.screen import FloatArray


@dataclass(frozen=True, slots=True)
class Encoding:
    """One tokenized text."""

    input_ids: tuple[int, ...]
    truncated: bool
    """True if the text was cut to the model's maximum length."""

    def __len__(self) -> int:
        return len(self.input_ids)


class ClassifierState(Protocol):
    """Where `classify` goes on: an `Encoding`, or what screening one has computed already."""

    def __len__(self) -> int:
        """Return how many tokens it takes to go on."""


class Screening(NamedTuple):
    """What screening some texts gives."""

    readings: FloatArray
    """Shape (n, V, C), see `models.network.guarded.Guarded.screen`."""
    states: Sequence[ClassifierState]
    """One for each text, for `Engine.classify`."""


class Engine(Protocol):
    """What the service and the offline half ask of a runtime. Not thread-safe: one thread only."""

    @property
    def name(self) -> str:
        """Name under which thresholds are kept in the manifest, such as `torch`."""

    @property
    def dtype(self) -> str:
        """Floating-point type of the weights, such as `float32` or `bfloat16`."""

    @property
    def passes(self) -> float:
        """What `screen` and `classify` cost together, in forward passes of the victim."""

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenize texts, truncating each to the model's maximum length."""

    def screen(self, batch: Sequence[Encoding]) -> Screening:
        """Screen texts."""

    def classify(self, batch: Sequence[ClassifierState]) -> FloatArray:
        """Return the victim's softmax probabilities, shape (len(batch), C).

        Args:
            batch: encodings, or the states of earlier calls of `screen`.
        """
