"""The one table of errors, and answers in the protocol in which a request came."""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from starlette.applications import Starlette
from starlette.exceptions import HTTPException

from service.errors import (
    ClassifyFailed,
    Forbidden,
    Invalid,
    Malformed,
    NotAllowed,
    NotInspected,
    NotReady,
    Overloaded,
    RateLimited,
    ScreenFailed,
    ServiceError,
    TimedOut,
    TooLarge,
    Unauthorized,
    UnknownModel,
    UnsupportedMedia,
    UpstreamDown,
    UpstreamFailed,
    UpstreamRefused,
)
from service.protocols.base import WireProtocol
from service.protocols.native import Native

STATUS: dict[type[ServiceError], int] = {
    Malformed: 400,
    Unauthorized: 401,
    Forbidden: 403,
    NotInspected: 403,
    UnknownModel: 404,
    TooLarge: 413,
    UnsupportedMedia: 415,
    Invalid: 422,
    Overloaded: 429,
    RateLimited: 429,
    UpstreamFailed: 502,
    ClassifyFailed: 503,
    NotReady: 503,
    ScreenFailed: 503,
    UpstreamDown: 503,
    TimedOut: 504,
}
PROBLEM_JSON = Native.error_media


def problem(
    status: int, code: str, detail: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an error response (RFC 9457)."""
    return json_response(status, Native().error(status, code, detail), headers, PROBLEM_JSON)


def json_response(
    status: int,
    content: Any,
    headers: Mapping[str, str] | None = None,
    media: str = "application/json",
) -> Response:
    """Return JSON; NaN in it is a bug."""
    body = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(body, status, headers, media)


def internal_error() -> Response:
    """Return the answer to a request on which the service has a bug."""
    return problem(500, "internal", "an internal error; the log has it under the request id")


def error_response(error: ServiceError, protocol: WireProtocol) -> Response:
    """Return an expected error as a protocol puts it."""
    if isinstance(error, UpstreamRefused):
        return relayed(error.status, error.headers, error.body)
    headers = {}
    if isinstance(error, Overloaded | RateLimited | UpstreamDown):
        headers["retry-after"] = str(error.retry_after_s)
    if isinstance(error, NotAllowed):
        headers["www-authenticate"] = error.challenge
    status = STATUS[type(error)]
    content = protocol.error(status, error.code, str(error))
    return json_response(status, content, headers, protocol.error_media)


def relayed(status: int, headers: Sequence[tuple[str, str]], body: bytes) -> Response:
    """Return what an upstream said."""
    response = Response(body, status)
    pairs = [(k.encode(), v.encode(errors="surrogateescape")) for k, v in headers]
    response.raw_headers[:0] = pairs
    return response


def install_error_handlers(app: Starlette) -> None:
    """Answer every expected error, unknown paths included, in the protocol of the route."""

    async def on_service_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)  # noqa: S101 - registered for it
        return error_response(error, getattr(request.state, "protocol", Native()))

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        headers = dict(error.headers) if error.headers else None
        return problem(error.status_code, code, str(error.detail), headers)

    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(HTTPException, on_http_error)
