"""Fuzz what reads requests, and upstreams' answers, in every protocol, guided by coverage.

Tensors after the JSON and messages of gRPC are among them, and the proxies' questions.

A body is refused with one of four errors, none of which repeats it, or read: then what is screened
is what an upstream would get. An upstream's answer is believed, or is a `BadAnswer`.

    pip install atheris==3.0.0
    python fuzz/fuzz_requests.py CORPUS -max_total_time=600

CORPUS is a folder, in which requests that find something new are kept; it may be empty.
"""

import json
import math
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import atheris
from mutation import mutate

with atheris.instrument_imports(
    include=[
        "service.http.parsing",
        "service.protocols",
        "service.schemas",
        "service.grpc.messages",
    ]
):
    from service.grpc.messages import infer_response, request_json
    from service.http.parsing import choose, parse, read_inference, read_json
    from service.protocols.base import BadAnswer, ModelInfo, WireProtocol
    from service.protocols.guardrails.dialects import GUARDRAILS
    from service.protocols.oip import OipRequest, OpenInference
    from service.protocols.openai import ModerationRequest
    from service.protocols.registry import SERVED, protocols
    from service.schemas import ExplainRequest, Result, ScreenRequest, TextsRequest

from google.protobuf.message import DecodeError
from starlette.requests import Request
from tritonclient.grpc import service_pb2

from service.errors import Invalid, Malformed, ServiceError, TooLarge, UnsupportedMedia
from service.settings import Settings

SETTINGS = Settings(bundle=Path("unused"), max_chars=200, max_inputs=8, max_body_bytes=4096)
LABELS = ["negative", "positive"]
WORLD = ModelInfo("m", "d" * 64, LABELS)
UPSTREAMS = [*protocols().values()]
MEDIA = (b"application/json", b"application/json; charset=utf-8", b"text/plain", b"")
ASKED = [*dict.fromkeys(guardrail.request_type for guardrail in GUARDRAILS)]
OURS: list[type[TextsRequest]] = [ScreenRequest, ExplainRequest, ModerationRequest, *ASKED]
SECRET = "hunter2"


def fuzz(data: bytes) -> None:
    """Take the first byte for what is read, and the others for its content."""
    if len(data) < 2:
        return
    kind, body = data[0], data[1:]
    if kind < 112:
        request(kind, body)
    elif kind < 120:
        binary(body[0], body[1:])
    elif kind < 128:
        message(body)
    else:
        answer(UPSTREAMS[kind % len(UPSTREAMS)], kind // 64 - 1, body)


def request(kind: int, body: bytes) -> None:
    protocol = SERVED[kind // 4 % len(SERVED)]
    try:
        media = [(b"content-type", MEDIA[kind % 4])]
        given = Request({"type": "http", "headers": media}, received(body))
        _, read = done(read_json(given, SETTINGS, media_optional=protocol.media_optional))
        for model in OURS:
            try:
                checked(parse(read, model, SETTINGS))
            except ServiceError as error:
                refused(error)
        asked = parse(read, choose([protocol], read).request_type, SETTINGS)
    except ServiceError as error:
        refused(error)
        return
    checked(asked)
    assert asked.with_texts(asked.texts).texts == asked.texts
    sent = json.loads(asked.model_dump_json(exclude_none=True))
    assert parse(sent, protocol.request_type, SETTINGS).texts == asked.texts, (
        "an upstream reads others"
    )
    scores = [{"label": label, "score": 0.5} for label in LABELS]
    one = {"decision": "allow", "screen": None, "label": LABELS[0], "scores": scores}
    results = [Result.model_validate(one) for _ in asked.texts]
    json.dumps(asked.to_response(results, WORLD), allow_nan=False).encode()


def binary(length: int, body: bytes) -> None:
    """Read a body of Open Inference with tensors after as many bytes of JSON."""
    headers = [(b"inference-header-content-length", str(length).encode())]
    given = Request({"type": "http", "headers": headers, "state": {}}, received(body))
    try:
        _, asked, sent, unreadable = done(read_inference(given, [OpenInference()], SETTINGS))
    except ServiceError as error:
        refused(error)
        return
    assert OipRequest.model_validate_json(sent).texts == asked.texts, "an upstream reads others"
    for number, text in enumerate(asked.texts):
        assert number in unreadable or text.strip()


def message(body: bytes) -> None:
    """Read a message of gRPC; an answer fits into one, or is a `BadAnswer`."""
    try:
        given = service_pb2.ModelInferRequest.FromString(body)
    except DecodeError:
        given = None
    if given:
        try:
            json.loads(request_json(given))
        except ValueError as error:
            assert SECRET not in str(error)
    for raw in (False, True):
        try:
            infer_response(body, "m", "", raw).SerializeToString()
        except BadAnswer as error:
            assert SECRET not in str(error)


def checked(asked: TextsRequest) -> None:
    for text in asked.texts:
        assert text.strip() and len(text) <= SETTINGS.max_chars
        text.encode()


def refused(error: ServiceError) -> None:
    assert isinstance(error, Malformed | Invalid | TooLarge | UnsupportedMedia), type(error)
    assert SECRET not in str(error), "an error repeats the text"


def answer(protocol: WireProtocol, count: int, body: bytes) -> None:
    try:
        protocol.check(body, count)
        rows = protocol.scores(body, count, LABELS)
    except BadAnswer as error:
        assert SECRET not in str(error)
        return
    assert len(rows) == count
    assert all(math.isfinite(score.score) for row in rows for score in row)


def received(body: bytes) -> Any:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def done(work: Coroutine[Any, Any, Any]) -> Any:
    """Return what a coroutine gives that never waits."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


if __name__ == "__main__":
    atheris.Setup(sys.argv, fuzz, custom_mutator=mutate)
    atheris.Fuzz()
