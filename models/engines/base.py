"""Runtimes of the guarded model, each calibrated by itself, and the contract of an engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from models.detection.screen import FloatArray

IntArray = npt.NDArray[np.int64]
EngineName = Literal["torch", "openvino"]
DtypeName = Literal["float32", "bfloat16"]


class Runtime(NamedTuple):
    """An engine and the floating-point type that it computes in."""

    engine: EngineName
    dtype: DtypeName

    def __str__(self) -> str:
        return f"{self.engine}/{self.dtype}"


REFERENCE = Runtime("torch", "float32")
"""The runtime that the others are compared with; every bundle can use it."""
RUNTIMES = (
    REFERENCE,
    Runtime("openvino", "float32"),
    Runtime("openvino", "bfloat16"),
    Runtime("torch", "bfloat16"),
)
"""All runtimes. Only the last one converts the module in place, so in this order they can follow
each other on one module."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """One tokenized text."""

    input_ids: tuple[int, ...]
    truncated: bool
    """True if the text was cut to the model's maximum length."""

    def __len__(self) -> int:
        return len(self.input_ids)


class ClassifierState(Protocol):
    """Input of `classify`: an `Encoding`, or the `Withheld` answer that screening it has left."""

    def __len__(self) -> int:
        """Return how many tokens are left to compute."""


@dataclass(frozen=True, slots=True)
class Withheld:
    """The classifier's answer for a text, known from the pass that screened it.

    It is nobody's to read until the text may pass.
    """

    probabilities: FloatArray
    """Of each label, shape (L,)."""

    def __len__(self) -> int:
        return 0


class Screening(NamedTuple):
    """Result of screening a batch of texts."""

    readings: FloatArray
    """Shape (n, V, C), see `models.network.guarded.Guarded.screen`."""
    states: Sequence[ClassifierState]
    """One for each text, for `Engine.classify`."""


class Engine(Protocol):
    """Executes the guarded model. Not thread-safe: one thread only."""

    @property
    def name(self) -> str:
        """Name in the manifest, such as `torch`."""

    @property
    def dtype(self) -> str:
        """Floating-point type of the weights, such as `float32` or `bfloat16`."""

    @property
    def device_type(self) -> str:
        """Where it computes: `cpu` or `cuda`."""

    @property
    def forward_passes(self) -> float:
        """Cost of `screen` and `classify` together, in forward passes of the victim."""

    @property
    def window_length(self) -> int:
        """How many tokens of a text the model reads at once, beside the special tokens."""

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokenize texts, truncating each to the model's maximum length."""

    def token_ids(self, text: str) -> IntArray:
        """Tokenize a whole text, without special tokens; one thread may call it beside the other.

        A classifier elsewhere reads a prefix of these tokens, or all.
        """

    def window(self, ids: IntArray) -> Encoding:
        """Return up to `window_length` tokens of a text with special tokens, as a text."""

    def content(self, encoding: Encoding) -> IntArray:
        """Return the tokens of a text without special tokens, the reverse of `window`."""

    def screen(self, batch: Sequence[Encoding]) -> Screening:
        """Return readings of texts, and the states to classify them from."""

    def classify(self, batch: Sequence[ClassifierState]) -> FloatArray:
        """Return the victim's probability of each label, shape (len(batch), L).

        Args:
            batch: encodings, or the states of earlier calls of `screen`.
        """
