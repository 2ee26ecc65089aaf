"""Open Inference Protocol v2 (KServe, MLServer, Triton): `POST /v2/models/NAME/infer`.

Texts are the one input, of type BYTES. What would let a server read them otherwise than the screen
does is refused: tensors behind the JSON, base64, further inputs.
"""

import math
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from service.protocols.base import (
    BadAnswer,
    Finite,
    InferenceRequest,
    ModelInfo,
    Wire,
    WireProtocol,
    parsed,
)
from service.schemas import Result, Score, Text, best_first

LABEL, SCORES = "label", "scores"
"""Our outputs: the best class, shape [n], and all probabilities, shape [n, C]."""
CLOSE = 1e-2
"""How far from 1 the probabilities of a text may sum up to: some servers round them to float16."""


class Codec(Wire):
    """How a tensor is encoded, where servers offer a choice; only as plain strings, here."""

    content_type: Literal["str"] | None = None
    binary_data: Literal[False] | None = None


class InputTensor(Wire):
    """The texts; `[[text], ...]` is the same as `[text, ...]`."""

    name: str
    shape: Annotated[list[Annotated[int, Field(strict=True, ge=1)]], Field(min_length=1)]
    datatype: Literal["BYTES"]
    data: Annotated[list[Text | list[Text]], Field(min_length=1, fail_fast=True)]
    parameters: Codec | None = None

    @model_validator(mode="after")
    def _one_text_a_row(self) -> Self:
        rows = [row if isinstance(row, list) else [row] for row in self.data]
        if self.shape not in ([len(rows)], [len(rows), 1]) or any(len(row) != 1 for row in rows):
            raise ValueError("the shape must be [n] or [n, 1], and data must hold n texts")
        return self

    @property
    def texts(self) -> list[str]:
        """The texts, flat."""
        return [row if isinstance(row, str) else row[0] for row in self.data]

    def with_texts(self, texts: Sequence[str]) -> Self:
        """Return the same tensor for other texts."""
        shape = [len(texts), *self.shape[1:]]
        return self.model_copy(update={"shape": shape, "data": list(texts)})


class OutputParameters(Wire):
    """How an output is wanted; a binary one is answered in JSON, which every client reads."""

    binary_data: bool | None = None
    content_type: Literal["str"] | None = None


class WantedOutput(Wire):
    """An output to return."""

    name: str
    parameters: OutputParameters | None = None


class RequestParameters(Wire):
    """What may be said of the whole request."""

    content_type: Literal["str"] | None = None
    binary_data_output: bool | None = None


class Infer(InferenceRequest):
    """Texts as a tensor."""

    model_config = ConfigDict(serialize_by_alias=True)

    id: str | None = None
    named: str | None = Field(None, alias="model_name")
    """The model, which KServe's client says here too."""
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1)]
    outputs: list[WantedOutput] | None = None
    parameters: RequestParameters | None = None

    @property
    def texts(self) -> list[str]:
        """The texts of the one input."""
        return self.inputs[0].texts

    @property
    def model_name(self) -> str | None:
        """The model that the body names, if it does."""
        return self.named

    @property
    def forward_as_is(self) -> bool:
        """Outputs in binary form could not be checked, so we ask for JSON in the client's name."""
        wanted = [out.parameters for out in self.outputs or []]
        binary = any(p is not None and p.binary_data for p in wanted)
        return not binary and not (self.parameters and self.parameters.binary_data_output)

    def with_texts(self, texts: Sequence[str]) -> Self:
        """Return the same request for other texts, and for JSON."""
        outputs = self.outputs and [
            WantedOutput(name=out.name, parameters=out.parameters and _json(out.parameters))
            for out in self.outputs
        ]
        parameters = self.parameters and RequestParameters(
            content_type=self.parameters.content_type,
            binary_data_output=None if self.parameters.binary_data_output is None else False,
        )
        inputs = [self.inputs[0].with_texts(texts)]
        changes = {"inputs": inputs, "outputs": outputs, "parameters": parameters}
        return self.model_copy(update=changes)

    def to_response(self, results: Sequence[Result], served: ModelInfo) -> Any:
        """Return label and probabilities of every text, or the outputs that are wanted of these."""
        best = [result.label for result in results]
        rows = [{s.label: s.score for s in result.scores or []} for result in results]
        outputs = [
            _tensor(LABEL, [len(best)], "BYTES", best),
            _tensor(
                SCORES,
                [len(rows), len(served.labels)],
                "FP32",
                [row[label] for row in rows for label in served.labels],
            ),
        ]
        wanted = {out.name for out in self.outputs or []}
        outputs = [out for out in outputs if not wanted or out["name"] in wanted]
        answer = {"model_name": served.model, "outputs": outputs}
        return answer if self.id is None else answer | {"id": self.id}


