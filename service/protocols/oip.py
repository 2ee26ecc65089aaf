"""Open Inference Protocol v2 (KServe, MLServer, Triton): `POST /v2/models/NAME/infer`.

The texts are the only input, of type BYTES, in the JSON or after it. Anything that a server might
read differently from the screen is refused: base64, further inputs.
"""

import math
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

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
"""Outputs of the gateway: the best class, shape [n], and all probabilities, shape [n, C]."""
SUM_TOLERANCE = 1e-2
"""Tolerance for a sum of probabilities: some servers round them to float16."""


class Codec(Wire):
    """Encoding of a tensor; only plain strings are accepted."""

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
    """Format of an output; a binary one is answered in JSON, which every client reads."""

    binary_data: bool | None = None
    content_type: Literal["str"] | None = None


class RequestedOutput(Wire):
    """An output to return."""

    name: str
    parameters: OutputParameters | None = None


class RequestParameters(Wire):
    """Parameters of the whole request, those of Triton's scheduler among them.

    A sequence of requests is refused: a model that reads it could put a trigger together.
    """

    content_type: Literal["str"] | None = None
    binary_data_output: bool | None = None
    priority: Annotated[int, Field(strict=True, ge=0)] | None = None
    timeout: Annotated[int, Field(strict=True, ge=0)] | None = None
    sequence_id: Literal[0, ""] | None = None
    sequence_start: Literal[False] | None = None
    sequence_end: Literal[False] | None = None


class OipRequest(InferenceRequest):
    """Texts as a tensor."""

    model_config = ConfigDict(serialize_by_alias=True)

    id: str | None = None
    requested_model: str | None = Field(None, alias="model_name")
    """The model, which KServe's client repeats here."""
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1)]
    outputs: list[RequestedOutput] | None = None
    parameters: RequestParameters | None = None

    @property
    def texts(self) -> list[str]:
        """The texts of the one input."""
        return self.inputs[0].texts

    @property
    def model_name(self) -> str | None:
        """The model that the body names; None if it names none."""
        return self.requested_model

    @property
    def forward_as_is(self) -> bool:
        """Whether outputs are requested in JSON: binary ones could not be checked."""
        parameters = [out.parameters for out in self.outputs or []]
        binary = any(p is not None and p.binary_data for p in parameters)
        return not binary and not (self.parameters and self.parameters.binary_data_output)

    def with_texts(self, texts: Sequence[str]) -> Self:
        """Return the same request for other texts, with outputs in JSON."""
        outputs = self.outputs and [
            RequestedOutput(name=out.name, parameters=out.parameters and _json(out.parameters))
            for out in self.outputs
        ]
        parameters = self.parameters
        if parameters and parameters.binary_data_output:
            parameters = parameters.model_copy(update={"binary_data_output": False})
        inputs = [self.inputs[0].with_texts(texts)]
        changes = {"inputs": inputs, "outputs": outputs, "parameters": parameters}
        return self.model_copy(update=changes)

    def to_response(self, results: Sequence[Result], model_info: ModelInfo) -> Any:
        """Return the label and probabilities of every text, or those outputs that are requested."""
        best = [result.label for result in results]
        rows = [{s.label: s.score for s in result.scores or []} for result in results]
        outputs = [
            _tensor(LABEL, [len(best)], "BYTES", best),
            _tensor(
                SCORES,
                [len(rows), len(model_info.labels)],
                "FP32",
                [row[label] for row in rows for label in model_info.labels],
            ),
        ]
        requested = {out.name for out in self.outputs or []}
        outputs = [out for out in outputs if not requested or out["name"] in requested]
        answer = {"model_name": model_info.model, "outputs": outputs}
        return answer if self.id is None else answer | {"id": self.id}


def _json(parameters: OutputParameters) -> OutputParameters:
    binary_data = None if parameters.binary_data is None else False
    return parameters.model_copy(update={"binary_data": binary_data})


def _tensor(name: str, shape: list[int], datatype: str, data: list[Any]) -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


def metadata(model_info: ModelInfo) -> dict[str, Any]:
    """Return the metadata of a model: its inputs and outputs."""
    text = {"name": "text", "datatype": "BYTES", "shape": [-1]}
    label = {"name": LABEL, "datatype": "BYTES", "shape": [-1]}
    scores = {"name": SCORES, "datatype": "FP32", "shape": [-1, len(model_info.labels)]}
    return {
        "name": model_info.model,
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
    """A prediction by MLServer's Hugging Face runtime, as JSON in a string."""

    label: str
    score: Finite


ANSWER = TypeAdapter(_OipResponse)
PREDICTIONS: TypeAdapter[_OipPrediction | list[_OipPrediction]] = TypeAdapter(
    _OipPrediction | list[_OipPrediction]
)


class OpenInference(WireProtocol):
    """Open Inference; a tensor needs a value for every text, so one rejected text refuses all."""

    name = "oip"
    routes = ("/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer")
    request_type = OipRequest
    supports_partial = False
    requires_all_scores = True
    media_optional = True
    binary_tensors = True

    def __init__(self, input_name: str = "text") -> None:
        self._input_name = input_name

    def error(self, status: int, code: str, detail: str) -> Any:
        """Return the JSON of an error."""
        return {"error": detail}

    def path(self, model: str, version: str | None = None) -> str:
        """Return the path at which a model takes requests."""
        return f"/v2/models/{model}{f'/versions/{version}' if version else ''}/infer"

    def build_request(self, texts: Sequence[str], model_info: ModelInfo) -> InferenceRequest:
        """Return a request for all outputs; its tensor is a column, as most servers expect."""
        tensor = InputTensor(
            name=self._input_name, shape=[len(texts), 1], datatype="BYTES", data=list(texts)
        )
        return OipRequest(inputs=[tensor])

    def scores(
        self, body: bytes, count: int, labels: Sequence[str], *, multi_label: bool = False
    ) -> list[list[Score]]:
        """Return the first output that holds probabilities or predictions for each text."""
        outputs = _checked(body, count)
        for output in outputs:
            if output.datatype.startswith("FP") and output.shape == [count, len(labels)]:
                rows = _rows(output.values, count)
                return [_by_label(row, labels, multi_label) for row in rows]
        for output in outputs:
            if output.datatype == "BYTES":
                try:
                    return [_predicted(value) for value in output.values]
                except ValidationError:
                    continue
        wanted = f"floats of shape [{count}, {len(labels)}], or predictions in JSON"
        raise BadAnswer(f"no output has a score for each class: wanted {wanted}")

    def check(self, body: bytes, count: int) -> None:
        """Raise `BadAnswer` unless every output has finite numbers for all texts."""
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
    # An integer can be too large for a float.
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _rows(values: list[Any], count: int) -> list[list[float]]:
    width = len(values) // count
    return [values[i * width : (i + 1) * width] for i in range(count)]


def _by_label(row: Sequence[float], labels: Sequence[str], multi_label: bool) -> list[Score]:
    wrong = max(row) > 1 if multi_label else abs(sum(row) - 1) > SUM_TOLERANCE
    if min(row) < 0 or wrong:
        own = "sigmoids" if multi_label else "softmax"
        raise BadAnswer(f"floats that are no probabilities; have the model return its {own}")
    return best_first(zip(labels, row, strict=True))


def _predicted(value: Any) -> list[Score]:
    found = PREDICTIONS.validate_json(value) if isinstance(value, str) else None
    rows = found if isinstance(found, list) else [found] if found else []
    if not rows:
        raise BadAnswer("no prediction for an input")
    return best_first((p.label, p.score) for p in rows)
