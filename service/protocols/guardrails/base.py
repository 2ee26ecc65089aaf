"""Interface of a proxy that asks about a conversation: how it asks, and what it is told."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from service.protocols.guardrails.litellm import GuardrailRequest, Question


class Guardrail(ABC):
    """A kind of proxy."""

    route: ClassVar[str]
    request_type: ClassVar[type[Question]]
    takes_texts: ClassVar[bool] = True
    """Whether it takes texts back. If not, a triggered text blocks the request in every mode."""

    def is_answer(self, data: object) -> bool:
        """Return whether a body holds a model's answer, which is not screened."""
        return False

    @abstractmethod
    def passes(self) -> Any:
        """Return the JSON that lets a request pass as it is."""

    @abstractmethod
    def blocks(self, reason: str) -> Any:
        """Return the JSON that blocks a request."""

    def masks(self, asked: GuardrailRequest, cleaned: Mapping[str, str]) -> Any:
        """Return the JSON that lets a request pass with other texts, if it `takes_texts`.

        Args:
            asked: the whole conversation, as it was asked about.
            cleaned: what takes the place of each sanitized text.
        """
        raise NotImplementedError
