"""vLLM and SGLang: `POST /classify` and `POST /v1/classify`."""

import time
import uuid
from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, TypeAdapter, model_validator

from service.protocols.base import (
    BadAnswer,
    Finite,
    InferenceRequest,
    ModelInfo,
    WireProtocol,
    checked_count,
    harmless_cut,
    parsed,
)
from service.schemas import Batch, Result, Score, Text, best_first


class VllmRequest(InferenceRequest):
    """One text or several; token ids and chats are refused, since the screen cannot read them."""

    model: str | None = None
    input: Text | Batch
    user: str | None = None
    request_id: str | None = None
    rid: str | None = None
    priority: int | None = None
    truncate_prompt_tokens: Annotated[Literal[-1] | None, harmless_cut(-1)] = None
    """-1 cuts at the limit of the model, on a side that depends on the version of vLLM."""
    truncation_side: Annotated[Literal["right"] | None, harmless_cut("right")] = None
    add_special_tokens: Literal[True] | None = None
    """Without special tokens, the classifier would read a different text from the screen."""
    use_activation: bool | None = None
    softmax: Literal[True] | None = None
    activation: Literal[True] | None = None
    """Older names of `use_activation`."""
    mm_processor_kwargs: None = None
    cache_salt: None = None
    """Null, as clients send them that write out every default."""

    @model_validator(mode="after")
    def _cut_on_the_right(self) -> Self:
        if self.truncate_prompt_tokens and self.truncation_side is None:
            raise ValueError(
                "truncate_prompt_tokens may cut on the left; leave it out, or add "
                "truncation_side: right"
            )
        return self

    @property
    def texts(self) -> list[str]:
        """The texts, in a list even if there is one."""
        return [self.input] if isinstance(self.input, str) else self.input

    @property
    def model_name(self) -> str | None:
        """The model that the body names; None if it names none."""
        return self.model

    def unsupported_option(self, model_info: ModelInfo) -> str | None:
        """Return the option for logits, or for truncation: only vLLM and SGLang have them."""
        if self.use_activation is False:
            return "use_activation"
        return "truncate_prompt_tokens" if self.truncate_prompt_tokens else None

    def with_texts(self, texts: Sequence[str]) -> Self:
        """Return the same request for other texts."""
        single = isinstance(self.input, str)
        return self.model_copy(update={"input": texts[0] if single else list(texts)})

    def to_response(self, results: Sequence[Result], model_info: ModelInfo) -> Any:
        """Return probabilities in the order of the classes; a rejected text has no label."""
        return {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),  # noqa: TID251 - a date for the client
            "model": model_info.model,
            "data": [_data(i, result, model_info.labels) for i, result in enumerate(results)],
            "usage": {"prompt_tokens": 0, "total_tokens": 0, "completion_tokens": 0},
        }


def _data(index: int, result: Result, labels: Sequence[str]) -> dict[str, Any]:
    scores = {s.label: s.score for s in result.scores or []}
    probs = [scores[label] for label in labels if label in scores]
    return {"index": index, "label": result.label, "probs": probs, "num_classes": len(probs)}


class _Datum(BaseModel):
    index: int
    label: str | None
    probs: Annotated[list[Finite], Field(min_length=1)]


class _VllmResponse(BaseModel):
    data: list[_Datum]


class _Model(BaseModel):
    id: str
    max_model_len: int | None = None


class _Models(BaseModel):
    data: list[_Model]


ANSWER = TypeAdapter(_VllmResponse)
MODELS = TypeAdapter(_Models)


class Vllm(WireProtocol):
    """vLLM."""

    name = "vllm"
    limit_path: ClassVar[str | None] = "/v1/models"
    routes = ("/classify", "/v1/classify")
    request_type = VllmRequest
    requires_all_scores = True

    def claims(self, data: object) -> bool:
        """Return whether a body has vLLM's `input`, and not the native `inputs`."""
        return isinstance(data, dict) and "input" in data and "inputs" not in data

    def error(self, status: int, code: str, detail: str) -> Any:
        """Return the JSON of an error in OpenAI's format."""
        kind = HTTPStatus(status).phrase.replace(" ", "") + "Error"
        return {"error": {"message": detail, "type": kind, "param": None, "code": status}}

    def path(self, model: str, version: str | None = None) -> str:
        """Return `/classify`."""
        return "/classify"

    def max_length(self, body: bytes, model: str) -> int | None:
        """Return the limit of the model that the gateway names in its requests."""
        limits = (one.max_model_len for one in parsed(MODELS, body).data if one.id == model)
        return next(limits, None)

    def build_request(self, texts: Sequence[str], model_info: ModelInfo) -> InferenceRequest:
        """Return a request for all scores of some texts."""
        return VllmRequest(model=model_info.model, input=list(texts))

    def scores(
        self, body: bytes, count: int, labels: Sequence[str], *, multi_label: bool = False
    ) -> list[list[Score]]:
        """Return the probabilities of each text, which are in the order of the classes."""
        data = sorted(checked_count(parsed(ANSWER, body).data, count), key=lambda d: d.index)
        if [datum.index for datum in data] != list(range(count)):
            raise BadAnswer("indices that are not those of the inputs")
        return [_by_label(datum.probs, labels) for datum in data]

    def check(self, body: bytes, count: int) -> None:
        """Raise `BadAnswer` unless the answer has finite numbers for each of `count` texts."""
        most = max((len(d.probs) for d in parsed(ANSWER, body).data), default=0)
        self.scores(body, count, [""] * most)


class Sglang(Vllm):
    """SGLang: vLLM's format at another path."""

    name = "sglang"
    limit_path = None  # it refuses longer texts, or cuts off the special token behind them too

    def path(self, model: str, version: str | None = None) -> str:
        """Return `/v1/classify`."""
        return "/v1/classify"


def _by_label(probs: Sequence[float], labels: Sequence[str]) -> list[Score]:
    if len(probs) != len(labels):
        raise BadAnswer(f"{len(probs)} classes, but the bundle knows {len(labels)}")
    return best_first(zip(labels, probs, strict=True))
