"""Runtimes that execute the guarded model; each has a threshold calibrated for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from models.screen import FloatArray


@dataclass(frozen=True, slots=True)
class Encoding:
    """One tokenized text."""

    input_ids: tuple[int, ...]
    truncated: bool
    """True if the text was cut to the model's maximum length."""

    def __len__(self) -> int:
        return len(self.input_ids)


class Engine(Protocol):
    """What the service and the offline half ask of a runtime. Not thread-safe: one thread only."""

    @property
    def name(self) -> str:
        """Name under which thresholds are kept in the manifest, such as `torch`."""

    @property
    def dtype(self) -> str:
        """Floating-point type of the weights, such as `float32` or `bfloat16`."""

    @property
    def screening_passes(self) -> float:
        """What `screen` costs, in forward passes of the victim."""

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenize texts, truncating each to the model's maximum length."""

    def screen(self, batch: Sequence[Encoding]) -> FloatArray:
        """Return readings, shape (len(batch), K + M, C), see `models.guarded.Guarded.screen`."""

    def classify(self, batch: Sequence[Encoding]) -> FloatArray:
        """Return the victim's softmax probabilities, shape (len(batch), C)."""
