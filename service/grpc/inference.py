"""Open Inference over gRPC: each call is answered as the HTTP request that says the same.

So screening, keys, limits, metrics and audit are those of the HTTP protocol.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import grpc
from starlette.types import ASGIApp, Message
from tritonclient.grpc import service_pb2 as pb

from service.grpc.listening import listening
from service.grpc.messages import infer_response, model_metadata, request_json, server_metadata
from service.http.responses import VERDICT_HEADERS
from service.protocols.base import BadAnswer
from service.settings import InferenceGrpcSettings

SERVICE = "inference.GRPCInferenceService"
MESSAGE_OVERHEAD = 2**16
"""Bytes that a message may have beside the body that it becomes."""
TAKEN = frozenset("authorization x-api-key x-request-id traceparent tracestate".split())
"""Metadata that becomes headers. No other does, since an upstream might heed it."""
TOLD = ("x-request-id", "retry-after", *VERDICT_HEADERS)
"""Headers that become metadata."""
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Status of a call by that of the answer; for all others it is INTERNAL."""

Call = Callable[[Any, Any], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """The answer of the application."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def detail(self) -> str:
        """Why there is no result."""
        try:
            found = json.loads(self.body)["error"]
        except (ValueError, KeyError, TypeError):
            found = None
        return found if isinstance(found, str) else f"the answer has status {self.status}"


class InferenceServer:
    """gRPC server that gives each call to an ASGI application, which serves Open Inference."""

    def __init__(self, app: ASGIApp, settings: InferenceGrpcSettings) -> None:
        self._app, self._settings = app, settings
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Start to listen.

        Raises:
            RuntimeError: the port is not available.
        """
        calls: dict[str, Call] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._infer,
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                call, getattr(pb, f"{name}Request").FromString, lambda m: m.SerializeToString()
            )
            for name, call in calls.items()
        }
        handler = grpc.method_handlers_generic_handler(SERVICE, handlers)
        most = self._settings.max_body_bytes + MESSAGE_OVERHEAD
        host, port = self._settings.host, self._settings.oip_grpc_port
        self._server = await listening(handler, host, port, most)

    async def close(self) -> None:
        """Refuse new calls, and let running ones end within `drain_s` seconds."""
        if self._server is not None:
            await self._server.stop(self._settings.drain_s)

    async def _server_live(self, request: Any, context: Any) -> Any:
        answer = await self._ask(context, "GET", "/v2/health/live")
        return pb.ServerLiveResponse(live=answer.status == 200)

    async def _server_ready(self, request: Any, context: Any) -> Any:
        answer = await self._ask(context, "GET", "/v2/health/ready")
        return pb.ServerReadyResponse(ready=answer.status == 200)

    async def _model_ready(self, request: Any, context: Any) -> Any:
        answer = await self._ask(context, "GET", f"{_path(request.name)}/ready")
        if answer.status not in (200, 503):
            await _abort(context, answer)
        return pb.ModelReadyResponse(ready=answer.status == 200)

    async def _server_metadata(self, request: Any, context: Any) -> Any:
        answer = await self._result(context, "GET", "/v2")
        return await _fitting(context, lambda: server_metadata(json.loads(answer.body)))

    async def _model_metadata(self, request: Any, context: Any) -> Any:
        answer = await self._result(context, "GET", _path(request.name))
        return await _fitting(context, lambda: model_metadata(json.loads(answer.body)))

    async def _infer(self, request: Any, context: Any) -> Any:
        try:
            body = request_json(request)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            raise
        version, path = request.model_version, _path(request.model_name)
        path = f"{path}/versions/{_segment(version)}/infer" if version else f"{path}/infer"
        answer = await self._result(context, "POST", path, body)
        raw = bool(request.raw_input_contents)
        return await _fitting(
            context, lambda: infer_response(answer.body, request.model_name, version, raw)
        )

    async def _result(self, context: Any, method: str, path: str, body: bytes = b"") -> HttpAnswer:
        """Return the answer of a request that succeeds; end the call if it does not."""
        answer = await self._ask(context, method, path, body)
        if answer.status != 200:
            await _abort(context, answer)
        return answer

    async def _ask(self, context: Any, method: str, path: str, body: bytes = b"") -> HttpAnswer:
        # Values of keys that end in `-bin` are bytes; none of them is taken.
        headers = [
            (name.encode(), value.encode())
            for name, value in context.invocation_metadata() or ()
            if name in TAKEN and isinstance(value, str)
        ]
        if body:
            headers.append((b"content-type", b"application/json"))
        answer = await _ask(self._app, method, path, headers, body)
        told = [(name, answer.headers[name]) for name in TOLD if name in answer.headers]
        context.set_trailing_metadata(tuple(told))
        return answer


def _path(model: str) -> str:
    return f"/v2/models/{_segment(model)}"


def _segment(name: str) -> str:
    """Return a name as a single part of a path."""
    return name.replace("/", "%2F")


async def _abort(context: Any, answer: HttpAnswer) -> None:
    code = CODES.get(answer.status, grpc.StatusCode.INTERNAL)
    await context.abort(code, answer.detail)


async def _fitting(context: Any, build: Callable[[], Any]) -> Any:
    """Return a message; end the call if what the classifier says does not fit into one."""
    try:
        return build()
    except BadAnswer as error:
        await context.abort(grpc.StatusCode.UNAVAILABLE, f"the classifier answers with {error}")
        raise


async def _ask(
    app: ASGIApp, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes
) -> HttpAnswer:
    """Return an application's answer; the work is cancelled with the call."""
    parts = [{"type": "http.request", "body": body, "more_body": False}]
    found: dict[str, str] = {}
    status, reply = 500, bytearray()

    async def receive() -> Message:
        if parts:
            return parts.pop()
        await asyncio.Event().wait()  # a caller that hangs up cancels the call
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            found.update((k.decode("latin-1"), v.decode("latin-1")) for k, v in message["headers"])
        else:
            reply.extend(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": quote(path).encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
    }
    await app(scope, receive, send)
    return HttpAnswer(status, found, bytes(reply))
