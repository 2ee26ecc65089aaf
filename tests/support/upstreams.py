"""A gateway in front of a classifier that answers what it is told to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.support.requests import CLEAN, client_of, listening

SOUND = b'[[{"score":0.75,"label":"positive"},{"score":0.25,"label":"negative"}]]'
ONE_TEI = {"inputs": [[CLEAN]]}


@dataclass
class Peer:
    """A TEI that answers what it is told to, and remembers what it was asked."""

    body: bytes = SOUND
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wait_s: float = 0
    asked: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)

    async def answer(self, request: Request) -> Response:
        self.asked.append((request.url.path, dict(request.headers), await request.body()))
        await asyncio.sleep(self.wait_s)
        return Response(self.body, self.status, self.headers, "application/json")


@asynccontextmanager
async def behind(peer: Peer, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of a gateway in front of a peer that has answered once."""
    kept = peer.body, peer.status, peer.headers, peer.wait_s
    sound = kept[0] if changes.get("upstream_protocol") == "oip" else SOUND
    peer.body, peer.status, peer.headers, peer.wait_s = sound, 200, {}, 0
    app = Starlette(routes=[Route("/{path:path}", peer.answer, methods=["POST"])])
    settings: dict[str, Any] = {"upstream_protocol": "tei", "upstream_retry_s": 60} | changes
    async with listening(app) as url, client_of(upstream=url, **settings) as client:
        peer.body, peer.status, peer.headers, peer.wait_s = kept
        peer.asked.clear()
        yield client
