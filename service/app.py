"""The composition root: settings, bundle, gateway, application. The only place that wires."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

import torch
from fastapi import FastAPI

from models.bundle import Bundle, load_bundle
from service import api, front, guards, health
from service.batcher import Batcher, Screener
from service.dialects.dialect import Served
from service.dialects.known import dialects
from service.explainer import Explainer
from service.front import Front
from service.gateway import Gateway
from service.guards import Guards
from service.metrics import Metrics
from service.middleware import RequestId
from service.recorder import Recorder
from service.responses import install_error_handlers, internal_error
from service.settings import Settings, usable_cpus
from service.upstream import Upstream
from service.victim import LocalVictim
from service.windows import WholeTexts

log = logging.getLogger(__name__)


def create_app(settings: Settings, bundle: Bundle | None = None) -> FastAPI:
    """Load the bundle that `settings` name, unless one is given, and build the application.

    Raises:
        BundleError: the bundle cannot be served.
    """
    torch.set_num_threads(settings.threads or usable_cpus())
    bundle = bundle or load_bundle(settings.bundle, settings.dtype)
    metrics = Metrics(bundle, settings.mode)
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
        batcher.start()
        await gateway.start()
        log.info("ready", extra={"bundle": bundle.digest, "mode": settings.mode})
        yield
        metrics.ready.set(0)
        await gateway.close()
        await batcher.close()

    app = FastAPI(title="PSIM Gateway", version=version("psim-gateway"), lifespan=lifespan)
    app.add_middleware(RequestId, on_bug=internal_error())
    install_error_handlers(app)
    recorder = Recorder(metrics, settings.mode)
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
