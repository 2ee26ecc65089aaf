"""What audit, traces and small batches cost: a server with each of them, beside one without.

All servers run; only one at a time is asked, a text per request, rounds in turns. The ratio is
that of requests a second to the server without. Traces go to a collector that takes everything.

    python benchmarks/operations.py BUNDLE TEXTS.jsonl
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import aiohttp
import typer
from aiohttp import web
from harness import ratios, spread
from hop import free_port, process
from rich.console import Console
from rich.table import Table

from models.offline.io.samples import load_samples

CONNECTIONS = (1, 8, 32, 128)


async def per_second(
    session: aiohttp.ClientSession, url: str, texts: Sequence[str], connections: int
) -> float:
    """Return how many requests a second a server answers."""
    waiting = iter(texts)

    async def caller() -> None:
        for text in waiting:
            async with session.post(f"{url}/classify", json={"inputs": text}) as answer:
                await answer.read()
            if answer.status not in (200, 403):
                raise SystemExit(f"{url} answered with {answer.status}")

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(connections)))
    return len(texts) / (time.perf_counter() - started)


async def collector(stack: AsyncExitStack) -> str:
    """Serve a collector of traces until the stack is left; return its URL."""

    async def take(request: web.Request) -> web.Response:
        await request.read()
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    return f"http://127.0.0.1:{port}"


async def measure(bundle: Path, texts: Sequence[str], rounds: int, folder: Path) -> Table:
    """Return a table of throughput by what is on."""
    async with AsyncExitStack() as stack:
        traces = {
            "PSIM_TRACES": "true",
            "OTEL_EXPORTER_OTLP_ENDPOINT": await collector(stack),
        }
        audit = {"PSIM_AUDIT_URL": f"sqlite:///{folder}/audit.db"}
        kept = {
            "PSIM_AUDIT_URL": f"sqlite:///{folder}/texts.db",
            "PSIM_AUDIT_TEXT": "true",
            "PSIM_AUDIT_KEY": "k" * 32,
        }
        large = {"PSIM_BATCH_TOKENS": "4096"}
        ways = {"neither": {}, "audit": audit, "audit, texts, HMAC": kept, "traces": traces}
        ways["batches of 4,096 tokens"] = large
        urls = {}
        for name, settings in ways.items():
            urls[name] = url = f"http://127.0.0.1:{free_port()}"
            common = {"PSIM_BUNDLE": str(bundle), "PSIM_PORT": url.rsplit(":", 1)[1]}
            common |= {"PSIM_THREADS": "1", "PSIM_QUEUE_S": "60"}
            await stack.enter_async_context(process(["-m", "service"], url, **common, **settings))
        session = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        )
        table = Table("connections", "", "requests/s", "of the server without")
        for connections in CONNECTIONS:
            for url in urls.values():  # to warm up
                await per_second(session, url, texts[: 4 * connections], connections)
            found: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name, url in urls.items():
                    found[name].append(await per_second(session, url, texts, connections))
            for name, rates in found.items():
                ratio = spread(ratios(rates, found["neither"]))
                table.add_row(str(connections), name, spread(rates, 0), ratio)
    return table


def main(
    bundle: Path,
    texts: str,
    most: Annotated[int, typer.Option(help="Texts in a round.")] = 256,
    rounds: Annotated[int, typer.Option(help="Rounds in turns.")] = 5,
) -> None:
    """Compare servers with audit and traces with one without."""
    samples = [s.text for s in load_samples(texts, drop_empty=True)][:most]
    with TemporaryDirectory() as folder:
        Console().print(asyncio.run(measure(bundle, samples, rounds, Path(folder))))


if __name__ == "__main__":
    typer.run(main)
