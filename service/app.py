"""The composition root: builds the application from the settings. The only place that wires."""

import asyncio
import gc
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from fastapi import APIRouter, Depends, FastAPI
from fastapi.routing import APIRoute
from opentelemetry.trace import NoOpTracer

from models.bundle.load import Bundle, load_bundle
from models.errors import PsimError
from service.classifiers.local import LocalClassifier
from service.classifiers.upstream import UpstreamClassifier
from service.http.direct import DirectRoutes
from service.http.exchange import Exchange
from service.http.responses import add_request_ids, install_error_handlers
from service.http.routes.admin import AdminRoutes
from service.http.routes.classify import ClassifyRoutes
from service.http.routes.conversations import ConversationRoutes
from service.http.routes.guardrails import ExternalAuthz, ext_proc_app
from service.http.routes.health import HealthRoutes
from service.http.routes.native import ModelRoutes, ProcessRoutes
from service.http.routes.openai import OpenAiRoutes
from service.http.server import serving
from service.inference.batcher import Batcher, Screener
from service.lifecycle.models_file import settings_by_model
from service.lifecycle.registry import Model, Registry
from service.lifecycle.reload import Reloader
from service.observability import logs
from service.observability.event_loop import measured_event_loop
from service.observability.metrics import Metrics, ModelMetrics
from service.observability.traces import close_provider, open_provider
from service.pipeline.challenger import Challenger
from service.pipeline.gateway import Gateway
from service.pipeline.request_record import Recorder
from service.pipeline.trigger_search import TriggerSearch
from service.pipeline.two_stage import TwoStageScreener
from service.pipeline.upstream_parity import ParityCheck
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
    InferenceGrpcSettings,
    RequestLimits,
    Settings,
    UpstreamSettings,
    ignored_variables,
    usable_cpus,
)

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from service.audit.exceptions_reader import Exceptions
    from service.audit.push import Push
    from service.audit.writer import Writer
    from service.console.status import ServiceStatus
    from service.envoy.ext_proc import ExtProc
    from service.grpc.inference import InferenceServer

log = logging.getLogger(__name__)


class BackgroundThread(Protocol):
    """What runs beside requests in a thread of its own."""

    def start(self) -> None:
        """Start the thread."""

    def close(self) -> None:
        """End the thread, in bounded time."""


def create_process_app(settings: Settings) -> FastAPI:
    """Return the application of a process that does nothing else, and set up its logs.

    Raises:
        PsimError: these settings cannot be served.
    """
    # Imported modules stay: a full collection, as after a reload, need not visit them. It then
    # blocks all else for 4 ms instead of 270.
    gc.freeze()
    logs.configure(settings.log_level)
    for warning in ignored_variables(os.environ):
        log.warning(warning)
    return create_app(settings)


def create_app(
    settings: Settings, bundle: Bundle | None = None, traces: "TracerProvider | None" = None
) -> FastAPI:
    """Build the application; `bundle` and `traces` stand in for those of the settings.

    Raises:
        BundleError: a bundle cannot be served.
        PsimError: the file of models or the audit cannot be opened, or an extra is not installed.
    """
    torch.set_num_threads(settings.threads or usable_cpus())
    traces = traces or (open_provider() if settings.traces else None)
    tracer = traces.get_tracer("psim") if traces else NoOpTracer()
    metrics = Metrics()
    exceptions = _exceptions(settings, metrics)

    def build() -> list[Model]:
        return [_model(own, metrics, exceptions, bundle) for own in settings_by_model(settings)]

    models = Registry(build())
    metrics.describe(models.bundles)
    reloader = Reloader(models, build, metrics)
    audit = _audit(settings, metrics)
    limiter = _limiter(settings, metrics)
    access = _access(settings, limiter, metrics)
    exchange = Exchange(models, Recorder(metrics, tracer, audit), settings)
    authz = ExternalAuthz(models, exchange)
    over_grpc = _grpc_servers(settings, models, exchange, authz, access)
    console = _console(settings, models, metrics, access)
    threads = [thread for thread in (audit, exceptions, _push(settings, metrics)) if thread]
    app = _application(
        access,
        [*_model_routes(models, exchange, authz, settings)],
        lambda _: _running(models, metrics, reloader, limiter, over_grpc, console, threads, traces),
    )
    app.state.models = models
    app.include_router(ProcessRoutes(models, metrics).router())
    if settings.admin:
        app.include_router(AdminRoutes(models, reloader).router())
    _warn(settings)
    return app


