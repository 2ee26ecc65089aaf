"""Routes that classify texts, in every protocol."""

import re
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request, Response

from service.classifiers.base import Call
from service.errors import UnknownModel
from service.http.exchange import Completed, Exchange, Parsed
from service.http.openapi import ERROR_STATUSES, documented
from service.http.parsing import read_inference, require_readable
from service.http.responses import (
    json_response,
    rejected_reason,
    relayed,
    server_timing,
    verdict_headers,
)
from service.http.routing import add_route
from service.pipeline.gateway import Gateway, GatewayResult
from service.protocols.base import ClientProtocol
from service.protocols.native import ClassifyRequest
from service.protocols.registry import by_route
from service.route_table import ROUTES
from service.schemas import ClassifyResponse, Decision
from service.settings import RequestLimits

VERSION = re.compile(r"\w[\w.-]*", re.ASCII)
"""Versions of a model that may become a part of the upstream's path."""


class ClassifyRoutes:
    """One route for each path that protocols classify at."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter()
        for path, protocols in by_route().items():
            documentation: dict[str, Any] = {"response_model": None}
            if ROUTES[path].documented:
                documentation = documented(ClassifyRequest, ClassifyResponse, ERROR_STATUSES)
            add_route(router, path, self._endpoint(path, protocols), **documentation)
        return router

    def _endpoint(
        self, path: str, protocols: Sequence[ClientProtocol]
    ) -> Callable[[Request], Awaitable[Response]]:
        read = partial(_read, protocols)

        async def classify(request: Request) -> Response:
            """Screen every input with PSIM; classify those that may pass."""
            return await self._exchange.run(request, path, read, Gateway.handle, _respond)

        return classify


async def _read(
    protocols: Sequence[ClientProtocol], request: Request, settings: RequestLimits
) -> Parsed[Call]:
    protocol, inference, body, unreadable = await read_inference(request, protocols, settings)
    if not protocol.supports_partial or len(unreadable) == len(inference.texts):
        require_readable(unreadable)
    version = request.path_params.get("version")
    if version is not None and not VERSION.fullmatch(version):
        raise UnknownModel("there is no such version")
    request_id = request.state.request_id
    gaps = {number: str(error) for number, error in unreadable.items()}
    call = Call(inference, protocol, body, request.headers.raw, request_id, version, gaps)
    return Parsed(call, (request.path_params.get("model"), inference.model_name))


def _respond(done: Completed[Call, GatewayResult]) -> Response:
    inference, protocol, outcome = done.body.request, done.body.protocol, done.answer
    headers = {
        **verdict_headers(done.record),
        "server-timing": server_timing(done.record.stages),
    }
    if done.body.unreadable:
        headers["x-psim-decision"] = Decision.REJECT
    if outcome.rejected:
        headers["x-psim-rejected"] = ",".join(map(str, outcome.rejected))
    if outcome.excepted:
        headers["x-psim-excepted"] = ",".join(map(str, outcome.excepted))
    if outcome.refused:
        content = protocol.rejection(inference, outcome.results, done.model_info, _reason(done))
        return json_response(HTTPStatus.FORBIDDEN, content, headers, protocol.error_media)
    if outcome.reply is not None:
        response = relayed(outcome.reply.status, outcome.reply.headers, outcome.reply.body)
        response.headers.update(headers)
        return response
    return json_response(
        HTTPStatus.OK, inference.to_response(outcome.results, done.model_info), headers
    )


def _reason(done: Completed[Call, GatewayResult]) -> str:
    outcome, record = done.answer, done.record
    found = ". ".join([rejected_reason(record), *done.body.unreadable.values()])
    if len(outcome.rejected) == len(outcome.results):
        return f"every input was rejected: {found}"
    numbers = ", ".join(map(str, outcome.rejected))
    return f"input {numbers} of {len(outcome.results)} (from 0) was rejected: {found}"
