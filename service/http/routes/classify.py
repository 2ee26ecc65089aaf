"""The routes at which texts are classified, in every protocol: unpack, call the gateway, pack."""

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request, Response

from service.classifiers.base import Call
from service.errors import UnknownModel
from service.http.deadline import Deadline, while_connected
from service.http.parsing import parse, read_json
from service.http.responses import PROBLEM_JSON, STATUS, json_response, relayed
from service.lifecycle.registry import Registry
from service.pipeline.gateway import GatewayResult
from service.pipeline.request_record import Recorder, RequestRecord
from service.protocols.base import ModelInfo, WireProtocol
from service.protocols.native import ClassifyRequest
from service.protocols.registry import by_route
from service.schemas import ClassifyResponse, Problem, worst
from service.security.access import caller_of
from service.settings import RequestLimits

VERSION = re.compile(r"\w[\w.-]*", re.ASCII)
"""What may become a part of a path of the upstream's."""


def documented(request: type[Any], response: type[Any], statuses: Sequence[int]) -> dict[str, Any]:
    """Return OpenAPI arguments: the body is parsed by hand, more strictly than FastAPI does."""
    content = {"application/json": {"schema": request.model_json_schema()}}
    return {
        "response_model": response,
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": problems(*statuses),
    }


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what OpenAPI says of errors."""
    content = {PROBLEM_JSON: {"schema": Problem.model_json_schema()}}
    return {s: {"content": content, "description": HTTPStatus(s).phrase} for s in statuses}


class ClassifyHandler:
    """Answers requests for classes."""

    def __init__(self, models: Registry, recorder: Recorder, settings: RequestLimits) -> None:
        self._models, self._recorder, self._settings = models, recorder, settings

    async def classify(
        self, request: Request, route: str, protocols: Sequence[WireProtocol]
    ) -> Response:
        """Screen every input with PSIM; classify those that may pass."""
        request.state.protocol = protocols[0]
        by = caller_of(request)
        with self._recorder.record(route, request.state.request_id, by) as entry:
            async with Deadline(self._settings.request_timeout_s):
                call = await self._call(request, protocols)
                named = request.path_params.get("model"), call.request.model_name
                with self._models.get(prefixed(request), *named).lease() as gateway:
                    outcome = await while_connected(request, gateway.handle(entry, call))
        return _pack(call, outcome, entry, gateway.served)

    async def _call(self, request: Request, protocols: Sequence[WireProtocol]) -> Call:
        optional = protocols[0].media_optional
        body, data = await read_json(request, self._settings, media_optional=optional)
        protocol = choose(protocols, data)
        request.state.protocol = protocol
        asked = parse(data, protocol.request_type, self._settings)
        version = request.path_params.get("version")
        if version is not None and not VERSION.fullmatch(version):
            raise UnknownModel("there is no such version")
        return Call(
            asked,
            protocol,
            body,
            request.headers.raw,
            request.state.request_id,
            version,
        )


def choose(protocols: Sequence[WireProtocol], data: object) -> WireProtocol:
    """Return which protocol of a route a body is written in; the first one is the default."""
    return next((d for d in reversed(protocols) if d.claims(data)), protocols[0])


def prefixed(request: Request) -> str | None:
    """Return the name of the model before the route, if there is one."""
    return request.path_params.get("name")


def routes(front: ClassifyHandler) -> APIRouter:
    """Return the routes of all protocols."""
    router = APIRouter()
    for route, protocols in by_route().items():
        _add(router, front, route, protocols)
    return router


def _add(
    router: APIRouter, front: ClassifyHandler, route: str, protocols: Sequence[WireProtocol]
) -> None:
    arguments: dict[str, Any] = {"response_model": None, "include_in_schema": False}
    if protocols[0].request_type is ClassifyRequest:
        statuses = sorted({403, *STATUS.values()})
        arguments = documented(ClassifyRequest, ClassifyResponse, statuses)

    @router.post(route, **arguments)
    async def classify(request: Request) -> Response:
        """Screen every input with PSIM; classify those that may pass."""
        return await front.classify(request, route, protocols)


def _pack(call: Call, outcome: GatewayResult, entry: RequestRecord, served: ModelInfo) -> Response:
    protocol = call.protocol
    headers = {
        "x-psim-decision": worst(entry.decisions),
        "server-timing": server_timing(entry),
    }
    if outcome.rejected:
        headers["x-psim-rejected"] = ",".join(map(str, outcome.rejected))
    if outcome.refused:
        content = protocol.rejection(call.request, outcome.results, served, _why(outcome))
        return json_response(HTTPStatus.FORBIDDEN, content, headers, protocol.error_media)
    if outcome.reply is not None:
        response = relayed(outcome.reply.status, outcome.reply.headers, outcome.reply.body)
        response.headers.update(headers)
        return response
    return json_response(HTTPStatus.OK, call.request.to_response(outcome.results, served), headers)


def _why(outcome: GatewayResult) -> str:
    screens = [outcome.results[i].screen for i in outcome.rejected]
    found = "PSIM finds a backdoor trigger in it"
    if not all(screen and screen.poisoned for screen in screens):
        found += ", or it is longer than PSIM reads"
    if len(outcome.rejected) == len(outcome.results):
        return f"every input was rejected: {found}"
    numbers = ", ".join(map(str, outcome.rejected))
    return f"input {numbers} of {len(outcome.results)} (from 0) was rejected: {found}"


def server_timing(entry: RequestRecord) -> str:
    """Return the seconds by stage as a header (W3C Server Timing)."""
    return ", ".join(f"{stage};dur={1000 * s:.2f}" for stage, s in entry.stages.items())
