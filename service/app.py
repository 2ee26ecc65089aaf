"""The composition root: settings, bundle, gateway, application. The only place that wires."""

import asyncio
import gc
import logging
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from fastapi import APIRouter, Depends, FastAPI
from opentelemetry.trace import NoOpTracer

from models.bundle.load import Bundle, load_bundle
from models.errors import PsimError
from service.audit.store import AuditStore
from service.audit.writer import Writer
from service.classifiers.local import LocalClassifier
from service.classifiers.upstream import UpstreamClassifier
from service.console.access import anybody
from service.console.app import LOOPBACK, console_app
from service.console.audit_reader import Audit
from service.console.status import ServiceStatus, state
from service.http.middleware import RequestId
from service.http.responses import install_error_handlers, internal_error
from service.http.routes import admin, health
from service.http.routes import classify as front
from service.http.routes import guardrails as guards
from service.http.routes import native as api
from service.http.routes.classify import ClassifyHandler
from service.http.routes.guardrails import ExternalAuthz
from service.http.server import serving
from service.inference.batcher import Batcher, Screener
from service.lifecycle.models_file import settings_by_model
from service.lifecycle.registry import Model, Registry
from service.lifecycle.reload import Reloader
from service.observability import logs
from service.observability.metrics import Metrics, ModelMetrics
from service.observability.traces import close_provider, open_provider
from service.pipeline.challenger import Challenger
from service.pipeline.gateway import Gateway
from service.pipeline.request_record import Recorder
from service.pipeline.trigger_search import TriggerSearch
from service.pipeline.windows import WindowedScreener
from service.protocols.base import ModelInfo
from service.protocols.registry import PREFIX, protocols
from service.security.access import Access, TakeKey
from service.security.keys.file import Keys
from service.security.rate_limit import Limiter
from service.settings import (
    AccessSettings,
    AuditSettings,
    ExtProcSettings,
    Settings,
    usable_cpus,
)

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from service.envoy.ext_proc import ExtProc

log = logging.getLogger(__name__)


