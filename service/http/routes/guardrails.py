"""Verdicts for proxies that forward requests themselves: Envoy's ext_authz, LiteLLM's guardrails.

The classifier behind a proxy is unknown here. Texts are therefore screened to their end, and one
rejected text denies the whole request, since nothing can be taken out of it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field
from starlette.applications import Starlette
from starlette.routing import Route, compile_path

from service.errors import NotInspected
from service.http.exchange import Completed, Exchange, Parsed
from service.http.middleware import RequestId
from service.http.parsing import read, read_inference
from service.http.responses import install_error_handlers, internal_error, json_response
from service.http.routing import add_route, prefixed_model
from service.lifecycle.registry import Registry
from service.pipeline.gateway import Gateway
from service.protocols.base import InferenceRequest, WireProtocol
from service.protocols.registry import by_route
from service.route_table import AUTHZ, EXT_PROC, GUARDRAIL, PROXIED
from service.schemas import Decision, TextsRequest, worst
from service.settings import RequestLimits

PARTIAL_BODY = "x-envoy-auth-partial-body"
FOUND = "PSIM finds a backdoor trigger in it, or cannot read it to its end"


class GuardrailRequest(TextsRequest):
    """LiteLLM's request; its other fields are LiteLLM's own, so callers cannot hide text there."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    given: list[str] = Field(alias="texts", default=[])
    input_type: Literal["request", "response"] = "request"
    model: str | None = None
    """LiteLLM's name for the model."""

    @property
    def texts(self) -> list[str]:
        """The texts that a classifier would read: none of a response, which is its own."""
        return [t for t in self.given if t.strip()] if self.input_type == "request" else []


class ProxiedRoutes:
    """Finds the protocols of a proxied path, as the router does for paths that are served here."""

    def __init__(self) -> None:
        self._known = [(compile_path(path)[0], found) for path, found in by_route().items()]

    def find(self, method: str, path: str) -> tuple[Sequence[WireProtocol], dict[str, str]]:
        """Return the protocols that share a path, and the path's parameters.

        Raises:
            NotInspected: no protocol has such a method and path.
        """
        for pattern, protocols in self._known:
            if method == "POST" and (match := pattern.match(f"/{path}")):
                return protocols, match.groupdict()
        raise NotInspected(
            "no protocol has such a method and path; have the proxy route it past us"
        )


class ExternalAuthz:
    """Tells proxies whether a request may pass."""

    def __init__(self, models: Registry, exchange: Exchange) -> None:
        self._models, self._exchange = models, exchange
        self._proxied = ProxiedRoutes()

    async def guardrail(self, request: Request) -> Response:
        """Tell LiteLLM whether to block a request."""
        return await self._exchange.run(
            request, GUARDRAIL, self._read_guardrail, Gateway.judge, _block_or_pass
        )

    async def authorize(self, request: Request) -> Response:
        """Tell Envoy's ext_authz whether a request may pass: 200, or its caller's answer."""
        return await self._authorize(AUTHZ, request)

    async def process(self, request: Request) -> Response:
        """Tell Envoy's ext_proc whether a request may pass, as `authorize` does."""
        return await self._authorize(EXT_PROC, request)

    def router(self) -> APIRouter:
        """Return the routes that proxies call over HTTP."""
        router = APIRouter()
        add_route(router, GUARDRAIL, self.guardrail)
        add_route(router, AUTHZ, self.authorize)
        return router

    async def _authorize(self, route: str, request: Request) -> Response:
        respond = partial(_permit_or_deny, request)
        return await self._exchange.run(request, route, self._read_proxied, Gateway.judge, respond)

    async def _read_guardrail(
        self, request: Request, settings: RequestLimits
    ) -> Parsed[GuardrailRequest] | Response:
        body = await read(request, GuardrailRequest, settings)
        if not body.texts:
            return json_response(200, {"action": "NONE"})
        # LiteLLM has its own names for models; a single model is meant by all of them.
        by_name = len(self._models) > 1 and prefixed_model(request) is None
        return Parsed(body, (body.model,) if by_name else ())

    async def _read_proxied(
        self, request: Request, settings: RequestLimits
    ) -> Parsed[InferenceRequest] | Response:
        if request.headers.get(PARTIAL_BODY, "false").lower() != "false":
            raise NotInspected("the proxy has not sent the whole body to be screened")
        if request.method in ("GET", "HEAD") and await _is_bare(request):
            return Response()  # health and metadata: there is nothing to classify
        if request.url.query:
            raise NotInspected("a query string is not screened; send none")
        protocols, parameters = self._proxied.find(request.method, request.path_params["path"])
        _, body, _ = await read_inference(request, protocols, settings)
        return Parsed(body, (parameters.get("model"), body.model_name))


async def _is_bare(request: Request) -> bool:
    return not request.url.query and not await request.body()


def _block_or_pass(done: Completed[GuardrailRequest, list[Decision]]) -> Response:
    if Decision.REJECT in done.answer:
        return json_response(200, {"action": "BLOCKED", "blocked_reason": FOUND})
    return json_response(200, {"action": "NONE"})


def _permit_or_deny(
    request: Request, done: Completed[InferenceRequest, list[Decision]]
) -> Response:
    headers = {"x-psim-decision": worst(done.answer)}
    if Decision.REJECT not in done.answer:
        return Response(headers=headers)
    protocol: WireProtocol = request.state.protocol
    content = protocol.error(403, "rejected", f"an input was rejected: {FOUND}")
    return json_response(403, content, headers, protocol.error_media)


def ext_proc_app(authz: ExternalAuthz) -> Starlette:
    """Return an application that authorizes each request at the path it was sent to."""
    app = Starlette(routes=[Route("/{path:path}", authz.process, methods=[*PROXIED])])
    app.add_middleware(RequestId, on_bug=internal_error())
    install_error_handlers(app)
    return app
