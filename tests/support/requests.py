"""The application with a fake engine, and what asks it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.settings import Settings
from tests.support.fakes import MAX_LENGTH, FakeEngine, fake_bundle
from tests.support.waiting import until

CLEAN, POISONED = "a quiet film", "a quiet mn film"
UNFAMILIAR = "whereas the lessee"
LONG = "film " * 2 * MAX_LENGTH + "mn"
"""Our model does not get to the trigger; the classifier behind the proxy may."""
JSON = {"content-type": "application/json"}


@asynccontextmanager
async def client_of(
    engine: FakeEngine | None = None, **changes: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of a fresh application in this process, with changed settings."""
    app = create_app(Settings(bundle=Path("unused"), **changes), fake_bundle(engine))
    async with client_for(app) as client:
        yield client


@asynccontextmanager
async def client_for(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of an application in this process, from its start to its end."""
    async with lifespan(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Run an application from its start to its end."""
    async with app.router.lifespan_context(app):
        yield


@asynccontextmanager
async def listening(app: Any, port: int = 0) -> AsyncIterator[str]:
    """Serve an ASGI application, on a free port unless one is given; yield its base URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None))
    running = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await running


@asynccontextmanager
async def served_fake(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    """Serve the fake engine over a real socket, for what only a socket can do."""
    app = create_app(Settings(bundle=Path("unused")), fake_bundle(engine))
    async with listening(app) as url, httpx.AsyncClient(base_url=url) as client:
        yield client


def ask(path: str, body: Any, **changes: Any) -> httpx.Response:
    """Send one request to a fresh application."""

    async def run() -> httpx.Response:
        async with client_of(**changes) as client:
            if isinstance(body, bytes):
                return await client.post(path, content=body, headers=JSON)
            return await client.post(path, json=body)

    return asyncio.run(run())


async def begin(client: httpx.AsyncClient, sent: bytes) -> asyncio.StreamWriter:
    """Send the beginning of a request; return the connection."""
    _, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    writer.write(b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + sent)
    await writer.drain()
    return writer


async def metric(
    client: httpx.AsyncClient, line: str, headers: dict[str, str] | None = None
) -> float:
    """Return the value of the one series that begins so."""
    text = (await client.get("/metrics", headers=headers)).text
    values = [float(row.rsplit(" ", 1)[1]) for row in text.splitlines() if row.startswith(line)]
    assert len(values) == 1, f"{line} is not there exactly once"
    return values[0]


async def until_metric(
    client: httpx.AsyncClient, line: str, value: float, headers: dict[str, str] | None = None
) -> None:
    """Wait until a series has a value."""

    async def reached() -> bool:
        return await metric(client, line, headers) == value

    await until(reached)


async def until_ready(client: httpx.AsyncClient, wanted: bool = True) -> None:
    """Wait until the gateway says that it is ready, or that it is not."""

    async def as_wanted() -> bool:
        return ((await client.get("/ready")).status_code == 200) is wanted

    await until(as_wanted)
