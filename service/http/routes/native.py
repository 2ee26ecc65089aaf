"""Native routes beside `/classify`."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel

from service.errors import NotReady
from service.http.exchange import Completed, Exchange, Parsed
from service.http.openapi import ERROR_STATUSES, documented, problems
from service.http.parsing import read
from service.http.responses import server_timing
from service.http.routing import add_route, prefixed_model
from service.lifecycle.registry import Registry
from service.observability.metrics import Metrics
from service.pipeline.gateway import Gateway
from service.schemas import (
    ExplainRequest,
    ExplainResponse,
    ScreenRequest,
    ScreenResponse,
    ScreenResult,
    TextsRequest,
)
from service.security.access import caller_of
from service.settings import RequestLimits

Texts = TypeVar("Texts", bound=TextsRequest)
LIMITS = ("max_body_bytes", "max_inputs", "max_chars", "request_timeout_s")
"""RequestLimits that `/info` shows."""
THRESHOLDS = ("calibrations", "recalibration")
"""Parts of a manifest that hold thresholds, which `/info` shows only with scores."""


class ModelRoutes:
    """Native routes about a model."""

    def __init__(self, models: Registry, exchange: Exchange, settings: RequestLimits) -> None:
        self._models, self._exchange, self._settings = models, exchange, settings

    async def screen(self, request: Request) -> Response:
        """Screen every input with PSIM; classify none."""
        return await self._exchange.run(
            request, "/screen", _reader(ScreenRequest), Gateway.screen, _screened
        )

    async def explain(self, request: Request) -> Response:
        """Return the words of a text that raise its score, and those that carry its trigger."""
        return await self._exchange.run(
            request, "/explain", _reader(ExplainRequest), Gateway.explain, _explained
        )

    async def ready(self, request: Request) -> dict[str, str]:
        """Return 200 if PSIM and every classifier answer, else 503."""
        if reason := self._models.unready_reason(prefixed_model(request)):
            raise NotReady(reason)
        return {"status": "ready"}

    async def info(self, request: Request) -> dict[str, Any]:
        """Return the served model and the limits of requests."""
        gateway, caller = self._models.get(prefixed_model(request)).gateway, caller_of(request)
        context, policy = gateway.context_of(caller), gateway.policy_of(caller)
        bundle, engine, parity = gateway.bundle, gateway.bundle.engine, gateway.upstream_parity
        shown: dict[str, Any] = {
            "bundle": bundle.digest,
            "challenger": gateway.challenger,
            "mode": context.mode,
            "unfamiliar": policy.unfamiliar,
            "model": context.model,
            "models": [model.name for model in self._models if caller.may_use(model.name)],
            "override_test": gateway.override_test,
            "upstream": gateway.upstream_protocol,
            "upstream_parity": parity and asdict(parity),
            "engine": {
                "name": engine.name,
                "dtype": engine.dtype,
                "passes": round(engine.forward_passes, 2),
            },
            "limits": {name: getattr(self._settings, name) for name in LIMITS},
            "manifest": bundle.manifest.model_dump(mode="json", exclude={"files", *THRESHOLDS}),
        }
        if caller.sees_scores:
            # After a single text, drift is its score's rank.
            shown["drift"] = [asdict(d) for d in await asyncio.to_thread(gateway.drift.measure)]
            shown["manifest"] |= bundle.manifest.model_dump(mode="json", include={*THRESHOLDS})
        return shown

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter()
        screen = documented(ScreenRequest, ScreenResponse, ERROR_STATUSES)
        explain = documented(ExplainRequest, ExplainResponse, ERROR_STATUSES)
        add_route(router, "/screen", self.screen, **screen)
        add_route(router, "/explain", self.explain, **explain)
        add_route(router, "/ready", self.ready, responses=problems(503))
        add_route(router, "/info", self.info, responses=problems(401, 403))
        return router


class ProcessRoutes:
    """Native routes about the process."""

    def __init__(self, models: Registry, metrics: Metrics) -> None:
        self._models, self._metrics = models, metrics

    async def live(self) -> dict[str, str]:
        """Return 200 if the process answers, and 503 if only a new process helps."""
        if reason := self._models.unrecoverable:
            raise NotReady(reason)
        return {"status": "live"}

    async def scrape(self, request: Request) -> Response:
        """Return the metrics in the format that the scraper accepts."""
        for model in self._models:
            model.gateway.update_gauges()
        self._metrics.compare(await asyncio.to_thread(self._models.drift))
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._metrics.registry), headers={"content-type": content_type})

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter()
        formats = {200: {"content": {"application/openmetrics-text": {}}}, **problems(401, 403)}
        add_route(router, "/live", self.live, responses=problems(503))
        add_route(
            router, "/metrics", self.scrape, response_class=PlainTextResponse, responses=formats
        )
        return router


def _reader(
    request_type: type[Texts],
) -> Callable[[Request, RequestLimits], Awaitable[Parsed[Texts]]]:
    async def read_texts(request: Request, settings: RequestLimits) -> Parsed[Texts]:
        return Parsed(await read(request, request_type, settings))

    return read_texts


def _screened(done: Completed[ScreenRequest, list[ScreenResult]]) -> Response:
    answer = ScreenResponse(bundle=done.model_info.bundle, results=done.answer)
    return _json(answer, {"server-timing": server_timing(done.record.stages)})


def _explained(done: Completed[ExplainRequest, ExplainResponse]) -> Response:
    return _json(done.answer, {})


def _json(answer: BaseModel, headers: dict[str, str]) -> Response:
    return Response(answer.model_dump_json(), 200, headers, "application/json")
