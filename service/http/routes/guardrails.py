"""Verdicts for proxies that forward requests themselves: Envoy's ext_authz and ext_proc.

The classifier behind a proxy is unknown here. Texts are therefore screened to their end, and one
rejected text denies the whole request, since nothing can be taken out of it.
"""

import re
from collections.abc import Sequence
from functools import partial

from fastapi import APIRouter, Request, Response
from starlette.applications import Starlette
from starlette.routing import Route, compile_path

from service.errors import NotInspected
from service.http.exchange import Completed, Exchange, Parsed
from service.http.parsing import read_inference, require_readable
from service.http.responses import (
    add_request_ids,
    install_error_handlers,
    json_response,
    rejected_reason,
    verdict_headers,
)
from service.http.routing import add_route, prefixed_model
from service.lifecycle.registry import Registry
from service.pipeline.gateway import Gateway
from service.protocols.base import ClientProtocol, InferenceRequest
from service.protocols.headers import is_ambiguous
from service.protocols.registry import by_route
from service.route_table import AUTHZ, EXT_PROC, PROXIED
from service.schemas import Decision
from service.settings import RequestLimits

PARTIAL_BODY = "x-envoy-auth-partial-body"
STATES = (
    "/health /live /ready /ping /info /version /v1/models /v1/models/{model} "
    "/v2 /v2/health/live /v2/health/ready /v2/models/{model} /v2/models/{model}/ready "
    "/v2/models/{model}/versions/{version} /v2/models/{model}/versions/{version}/ready"
).split()
"""Paths at which servers of our protocols tell their health and metadata, and read no text."""


_Known = Sequence[tuple[re.Pattern[str], Sequence[ClientProtocol]]]


class ProxiedRoutes:
    """Finds what a proxied path is for, as the router does for paths that are served here."""

    def __init__(self) -> None:
        classify: _Known = [(compile_path(path)[0], found) for path, found in by_route().items()]
        states: _Known = [(compile_path(path)[0], ()) for path in STATES]
        self._known: dict[str, _Known] = {"POST": classify, "GET": states, "HEAD": states}

    def find(self, method: str, path: str) -> tuple[Sequence[ClientProtocol], dict[str, str]]:
        """Return the protocols that share a path, and the path's parameters.

        A path of health or metadata, at which there is nothing to classify, has no protocols.

        Raises:
            NotInspected: no protocol has such a method and path.
        """
        for pattern, protocols in self._known.get(method, ()):
            if match := pattern.fullmatch(f"/{path}"):
                return protocols, match.groupdict()
        raise NotInspected(
            "no protocol has such a method and path; have the proxy route it past us"
        )


class ExternalAuthz:
    """Tells proxies whether a request may pass."""

    def __init__(self, models: Registry, exchange: Exchange) -> None:
        self._models, self._exchange = models, exchange
        self._proxied = ProxiedRoutes()

    async def authorize(self, request: Request) -> Response:
        """Tell Envoy's ext_authz whether a request may pass: 200, or its caller's answer."""
        return await self._authorize(AUTHZ, request)

    async def process(self, request: Request) -> Response:
        """Tell Envoy's ext_proc whether a request may pass, as `authorize` does."""
        return await self._authorize(EXT_PROC, request)

    def router(self) -> APIRouter:
        """Return the routes that proxies call over HTTP."""
        router = APIRouter()
        add_route(router, AUTHZ, self.authorize)
        return router

    async def _authorize(self, route: str, request: Request) -> Response:
        respond = partial(_permit_or_deny, request)
        return await self._exchange.run(request, route, self._read_proxied, Gateway.judge, respond)

    async def _read_proxied(
        self, request: Request, settings: RequestLimits
    ) -> Parsed[InferenceRequest] | Response:
        protocols, parameters = self._proxied.find(request.method, request.path_params["path"])
        if protocols:
            request.state.protocol = protocols[0]
        _check_head(request)
        if protocols:
            _, body, _, unreadable = await read_inference(request, protocols, settings)
            require_readable(unreadable)
            return Parsed(body, (parameters.get("model"), body.model_name))
        if model := parameters.get("model"):
            self._models.get(prefixed_model(request), model)
        if await request.body():
            raise NotInspected("a body is not screened at a path of health or metadata; send none")
        return Response()


def _check_head(request: Request) -> None:
    """Raise `NotInspected` if the body alone does not tell what the classifier would read."""
    if request.headers.get(PARTIAL_BODY, "false").lower() != "false":
        raise NotInspected("the proxy has not sent the whole body to be screened")
    if request.url.query:
        raise NotInspected("a query string is not screened; send none")
    if any(map(is_ambiguous, request.headers)):
        raise NotInspected(
            "a header replaces the method or the URL, or has a name of other characters than "
            "letters, digits and -; have the proxy drop it"
        )


def _permit_or_deny(
    request: Request, done: Completed[InferenceRequest, list[Decision]]
) -> Response:
    headers = verdict_headers(done.record)
    if Decision.REJECT not in done.answer:
        return Response(headers=headers)
    protocol: ClientProtocol = request.state.protocol
    content = protocol.error(
        403, "rejected", f"an input was rejected: {rejected_reason(done.record)}"
    )
    return json_response(403, content, headers, protocol.error_media)


def ext_proc_app(authz: ExternalAuthz) -> Starlette:
    """Return an application that authorizes each request at the path it was sent to."""
    app = Starlette(routes=[Route("/{path:path}", authz.process, methods=[*PROXIED])])
    add_request_ids(app)
    install_error_handlers(app)
    return app
