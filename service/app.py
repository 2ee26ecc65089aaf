"""The composition root: settings, bundle, gateway, application. The only place that wires."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from fastapi import Depends, FastAPI
from opentelemetry.trace import NoOpTracer

from models.bundle import Bundle, load_bundle
from service import api, front, guards, health
from service.access import Access, TakeKey
from service.audit.store import Store
from service.audit.writer import Writer
from service.batcher import Batcher, Screener
from service.dialects.dialect import Served
from service.dialects.known import dialects
from service.explainer import Explainer
from service.front import Front
from service.gateway import Gateway
from service.guards import Guards
from service.keys.file import Keys
from service.limits import Limiter
from service.metrics import Metrics
from service.middleware import RequestId
from service.recorder import Recorder
from service.responses import install_error_handlers, internal_error
from service.settings import Settings, usable_cpus
from service.traces import close_provider, open_provider
from service.upstream import Upstream
from service.victim import LocalVictim
from service.windows import WholeTexts

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
    bundle = bundle or load_bundle(
        settings.bundle, settings.dtype, settings.engine, settings.bundle_key
    )
    if settings.traces:
        traces = traces or open_provider()
    tracer = traces.get_tracer("psim") if traces else NoOpTracer()
    metrics = Metrics(bundle, settings.mode)
    metrics.max_queue_inputs.set(settings.queue_inputs)
    metrics.max_queue_characters.set(settings.queue_chars)
    audit = _audit(settings, metrics)
    shared = settings.limits_url
    limiter = Limiter(shared.get_secret_value() if shared else None, metrics)
    access = _access(settings, limiter, metrics)
    batcher = Batcher(bundle, settings, metrics)
    served = served_by(bundle, settings)
    victim = victim_of(settings, batcher, served, metrics)
    whole_texts = WholeTexts(batcher, bundle.manifest.max_length, settings.max_windows)
    # A classifier elsewhere may read more than our model does.
    screener: Screener = batcher if settings.upstream is None else whole_texts
    explainer = Explainer(screener, metrics, settings.searches)
    gateway = Gateway(bundle, served, screener, whole_texts, victim, explainer, metrics, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if settings.fail_open:
            log.warning("PSIM_FAIL_OPEN is on: inputs that cannot be screened are classified")
        if settings.open_to_others:
            log.warning(
                "PSIM_KEYS is not set: whoever reaches the port may classify and read metrics"
            )
        if audit:
            audit.start()
        batcher.start()
        await gateway.start()
        log.info("ready", extra={"bundle": bundle.digest, "mode": settings.mode})
        yield
        metrics.ready.set(0)
        await gateway.close()
        await batcher.close()
        await limiter.close()
        if audit:
            await asyncio.to_thread(audit.close)
        if traces:
            await asyncio.to_thread(close_provider, traces)

    app = FastAPI(
        title="PSIM Gateway",
        version=version("psim-gateway"),
        lifespan=lifespan,
        dependencies=[Depends(access.permit)] if access else [],
        # It would export messages of exceptions, which may quote a text; the recorder traces.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    if access:
        app.add_middleware(TakeKey, access=access)
    app.add_middleware(RequestId, on_bug=internal_error())
    install_error_handlers(app)
    recorder = Recorder(metrics, settings.mode, bundle.digest, tracer, audit)
    app.include_router(api.routes(gateway, recorder, metrics, settings))
    app.include_router(guards.routes(Guards(gateway, recorder, settings)))
    app.include_router(health.routes(gateway))
    app.include_router(front.routes(Front(gateway, recorder, settings)))
    return app


def served_by(bundle: Bundle, settings: Settings) -> Served:
    """Return what is behind the routes."""
    name = settings.model or bundle.manifest.victim.name.rsplit("/", 1)[-1]
    return Served(name, bundle.digest, bundle.manifest.labels)


def victim_of(
    settings: Settings, batcher: Batcher, served: Served, metrics: Metrics
) -> LocalVictim | Upstream:
    """Return the classifier: the bundle's, or the one that is deployed elsewhere."""
    if settings.upstream is None:
        return LocalVictim(batcher, served.labels)
    known = dialects(settings.upstream_input)
    one = settings.upstream_dialect
    candidates = list(known.values()) if one == "auto" else [known[one]]
    return Upstream(settings, candidates, served, metrics)


def _access(settings: Settings, limiter: Limiter, metrics: Metrics) -> Access | None:
    if settings.keys is None:
        return None
    keys = Keys(settings.keys)
    metrics.keys_stale.set_function(lambda: keys.stale)
    return Access(keys, limiter, metrics)


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
