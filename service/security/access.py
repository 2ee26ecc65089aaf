"""Access control: the API key is taken out of each request, and its scopes are checked.

Nothing behind `Access` ever sees a key: not the logs, nor the audit, nor an upstream.
"""

from base64 import b64decode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from fastapi import HTTPException, Request
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from service.errors import Forbidden, Unauthorized
from service.observability.metrics import AccessMetrics
from service.route_table import ROUTES, route_of
from service.security.keys.file import Key, Keys, Scope
from service.security.rate_limit import Limiter

Headers = Sequence[tuple[bytes, bytes]]

OPEN = None
"""Scope of routes that need no key."""
SCOPES: dict[str, Scope | None] = {
    path: route.scope and Scope(route.scope) for path, route in ROUTES.items()
}
"""Scope of each route."""
WANTED = "send an API key, as Authorization: Bearer or as x-api-key"
CHALLENGE = 'Bearer realm="psim"'


@dataclass(slots=True)
class Caller:
    """Who sends one request, and what it has cost; without a key, everything is allowed."""

    name: str | None = None
    """Name of the key, never the key."""
    key: Key | None = None
    limiter: Limiter | None = None
    passes: int = 0
    """Passes of the request that were counted against the limit."""

    @property
    def sees_scores(self) -> bool:
        """Whether answers to the caller hold scores beside decisions."""
        return self.key is None or self.key.scores

    def require_scores(self) -> None:
        """Raise `Forbidden` if answers to the caller hold decisions only."""
        if not self.sees_scores:
            raise Forbidden("the API key is for decisions only", CHALLENGE)

    def may_use(self, model: str) -> bool:
        """Return whether the key is for a model."""
        return self.key is None or self.key.allows(model)

    def require_model(self, model: str, budget: float) -> None:
        """Raise `Forbidden` unless the key is for a model, and for its false-rejection budget."""
        if not self.may_use(model):
            raise Forbidden(f"the API key is not for the model {model}", CHALLENGE)
        if self.key and not self.key.holds(budget):
            raise Forbidden(
                f"the API key is for a false-rejection budget of {self.key.frr_budget:g}, and the "
                f"bundle of the model {model} holds thresholds for {budget:g} only: change "
                "frr_budget of the key",
                CHALLENGE,
            )

    async def take(self, passes: int) -> None:
        """Count the next passes of the request against the caller's rate limit, if it has one.

        Raises:
            TooLarge, RateLimited: as `Limiter.take` does.
        """
        if self.name and self.key and self.key.rate and self.limiter:
            await self.limiter.take(self.name, self.key.rate, passes, self.passes)
            self.passes += passes


ANYONE = Caller()


def caller_of(request: Request) -> Caller:
    """Return the caller of a request."""
    caller: Caller = getattr(request.state, "caller", ANYONE)
    return caller


class Access:
    """Identifies callers by their keys, and checks what they may do."""

    def __init__(self, keys: Keys, limiter: Limiter, metrics: AccessMetrics) -> None:
        self._keys, self._limiter, self._metrics = keys, limiter, metrics

    @property
    def keys(self) -> Mapping[str, Key]:
        """The keys in force, by name."""
        return self._keys.all

    def identify(self, headers: Headers) -> tuple[Caller | None, list[tuple[bytes, bytes]]]:
        """Return the caller, and the headers without our keys.

        Other credentials, such as a token for an upstream, stay in the headers.
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
        """Return the caller if its key has the scope.

        Raises:
            Unauthorized: there is no key, or an unknown one.
            Forbidden: the key lacks the scope.
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
        """Let a request pass if its route is open, or its key has the route's scope.

        Raises:
            Unauthorized, Forbidden: as `require` does.
        """
        route = route_of(request.scope)
        scope = SCOPES[route.path] if route else Scope.ADMIN
        if scope is not OPEN:
            self.require(request.state.caller, scope)

    def console(self, request: Request) -> str:
        """Return the name of the API key with which the console is used.

        Raises:
            HTTPException: the key is missing or lacks the scope. Browsers then ask their user for a
                password, which is the key.
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
    """Middleware that moves the key out of a request's headers, and its caller into the state."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http":
            caller, scope["headers"] = self._access.identify(scope["headers"])
            scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)


def _token(name: bytes, value: bytes) -> str | None:
    """Return the part of a header that may be one of our keys."""
    if name == b"x-api-key":
        return value.decode("latin-1")
    if name != b"authorization":
        return None
    scheme, _, given = value.partition(b" ")
    match scheme.lower():
        case b"bearer":
            return given.strip().decode("latin-1")
        case b"basic":  # the only scheme for which browsers ask
            with suppress(ValueError):
                return b64decode(given).partition(b":")[2].decode("latin-1")
    return None
