"""The composition root: settings, bundle, gateway, application. The only place that wires."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from fastapi import FastAPI
from opentelemetry.trace import NoOpTracer

from models.bundle import Bundle, load_bundle
from service.api import install_error_handlers, internal_error, routes
from service.audit.store import Store
from service.audit.writer import Writer
from service.batcher import Batcher
from service.explainer import Explainer
from service.gateway import Gateway
from service.metrics import Metrics
from service.middleware import RequestId
from service.recorder import Recorder
from service.settings import Settings, usable_cpus
from service.traces import close_provider, open_provider
from service.victim import LocalVictim

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)


def create_app(
    settings: Settings, bundle: Bundle | None = None, traces: "TracerProvider | None" = None
) -> FastAPI:
    """Build the application; bundle and traces are those that `settings` name, unless given.

    Raises:
        BundleError: the bundle cannot be served.
        PsimError: the audit cannot be opened, or an extra that the settings need is not installed.
    """
    torch.set_num_threads(settings.threads or usable_cpus())
    bundle = bundle or load_bundle(settings.bundle, settings.dtype, settings.engine)
    if settings.traces:
        traces = traces or open_provider()
    tracer = traces.get_tracer("psim") if traces else NoOpTracer()
    metrics = Metrics(bundle, settings.mode)
    metrics.max_queue_inputs.set(settings.queue_inputs)
    metrics.max_queue_characters.set(settings.queue_chars)
    audit = _audit(settings, metrics)
    batcher = Batcher(bundle, settings, metrics)
    victim = LocalVictim(batcher)
    explainer = Explainer(batcher, metrics, settings.searches)
    gateway = Gateway(bundle, batcher, victim, explainer, metrics, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if settings.fail_open:
            log.warning("PSIM_FAIL_OPEN is on: inputs that cannot be screened are classified")
        if audit:
            audit.start()
        batcher.start()
        await gateway.warm_up()
        log.info("ready", extra={"bundle": bundle.digest, "mode": settings.mode})
        yield
        metrics.ready.set(0)
        await batcher.close()
        if audit:
            await asyncio.to_thread(audit.close)
        if traces:
            await asyncio.to_thread(close_provider, traces)

    app = FastAPI(
        title="PSIM Gateway",
        version=version("psim-gateway"),
        lifespan=lifespan,
        # It would export messages of exceptions, which may quote a text; the recorder traces.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.add_middleware(RequestId, on_bug=internal_error())
    install_error_handlers(app)
    recorder = Recorder(metrics, settings.mode, bundle.digest, tracer, audit)
    app.include_router(routes(gateway, recorder, metrics, settings))
    return app


def _audit(settings: Settings, metrics: Metrics) -> Writer | None:
    if settings.audit_url is None:
        return None
    return Writer(
        Store(settings.audit_url.get_secret_value()),
        metrics,
        limit=settings.audit_queue,
        days=settings.audit_days,
        key=settings.audit_key.get_secret_value().encode() if settings.audit_key else None,
        keep_text=settings.audit_text,
    )
