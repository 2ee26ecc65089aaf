"""Middleware for every request: its id, the caller's trace, and the answer where none was given."""

import asyncio
import logging
import random
import re
import traceback

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.observability.traces import caller_trace

log = logging.getLogger(__name__)

VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestId:
    """Takes the caller's `x-request-id` if it is well-formed, or makes one, and sends it back.

    An exception that gets this far is a bug: it is logged, and `on_bug` answers. `on_cut_off`
    answers a request that the server cancels, since its time to drain is over.
    """

    def __init__(self, app: ASGIApp, on_bug: ASGIApp, on_cut_off: ASGIApp) -> None:
        self._app, self._on_bug, self._on_cut_off = app, on_bug, on_cut_off

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if VALID_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"
        scope.setdefault("state", {})["request_id"] = request_id

        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            with caller_trace(Headers(scope=scope)):
                await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            return  # nobody is left to answer
        except asyncio.CancelledError:
            if not started:
                await self._on_cut_off(scope, receive, send_with_headers)
        except Exception as error:
            # Its place and type only: its message may quote a text.
            where = "".join(traceback.format_tb(error.__traceback__))
            fields = {"request_id": request_id, "error": type(error).__name__, "where": where}
            log.error("bug", extra=fields)
            if not started:
                await self._on_bug(scope, receive, send_with_headers)
