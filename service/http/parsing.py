"""Strict reading of JSON bodies: a body that servers could read in two ways is refused."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from service.errors import ClientError, Invalid, Malformed, TooLarge, UnsupportedMedia
from service.protocols.base import ClientProtocol, InferenceRequest
from service.protocols.tensors import with_binary
from service.schemas import TextsRequest
from service.settings import RequestLimits

Model = TypeVar("Model", bound=TextsRequest)
BINARY_TENSORS = "inference-header-content-length"
DIGITS = re.compile(r"[0-9]{1,12}")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read(request: Request, model: type[Model], settings: RequestLimits) -> Model:
    """Return the request's body as `model`.

    Raises:
        UnsupportedMedia, TooLarge, Malformed, Invalid: the message does not quote the body.
    """
    _, data = await read_json(request, settings)
    return parse(data, model, settings)


async def read_inference(
    request: Request, protocols: Sequence[ClientProtocol], settings: RequestLimits
) -> tuple[ClientProtocol, InferenceRequest, bytes, Mapping[int, ClientError]]:
    """Return a body's protocol, of those that share a route, the parsed body, and its bytes.

    Last come texts that cannot be read, by their numbers: the caller must not let them pass.
    Errors from here on are answered in that protocol.

    Raises:
        UnsupportedMedia, TooLarge, Malformed, Invalid: the message does not quote the body.
    """
    request.state.protocol = protocols[0]
    if protocols[0].binary_tensors and BINARY_TENSORS in request.headers:
        body, data = await _read_binary(request, settings)
    else:
        optional = protocols[0].media_optional
        body, data = await read_json(request, settings, media_optional=optional)
    protocol = request.state.protocol = choose(protocols, data)
    parsed = valid(data, protocol.request_type)
    return protocol, parsed, body, _unreadable(parsed.texts, settings)


def choose(protocols: Sequence[ClientProtocol], data: object) -> ClientProtocol:
    """Return the protocol that a body is written in; the first one is the default."""
    return next((p for p in reversed(protocols) if p.claims(data)), protocols[0])


async def read_json(
    request: Request, settings: RequestLimits, media_optional: bool = False
) -> tuple[bytes, object]:
    """Return the request's body, as bytes and as JSON.

    Raises:
        UnsupportedMedia, TooLarge, Malformed, Invalid: the message does not quote the body.
    """
    _check_media(request, media_optional)
    body = await _limited_body(request, settings.max_body_bytes)
    return body, _parse(body)


async def _read_binary(request: Request, settings: RequestLimits) -> tuple[bytes, object]:
    """Return a body with tensors after its JSON as a body that has them in it, and as JSON.

    Raises:
        UnsupportedMedia, TooLarge, Malformed, Invalid: the message does not quote the body.
    """
    _check_media(request, optional=True, binary=True)
    length, *more = request.headers.getlist(BINARY_TENSORS)
    body = await _limited_body(request, settings.max_body_bytes)
    if more or not DIGITS.fullmatch(length) or int(length) > len(body):
        raise Malformed(f"the header {BINARY_TENSORS} must be the length of the JSON in the body")
    try:
        data = with_binary(_parse(body[: int(length)]), body[int(length) :])
    except ValueError as error:
        raise Invalid(str(error)) from None
    return json.dumps(data, ensure_ascii=False).encode(), data


def parse(data: object, model: type[Model], settings: RequestLimits) -> Model:
    """Return JSON as `model`.

    Raises:
        TooLarge, Invalid: the message does not quote the JSON.
    """
    parsed = valid(data, model)
    require_readable(_unreadable(parsed.texts, settings))
    return parsed


def require_readable(unreadable: Mapping[int, ClientError]) -> None:
    """Raise the error of the first text that cannot be read, if there is one."""
    for error in unreadable.values():
        raise error


def _check_media(request: Request, optional: bool, binary: bool = False) -> None:
    for name in ("content-type", "content-encoding"):
        if len(request.headers.getlist(name)) > 1:
            raise UnsupportedMedia(f"the header {name} must not be there twice")
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    media = kind.strip().lower()
    known = media == "application/json" or (binary and media == "application/octet-stream")
    if not known and (kind or not optional):
        raise UnsupportedMedia("the content type must be application/json")
    if parameters.strip().lower().replace('"', "") not in ("", "charset=utf-8"):
        raise UnsupportedMedia("the only charset is utf-8")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMedia("the body must not be compressed")
    if BINARY_TENSORS in request.headers and not binary:
        raise UnsupportedMedia("no tensors may stand after the JSON here")


async def _limited_body(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise TooLarge(f"the body is over {limit} bytes")
    return bytes(body)


def _parse(body: bytes) -> object:
    try:
        data = json.loads(
            body.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
        if SURROGATE.search(body):
            json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # Half a character: no tokenizer can read it, and no answer could repeat it.
        raise Invalid("escapes from \\ud800 to \\udfff must be in pairs") from None
    except (ValueError, RecursionError):
        raise Malformed("the body is not valid JSON, or has a key twice") from None
    return data


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        # Parsers differ in which of the two they take, so a text could hide behind the other.
        raise ValueError("duplicate key")
    return result


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def valid(data: object, model: type[Model]) -> Model:
    """Return JSON as `model`, whatever the sizes of its texts.

    Raises:
        Invalid: the message does not quote the JSON.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise Invalid(_describe(error, model)) from None


def _describe(error: ValidationError, model: type[TextsRequest]) -> str:
    """Return the place and kind of the error that is deepest in the body.

    Of a text or a list of texts, each reading has its own errors: those of the right one are
    deeper. Keys that the caller chose are left out.
    """
    found = error.errors(include_input=False, include_url=False, include_context=False)
    worst = max(found, key=lambda one: sum(isinstance(place, int) for place in one["loc"]))
    unknown = worst["type"] == "extra_forbidden"
    if unknown and len(worst["loc"]) == 1:
        fields = ", ".join(field.alias or name for name, field in model.model_fields.items())
        return f"unknown field; there are: {fields}"
    known, path = {*_field_names(model)}, worst["loc"][: -1 if unknown else None]
    where = [str(place) for place in path if isinstance(place, int) or place in known]
    return f"{'.'.join(where) or 'the body'}: {worst['msg']}"


def _field_names(kind: Any) -> Iterator[str]:
    """Yield the names of all fields of a type, at any depth."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            yield field.alias or name
            yield from _field_names(field.annotation)
    else:
        for inner in get_args(kind):
            yield from _field_names(inner)


def _unreadable(texts: Sequence[str], settings: RequestLimits) -> dict[int, ClientError]:
    """Return what is wrong with each text that cannot be read, by its number.

    Raises:
        TooLarge: there are too many texts.
    """
    if len(texts) > settings.max_inputs:
        raise TooLarge(f"{len(texts)} inputs are over the limit of {settings.max_inputs}")
    found: dict[int, ClientError] = {}
    for number, text in enumerate(texts):
        place = f"input {number} of {len(texts)} (from 0)"
        if not text.strip():
            found[number] = Invalid(f"{place}: the text is empty")
        elif len(text) > settings.max_chars:
            found[number] = TooLarge(
                f"{place}: {len(text)} characters are over the limit of {settings.max_chars}"
            )
    return found
