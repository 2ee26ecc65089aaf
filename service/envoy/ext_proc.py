"""Envoy's ext_proc over gRPC: Envoy sends a request in parts, and is told what to do with each.

Each request goes to an ASGI application, which answers as it answers ext_authz. Envoy lets a
request pass when its stream ends, so no stream ends without a verdict. Envoy treats an error, an
answer of the wrong kind and a timeout as a failure; then the request passes only if Envoy's
`failure_mode_allow` is set.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any
from urllib.parse import unquote

import grpc
from betterproto2 import which_one_of
from envoy_data_plane.envoy.config.core.v3 import (
    HeaderValue,
    HeaderValueOption,
    HeaderValueOptionHeaderAppendAction,
)
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ProcessingModeBodySendMode as BodyMode,
)
from envoy_data_plane.envoy.service.ext_proc.v3 import (
    BodyMutation,
    BodyResponse,
    CommonResponse,
    HeaderMutation,
    HeadersResponse,
    HttpHeaders,
    ImmediateResponse,
    ProcessingRequest,
    ProcessingResponse,
    TrailersResponse,
)
from envoy_data_plane.envoy.type.v3 import HttpStatus, StatusCode
from starlette.types import ASGIApp, Message, Scope

from service.errors import Forbidden, NotAllowed, Unauthorized
from service.grpc.listening import listening
from service.http.responses import VERDICT_HEADERS, problem
from service.http.routes.guardrails import PARTIAL_BODY
from service.security.access import ANYONE, Access, Caller
from service.security.keys.file import Scope as KeyScope
from service.settings import ExtProcSettings

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
MESSAGE_OVERHEAD = 2**20
"""Bytes that a message may have beside the body."""
CONTINUE = {
    "response_headers": ProcessingResponse(response_headers=HeadersResponse()),
    "response_body": ProcessingResponse(response_body=BodyResponse()),
    "response_trailers": ProcessingResponse(response_trailers=TrailersResponse()),
}
"""Answers to the parts of a response, which is not screened."""

DENIED: dict[type[NotAllowed], grpc.StatusCode] = {
    Unauthorized: grpc.StatusCode.UNAUTHENTICATED,
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
}
"""Status of a call without a key of the right scope."""

NOT_INSPECTED = problem(403, "not_inspected", "not all of the request was sent to be screened")

Headers = Sequence[tuple[bytes, bytes]]


class ExtProc:
    """gRPC server for Envoy that gives each request to an ASGI application.

    With `access`, Envoy sends an API key of its own in the metadata of the call.
    """

    def __init__(self, app: ASGIApp, settings: ExtProcSettings, access: Access | None) -> None:
        self._app, self._settings, self._access = app, settings, access
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Start to listen.

        Raises:
            RuntimeError: the port is not available.
        """
        process = grpc.stream_stream_rpc_method_handler(
            self._process, ProcessingRequest.parse, ProcessingResponse.__bytes__
        )
        handler = grpc.method_handlers_generic_handler(SERVICE, {"Process": process})
        most = self._settings.max_body_bytes + MESSAGE_OVERHEAD
        host, port = self._settings.host, self._settings.ext_proc_port
        self._server = await listening(handler, host, port, most)

    async def close(self) -> None:
        """Refuse new requests, and let running ones end within `drain_s` seconds."""
        if self._server is not None:
            await self._server.stop(self._settings.drain_s)

    async def _process(self, parts: AsyncIterator[ProcessingRequest], context: Any) -> None:
        """Answer the parts of one request, each once and in order, until there is a verdict."""
        caller = await self._caller(context)
        request: ProxiedRequest | None = None
        try:
            async for part in parts:
                request = request or ProxiedRequest(self._app, part, caller)
                await context.write(await request.answer(part))
                if request.decided:
                    return
        finally:
            if request:
                await request.close()

    async def _caller(self, context: Any) -> Caller:
        """Return who calls; end the call if its key does not allow it."""
        if self._access is None:
            return ANYONE
        # Values of keys that end in `-bin` are bytes; none of them is a key of ours.
        metadata = [
            (name.encode(), value.encode())
            for name, value in context.invocation_metadata() or ()
            if isinstance(value, str)
        ]
        try:
            return self._access.require(self._access.identify(metadata)[0], KeyScope.CLASSIFY)
        except NotAllowed as error:
            await context.abort(DENIED[type(error)], str(error))
            raise


