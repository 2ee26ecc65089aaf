"""Verdicts for proxies that forward by themselves: Envoy's ext_authz, LiteLLM's guardrails.

They ask, and do as they are told; who classifies is not known here. So texts are screened to their
end, and a request in which one text is rejected is denied, since nothing can be taken out of it.
"""

from collections.abc import Sequence
from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field
from starlette.applications import Starlette
from starlette.routing import Route, compile_path

from service.errors import NotInspected
from service.http.deadline import Deadline, while_connected
from service.http.middleware import RequestId
from service.http.parsing import parse, read_json
from service.http.responses import install_error_handlers, internal_error, json_response
from service.http.routes.classify import choose, prefixed
from service.lifecycle.registry import Registry
from service.pipeline.request_record import Recorder
from service.protocols.base import WireProtocol
from service.protocols.registry import by_route
from service.schemas import Decision, TextsRequest, worst
from service.security.access import caller_of
from service.settings import RequestLimits

AUTHZ = "/envoy/{path:path}"
EXT_PROC = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
PARTIAL_BODY = "x-envoy-auth-partial-body"
GUARDRAIL = "/beta/litellm_basic_guardrail_api"
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
FOUND = "PSIM finds a backdoor trigger in it, or cannot read it to its end"


class GuardrailRequest(TextsRequest):
    """What LiteLLM asks; LiteLLM made it, so that what else it says is no hiding place."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    given: list[str] = Field(alias="texts", default=[])
    input_type: Literal["request", "response"] = "request"
    model: str | None = None
    """In LiteLLM's words."""

    @property
    def texts(self) -> list[str]:
        """What a classifier would read: nothing of a response, which is its own."""
        return [t for t in self.given if t.strip()] if self.input_type == "request" else []


class ExternalAuthz:
    """Answers proxies that ask whether a request may pass."""

    def __init__(self, models: Registry, recorder: Recorder, settings: RequestLimits) -> None:
        self._models, self._recorder, self._settings = models, recorder, settings

    async def guardrail(self, request: Request) -> Response:
        """Say whether LiteLLM is to block a request."""
        by = caller_of(request)
        with self._recorder.record(GUARDRAIL, request.state.request_id, by) as entry:
            async with Deadline(self._settings.request_timeout_s):
                _, data = await read_json(request, self._settings)
                asked = parse(data, GuardrailRequest, self._settings)
                decisions: Sequence[Decision] = []
                if asked.texts:
                    # LiteLLM has names of its own; a single model is meant by all of them.
                    named = asked.model if len(self._models) > 1 else None
                    with self._models.get(prefixed(request) or named).lease() as gateway:
                        work = gateway.judge(entry, asked.texts)
                        decisions = await while_connected(request, work)
        if Decision.REJECT in decisions:
            return json_response(200, {"action": "BLOCKED", "blocked_reason": FOUND})
        return json_response(200, {"action": "NONE"})

    async def authorize(self, request: Request, known: "Routes", route: str = AUTHZ) -> Response:
        """Say whether Envoy is to let a request pass: 200, or the answer that its caller gets."""
        by = caller_of(request)
        with self._recorder.record(route, request.state.request_id, by) as entry:
            async with Deadline(self._settings.request_timeout_s):
                if request.headers.get(PARTIAL_BODY, "false").lower() != "false":
                    raise NotInspected("the proxy has not sent the whole body to be screened")
                if request.method in ("GET", "HEAD") and await _is_bare(request):
                    return Response()  # health and metadata: there is nothing to classify
                if request.url.query:
                    raise NotInspected("a query string is not screened; send none")
                protocols, parameters = known.find(request.method, request.path_params["path"])
                request.state.protocol = protocols[0]
                _, data = await read_json(
                    request, self._settings, media_optional=protocols[0].media_optional
                )
                protocol = request.state.protocol = choose(protocols, data)
                asked = parse(data, protocol.request_type, self._settings)
                named = parameters.get("model"), asked.model_name
                with self._models.get(prefixed(request), *named).lease() as gateway:
                    work = gateway.judge(entry, asked.texts)
                    decisions = await while_connected(request, work)
        headers = {"x-psim-decision": worst(decisions)}
        if Decision.REJECT not in decisions:
            return Response(headers=headers)
        detail = f"an input was rejected: {FOUND}"
        content = protocol.error(403, "rejected", detail)
        return json_response(403, content, headers, protocol.error_media)


class Routes:
    """Finds the protocols of a path, as the router does for what is served here."""

    def __init__(self) -> None:
        self._known = [(compile_path(route)[0], found) for route, found in by_route().items()]

    def find(self, method: str, path: str) -> tuple[Sequence[WireProtocol], dict[str, str]]:
        """Return the protocols that share a path, and its parameters.

        Raises:
            NotInspected: no classifier that we know reads such a request.
        """
        for pattern, protocols in self._known:
            if method == "POST" and (match := pattern.match(f"/{path}")):
                return protocols, match.groupdict()
        raise NotInspected(
            "no protocol has such a method and path; have the proxy route it past us"
        )


async def _is_bare(request: Request) -> bool:
    return not request.url.query and not await request.body()


def routes(guards: ExternalAuthz) -> APIRouter:
    """Return the routes that proxies ask."""
    router, known = APIRouter(include_in_schema=False), Routes()

    @router.post(GUARDRAIL)
    async def guardrail(request: Request) -> Response:
        """Say whether LiteLLM is to block a request."""
        return await guards.guardrail(request)

    @router.api_route(AUTHZ, methods=METHODS)
    async def authorize(request: Request) -> Response:
        """Say whether Envoy is to let a request pass."""
        return await guards.authorize(request, known)

    return router


def processed(guards: ExternalAuthz) -> Starlette:
    """Return what says of each request, at the path it was sent to, whether Envoy may pass it."""
    known = Routes()

    async def authorize(request: Request) -> Response:
        return await guards.authorize(request, known, EXT_PROC)

    app = Starlette(routes=[Route("/{path:path}", authorize, methods=METHODS)])
    app.add_middleware(RequestId, on_bug=internal_error())
    install_error_handlers(app)
    return app
