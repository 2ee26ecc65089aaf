"""OpenAI's moderations and list of models; errors are in the form that vLLM shares with it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from models.detection.screen import Finding, Verdict
from service.schemas import Text, TextsRequest

OPENAIS_OWN = ("omni-moderation", "text-moderation")
"""Beginnings of the models' names that OpenAI's clients send unasked."""
Category = Literal["backdoor/triggered", "backdoor/unfamiliar"]
TRIGGERED: Category = "backdoor/triggered"
UNFAMILIAR: Category = "backdoor/unfamiliar"


class ModerationRequest(TextsRequest):
    """Texts to screen."""

    input: Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
    model: str | None = None

    @property
    def texts(self) -> list[str]:
        """The texts, in a list even if there is one."""
        return [self.input] if isinstance(self.input, str) else self.input

    @property
    def model_name(self) -> str | None:
        """The model that is meant; None for the default, which OpenAI's own names mean too."""
        own = self.model is not None and self.model.startswith(OPENAIS_OWN)
        return None if own else self.model


class Moderation(BaseModel):
    """The verdict on a text."""

    flagged: bool
    categories: Mapping[Category, bool]
    category_scores: Mapping[Category, float]
    """In [0, 1]; the categories as numbers if the caller's API key is for decisions only."""


class ModerationResponse(BaseModel):
    """The verdicts, in the order of the inputs."""

    id: str
    model: str
    results: list[Moderation]


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "psim"


class ModelList(BaseModel):
    """The served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class OpenAiError(BaseModel):
    """An error."""

    error: dict[str, Any]


def moderation(verdict: Verdict | None, flagged: bool, with_scores: bool) -> Moderation:
    """Return the answer for a text, given its verdict; None if it has failed open."""
    finding = None if verdict is None else verdict.finding
    categories: dict[Category, bool] = {
        TRIGGERED: finding is Finding.TRIGGERED,
        UNFAMILIAR: finding is Finding.UNFAMILIAR,
    }
    scores = {category: float(holds) for category, holds in categories.items()}
    if verdict is not None and with_scores:
        scores = _scores(verdict)
    return Moderation(flagged=flagged, categories=categories, category_scores=scores)


def _scores(verdict: Verdict) -> dict[Category, float]:
    """Return one less the p-value of the stage that each category rests on.

    A text that the override test was not asked about is triggered only because it is extreme, or it
    is not triggered at all.
    """
    extreme = 1 - min(1.0, verdict.p_value)
    if verdict.override_p_value is not None:
        triggered = 1 - min(1.0, verdict.override_p_value)
    else:
        triggered = extreme if verdict.poisoned else 0.0
    return {TRIGGERED: triggered, UNFAMILIAR: extreme}
