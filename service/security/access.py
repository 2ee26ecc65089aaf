"""Who may ask for what: the key is taken out of each request, its scopes are held against a table.

Nothing behind `Access` ever sees a key: not the logs, nor the audit, nor an upstream.
"""

from base64 import b64decode
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from fastapi import HTTPException, Request
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from service.errors import Forbidden, Unauthorized
from service.observability.metrics import AccessMetrics
from service.protocols.base import WireProtocol
from service.protocols.native import Native
from service.protocols.oip import OpenInference
from service.protocols.registry import PREFIX, by_route
from service.security.keys.file import Key, Keys, Scope
from service.security.rate_limit import Limiter

Headers = Sequence[tuple[bytes, bytes]]

OPEN = None
"""The scope of what probes ask, and of what says nothing of this service."""
SCOPES: dict[str, Scope | None] = {
    **dict.fromkeys(by_route(), Scope.CLASSIFY),
    "/screen": Scope.CLASSIFY,
    "/explain": Scope.CLASSIFY,
    "/info": Scope.CLASSIFY,
    "/v2": Scope.CLASSIFY,
    "/v2/models/{model}": Scope.CLASSIFY,
    "/envoy/{path:path}": Scope.CLASSIFY,
    "/beta/litellm_basic_guardrail_api": Scope.CLASSIFY,
    "/metrics": Scope.METRICS,
    "/replicas": Scope.METRICS,
    "/admin/reload": Scope.ADMIN,
    "/live": OPEN,
    "/ready": OPEN,
    "/health": OPEN,
    "/v2/health/live": OPEN,
    "/v2/health/ready": OPEN,
    "/v2/models/{model}/ready": OPEN,
    "/openapi.json": OPEN,
    "/docs": OPEN,
    "/docs/oauth2-redirect": OPEN,
    "/redoc": OPEN,
}
"""Of each route. One that is not here needs `admin`."""
PROTOCOLS: dict[str, WireProtocol] = {
    "/v2": OpenInference(),
    "/v2/models/{model}": OpenInference(),
    **{route: found[0] for route, found in by_route().items()},
}
"""In which callers of a route are told that they may not, where that is not our own."""
NATIVE = Native()
WANTED = "send an API key, as Authorization: Bearer or as x-api-key"
CHALLENGE = 'Bearer realm="psim"'


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks; without a key, everything is allowed: then none is asked for."""

    name: str | None = None
    """Of the key, never the key."""
    key: Key | None = None
    limiter: Limiter | None = None

    @property
    def sees_scores(self) -> bool:
        """Whether the caller is told of more than decisions."""
        return self.key is None or self.key.scores

    def require_scores(self) -> None:
        """Raise `Forbidden` if the caller is told no more than decisions."""
        if not self.sees_scores:
            raise Forbidden("the API key is for decisions only", CHALLENGE)

    async def take(self, inputs: int) -> None:
        """Take inputs off what the caller may still send.

        Raises:
            TooLarge, RateLimited: it may not send them.
        """
        if self.name and self.key and self.key.rate and self.limiter:
            await self.limiter.take(self.name, self.key.rate, inputs)


ANYONE = Caller()


def caller_of(request: Request) -> Caller:
    """Return who asks."""
    caller: Caller = getattr(request.state, "caller", ANYONE)
    return caller


class Access:
    """Knows callers by their keys."""

    def __init__(self, keys: Keys, limiter: Limiter, metrics: AccessMetrics) -> None:
        self._keys, self._limiter, self._metrics = keys, limiter, metrics

    def identify(self, headers: Headers) -> tuple[Caller | None, list[tuple[bytes, bytes]]]:
        """Return who sends these headers, and the headers without any key of ours.

        What is no key of ours, such as a token for an upstream, stays.
        """
        caller, rest = None, []
        for name, value in headers:
            found = self._keys.find(token) if (token := _token(name, value)) else None
            if found is None:
                rest.append((name, value))
            elif caller is None or name == b"x-api-key":
                caller = Caller(*found, self._limiter)
        return caller, rest

    def require(self, caller: Caller | None, scope: Scope) -> Caller:
        """Return the caller, whose key must have the scope.

        Raises:
            Unauthorized, Forbidden: there is no such key, or it has another scope.
        """
        if caller is None or caller.key is None:
            self._metrics.denied.labels("key").inc()
            raise Unauthorized(WANTED, CHALLENGE)
        if scope not in caller.key.scopes:
            self._metrics.denied.labels("scope").inc()
            challenge = f'{CHALLENGE}, error="insufficient_scope", scope="{scope}"'
            raise Forbidden(f"the API key has no scope {scope}", challenge)
        return caller

    async def permit(self, request: Request) -> None:
        """Let a request pass if its route is open, or its key has the route's scope."""
        route = request.scope["route"].path.removeprefix(PREFIX)
        request.state.protocol = PROTOCOLS.get(route, NATIVE)
        scope = SCOPES.get(route, Scope.ADMIN)
        if scope is not OPEN:
            self.require(request.state.caller, scope)

    def console(self, request: Request) -> str:
        """Return the name of the key of who uses the console.

        Raises:
            HTTPException: they may not; browsers ask their user for a password then, the key.
        """
        try:
            caller = self.require(self.identify(request.scope["headers"])[0], Scope.CONSOLE)
        except Unauthorized as error:
            headers = {"www-authenticate": 'Basic realm="psim"'}
            raise HTTPException(401, "Give an API key as the password.", headers) from error
        except Forbidden as error:
            raise HTTPException(403, f"{error}.") from error
        return caller.name or ""


class TakeKey:
    """Takes the key out of each request, and notes in its state whose it is."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http":
            caller, scope["headers"] = self._access.identify(scope["headers"])
            scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)


def _token(name: bytes, value: bytes) -> str | None:
    """Return what a header holds that may be a key of ours."""
    if name == b"x-api-key":
        return value.decode("latin-1")
    if name != b"authorization":
        return None
    scheme, _, given = value.partition(b" ")
    match scheme.lower():
        case b"bearer":
            return given.strip().decode("latin-1")
        case b"basic":  # browsers know no other
            with suppress(ValueError):
                return b64decode(given).partition(b":")[2].decode("latin-1")
    return None
