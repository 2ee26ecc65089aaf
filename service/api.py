"""Native routes: unpack, call the gateway, pack. And the one table of errors."""

import asyncio
from collections.abc import Coroutine
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service.body import read
from service.errors import (
    ClassifyFailed,
    Invalid,
    Malformed,
    NotReady,
    Overloaded,
    ScreenFailed,
    ServiceError,
    TimedOut,
    TooLarge,
    UnsupportedMedia,
)
from service.gateway import Gateway
from service.metrics import Metrics
from service.recorder import Entry, Recorder, all_rejected
from service.schemas import (
    ClassifyRequest,
    ClassifyResponse,
    Decision,
    ExplainRequest,
    ExplainResponse,
    Problem,
    ScreenRequest,
    ScreenResponse,
)
from service.settings import Settings

Answer = TypeVar("Answer")

STATUS: dict[type[ServiceError], int] = {
    Malformed: 400,
    TooLarge: 413,
    UnsupportedMedia: 415,
    Invalid: 422,
    Overloaded: 429,
    ClassifyFailed: 503,
    NotReady: 503,
    ScreenFailed: 503,
    TimedOut: 504,
}
SEVERITY = {decision: number for number, decision in enumerate(Decision)}
PROBLEM_JSON = "application/problem+json"


def problem(
    status: int, code: str, detail: str, headers: dict[str, str] | None = None, **more: Any
) -> Response:
    """Return an error response (RFC 9457)."""
    title = HTTPStatus(status).phrase
    body = Problem(title=title, status=status, detail=detail, code=code, **more)
    return Response(body.model_dump_json(), status, headers, PROBLEM_JSON)


def internal_error() -> Response:
    """Return the answer to a request on which the service has a bug."""
    return problem(500, "internal", "an internal error; the log has it under the request id")


def install_error_handlers(app: FastAPI) -> None:
    """Answer every expected error, unknown paths included, as a problem."""

    async def on_service_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)  # noqa: S101 - registered for it
        retry = {"retry-after": str(error.retry_after_s)} if isinstance(error, Overloaded) else None
        return problem(STATUS[type(error)], error.code, str(error), retry)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        headers = dict(error.headers) if error.headers else None
        return problem(error.status_code, code, str(error.detail), headers)

    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(HTTPException, on_http_error)


def _documented(request: type[BaseModel], response: type[BaseModel]) -> dict[str, Any]:
    """Return OpenAPI arguments: the body is parsed by hand, more strictly than FastAPI does."""
    content = {"application/json": {"schema": request.model_json_schema()}}
    statuses = sorted({403, *STATUS.values()})
    if response is not ClassifyResponse:
        statuses.remove(403)
    return {
        "response_model": response,
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": {
            status: {
                "content": {PROBLEM_JSON: {"schema": Problem.model_json_schema()}},
                "description": HTTPStatus(status).phrase,
            }
            for status in statuses
        },
    }


def routes(gateway: Gateway, recorder: Recorder, metrics: Metrics, settings: Settings) -> APIRouter:
    """Return the native routes over `gateway`."""
    router = APIRouter()

    @router.post("/classify", **_documented(ClassifyRequest, ClassifyResponse))
    async def classify(request: Request) -> Response:
        """Screen every input with PSIM; classify those that may pass."""
        with recorder.record("/classify", request.state.request_id) as entry:
            async with _deadline(settings):
                body = await read(request, ClassifyRequest, settings)
                results = await _while_connected(
                    request, gateway.handle(entry, body.texts, body.top_k)
                )
        answer = ClassifyResponse(bundle=gateway.bundle.digest, results=results)
        worst = max(entry.decisions, key=SEVERITY.__getitem__)
        headers = {"x-psim-decision": worst, "server-timing": _server_timing(entry)}
        if all_rejected(entry.decisions):
            detail = "every input was rejected: PSIM finds a backdoor trigger in it"
            return problem(403, "rejected", detail, headers, **answer.model_dump(mode="json"))
        return _json(answer, headers)

    @router.post("/screen", **_documented(ScreenRequest, ScreenResponse))
    async def screen(request: Request) -> Response:
        """Screen every input with PSIM; classify none."""
        with recorder.record("/screen", request.state.request_id) as entry:
            async with _deadline(settings):
                body = await read(request, ScreenRequest, settings)
                results = await _while_connected(request, gateway.screen(entry, body.texts))
        answer = ScreenResponse(bundle=gateway.bundle.digest, results=results)
        return _json(answer, {"server-timing": _server_timing(entry)})

    @router.post("/explain", **_documented(ExplainRequest, ExplainResponse))
    async def explain(request: Request) -> Response:
        """Say which words of a text the screen minds, and what carries its trigger."""
        with recorder.record("/explain", request.state.request_id):
            async with _deadline(settings):
                body = await read(request, ExplainRequest, settings)
                answer = await _while_connected(request, gateway.explain(body.inputs))
        return _json(answer, {})

    @router.get("/live")
    async def live() -> dict[str, str]:
        """Say that the process answers; 503 when only a new process helps."""
        _require(not gateway.health.beyond_repair, gateway)
        return {"status": "live"}

    @router.get("/ready")
    async def ready() -> dict[str, str]:
        """Say whether PSIM and the classifier answer: 503 while not."""
        _require(gateway.ready, gateway)
        return {"status": "ready"}

    @router.get("/info")
    async def info() -> dict[str, Any]:
        """Say what is served, and within which limits."""
        bundle = gateway.bundle
        passes = round(bundle.engine.passes, 2)
        return {
            "bundle": bundle.digest,
            "mode": settings.mode,
            "engine": {"name": bundle.engine.name, "dtype": bundle.engine.dtype, "passes": passes},
            "limits": {
                name: getattr(settings, name)
                for name in ("max_body_bytes", "max_inputs", "max_chars", "request_timeout_s")
            },
            "manifest": bundle.manifest.model_dump(mode="json", exclude={"files"}),
        }

    @router.get("/metrics")
    async def scrape(request: Request) -> Response:
        """Return the metrics in the format that the scraper asks for."""
        _ = gateway.ready  # brings psim_ready up to date
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), headers={"content-type": content_type})

    return router


def _require(fit: bool, gateway: Gateway) -> None:
    if not fit:
        raise NotReady(f"the inference worker {gateway.health}")


async def _while_connected(request: Request, answer: Coroutine[Any, Any, Answer]) -> Answer:
    """Return the answer, or drop the work and raise `ClientDisconnect` when the caller hangs up."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, watch = asyncio.create_task(answer), asyncio.create_task(gone())
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        watch.cancel()
        if work.cancel():
            await asyncio.wait((work,))


class _deadline:
    """Turn the request's time limit into `TimedOut`."""

    def __init__(self, settings: Settings) -> None:
        self._seconds = settings.request_timeout_s
        self._timeout = asyncio.timeout(self._seconds)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._timeout.__aexit__(*error)
        except TimeoutError:
            raise TimedOut(f"no answer within {self._seconds} s") from None


def _json(answer: BaseModel, headers: dict[str, str]) -> Response:
    return Response(answer.model_dump_json(), 200, headers, "application/json")


def _server_timing(entry: Entry) -> str:
    return ", ".join(f"{stage};dur={1000 * s:.2f}" for stage, s in entry.stages.items())
