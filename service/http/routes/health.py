"""What clients of other servers ask before they infer: are you there, and what have you got?"""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response

from service.errors import NotReady
from service.http.responses import json_response
from service.http.routes.classify import prefixed
from service.lifecycle.registry import Registry
from service.protocols.oip import OpenInference, metadata


def routes(models: Registry) -> APIRouter:
    """Return Open Inference's routes of health and metadata, and TEI's and vLLM's `/health`."""
    router = APIRouter(include_in_schema=False)

    @router.get("/health")
    @router.get("/v2/health/ready")
    async def ready(request: Request) -> Response:
        """Say by the status whether PSIM and every classifier answer."""
        return _said("ready", not models.unready_reason(prefixed(request)))

    @router.get("/v2/health/live")
    async def live() -> Response:
        """Say by the status whether the process is of any use."""
        return _said("live", not models.unrecoverable)

    @router.get("/v2")
    async def server(request: Request) -> dict[str, Any]:
        """Say what server this is, or what the upstream is if there is one model."""
        own = {"name": "psim-gateway", "version": version("psim-gateway"), "extensions": []}
        if len(models) > 1 and prefixed(request) is None:
            return own
        with models.get(prefixed(request)).lease() as gateway:
            return await gateway.metadata("/v2") or own

    @router.get("/v2/models/{model}")
    async def describe(request: Request, model: str) -> dict[str, Any]:
        """Say what a model takes and gives."""
        request.state.protocol = OpenInference()
        with models.get(prefixed(request), model).lease() as gateway:
            return await gateway.metadata(f"/v2/models/{model}") or metadata(gateway.served)

    @router.get("/v2/models/{model}/ready")
    async def model_ready(request: Request, model: str) -> Response:
        """Say whether a model answers."""
        request.state.protocol = OpenInference()
        if unready_reason := models.get(prefixed(request), model).gateway.unready_reason:
            raise NotReady(unready_reason)
        return json_response(200, {"name": model, "ready": True})

    return router


def _said(what: str, so: bool) -> Response:
    """Return what is so by the status, for most clients, and in JSON for KServe's."""
    return json_response(200 if so else 503, {what: so})
