"""text-embeddings-inference: `POST /predict`."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, TypeAdapter, field_validator

from service.protocols.base import (
    InferenceRequest,
    ModelInfo,
    WireProtocol,
    checked_count,
    harmless_cut,
    parsed,
)
from service.protocols.hf import HfParameters, predictions
from service.schemas import Element, Result, Score, Text

ERROR_TYPES = {400: "Empty", 429: "Overloaded", 502: "Backend", 503: "Unhealthy", 504: "Backend"}
"""Error types by status; all other statuses are `Validation`."""
PAIR = "a pair of texts cannot be screened; send single texts: [[text], ...]"


class TeiRequest(InferenceRequest):
    """One text, or a batch as a list of lists; a flat list of two is a pair, which is refused."""

    inputs: Text | list[list[Element]]
    truncate: bool | None = None
    truncation_direction: Annotated[
        Literal["Right", "right"] | None, harmless_cut("Right", "right")
    ] = None
    raw_scores: bool = False
    parameters: HfParameters | None = None
    """Sent by clients of Hugging Face Inference; TEI ignores it."""

    @field_validator("inputs", mode="before")
    @classmethod
    def _no_pairs(cls, inputs: object) -> object:
        if not isinstance(inputs, list) or not inputs:
            return inputs
        if all(isinstance(one, str) for one in inputs):
            if len(inputs) > 1:
                raise ValueError(PAIR)
            return inputs[0]
        if any(isinstance(one, list) and len(one) > 1 for one in inputs):
            raise ValueError(PAIR)
        return inputs

    @field_validator("inputs")
    @classmethod
    def _none_missing(cls, inputs: str | list[list[str]]) -> str | list[list[str]]:
        if not inputs or not all(map(len, inputs)):
            raise ValueError("there is no text")
        return inputs

    @property
    def texts(self) -> list[str]:
        """The texts, in a list even if there is one."""
        return [self.inputs] if isinstance(self.inputs, str) else [one for (one,) in self.inputs]

    def unsupported_option(self, model_info: ModelInfo) -> str | None:
        """Return the option for logits: only TEI has it."""
        return "raw_scores" if self.raw_scores else None

    def with_texts(self, texts: Sequence[str]) -> Self:
        """Return the same request for other texts."""
        single = isinstance(self.inputs, str)
        return self.model_copy(update={"inputs": texts[0] if single else [[t] for t in texts]})

    def to_response(self, results: Sequence[Result], model_info: ModelInfo) -> Any:
        """Return a list per text, best label first; the list of a rejected text is empty."""
        rows = [_wire(result.scores or []) for result in results]
        return rows[0] if isinstance(self.inputs, str) else rows


def _wire(scores: Sequence[Score]) -> list[dict[str, Any]]:
    return [{"score": s.score, "label": s.label} for s in scores]


class _TeiInfo(BaseModel):
    max_input_length: int | None = None


INFO = TypeAdapter(_TeiInfo)


class Tei(WireProtocol):
    """text-embeddings-inference."""

    name = "tei"
    why_no_multi_label = (
        "text-embeddings-inference takes the softmax over all labels; serve a multi-label "
        "classifier by vLLM, or in the gateway itself"
    )
    limit_path = "/info"
    routes = ("/predict",)
    request_type = TeiRequest

    def error(self, status: int, code: str, detail: str) -> Any:
        """Return the JSON of an error, with TEI's type."""
        return {"error": detail, "error_type": ERROR_TYPES.get(status, "Validation")}

    def path(self, model: str, version: str | None = None) -> str:
        """Return `/predict`."""
        return "/predict"

    def max_length(self, body: bytes, model: str) -> int | None:
        """Return the limit that `/info` tells."""
        return parsed(INFO, body).max_input_length

    def build_request(self, texts: Sequence[str], model_info: ModelInfo) -> InferenceRequest:
        """Return a request for all scores; always a batch, since a flat list could be a pair."""
        return TeiRequest(inputs=[[text] for text in texts], truncate=True)

    def scores(
        self, body: bytes, count: int, labels: Sequence[str], *, multi_label: bool = False
    ) -> list[list[Score]]:
        """Return the predictions of each text; a flat list holds those of a single text."""
        return checked_count(predictions(body), count)
