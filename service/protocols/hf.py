"""Hugging Face Inference: `POST /` of an endpoint, or `POST /models/NAME`."""

from collections.abc import Sequence
from math import isclose
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, TypeAdapter

from service.protocols.base import (
    BadAnswer,
    Finite,
    InferenceRequest,
    ModelInfo,
    Wire,
    WireProtocol,
    checked_count,
    harmless_cut,
    parsed,
)
from service.schemas import Batch, Count, Result, Score, Text, best_first

SUM_TOLERANCE = 1e-4
"""Tolerance for a sum of float32 probabilities."""


class HfParameters(Wire):
    """Parameters of the pipeline: numbers and switches, nothing that could be a text."""

    top_k: Count | None = None
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    truncation: bool | None = None
    max_length: Annotated[None, harmless_cut()] = None


class HfOptions(Wire):
    """Options of older clients about caching and cold starts."""

    use_cache: bool | None = None
    wait_for_model: bool | None = None
    use_gpu: bool | None = None


class HfRequest(InferenceRequest):
    """One text, or a batch of them."""

    inputs: Text | Batch
    parameters: HfParameters | None = None
    options: HfOptions | None = None

    @property
    def texts(self) -> list[str]:
        """The texts, in a list even if there is one."""
        return [self.inputs] if isinstance(self.inputs, str) else self.inputs

    @property
    def limit(self) -> int | None:
        """`top_k`."""
        return self.parameters.top_k if self.parameters else None

    def unsupported_option(self, model_info: ModelInfo) -> str | None:
        """Return the option for scores other than the model's own: only the pipeline has them."""
        function = self.parameters and self.parameters.function_to_apply
        own = "sigmoid" if model_info.multi_label else "softmax"
        return None if function in (None, own) else "function_to_apply"

    @property
    def may_be_pair(self) -> bool:
        """Whether TEI, which serves classifiers at `/` too, would read a pair."""
        return isinstance(self.inputs, list) and len(self.inputs) == 2

    def with_texts(self, texts: Sequence[str]) -> Self:
        """Return the same request for other texts."""
        single = isinstance(self.inputs, str)
        return self.model_copy(update={"inputs": texts[0] if single else list(texts)})

    def to_response(self, results: Sequence[Result], model_info: ModelInfo) -> Any:
        """Return a list per text, best label first; the list of a rejected text is empty."""
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
    """Return an answer's predictions per text, best label first.

    A flat list holds the predictions of one text, or the best one of each text if `flat_is_batch`.

    Raises:
        BadAnswer: a text has no prediction.
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
    """Hugging Face Inference."""

    name = "hf"
    routes = ("/", "/models/{model:path}")
    request_type = HfRequest

    def error(self, status: int, code: str, detail: str) -> Any:
        """Return the JSON of an error."""
        return {"error": detail}

    def path(self, model: str, version: str | None = None) -> str:
        """Return the empty path: the base URL is already that of the endpoint, or of the model."""
        return ""

    def build_request(self, texts: Sequence[str], model_info: ModelInfo) -> InferenceRequest:
        """Return a request for all scores of some texts."""
        return HfRequest(inputs=list(texts), parameters=HfParameters(top_k=len(model_info.labels)))

    def scores(
        self, body: bytes, count: int, labels: Sequence[str], *, multi_label: bool = False
    ) -> list[list[Score]]:
        """Return the predictions of each text: nested, or flat as pipelines give them."""
        rows = checked_count(predictions(body, flat_is_batch=count > 1), count)
        if count > 1 and _may_be_one_text(rows, multi_label):
            raise BadAnswer(
                "what may be one answer to a pair of texts; "
                "for text-embeddings-inference set PSIM_UPSTREAM_PROTOCOL=tei"
            )
        return rows


def _may_be_one_text(rows: Sequence[Sequence[Score]], multi_label: bool) -> bool:
    """Return whether single predictions of several texts may be all those of one text.

    Those of one text sum to 1, unless they are of a multi-label classifier.
    """
    flat = [score for row in rows for score in row]
    labels = {score.label for score in flat}
    return len(rows) == len(flat) == len(labels) and (
        multi_label or isclose(sum(score.score for score in flat), 1, abs_tol=SUM_TOLERANCE)
    )
