"""The gateway's own wire format."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, TypeAdapter

from service.protocols.base import (
    Finite,
    InferenceRequest,
    ModelInfo,
    WireProtocol,
    checked_count,
    parsed,
)
from service.schemas import Batch, ClassifyResponse, Count, Problem, Result, Score, Text


class ClassifyRequest(InferenceRequest):
    """Texts to screen and classify."""

    inputs: Text | Batch
    top_k: Count | None = None
    """Scores to return per text; null returns all."""

    @property
    def texts(self) -> list[str]:
        """The texts, in a list even if there is one."""
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs

    @property
    def limit(self) -> int | None:
        """`top_k`."""
        return self.top_k

    def with_texts(self, texts: Sequence[str]) -> Self:
        """Return the same request for other texts."""
        return self.model_copy(update={"inputs": list(texts)})

    def to_response(self, results: Sequence[Result], model_info: ModelInfo) -> Any:
        """Return every result; rejected ones have neither label nor scores."""
        answer = ClassifyResponse(bundle=model_info.bundle, results=list(results))
        return answer.model_dump(mode="json")


class _Scored(BaseModel):
    label: str
    score: Finite


class _Classified(BaseModel):
    scores: Annotated[list[_Scored], Field(min_length=1)]


class _NativeResponse(BaseModel):
    results: list[_Classified]


ANSWER = TypeAdapter(_NativeResponse)


class Native(WireProtocol):
    """The gateway's own protocol."""

    name = "native"
    routes = ("/classify",)
    request_type = ClassifyRequest
    passthrough = False  # the verdict is a part of the answer
    error_media = "application/problem+json"

    def error(self, status: int, code: str, detail: str, **more: Any) -> Any:
        """Return a problem (RFC 9457)."""
        title = HTTPStatus(status).phrase
        problem = Problem(title=title, status=status, detail=detail, code=code, **more)
        return problem.model_dump(mode="json")

    def rejection(
        self,
        request: InferenceRequest,
        results: Sequence[Result],
        model_info: ModelInfo,
        detail: str,
    ) -> Any:
        """Return a problem with the verdicts."""
        return self.error(403, "rejected", detail, **request.to_response(results, model_info))

    def path(self, model: str, version: str | None = None) -> str:
        """Return `/classify`."""
        return "/classify"

    def build_request(self, texts: Sequence[str], model_info: ModelInfo) -> InferenceRequest:
        """Return a request for all scores of some texts."""
        return ClassifyRequest(inputs=list(texts))

    def scores(
        self, body: bytes, count: int, labels: Sequence[str], *, multi_label: bool = False
    ) -> list[list[Score]]:
        """Return the scores of each result."""
        results = checked_count(parsed(ANSWER, body).results, count)
        return [[Score(label=s.label, score=s.score) for s in r.scores] for r in results]
