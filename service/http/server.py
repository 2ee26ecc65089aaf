"""An additional server in the process and event loop of the service."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from starlette.types import ASGIApp

from models.errors import PsimError

CONNECTIONS = 32
"""Connections at once that a server of a few users has; more are answered with 503."""
KEEP_ALIVE_S = 75
"""Time that an idle connection is kept: longer than proxies and pools keep theirs (nginx 60 s), so
that no request meets a closing connection."""


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the service's main server, which ends this one."""
        yield


@asynccontextmanager
async def serving(
    app: ASGIApp,
    host: str,
    port: int,
    *,
    connections: int | None = CONNECTIONS,
    drain_s: int = 1,
) -> AsyncIterator[int]:
    """Serve an application while the block runs, and yield the port; port 0 takes a free one.

    There may be so many `connections` at once, or any number; requests that run at the end have
    `drain_s`.

    Raises:
        PsimError: the address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise PsimError(f"cannot listen on {host} port {port}: {error}") from error
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        limit_concurrency=connections,
        timeout_graceful_shutdown=drain_s,
        timeout_keep_alive=KEEP_ALIVE_S,
        server_header=False,
    )
    server = _Server(config)
    running = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        await running
