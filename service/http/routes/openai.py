"""OpenAI's routes that are not about classes: moderations, and the list of models."""

from fastapi import APIRouter, Request, Response

from service.http.exchange import Completed, Exchange, Parsed
from service.http.openapi import ERROR_STATUSES, documented, errors
from service.http.parsing import read
from service.http.responses import server_timing, verdict_headers
from service.http.routing import add_route, prefixed_model
from service.lifecycle.registry import Registry
from service.pipeline.gateway import Gateway
from service.protocols.openai import (
    ModelCard,
    ModelList,
    Moderation,
    ModerationRequest,
    ModerationResponse,
    OpenAiError,
)
from service.route_table import MODERATIONS
from service.security.access import caller_of
from service.settings import RequestLimits


class OpenAiRoutes:
    """What hooks for OpenAI's API call."""

    def __init__(self, models: Registry, exchange: Exchange) -> None:
        self._models, self._exchange = models, exchange

    async def moderate(self, request: Request) -> Response:
        """Screen every input with PSIM; classify none."""
        return await self._exchange.run(request, MODERATIONS, _read, Gateway.moderate, _moderated)

    async def list_models(self, request: Request) -> ModelList:
        """Return the models that are served, or the one that the path names."""
        name = prefixed_model(request)
        models = [*self._models] if name is None else [self._models.get(name)]
        may_use = caller_of(request).may_use
        return ModelList(data=[ModelCard(id=m.name) for m in models if may_use(m.name)])

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter()
        responses = errors(OpenAiError, "application/json", *ERROR_STATUSES)
        moderations = documented(ModerationRequest, ModerationResponse, ERROR_STATUSES)
        add_route(router, MODERATIONS, self.moderate, **moderations | {"responses": responses})
        denied = errors(OpenAiError, "application/json", 401, 403)
        add_route(router, "/v1/models", self.list_models, responses=denied)
        return router


async def _read(request: Request, settings: RequestLimits) -> Parsed[ModerationRequest]:
    body = await read(request, ModerationRequest, settings)
    return Parsed(body, (body.model_name,))


def _moderated(done: Completed[ModerationRequest, list[Moderation]]) -> Response:
    answer = ModerationResponse(
        id=f"modr-{done.record.request_id}", model=done.model_info.model, results=done.answer
    )
    timing = {"server-timing": server_timing(done.record.stages)}
    headers = verdict_headers(done.record) | timing
    return Response(answer.model_dump_json(), 200, headers, "application/json")
