"""The native wire format, and the types that all protocols share."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from models.detection.screen import Detector, Finding

NOT_BLANK = r"[^\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
"""A character that `str.strip` keeps, for OpenAPI only; requests are checked in Python."""
Text = Annotated[
    str,
    StringConstraints(min_length=1, strict=True),
    Field(json_schema_extra={"pattern": NOT_BLANK}),
]

Element = Annotated[str, StringConstraints(strict=True)]
"""A text in a list; one that is blank is refused by itself, where answers may have gaps."""
Batch = Annotated[
    list[Element],
    Field(
        min_length=1,
        fail_fast=True,
        json_schema_extra={"contains": {"type": "string", "pattern": NOT_BLANK}},
    ),
]


def _whole(number: object) -> object:
    """Return 2.0 as 2, since JSON has one kind of number."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


Count = Annotated[int, Field(strict=True, ge=1), BeforeValidator(_whole)]


class Decision(StrEnum):
    """Treatment of an input, in order of severity."""

    ALLOW = "allow"
    SANITIZE = "sanitize"
    FLAG = "flag"
    REJECT = "reject"


SEVERITY = {decision: number for number, decision in enumerate(Decision)}


def worst(decisions: Iterable[Decision | None]) -> Decision:
    """Return the most severe decision; None stands for an input without one."""
    return max(filter(None, decisions), key=SEVERITY.__getitem__)


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextsRequest(_Wire, ABC):
    """A request with texts."""

    @property
    @abstractmethod
    def texts(self) -> list[str]:
        """Everything that a classifier would read, in order."""


class ScreenRequest(TextsRequest):
    """Texts to screen."""

    inputs: Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)]

    @property
    def texts(self) -> list[str]:
        """The texts, in a list even if there is one."""
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs


class ScreenResult(_Wire):
    """Verdict on a text, see `models.detection.screen.Verdict`.

    The numbers and the detector are null if the caller's API key is for decisions only.
    """

    confidence: float | None = None
    score: float | None = None
    detector: Detector | None = None
    threshold: float | None = None
    p_value: float | None = None
    override: float | None = None
    """Null too if the override test was not asked."""
    override_threshold: float | None = None
    override_p_value: float | None = None
    finding: Finding | None
    """Null if nothing was found."""
    poisoned: bool
    """True iff the finding is `triggered`."""
    truncated: bool


class Removed(_Wire):
    """A span of the text that carried a trigger, in characters (Unicode code points)."""

    start: int
    end: int
    text: str


class Score(_Wire):
    """The classifier's probability of one label; those of a multi-label one do not sum to 1."""

    label: str
    score: float


def best_first(scores: Iterable[tuple[str, float]]) -> list[Score]:
    """Return labels with their scores, best first."""
    return sorted((Score(label=label, score=s) for label, s in scores), key=lambda s: -s.score)


class Result(_Wire):
    """The answer for one text; a rejected one has neither label nor scores."""

    decision: Decision
    screen: ScreenResult | None
    """Null if the text could not be read, or if the operator chose to fail open."""
    label: str | None
    """The one with the highest score."""
    labels: Annotated[list[str] | None, Field(exclude_if=lambda labels: labels is None)] = None
    """Labels that fire, best first, of a multi-label classifier; left out for others."""
    scores: list[Score] | None
    reason: Annotated[
        Literal["exception"] | None, Field(exclude_if=lambda reason: reason is None)
    ] = None
    """`exception` if a reviewed exception let a text with a finding pass; left out for others."""
    error: Annotated[str | None, Field(exclude_if=lambda error: error is None)] = None
    """Why the text could not be read; left out for others."""
    removed: list[Removed] | None = None
    """Spans cut from a sanitized text before it was classified; else null."""


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
    """A word, and the fall of the score without it, see `models.detection.explain.Word`."""

    start: int
    end: int
    text: str
    weight: float


class ExplainResponse(_Wire):
    """Reasons for the verdict on a text."""

    bundle: str
    screen: ScreenResult
    words: list[WeightedWord]
    """In the order of the text."""
    removed: list[Removed]
    """Spans without which nothing is found; empty if nothing is found, or there are none."""
    known_triggers: list[str]
    """Triggers that `psim scan` found in this model, and that the text has all words of."""


class Problem(BaseModel):
    """An error (RFC 9457); `code` is stable. It never holds the caller's text."""

    model_config = ConfigDict(extra="allow")

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
