"""Hugging Face Inference: `POST /` of an endpoint, or `POST /models/NAME`."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, TypeAdapter

from service.protocols.base import (
    BadAnswer,
    Finite,
    InferenceRequest,
    ModelInfo,
    Wire,
    WireProtocol,
    checked_count,
    parsed,
)
from service.schemas import Count, Result, Score, Text, best_first


class HfParameters(Wire):
    """What may be said to the pipeline: numbers and switches, nothing that could be a text."""

    top_k: Count | None = None
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    truncation: bool | None = None
    max_length: Count | None = None


class HfOptions(Wire):
    """What older clients say about caching and cold starts."""

    use_cache: bool | None = None
    wait_for_model: bool | None = None
    use_gpu: bool | None = None


class Inputs(InferenceRequest):
    """Texts; a list is a batch."""

    inputs: Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
    parameters: HfParameters | None = None
    options: HfOptions | None = None

    @property
    def texts(self) -> list[str]:
        """The texts, as a list even if there is one."""
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs

    @property
    def limit(self) -> int | None:
        """As `top_k` says."""
        return self.parameters.top_k if self.parameters else None

    @property
    def unsupported_option(self) -> str | None:
        """Scores other than probabilities are only to be had from the pipeline itself."""
        given = self.parameters and self.parameters.function_to_apply
        return None if given in (None, "softmax") else "function_to_apply"

    def with_texts(self, texts: Sequence[str]) -> Self:
        """Return the same request for other texts."""
        single = isinstance(self.inputs, str)
        return self.model_copy(update={"inputs": texts[0] if single else list(texts)})

    def to_response(self, results: Sequence[Result], served: ModelInfo) -> Any:
        """Return a list for each text, best first; that of a rejected text is empty."""
        return [
            [{"label": s.label, "score": s.score} for s in result.scores or []]
            for result in results
        ]


class _HfPrediction(BaseModel):
    label: str
    score: Finite


ANSWER: TypeAdapter[list[list[_HfPrediction]] | list[_HfPrediction]] = TypeAdapter(
    list[list[_HfPrediction]] | list[_HfPrediction]
)


def predictions(body: bytes, flat_is_batch: bool = False) -> list[list[Score]]:
    """Return an answer's predictions by text, best first.

    A flat list is of one text, or, if `flat_is_batch`, has the best prediction for each text.

    Raises:
        BadAnswer: it has not at least one prediction for each text.
    """
    rows: list[list[_HfPrediction]] = []
    flat: list[_HfPrediction] = []
    for one in parsed(ANSWER, body):
        if isinstance(one, list):
            rows.append(one)
        else:
            flat.append(one)
    if flat:
        rows = [[one] for one in flat] if flat_is_batch else [flat]
    if not rows or not all(rows):
        raise BadAnswer("no prediction for an input")
    return [best_first((p.label, p.score) for p in row) for row in rows]


class HuggingFace(WireProtocol):
    """`POST /`."""

    name = "hf"
    routes = ("/", "/models/{model:path}")
    request_type = Inputs

    def error(self, status: int, code: str, detail: str) -> Any:
        """Return an error."""
        return {"error": detail}

    def path(self, model: str, version: str | None = None) -> str:
        """Return nothing: the base URL is that of the endpoint, or of the model."""
        return ""

    def build_request(self, texts: Sequence[str], served: ModelInfo) -> InferenceRequest:
        """Return a request for all scores of some texts."""
        return Inputs(inputs=list(texts), parameters=HfParameters(top_k=len(served.labels)))

    def scores(self, body: bytes, count: int, labels: Sequence[str]) -> list[list[Score]]:
        """Return the predictions of each text: nested, or flat as pipelines give them."""
        return checked_count(predictions(body, flat_is_batch=count > 1), count)
