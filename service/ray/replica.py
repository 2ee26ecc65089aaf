"""A replica: the whole service, behind Serve's proxy and on a port of its own.

Serve's proxy passes a request to any replica, and takes as much processor time as the request. A
balancer can pass requests to the replicas' own port, PSIM_PORT, which costs nothing more. Routes
that concern one replica, such as `/metrics` and `/admin/reload`, are only called there; `/replicas`
lists the addresses.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psutil
import ray
from fastapi import FastAPI, Response
from ray import serve
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models.errors import PsimError
from service.app import create_process_app
from service.audit.writer import CLOSE_S
from service.http.responses import json_response
from service.http.server import serving
from service.inference.worker import STEP_S
from service.ray.scaling import CHARACTERS, CORES
from service.settings import Settings, is_loopback, load_settings

ANSWER_S = 5
"""Time for all replicas to report their address."""


class Replica:
    """The service with the settings of `PSIM_*`."""

    def create_app(self) -> FastAPI:
        """Return the application.

        Raises:
            PsimError: these settings cannot be served by a replica.
        """
        settings = load_settings()
        for name in ("console_port", "ext_proc_port", "oip_grpc_port"):
            if getattr(settings, name) is not None:
                raise PsimError(f"PSIM_{name.upper()} is of one process: replicas cannot have it")
        app = create_process_app(settings)
        also_serve(app, settings)
        return app

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application for Serve's proxy."""
        self._app, self._process = self.create_app(), psutil.Process()
        return SameRequestId(self._app)

    def check_health(self) -> None:
        """Make Serve replace this replica when only a new process helps, as `/live` reports."""
        if unready_reason := self._app.state.models.unrecoverable:
            raise RuntimeError(unready_reason)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Report the load, for `service.ray.scaling`."""
        return {
            CHARACTERS: self._app.state.models.queued_characters,
            CORES: self._process.cpu_percent() / 100,
        }

    def address(self) -> str:
        """Return the address of this replica's own port."""
        address: str = self._app.state.address
        return address


def also_serve(app: FastAPI, settings: Settings) -> None:
    """Serve the application on the replica's own port too, and add the route `/replicas`."""
    start = app.router.lifespan_context
    host = settings.host
    if not is_loopback(host):
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        own_port = serving(
            app, settings.host, settings.port, connections=None, drain_s=settings.drain_s
        )
        async with start(app) as state, own_port as port:
            app.state.address = f"{host}:{port}"
            yield state

    app.router.lifespan_context = lifespan

    @app.get("/replicas")
    async def replicas() -> Response:
        """Return the addresses of the replicas, in the format of Prometheus HTTP discovery."""
        own = serve.get_replica_context()
        handle = serve.get_deployment_handle(own.deployment, own.app_name)
        answers = await handle.broadcast("address").results_async(
            timeout_s=ANSWER_S, return_exceptions=True
        )
        targets = sorted(address for address in answers if isinstance(address, str))
        return json_response(200, [{"targets": targets}])


class SameRequestId:
    """Removes `x-request-id` from answers if Serve's proxy adds the same one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        request_id = Headers(scope=scope).get("x-request-id") if scope["type"] == "http" else None

        async def send_once(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if headers.get("x-request-id") == request_id:
                    del headers["x-request-id"]
            await send(message)

        await self._app(scope, receive, send_once)


DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}
app = serve.deployment(
    name="gateway",
    # More than PSIM_QUEUE_INPUTS admits has to reach the batcher, which answers 429 to the rest.
    # Serve's default is five.
    max_ongoing_requests=2 * DEFAULTS["queue_inputs"],
    # PSIM_DRAIN_S for requests, again for the worker and its last step; the audit; a margin.
    graceful_shutdown_timeout_s=2 * DEFAULTS["drain_s"] + STEP_S + CLOSE_S + 5,
    health_check_period_s=10,
    health_check_timeout_s=5,
)(serve.ingress()(Replica)).bind()
"""The application that `serve run` and config files name."""