class ProxiedRequest:
    """HTTP request that an application reads while Envoy sends it; `first` is its first part."""

    def __init__(self, app: ASGIApp, first: ProcessingRequest, caller: Caller) -> None:
        self.decided = False
        """Whether Envoy has been told the verdict."""
        head, config = first.request_headers, first.protocol_config
        mode = config.request_body_mode if config else BodyMode.NONE
        self._streamed = mode == BodyMode.STREAMED
        # In other modes Envoy forwards a body that it has not sent to us.
        sent = head and (head.end_of_stream or mode in (BodyMode.BUFFERED, BodyMode.STREAMED))
        # In observability mode it forwards the request whatever we answer.
        self._partial = not sent or first.observability_mode
        self._held = bytearray()
        self._body: asyncio.Queue[Message] = asyncio.Queue()
        self._body_wanted = asyncio.Event()
        self._status, self._reply = 500, b""
        self._headers: Headers = ()
        scope = _scope(head or HttpHeaders(), self._partial)
        scope["state"] = {"caller": caller}
        self._work = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def answer(self, part: ProcessingRequest) -> ProcessingResponse:
        """Return the answer to a part."""
        if part.request_headers is not None:
            return await self._on_headers(part.request_headers.end_of_stream)
        if part.request_body is not None:
            # A buffered body comes whole, but is not the end of the stream if there are trailers.
            ends = part.request_body.end_of_stream or not self._streamed
            return await self._on_body(part.request_body.body, ends)
        kind, _ = which_one_of(part, "request")
        if kind in CONTINUE and not self._partial:
            # The response is Envoy's own, or of an upstream that has not seen the body yet.
            return CONTINUE[kind]
        return self._refuse(
            NOT_INSPECTED.status_code, NOT_INSPECTED.raw_headers, bytes(NOT_INSPECTED.body)
        )

    async def close(self) -> None:
        """Cancel the work on the request."""
        if self._work.cancel():
            await asyncio.wait((self._work,))

    async def _on_headers(self, ends: bool) -> ProcessingResponse:
        if ends:
            self._give(b"", ends)
        wanted = asyncio.create_task(self._body_wanted.wait())
        waits = (self._work,) if ends else (self._work, wanted)
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            wanted.cancel()
        if self._work.done() and self._status != 200:
            return self._refusal()
        self.decided = self._work.done()
        # A caller's own header must not look like a verdict.
        mutation = HeaderMutation(remove_headers=[*VERDICT_HEADERS])
        common = CommonResponse(header_mutation=mutation)
        return ProcessingResponse(request_headers=HeadersResponse(common))

    async def _on_body(self, body: bytes, ends: bool) -> ProcessingResponse:
        self._give(body, ends)
        if not ends and not self._work.done():
            # Streamed parts are held back until the verdict, and go on with the last part.
            self._held += body
            common = CommonResponse(body_mutation=BodyMutation(clear_body=True))
            return ProcessingResponse(request_body=BodyResponse(common))
        await asyncio.wait((self._work,))
        if self._status != 200:
            return self._refusal()
        self.decided = True
        common = CommonResponse(header_mutation=_mutation(self._headers, only=VERDICT_HEADERS))
        if self._held:
            common.body_mutation = BodyMutation(body=bytes(self._held + body))
        return ProcessingResponse(request_body=BodyResponse(common))

    def _refusal(self) -> ProcessingResponse:
        return self._refuse(self._status, self._headers, self._reply)

    def _refuse(self, status: int, headers: Headers, body: bytes) -> ProcessingResponse:
        self.decided = True
        response = ImmediateResponse(
            status=HttpStatus(StatusCode(status)), headers=_mutation(headers), body=body
        )
        return ProcessingResponse(immediate_response=response)

    def _give(self, body: bytes, ends: bool) -> None:
        self._body.put_nowait({"type": "http.request", "body": body, "more_body": not ends})

    async def _receive(self) -> Message:
        self._body_wanted.set()
        return await self._body.get()

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], message["headers"]
        else:
            self._reply += message.get("body", b"")


def _scope(head: HttpHeaders, partial: bool) -> Scope:
    """Return the ASGI scope of a request."""
    fields = head.headers.headers if head.headers else []
    headers = [(f.key.lower().encode(), f.raw_value or f.value.encode()) for f in fields]
    pseudo = dict(headers)
    path, _, query = pseudo.get(b":path", b"/").partition(b"?")
    headers = [(name, value) for name, value in headers if not name.startswith(b":")]
    if partial:
        headers.append((PARTIAL_BODY.encode(), b"true"))
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": pseudo.get(b":method", b"POST").decode("latin-1"),
        "scheme": "http",
        "path": unquote(path.decode("latin-1")),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
    }


def _mutation(headers: Headers, only: Sequence[str] = ()) -> HeaderMutation:
    """Return the headers that Envoy sets; it computes the length of an answer itself."""
    found = [(name.decode("latin-1"), value) for name, value in headers]
    return HeaderMutation(
        set_headers=[
            HeaderValueOption(
                header=HeaderValue(key=name, raw_value=value),
                append_action=HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
            )
            for name, value in found
            if name in only or (not only and name != "content-length")
        ]
    )
