"""Native routes beside `/classify`: unpack, call the gateway, pack."""

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel

from service.errors import NotReady
from service.http.deadline import Deadline, while_connected
from service.http.parsing import read
from service.http.responses import STATUS
from service.http.routes.classify import documented, prefixed, problems, server_timing
from service.lifecycle.registry import Registry
from service.observability.metrics import Metrics
from service.pipeline.request_record import Recorder
from service.schemas import ExplainRequest, ExplainResponse, ScreenRequest, ScreenResponse
from service.security.access import caller_of
from service.settings import Settings

STATUSES = sorted(set(STATUS.values()))


def routes(models: Registry, recorder: Recorder, settings: Settings) -> APIRouter:
    """Return the native routes that are about a model."""
    router = APIRouter()

    @router.post("/screen", **documented(ScreenRequest, ScreenResponse, STATUSES))
    async def screen(request: Request) -> Response:
        """Screen every input with PSIM; classify none."""
        by = caller_of(request)
        with recorder.record("/screen", request.state.request_id, by) as entry:
            async with Deadline(settings.request_timeout_s):
                body = await read(request, ScreenRequest, settings)
                with models.get(prefixed(request)).lease() as gateway:
                    results = await while_connected(request, gateway.screen(entry, body.texts))
        answer = ScreenResponse(bundle=gateway.served.bundle, results=results)
        return _json(answer, {"server-timing": server_timing(entry)})

    @router.post("/explain", **documented(ExplainRequest, ExplainResponse, STATUSES))
    async def explain(request: Request) -> Response:
        """Say which words of a text the screen minds, and what carries its trigger."""
        by = caller_of(request)
        with recorder.record("/explain", request.state.request_id, by) as entry:
            async with Deadline(settings.request_timeout_s):
                body = await read(request, ExplainRequest, settings)
                with models.get(prefixed(request)).lease() as gateway:
                    answer = await while_connected(request, gateway.explain(entry, body.inputs))
        return _json(answer, {})

    @router.get("/ready", responses=problems(503))
    async def ready(request: Request) -> dict[str, str]:
        """Say whether PSIM and every classifier answer: 503 while not."""
        if unready_reason := models.unready_reason(prefixed(request)):
            raise NotReady(unready_reason)
        return {"status": "ready"}

    @router.get("/info", responses=problems(401, 403))
    async def info(request: Request) -> dict[str, Any]:
        """Say what is served, and within which limits."""
        gateway = models.get(prefixed(request)).gateway
        bundle = gateway.bundle
        # Thresholds are of use to who is told scores.
        hidden = {"files"} if caller_of(request).sees_scores else {"files", "calibrations"}
        passes = round(bundle.engine.forward_passes, 2)
        return {
            "bundle": bundle.digest,
            "challenger": gateway.challenger,
            "mode": gateway.mode,
            "model": gateway.served.model,
            "models": [model.name for model in models],
            "upstream": gateway.upstream_protocol,
            "engine": {"name": bundle.engine.name, "dtype": bundle.engine.dtype, "passes": passes},
            "limits": {
                name: getattr(settings, name)
                for name in ("max_body_bytes", "max_inputs", "max_chars", "request_timeout_s")
            },
            "drift": [asdict(one) for one in await asyncio.to_thread(gateway.drift.measure)],
            "manifest": bundle.manifest.model_dump(mode="json", exclude=hidden),
        }

    return router


def process_routes(models: Registry, metrics: Metrics) -> APIRouter:
    """Return the native routes that are about the process."""
    router = APIRouter()

    @router.get("/live", responses=problems(503))
    async def live() -> dict[str, str]:
        """Say that the process answers; 503 when only a new process helps."""
        if models.unrecoverable:
            raise NotReady(models.unrecoverable)
        return {"status": "live"}

    @router.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses={200: {"content": {"application/openmetrics-text": {}}}, **problems(401, 403)},
    )
    async def scrape(request: Request) -> Response:
        """Return the metrics in the format that the scraper asks for."""
        models.unready_reason()  # brings psim_ready up to date
        metrics.compare(await asyncio.to_thread(models.drift))
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), headers={"content-type": content_type})

    return router


def _json(answer: BaseModel, headers: dict[str, str]) -> Response:
    return Response(answer.model_dump_json(), 200, headers, "application/json")
