"""What the hop through the gateway adds to a call of a classifier that is deployed elsewhere.

The classifier is a transformers pipeline of the bundle's victim behind `POST /predict`, in a
process of its own; the gateway is another, and screens what it forwards. Rounds of both are taken
in turns. Printed are medians of a call, what the gateway says it spent on screening, and the ratio

    (gateway - screen) / direct

where the screen is what queue, tokenizing and screening took of the same request (`server-timing`).

    python benchmarks/hop.py run BUNDLE TEXTS.jsonl
"""

import asyncio
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
import uvicorn
from rich.console import Console
from rich.table import Table
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers import pipeline

from models.offline.io.samples import load_samples

ROUNDS, CONNECTIONS = 5, (1, 8, 32)
TIMING = re.compile(r"(\w+);dur=([\d.]+)")
app = typer.Typer()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@app.command()
def serve(bundle: Path, port: int) -> None:
    """Serve the bare classifier; the benchmark starts this itself."""
    run: Any = pipeline(
        "text-classification", model=str(bundle / "victim"), tokenizer=str(bundle / "tokenizer")
    )

    async def predict(request: Request) -> JSONResponse:
        texts = [text for (text,) in (await request.json())["inputs"]]
        return JSONResponse(await asyncio.to_thread(run, texts, top_k=None))

    routes = [Route("/predict", predict, methods=["POST"])]
    uvicorn.run(Starlette(routes=routes), port=port, log_level="error")


@asynccontextmanager
async def process(command: Sequence[str], url: str, **settings: str) -> AsyncIterator[str]:
    """Run a server until the block ends; begin when it answers."""
    running = subprocess.Popen(
        [sys.executable, *command], env=os.environ | settings, stderr=subprocess.DEVNULL
    )
    try:
        async with aiohttp.ClientSession() as session:
            for _ in range(1200):
                try:
                    async with session.get(f"{url}/ready") as answer:
                        if answer.status in (200, 404):
                            break
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.1)
        yield url
    finally:
        running.terminate()
        running.wait(30)


async def round_of(
    session: aiohttp.ClientSession, url: str, texts: Sequence[str], connections: int
) -> list[tuple[float, float]]:
    """Return (seconds of a call, seconds of it that were screening) of every text."""
    waiting = iter(texts)
    took: list[tuple[float, float]] = []

    async def caller() -> None:
        for text in waiting:
            started = time.perf_counter()
            async with session.post(f"{url}/predict", json={"inputs": [[text]]}) as answer:
                await answer.read()
            seconds = time.perf_counter() - started
            if answer.status not in (200, 403):
                raise SystemExit(f"{url} answered with {answer.status}")
            if answer.status == 200:
                stages = dict(TIMING.findall(answer.headers.get("server-timing", "")))
                screen = sum(float(stages.get(s, 0)) for s in ("queue", "tokenize", "screen"))
                took.append((seconds, screen / 1000))

    await asyncio.gather(*(caller() for _ in range(connections)))
    return took


async def measure(bundle: Path, texts: Sequence[str]) -> Table:
    upstream, gateway = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    bare = [__file__, "serve", str(bundle), upstream.rsplit(":", 1)[1]]
    settings = {
        "PSIM_BUNDLE": str(bundle),
        "PSIM_PORT": gateway.rsplit(":", 1)[1],
        "PSIM_UPSTREAM": upstream,
        "PSIM_UPSTREAM_PROTOCOL": "tei",
        "PSIM_THREADS": "1",
    }
    columns = ("connections", "direct, ms", "gateway, ms", "of it screen, ms", "ratio", "rounds")
    table = Table(*columns)
    async with (
        process(bare, upstream),
        process(["-m", "service"], gateway, **settings),
        aiohttp.ClientSession() as session,
    ):
        for connections in CONNECTIONS:
            direct: list[tuple[float, float]] = []
            guarded: list[tuple[float, float]] = []
            ratios = []
            for url in (upstream, gateway):  # to warm up
                await round_of(session, url, texts[: 4 * connections], connections)
            for _ in range(ROUNDS):
                one = await round_of(session, upstream, texts, connections)
                two = await round_of(session, gateway, texts, connections)
                ratios.append(ratio(one, two))
                direct += one
                guarded += two
            table.add_row(
                str(connections),
                f"{1000 * statistics.median(s for s, _ in direct):.2f}",
                f"{1000 * statistics.median(s for s, _ in guarded):.2f}",
                f"{1000 * statistics.median(s for _, s in guarded):.2f}",
                f"{ratio(direct, guarded):.2f}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
            )
    return table


def ratio(direct: Sequence[tuple[float, float]], guarded: Sequence[tuple[float, float]]) -> float:
    hop = statistics.median(seconds - screen for seconds, screen in guarded)
    return hop / statistics.median(seconds for seconds, _ in direct)


@app.command()
def run(
    bundle: Path,
    texts: str,
    most: Annotated[int, typer.Option(help="Texts in a round.")] = 128,
) -> None:
    """Compare calls through the gateway with direct ones."""
    samples = [s.text for s in load_samples(texts, drop_empty=True)][:most]
    Console().print(asyncio.run(measure(bundle, samples)))


if __name__ == "__main__":
    app()
