"""KServe v1, which TensorFlow Serving began: `POST /v1/models/NAME:predict`.

For clients only: servers of this protocol answer with whatever their model returns.
"""

from collections.abc import Sequence
from typing import Any, Self

from service.protocols.base import ClientProtocol, InferenceRequest, ModelInfo
from service.schemas import Batch, Result


class KserveRequest(InferenceRequest):
    """Texts as instances."""

    instances: Batch

    @property
    def texts(self) -> list[str]:
        """The instances."""
        return self.instances

    def with_texts(self, texts: Sequence[str]) -> Self:
        """Return the same request for other texts."""
        return self.model_copy(update={"instances": list(texts)})

    def to_response(self, results: Sequence[Result], model_info: ModelInfo) -> Any:
        """Return the label and all scores of each text; null for a rejected one."""
        return {"predictions": [_prediction(result) for result in results]}


def _prediction(result: Result) -> dict[str, Any] | None:
    if result.scores is None:
        return None
    return {"label": result.label, "scores": {s.label: s.score for s in result.scores}}


class KserveV1(ClientProtocol):
    """KServe v1."""

    name = "kserve"
    routes = ("/v1/models/{model}:predict",)
    request_type = KserveRequest

    def error(self, status: int, code: str, detail: str) -> Any:
        """Return the JSON of an error."""
        return {"error": detail}
