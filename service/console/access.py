"""Who may use the console, and from which pages: checked here and nowhere else."""

from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.security.origin import same_origin

Check = Callable[[Request], str]
"""Returns the name of the user, which is kept with marks; raises if access is denied."""

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
    "img-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
SAFE_METHODS = ("GET", "HEAD")


def anybody(request: Request) -> str:
    """Admit everyone who reaches the port, which is on loopback, or open on purpose."""
    return "console"


class SameOrigin:
    """Refuses requests that another site makes a browser send; sets security headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        app = self._app
        if scope["method"] not in SAFE_METHODS and not same_origin(Headers(scope=scope)):
            refusal = "refused: the request does not come from a page of the console"
            app = PlainTextResponse(f"{refusal}; a program must send its Origin\n", 403)
        await app(scope, receive, send_with_headers)
