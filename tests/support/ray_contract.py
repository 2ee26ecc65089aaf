"""An application of Ray Serve that gives each test a gateway of its own, with a fake engine."""

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path

from ray import serve
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.app import create_app
from service.ray.replica import Replica, SameRequestId
from service.settings import Settings
from tests.support.fakes import fake_bundle

HEADER = "x-test"
"""Has a name of the gateway that is asked, and its settings, in JSON."""


class Fresh:
    """Answers each name by a gateway of its own; the one before ends."""

    def __init__(self) -> None:
        self._name, self._lock, self._running = "", asyncio.Lock(), AsyncExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        name, changes = json.loads(Headers(scope=scope)[HEADER])
        async with self._lock:
            if name != self._name:
                await self._running.aclose()
                app = create_app(Settings(bundle=Path("unused"), **changes), fake_bundle())
                await self._running.enter_async_context(app.router.lifespan_context(app))
                self._name, self._answer = name, SameRequestId(app)
        await self._answer(scope, receive, send)


class Contract(Replica):
    def __serve_build_asgi_app__(self) -> ASGIApp:
        return Fresh()

    def check_health(self) -> None:
        """It has no application of its own that could be ill."""


app = serve.deployment(max_ongoing_requests=100)(serve.ingress()(Contract)).bind()
