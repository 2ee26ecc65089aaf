"""The native wire format: requests and responses of `/classify` and `/screen`."""

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from models.screen import Voice

Text = Annotated[str, StringConstraints(min_length=1, strict=True)]


class Decision(StrEnum):
    """What the gateway does with an input; in order of severity."""

    ALLOW = "allow"
    FLAG = "flag"
    REJECT = "reject"


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScreenRequest(_Wire):
    """Texts to screen."""

    inputs: Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)]

    @property
    def texts(self) -> list[str]:
        """The texts, as a list even if there is one."""
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs


class ClassifyRequest(ScreenRequest):
    """Texts to screen and classify."""

    top_k: Annotated[int, Field(strict=True, ge=1)] | None = None
    """How many scores to return per text; null returns all."""


class ScreenResult(_Wire):
    """What PSIM says about a text; see `models.screen.Verdict`."""

    confidence: float
    score: float
    voice: Voice
    threshold: float
    p_value: float
    poisoned: bool
    truncated: bool


class Score(_Wire):
    """The classifier's probability of one label."""

    label: str
    score: float


class Result(_Wire):
    """The answer for one text; a rejected one has neither label nor scores."""

    decision: Decision
    screen: ScreenResult | None
    """Null only if screening failed and the operator chose to fail open."""
    label: str | None
    scores: list[Score] | None


class ClassifyResponse(_Wire):
    """The answers, in the order of the inputs."""

    bundle: str
    results: list[Result]


class ScreenResponse(_Wire):
    """The verdicts, in the order of the inputs."""

    bundle: str
    results: list[ScreenResult]


class Problem(BaseModel):
    """An error (RFC 9457); `code` is stable. It never holds the caller's text."""

    model_config = ConfigDict(extra="allow")

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
