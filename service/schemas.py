"""The native wire format; what protocols have in common is in its words too."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from models.detection.screen import Detector

NOT_BLANK = r"[^\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
"""What `str.strip` leaves, as a regular expression for OpenAPI; requests are checked in Python."""
Text = Annotated[
    str,
    StringConstraints(min_length=1, strict=True),
    Field(json_schema_extra={"pattern": NOT_BLANK}),
]


def _whole(number: object) -> object:
    """Return 2.0 as 2: JSON has one kind of numbers."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


Count = Annotated[int, Field(strict=True, ge=1), BeforeValidator(_whole)]


class Decision(StrEnum):
    """What the gateway does with an input; in order of severity."""

    ALLOW = "allow"
    SANITIZE = "sanitize"
    FLAG = "flag"
    REJECT = "reject"


SEVERITY = {decision: number for number, decision in enumerate(Decision)}


def worst(decisions: Iterable[Decision | None]) -> Decision:
    """Return the most severe of the decisions that were made."""
    return max(filter(None, decisions), key=SEVERITY.__getitem__)


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextsRequest(_Wire, ABC):
    """A request that is about texts."""

    @property
    @abstractmethod
    def texts(self) -> list[str]:
        """All that a classifier would read, in order."""


class ScreenRequest(TextsRequest):
    """Texts to screen."""

    inputs: Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)]

    @property
    def texts(self) -> list[str]:
        """The texts, as a list even if there is one."""
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs


class ScreenResult(_Wire):
    """What PSIM says about a text, see `models.detection.screen.Verdict`; the first five are null
    if the caller's API key is for decisions only."""

    confidence: float | None = None
    score: float | None = None
    detector: Detector | None = None
    threshold: float | None = None
    p_value: float | None = None
    poisoned: bool
    truncated: bool


class Removed(_Wire):
    """A part of the text, in characters (Unicode code points), that carried a trigger."""

    start: int
    end: int
    text: str


class Score(_Wire):
    """The classifier's probability of one label."""

    label: str
    score: float


def best_first(scores: Iterable[tuple[str, float]]) -> list[Score]:
    """Return labels and their scores, the best first."""
    return sorted((Score(label=label, score=s) for label, s in scores), key=lambda s: -s.score)


class Result(_Wire):
    """The answer for one text; a rejected one has neither label nor scores."""

    decision: Decision
    screen: ScreenResult | None
    """Null only if screening failed and the operator chose to fail open."""
    label: str | None
    scores: list[Score] | None
    removed: list[Removed] | None = None
    """What was taken out of a sanitized text before it was classified; else null."""


class ClassifyResponse(_Wire):
    """The answers, in the order of the inputs."""

    bundle: str
    results: list[Result]


class ScreenResponse(_Wire):
    """The verdicts, in the order of the inputs."""

    bundle: str
    results: list[ScreenResult]


class ExplainRequest(ScreenRequest):
    """A text to explain."""

    inputs: Text


class WeightedWord(_Wire):
    """A word and by how much the score falls without it, see `models.detection.explain.Word`."""

    start: int
    end: int
    text: str
    weight: float


class ExplainResponse(_Wire):
    """What the verdict on a text rests on."""

    bundle: str
    screen: ScreenResult
    words: list[WeightedWord]
    """In the order of the text."""
    removed: list[Removed]
    """What was found without which the text passes; empty if it passes as it is, or if nothing was
    found."""


class Problem(BaseModel):
    """An error (RFC 9457); `code` is stable. It never holds the caller's text."""

    model_config = ConfigDict(extra="allow")

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
