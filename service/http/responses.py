"""Responses, and errors in the protocol of the request."""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from models.detection.screen import worst_finding
from service.errors import NotReady, ServiceError, UpstreamRefused
from service.http.middleware import RequestId
from service.pipeline.policy import reason_for
from service.pipeline.request_record import RequestRecord
from service.protocols.base import ClientProtocol
from service.protocols.native import Native
from service.route_table import protocol_of_unknown, route_of
from service.schemas import Decision, worst

PROBLEM_JSON = Native.error_media
VERDICT_HEADERS = ("x-psim-decision", "x-psim-finding")


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
    """Return JSON.

    Raises:
        ValueError: the content holds NaN or an infinity, which is a bug.
    """
    body = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(body, status, headers, media)


async def _internal_error(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request on which the service has a bug."""
    detail = "an internal error; the log has it under the request id"
    response = _error(500, "internal", detail, None, protocol_of(Request(scope)))
    await response(scope, receive, send)


async def _cut_off(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request that ran for longer than a server that ends may wait."""
    error = NotReady("the server is ending; send the request again")
    await error_response(error, protocol_of(Request(scope)))(scope, receive, send)


def server_timing(stages: Mapping[str, float]) -> str:
    """Return seconds by stage as a header (W3C Server Timing)."""
    return ", ".join(f"{stage};dur={1000 * s:.2f}" for stage, s in stages.items())


def verdict_headers(record: RequestRecord) -> dict[str, str]:
    """Return the most severe decision and the worst finding of a request, as headers.

    Both are always there, so that they replace whatever a caller has sent under their names.
    """
    finding = worst_finding(verdict.finding for verdict in record.known_verdicts)
    return {"x-psim-decision": worst(record.decisions), "x-psim-finding": finding or "none"}


def rejected_reason(record: RequestRecord) -> str:
    """Return why texts of a request were rejected."""
    judged = zip(record.verdicts, record.decisions, strict=True)
    return reason_for(verdict for verdict, decision in judged if decision is Decision.REJECT)


def error_response(error: ServiceError, protocol: ClientProtocol) -> Response:
    """Return an expected error in the format of a protocol."""
    if isinstance(error, UpstreamRefused):
        return relayed(*error.answer)
    return _error(error.status, error.code, str(error), error.headers, protocol)


def _error(
    status: int,
    code: str,
    detail: str,
    headers: Mapping[str, str] | None,
    protocol: ClientProtocol,
) -> Response:
    content = protocol.error(status, code, detail)
    return json_response(status, content, headers, protocol.error_media)


def relayed(status: int, headers: Sequence[tuple[str, str]], body: bytes) -> Response:
    """Return an upstream's answer unchanged."""
    response = Response(body, status)
    pairs = [(k.encode(), v.encode(errors="surrogateescape")) for k, v in headers]
    response.raw_headers[:0] = pairs
    return response


def protocol_of(request: Request) -> ClientProtocol:
    """Return the protocol that the body was found to be in, or the first one of the route."""
    found: ClientProtocol | None = getattr(request.state, "protocol", None)
    route = route_of(request.scope)
    if found is not None:
        return found
    if route is not None:
        return route.protocols[0]
    # Ray Serve's prefix comes before the path.
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    return protocol_of_unknown(path)


def add_request_ids(app: Starlette) -> None:
    """Give every request an id, and an answer if there is none. Add it last, as the outermost."""
    app.add_middleware(RequestId, on_bug=_internal_error, on_cut_off=_cut_off)


def install_error_handlers(app: Starlette) -> None:
    """Answer every expected error, unknown paths included, in the protocol of the route."""

    async def on_service_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)  # noqa: S101 - registered for it
        return error_response(error, protocol_of(request))

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        headers = dict(error.headers) if error.headers else None
        return _error(error.status_code, code, str(error.detail), headers, protocol_of(request))

    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(HTTPException, on_http_error)