def _json(parameters: OutputParameters) -> OutputParameters:
    asked = None if parameters.binary_data is None else False
    return parameters.model_copy(update={"binary_data": asked})


def _tensor(name: str, shape: list[int], datatype: str, data: list[Any]) -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


def metadata(served: ModelInfo) -> dict[str, Any]:
    """Return what clients are told of a model before they ask it."""
    text = {"name": "text", "datatype": "BYTES", "shape": [-1]}
    label = {"name": LABEL, "datatype": "BYTES", "shape": [-1]}
    scores = {"name": SCORES, "datatype": "FP32", "shape": [-1, len(served.labels)]}
    return {
        "name": served.model,
        "versions": [],
        "platform": "psim",
        "inputs": [text],
        "outputs": [label, scores],
    }


class _Output(BaseModel):
    name: str
    shape: Annotated[list[int], Field(min_length=1)]
    datatype: str
    data: list[Any]

    @property
    def values(self) -> list[Any]:
        """The data, flat."""
        flat = self.data
        while any(isinstance(row, list) for row in flat):
            if not all(isinstance(row, list) for row in flat):
                raise BadAnswer("data that is nested unevenly")
            flat = [value for row in flat for value in row]
        return flat


class _OipResponse(BaseModel):
    outputs: Annotated[list[_Output], Field(min_length=1)]


class _OipPrediction(BaseModel):
    """What MLServer's Hugging Face runtime says of a text, JSON in a string."""

    label: str
    score: Finite


ANSWER = TypeAdapter(_OipResponse)
PREDICTIONS: TypeAdapter[_OipPrediction | list[_OipPrediction]] = TypeAdapter(
    _OipPrediction | list[_OipPrediction]
)


class OpenInference(WireProtocol):
    """`POST /v2/models/NAME/infer`; a tensor has no gaps, so one rejected text refuses it all."""

    name = "oip"
    routes = ("/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer")
    request_type = Infer
    supports_partial = False
    requires_all_scores = True
    media_optional = True

    def __init__(self, input_name: str = "text") -> None:
        self._input_name = input_name

    def error(self, status: int, code: str, detail: str) -> Any:
        """Return an error."""
        return {"error": detail}

    def path(self, model: str, version: str | None = None) -> str:
        """Return where a model takes requests."""
        return f"/v2/models/{model}{f'/versions/{version}' if version else ''}/infer"

    def build_request(self, texts: Sequence[str], served: ModelInfo) -> InferenceRequest:
        """Return a request for all outputs, as a column: what most servers that batch expect."""
        tensor = InputTensor(
            name=self._input_name, shape=[len(texts), 1], datatype="BYTES", data=list(texts)
        )
        return Infer(inputs=[tensor])

    def scores(self, body: bytes, count: int, labels: Sequence[str]) -> list[list[Score]]:
        """Return the first output that has probabilities or predictions for each text."""
        outputs = _checked(body, count)
        for output in outputs:
            if output.datatype.startswith("FP") and output.shape == [count, len(labels)]:
                return [_by_label(row, labels) for row in _rows(output.values, count)]
        for output in outputs:
            if output.datatype == "BYTES":
                try:
                    return [_predicted(value) for value in output.values]
                except ValidationError:
                    continue
        wanted = f"floats of shape [{count}, {len(labels)}], or predictions in JSON"
        raise BadAnswer(f"no output has a score for each class: wanted {wanted}")

    def check(self, body: bytes, count: int) -> None:
        """Raise `BadAnswer` unless every output is about all texts, in finite numbers."""
        _checked(body, count)


def _checked(body: bytes, count: int) -> list[_Output]:
    outputs = parsed(ANSWER, body).outputs
    for output in outputs:
        values = output.values
        if output.shape[0] != count or len(values) != math.prod(output.shape):
            raise BadAnswer(f"an output of shape {output.shape} for {count} inputs")
        if output.datatype != "BYTES" and not all(map(_is_finite, values)):
            raise BadAnswer("an output that is not finite numbers")
    return outputs


def _is_finite(value: Any) -> bool:
    # A whole number can be too large to be made a float.
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _rows(values: list[Any], count: int) -> list[list[float]]:
    width = len(values) // count
    return [values[i * width : (i + 1) * width] for i in range(count)]


def _by_label(row: Sequence[float], labels: Sequence[str]) -> list[Score]:
    if min(row) < 0 or abs(sum(row) - 1) > CLOSE:
        raise BadAnswer("floats that are no probabilities; have the model return its softmax")
    return best_first(zip(labels, row, strict=True))


def _predicted(value: Any) -> list[Score]:
    found = PREDICTIONS.validate_json(value) if isinstance(value, str) else None
    rows = found if isinstance(found, list) else [found] if found else []
    if not rows:
        raise BadAnswer("no prediction for an input")
    return best_first((p.label, p.score) for p in rows)
