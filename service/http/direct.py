"""Middleware that calls the endpoints of fixed paths itself.

FastAPI documents these routes and can serve them. But its router tries route after route and sets
up a request for features that we do not use, which takes an eighth of the event loop's time. What
asks it to classify is most of the traffic, so it takes the short way.
"""

from collections.abc import Awaitable, Callable, Iterable

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ServiceError
from service.http.responses import error_response, protocol_of

Permit = Callable[[Request], Awaitable[None]]


class DirectRoutes:
    """Answers POST at fixed paths, and leaves everything else to the application.

    Args:
        app: the application.
        routes: those with a fixed path are called directly. Their endpoints take the request alone
            and return a response.
        permit: raises unless the caller may use the route; None lets everybody in.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[APIRoute], permit: Permit | None) -> None:
        self._app, self._permit = app, permit
        self._routes = {r.path: r for r in routes if r.methods == {"POST"} and "{" not in r.path}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        asked = scope["type"] == "http" and scope["method"] == "POST"
        route = self._routes.get(scope["path"]) if asked else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        request = Request(scope, receive, send)
        try:
            if self._permit:
                await self._permit(request)
            response = await route.endpoint(request)
        except ServiceError as error:
            response = error_response(error, protocol_of(request))
        await response(scope, receive, send)