def _model(
    settings: Settings,
    metrics: Metrics,
    exceptions: "Exceptions | None",
    bundle: Bundle | None = None,
) -> Model:
    """Load and wire one model.

    Raises:
        BundleError: the bundle cannot be served.
        PsimError: nor can it with these settings.
    """
    bundle = bundle or _bundle(settings)
    model_info = _model_info(settings, bundle)
    model_metrics = metrics.of(model_info.model, settings)
    batcher = Batcher(bundle, settings, model_metrics)
    classifier = _classifier(settings, batcher, model_info, model_metrics)
    two_stages = TwoStageScreener(batcher, bundle, settings, model_metrics)
    windowed_screener = WindowedScreener(
        two_stages,
        bundle.manifest.max_length,
        settings.max_windows,
        limit=lambda: settings.upstream_max_length or classifier.max_length,
    )
    screener = _screener(settings, two_stages, windowed_screener, bundle)
    challenger = _challenger(settings, model_metrics)
    gateway = Gateway(
        bundle,
        model_info,
        screener,
        windowed_screener,
        classifier,
        TriggerSearch(screener, model_metrics, settings.searches),
        model_metrics,
        settings,
        challenger,
        _parity(settings, bundle, batcher, classifier, model_metrics),
        exceptions,
    )
    return Model(gateway, batcher, challenger)


def _bundle(settings: Settings) -> Bundle:
    assert settings.bundle is not None  # noqa: S101 - settings of one model have it
    return _loaded(settings.bundle, settings)


def _loaded(path: Path, settings: Settings) -> Bundle:
    key = settings.bundle_key
    return load_bundle(path, settings.dtype, settings.engine, key, apart=True)


def _model_info(settings: Settings, bundle: Bundle) -> ModelInfo:
    manifest = bundle.manifest
    name = settings.model or manifest.victim.name.rsplit("/", 1)[-1]
    return ModelInfo(name, bundle.digest, manifest.labels, manifest.multi_label)


def _screener(
    settings: Settings, two_stages: TwoStageScreener, windowed: WindowedScreener, bundle: Bundle
) -> Screener:
    if settings.upstream is not None:
        return windowed  # a classifier elsewhere may read more of a text than our model does
    if settings.long_texts == "cut":
        return two_stages
    length, most = bundle.manifest.max_length, settings.max_windows
    return WindowedScreener(two_stages, length, most, own_classifier=True)


def _classifier(
    settings: UpstreamSettings, batcher: Batcher, model_info: ModelInfo, metrics: ModelMetrics
) -> LocalClassifier | UpstreamClassifier:
    if settings.upstream is None:
        return LocalClassifier(batcher, model_info)
    known = protocols(settings.upstream_input)
    name = settings.upstream_protocol
    candidates = list(known.values()) if name == "auto" else [known[name]]
    return UpstreamClassifier(settings, candidates, model_info, metrics)


def _parity(
    settings: UpstreamSettings,
    bundle: Bundle,
    batcher: Batcher,
    classifier: LocalClassifier | UpstreamClassifier,
    metrics: ModelMetrics,
) -> ParityCheck | None:
    if isinstance(classifier, LocalClassifier):
        return None
    return ParityCheck(bundle, batcher, classifier, settings, metrics)


def _challenger(settings: Settings, metrics: ModelMetrics) -> Challenger | None:
    if settings.challenger is None:
        return None
    bundle = _loaded(settings.challenger, settings)
    return Challenger(bundle, settings, settings.max_windows, metrics)


# The database's libraries and the console take memory, so they are imported where there is use for
# them.


def _audit(settings: AuditSettings, metrics: Metrics) -> "Writer | None":
    if settings.audit_url is None:
        return None
    from service.audit.store import AuditStore
    from service.audit.writer import Writer

    return Writer(
        AuditStore(settings.audit_url.get_secret_value(), push=settings.push_url is not None),
        metrics,
        limit=settings.audit_queue,
        days=settings.audit_days,
        key=settings.audit_key.get_secret_value().encode() if settings.audit_key else None,
        keep_text=settings.audit_text,
        sample=settings.audit_sample,
    )


def _exceptions(settings: AuditSettings, metrics: Metrics) -> "Exceptions | None":
    """Return the reviewed exceptions; None without the key by which texts are recognized."""
    if settings.audit_url is None or settings.audit_key is None:
        return None
    from service.audit.exceptions_reader import Exceptions

    key = settings.audit_key.get_secret_value().encode()
    return Exceptions(settings.audit_url.get_secret_value(), key, metrics)


def _push(settings: AuditSettings, metrics: Metrics) -> "Push | None":
    if settings.push_url is None or settings.audit_url is None:
        return None
    from service.audit.push import Push

    url = settings.audit_url.get_secret_value()
    return Push(url, str(settings.push_url), settings.push_secret, metrics)


def _limiter(settings: AccessSettings, metrics: Metrics) -> Limiter:
    shared = settings.limits_url
    return Limiter(shared.get_secret_value() if shared else None, metrics)


def _access(settings: AccessSettings, limiter: Limiter, metrics: Metrics) -> Access | None:
    if settings.keys is None:
        return None
    keys = Keys(settings.keys)
    metrics.keys_stale.set_function(lambda: keys.stale)
    return Access(keys, limiter, metrics)


def _grpc_servers(
    settings: Settings,
    models: Registry,
    exchange: Exchange,
    authz: ExternalAuthz,
    access: Access | None,
) -> "list[ExtProc | InferenceServer]":
    found = (
        _ext_proc(settings, authz, access),
        _inference_server(settings, models, exchange, access),
    )
    return [server for server in found if server]


