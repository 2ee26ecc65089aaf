"""The composition root: settings, bundle, gateway, application. The only place that wires."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

import torch
from fastapi import FastAPI

from models.bundle import Bundle, load_bundle
from service.api import install_error_handlers, internal_error, routes
from service.batcher import Batcher
from service.explainer import Explainer
from service.gateway import Gateway
from service.metrics import Metrics
from service.middleware import RequestId
from service.recorder import Recorder
from service.settings import Settings, usable_cpus
from service.victim import LocalVictim

log = logging.getLogger(__name__)


def create_app(settings: Settings, bundle: Bundle | None = None) -> FastAPI:
    """Load the bundle that `settings` name, unless one is given, and build the application.

    Raises:
        BundleError: the bundle cannot be served.
    """
    torch.set_num_threads(settings.threads or usable_cpus())
    bundle = bundle or load_bundle(settings.bundle, settings.dtype)
    metrics = Metrics(bundle, settings.mode)
    metrics.queue_inputs_limit.set(settings.queue_inputs)
    metrics.queue_characters_limit.set(settings.queue_chars)
    batcher = Batcher(bundle, settings, metrics)
    victim = LocalVictim(batcher)
    explainer = Explainer(batcher, metrics, settings.searches)
    gateway = Gateway(bundle, batcher, victim, explainer, metrics, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if settings.fail_open:
            log.warning("PSIM_FAIL_OPEN is on: inputs that cannot be screened are classified")
        batcher.start()
        await gateway.warm_up()
        log.info("ready", extra={"bundle": bundle.digest, "mode": settings.mode})
        yield
        metrics.ready.set(0)
        await batcher.close()

    app = FastAPI(title="PSIM Gateway", version=version("psim-gateway"), lifespan=lifespan)
    app.add_middleware(RequestId, on_bug=internal_error())
    install_error_handlers(app)
    app.include_router(routes(gateway, Recorder(metrics, settings.mode), metrics, settings))
    return app
