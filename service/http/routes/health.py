"""Health and metadata routes that clients of other servers call before they send texts."""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response

from service.errors import NotReady
from service.http.responses import json_response
from service.http.routing import add_route, prefixed_model
from service.lifecycle.registry import Registry
from service.protocols.oip import metadata
from service.protocols.openai import ModelCard
from service.security.access import caller_of


class HealthRoutes:
    """Open Inference's routes of health and metadata, and `/health` of TEI and vLLM."""

    def __init__(self, models: Registry) -> None:
        self._models = models

    async def ready(self, request: Request) -> Response:
        """Return 200 if PSIM and every classifier answer, else 503."""
        return _state("ready", not self._models.unready_reason(prefixed_model(request)))

    async def live(self) -> Response:
        """Return 200 unless only a new process helps."""
        return _state("live", not self._models.unrecoverable)

    async def server(self, request: Request) -> dict[str, Any]:
        """Return the metadata of this server, or of the upstream if there is one model."""
        own = {"name": "psim-gateway", "version": version("psim-gateway"), "extensions": []}
        if len(self._models) > 1 and prefixed_model(request) is None:
            return own
        with self._models.get(prefixed_model(request)).lease() as gateway:
            gateway.context_of(caller_of(request))
            return await gateway.metadata("/v2") or own

    async def describe(self, request: Request, model: str) -> dict[str, Any]:
        """Return the inputs and outputs of a model."""
        with self._models.get(prefixed_model(request), model).lease() as gateway:
            gateway.context_of(caller_of(request))  # refuses a key that is for other models
            return await gateway.metadata(f"/v2/models/{model}") or metadata(gateway.model_info)

    async def model_ready(self, request: Request, model: str) -> Response:
        """Return 200 if a model answers, else 503."""
        gateway = self._models.get(prefixed_model(request), model).gateway
        if reason := gateway.unready_reason:
            raise NotReady(reason)
        return json_response(200, {"name": model, "ready": True})

    async def v1_model(self, request: Request, model: str) -> Response:
        """Return 200 if a model answers, else 503: as KServe v1 does, and as OpenAI's API."""
        await self.model_ready(request, model)
        card = ModelCard(id=model).model_dump()
        return json_response(200, card | {"name": model, "ready": True})

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter()
        add_route(router, "/health", self.ready)
        add_route(router, "/v2/health/ready", self.ready)
        add_route(router, "/v2/health/live", self.live)
        add_route(router, "/v2", self.server)
        add_route(router, "/v2/models/{model}", self.describe)
        add_route(router, "/v2/models/{model}/ready", self.model_ready)
        add_route(router, "/v1/models/{model}", self.v1_model)
        return router


def _state(name: str, holds: bool) -> Response:
    """Return a state as the status, which most clients read, and in JSON, as KServe's does."""
    return json_response(200 if holds else 503, {name: holds})