def create_app(
    settings: Settings, bundle: Bundle | None = None, traces: "TracerProvider | None" = None
) -> FastAPI:
    """Build the application; bundle and traces are those that `settings` name, unless given.

    Raises:
        BundleError: a bundle cannot be served.
        PsimError: the file of models or the audit cannot be opened, or an extra that the settings
            need is not installed.
    """
    torch.set_num_threads(settings.threads or usable_cpus())
    if settings.traces:
        traces = traces or open_provider()
    tracer = traces.get_tracer("psim") if traces else NoOpTracer()
    metrics = Metrics()

    def build() -> list[Model]:
        return [model_of(one, metrics, bundle) for one in settings_by_model(settings)]

    models = Registry(build())
    metrics.describe(models.bundles)
    reloader = Reloader(models, build, metrics)
    audit = _audit(settings, metrics)
    limiter = _limiter(settings, metrics)
    access = _access(settings, limiter, metrics)
    recorder = Recorder(metrics, tracer, audit)
    proxies = ExternalAuthz(models, recorder, settings)
    ext_proc = _ext_proc(settings, proxies)
    console = _console(settings, models, metrics, access)

    _warn(settings)
    app = FastAPI(
        title="PSIM Gateway",
        version=version("psim-gateway"),
        lifespan=lambda app: _running(models, reloader, limiter, ext_proc, console, audit, traces),
        dependencies=[Depends(access.permit)] if access else [],
        # It would export messages of exceptions, which may quote a text; the recorder traces.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.models = models
    if access:
        app.add_middleware(TakeKey, access=access)
    app.add_middleware(RequestId, on_bug=internal_error())
    install_error_handlers(app)
    app.include_router(api.process_routes(models, metrics))
    if settings.admin:
        app.include_router(admin.routes(models, reloader))
    for router in _about_models(models, recorder, proxies, settings):
        app.include_router(router)
        app.include_router(router, prefix=PREFIX, include_in_schema=False)
    return app


def create_process_app(settings: Settings) -> FastAPI:
    """Return the application of a process that does nothing else, and set up its logs.

    Raises:
        PsimError: it cannot be served by these settings.
    """
    # What was imported stays: a full collection, as after a reload, need not look at it. That is
    # 4 ms in which nothing else runs, instead of 270.
    gc.freeze()
    logs.configure(settings.log_level)
    return create_app(settings)


@asynccontextmanager
async def _running(
    models: Registry,
    reloader: Reloader,
    limiter: Limiter,
    ext_proc: "ExtProc | None",
    console: AbstractAsyncContextManager[int | None],
    audit: Writer | None,
    traces: "TracerProvider | None",
) -> AsyncIterator[None]:
    """Start what runs beside requests; what was started last ends first."""
    async with AsyncExitStack() as ends:
        if traces:
            ends.push_async_callback(asyncio.to_thread, close_provider, traces)
        if audit:
            audit.start()
            ends.push_async_callback(asyncio.to_thread, audit.close)
        ends.push_async_callback(limiter.close)
        await models.start()
        ends.push_async_callback(models.close)
        ends.push_async_callback(reloader.close)
        ends.enter_context(_hangups(reloader))
        if ext_proc:
            await ext_proc.start()
            ends.push_async_callback(ext_proc.close)
        await ends.enter_async_context(console)
        yield


def model_of(settings: Settings, metrics: Metrics, bundle: Bundle | None = None) -> Model:
    """Load and wire what screens and classifies for one model.

    Raises:
        BundleError: the bundle cannot be served.
    """
    if bundle is None:
        assert settings.bundle is not None  # noqa: S101 - of one model
        bundle = load_bundle(settings.bundle, settings.dtype, settings.engine, settings.bundle_key)
    served = served_by(bundle, settings)
    own = metrics.of(served.model, settings)
    batcher = Batcher(bundle, settings, own)
    victim = classifier_of(settings, batcher, served, own)
    windowed_screener = WindowedScreener(batcher, bundle.manifest.max_length, settings.max_windows)
    # A classifier elsewhere may read more than our model does.
    screener: Screener = batcher if settings.upstream is None else windowed_screener
    trigger_search = TriggerSearch(screener, own, settings.searches)
    challenger = _challenger_of(settings, own)
    gateway = Gateway(
        bundle,
        served,
        screener,
        windowed_screener,
        victim,
        trigger_search,
        own,
        settings,
        challenger,
    )
    return Model(gateway, batcher, challenger)


def _challenger_of(settings: Settings, metrics: ModelMetrics) -> Challenger | None:
    if settings.challenger is None:
        return None
    bundle = load_bundle(settings.challenger, settings.dtype, settings.engine, settings.bundle_key)
    return Challenger(bundle, settings, settings.max_windows, metrics)


def _about_models(
    models: Registry, recorder: Recorder, proxies: ExternalAuthz, settings: Settings
) -> Iterator[APIRouter]:
    yield api.routes(models, recorder, settings)
    yield guards.routes(proxies)
    yield health.routes(models)
    yield front.routes(ClassifyHandler(models, recorder, settings))


def served_by(bundle: Bundle, settings: Settings) -> ModelInfo:
    """Return what is behind the routes."""
    name = settings.model or bundle.manifest.victim.name.rsplit("/", 1)[-1]
    return ModelInfo(name, bundle.digest, bundle.manifest.labels)


def classifier_of(
    settings: Settings, batcher: Batcher, served: ModelInfo, metrics: ModelMetrics
) -> LocalClassifier | UpstreamClassifier:
    """Return the classifier: the bundle's, or the one that is deployed elsewhere."""
    if settings.upstream is None:
        return LocalClassifier(batcher, served.labels)
    known = protocols(settings.upstream_input)
    one = settings.upstream_protocol
    candidates = list(known.values()) if one == "auto" else [known[one]]
    return UpstreamClassifier(settings, candidates, served, metrics)


@contextmanager
def _hangups(reloader: Reloader) -> Iterator[None]:
    """Reload on SIGHUP; signals are only to be had in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, reloader.on_signal)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


def _ext_proc(settings: ExtProcSettings, proxies: ExternalAuthz) -> "ExtProc | None":
    if settings.ext_proc_port is None:
        return None
    try:
        from service.envoy.ext_proc import ExtProc
    except ModuleNotFoundError as error:
        raise PsimError(
            f"PSIM_EXT_PROC_PORT needs {error.name}: pip install 'psim-gateway[envoy]'"
        ) from error
    return ExtProc(guards.processed(proxies), settings)


def _console(
    settings: Settings, models: Registry, metrics: Metrics, access: Access | None
) -> AbstractAsyncContextManager[int | None]:
    """Return what serves the console, if there is to be one."""
    if settings.console_port is None:
        return nullcontext()
    audit = Audit(settings.audit_url.get_secret_value()) if settings.audit_url else None
    names = [settings.console_name] if settings.console_name else []

    def states() -> list[ServiceStatus]:
        return [state(model.gateway, metrics, settings) for model in models]

    check = access.console if access else anybody
    console = console_app(audit, states, [*LOOPBACK, *names], check)
    return serving(console, settings.console_host, settings.console_port)


def _warn(settings: Settings) -> None:
    if settings.fail_open:
        log.warning("PSIM_FAIL_OPEN is on: inputs that cannot be screened are classified")
    if settings.open_to_others:
        log.warning("PSIM_KEYS is not set: whoever reaches the port may classify and read metrics")


def _limiter(settings: AccessSettings, metrics: Metrics) -> Limiter:
    shared = settings.limits_url
    return Limiter(shared.get_secret_value() if shared else None, metrics)


def _access(settings: AccessSettings, limiter: Limiter, metrics: Metrics) -> Access | None:
    if settings.keys is None:
        return None
    keys = Keys(settings.keys)
    metrics.keys_stale.set_function(lambda: keys.stale)
    return Access(keys, limiter, metrics)


def _audit(settings: AuditSettings, metrics: Metrics) -> Writer | None:
    if settings.audit_url is None:
        return None
    return Writer(
        AuditStore(settings.audit_url.get_secret_value()),
        metrics,
        limit=settings.audit_queue,
        days=settings.audit_days,
        key=settings.audit_key.get_secret_value().encode() if settings.audit_key else None,
        keep_text=settings.audit_text,
    )