def _ext_proc(
    settings: ExtProcSettings, authz: ExternalAuthz, access: Access | None
) -> "ExtProc | None":
    if settings.ext_proc_port is None:
        return None
    try:
        from service.envoy.ext_proc import ExtProc
    except ModuleNotFoundError as error:
        raise PsimError(
            f"PSIM_EXT_PROC_PORT needs {error.name}: pip install 'psim-gateway[envoy]'"
        ) from error
    return ExtProc(ext_proc_app(authz), settings, access)


def _inference_server(
    settings: InferenceGrpcSettings, models: Registry, exchange: Exchange, access: Access | None
) -> "InferenceServer | None":
    if settings.oip_grpc_port is None:
        return None
    try:
        from service.grpc.inference import InferenceServer
    except ModuleNotFoundError as error:
        raise PsimError(
            f"PSIM_OIP_GRPC_PORT needs {error.name}: pip install 'psim-gateway[oip-grpc]'"
        ) from error
    routes = [HealthRoutes(models).router(), ClassifyRoutes(exchange).router()]
    return InferenceServer(_application(access, routes, lambda _: nullcontext()), settings)


def _console(
    settings: Settings, models: Registry, metrics: Metrics, access: Access | None
) -> AbstractAsyncContextManager[int | None]:
    """Return the server of the console, which does nothing if there is to be none."""
    if settings.console_port is None:
        return nullcontext()
    from service.console.access import anybody
    from service.console.app import LOOPBACK, console_app
    from service.console.audit_reader import Audit
    from service.console.status import service_status

    audit = Audit(settings.audit_url.get_secret_value()) if settings.audit_url else None
    names = [settings.console_name] if settings.console_name else []

    def statuses() -> "list[ServiceStatus]":
        return [service_status(model.gateway, metrics, settings) for model in models]

    check = access.console if access else anybody
    keys = (lambda: access.keys) if access else None
    console = console_app(audit, statuses, [*LOOPBACK, *names], check, keys)
    return serving(console, settings.console_host, settings.console_port)


def _application(
    access: Access | None,
    routers: Sequence[APIRouter],
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]],
) -> FastAPI:
    """Return the application with its middleware and routes about models.

    They are also served behind the prefix that names a model.
    """
    app = FastAPI(
        title="PSIM Gateway",
        version=version("psim-gateway"),
        lifespan=lifespan,
        dependencies=[Depends(access.permit)] if access else [],
        # It would export messages of exceptions, which may quote a text; the recorder traces.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        # A redirect would go to whatever host the caller names, and to plain HTTP.
        redirect_slashes=False,
    )
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    app.add_middleware(DirectRoutes, routes=routes, permit=access.permit if access else None)
    if access:
        app.add_middleware(TakeKey, access=access)
    add_request_ids(app)
    install_error_handlers(app)
    for router in routers:
        app.include_router(router)
        app.include_router(router, prefix=PREFIX, include_in_schema=False)
    return app


def _model_routes(
    models: Registry, exchange: Exchange, authz: ExternalAuthz, settings: RequestLimits
) -> Iterator[APIRouter]:
    """Yield the routes that are about a model."""
    yield ModelRoutes(models, exchange, settings).router()
    yield authz.router()
    yield ConversationRoutes(models, exchange).router()
    yield HealthRoutes(models).router()
    yield OpenAiRoutes(models, exchange).router()
    yield ClassifyRoutes(exchange).router()


def _warn(settings: Settings) -> None:
    if settings.fail_open:
        log.warning("PSIM_FAIL_OPEN is on: inputs that cannot be screened are classified")
    if settings.open_to_others:
        log.warning("PSIM_KEYS is not set: whoever reaches the port may classify and read metrics")
        for name in ("ext_proc_port", "oip_grpc_port"):
            if getattr(settings, name) is not None:
                log.warning(
                    "PSIM_KEYS is not set: whoever reaches PSIM_%s may ask there", name.upper()
                )


@asynccontextmanager
async def _running(
    models: Registry,
    metrics: Metrics,
    reloader: Reloader,
    limiter: Limiter,
    grpc_servers: "Sequence[ExtProc | InferenceServer]",
    console: AbstractAsyncContextManager[int | None],
    threads: Sequence[BackgroundThread],
    traces: "TracerProvider | None",
) -> AsyncIterator[None]:
    """Start everything that runs beside requests; close it in reverse order.

    What can fail half-way in its start is to be closed first: its `close` copes with any state.
    """
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(measured_event_loop(metrics.event_loop_lag))
        if traces:
            stack.push_async_callback(asyncio.to_thread, close_provider, traces)
        for thread in threads:
            thread.start()
            stack.push_async_callback(asyncio.to_thread, thread.close)
        stack.push_async_callback(limiter.close)
        stack.push_async_callback(models.close)
        await models.start()
        stack.push_async_callback(reloader.close)
        stack.enter_context(_reload_on_hangup(reloader))
        for server in grpc_servers:
            stack.push_async_callback(server.close)
            await server.start()
        await stack.enter_async_context(console)
        yield


@contextmanager
def _reload_on_hangup(reloader: Reloader) -> Iterator[None]:
    """Reload on SIGHUP; only the main thread can handle signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, reloader.on_signal)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
