"""Messages of Open Inference's gRPC, and the JSON that says the same.

The messages are tritonclient's, which were generated from the protocol.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from service.protocols.base import BadAnswer, parsed
from service.protocols.oip import ANSWER
from service.protocols.tensors import LENGTH_BYTES, text_of, texts_of

CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""The field of a tensor's contents, by its type; FP16 has none, so it is always raw."""
DTYPES = {name: name.lower().replace("fp", "float") for name in (*CONTENTS, "FP16")}
"""numpy's names of the types, beside BYTES."""


def request_json(request: Any) -> bytes:
    """Return the body of the HTTP request that says the same as a `ModelInferRequest`.

    Raises:
        ValueError: texts could be read in two ways, or are not UTF-8; no text is quoted.
    """
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise ValueError(f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs")
    inputs = [_input(tensor, raw[n] if raw else None) for n, tensor in enumerate(request.inputs)]
    body: dict[str, Any] = {"inputs": inputs}
    if request.id:
        body["id"] = request.id
    if request.parameters:
        body["parameters"] = _parameters(request.parameters)
    if request.outputs:
        body["outputs"] = [
            {"name": out.name, "parameters": _parameters(out.parameters)} for out in request.outputs
        ]
    return json.dumps(body, ensure_ascii=False).encode()


def infer_response(body: bytes, model: str, version: str, as_raw: bool) -> Any:
    """Return the `ModelInferResponse` that says the same as an answer over HTTP.

    Args:
        body: the answer.
        model: name that the request has for it.
        version: the same; empty if it has none.
        as_raw: whether tensors are to be raw, as those of the request were.

    Raises:
        BadAnswer: it does not fit into a message.
    """
    outputs = parsed(ANSWER, body).outputs
    given = json.loads(body).get("id")
    response = pb.ModelInferResponse(model_name=model, model_version=version)
    if isinstance(given, str):
        response.id = given
    as_raw = as_raw or any(output.datatype not in CONTENTS for output in outputs)
    for output in outputs:
        tensor = response.outputs.add(
            name=output.name, datatype=output.datatype, shape=output.shape
        )
        try:
            if as_raw:
                response.raw_output_contents.append(_raw(output.datatype, output.values))
            else:
                _fill(tensor.contents, output.datatype, output.values)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise BadAnswer("an output that is not of its own datatype") from None
    return response


def model_metadata(found: Mapping[str, Any]) -> Any:
    """Return metadata of a model as a message.

    Raises:
        BadAnswer: it does not fit into one.
    """
    try:
        return pb.ModelMetadataResponse(
            name=found["name"],
            versions=found.get("versions") or [],
            platform=found.get("platform") or "",
            **{kind: [_described(one) for one in found[kind]] for kind in ("inputs", "outputs")},
        )
    except (KeyError, TypeError, ValueError):
        raise BadAnswer("metadata of a model that is of another form") from None


def _described(tensor: Mapping[str, Any]) -> Any:
    named = {key: tensor[key] for key in ("name", "datatype", "shape")}
    return pb.ModelMetadataResponse.TensorMetadata(**named)


def server_metadata(found: Mapping[str, Any]) -> Any:
    """Return metadata of a server as a message.

    Raises:
        BadAnswer: it does not fit into one.
    """
    try:
        return pb.ServerMetadataResponse(
            name=found["name"],
            version=found["version"],
            extensions=found.get("extensions") or [],
        )
    except (KeyError, TypeError):
        raise BadAnswer("metadata of a server that is of another form") from None


def _input(tensor: Any, raw: bytes | None) -> dict[str, Any]:
    held = [field.name for field, _ in tensor.contents.ListFields()]
    if raw is not None and held:
        raise ValueError("an input has both contents and raw_input_contents")
    if set(held) - {"bytes_contents"}:
        raise ValueError("inputs must be texts, in bytes_contents or in raw_input_contents")
    if raw is None:
        data = [text_of(one, n) for n, one in enumerate(tensor.contents.bytes_contents)]
    else:
        data = texts_of(raw)
    found = {
        "name": tensor.name,
        "datatype": tensor.datatype,
        "shape": [*tensor.shape],
        "data": data,
    }
    return found | ({"parameters": _parameters(tensor.parameters)} if tensor.parameters else {})


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, parameter in given.items():
        kind = parameter.WhichOneof("parameter_choice")
        found[name] = getattr(parameter, kind) if kind else None
    return found


def _raw(datatype: str, values: list[Any]) -> bytes:
    if datatype != "BYTES":
        found = _numbers(datatype, values)
        return bytes(found.astype(found.dtype.newbyteorder("<")).tobytes())
    texts = [_bytes(value) for value in values]
    return b"".join(len(text).to_bytes(LENGTH_BYTES, "little") + text for text in texts)


def _fill(contents: Any, datatype: str, values: list[Any]) -> None:
    if datatype == "BYTES":
        found = [_bytes(value) for value in values]
    else:
        found = _numbers(datatype, values).tolist()
    getattr(contents, CONTENTS[datatype]).extend(found)


def _numbers(datatype: str, values: list[Any]) -> Any:
    """Return an array of its type; an error if a number does not fit into that."""
    return np.array(values, np.dtype(DTYPES[datatype]))


def _bytes(value: Any) -> bytes:
    if not isinstance(value, str):
        raise TypeError
    return value.encode()
