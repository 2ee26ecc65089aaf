"""Resident memory of the service over many requests of random lengths.

A server in a process of its own, over loopback. Texts are random tokens of the bundle's vocabulary,
of 3 tokens to the model's maximum with a density that falls as length**-2: every length comes, and
short ones dominate, as in traffic. How many callers ask at once is drawn anew for each 200th of the
run, from 1 to 64, so that batches have all shapes. Shadow mode: all is screened and classified.

    python benchmarks/memory.py BUNDLE OUT

The server has the environment of this command, such as ONEDNN_PRIMITIVE_CACHE_CAPACITY.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import psutil
import typer
from matplotlib.figure import Figure
from numpy.polynomial import Polynomial
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from models.bundle.verify import read_manifest

CALLERS, SHORTEST, SAMPLES = 64, 3, 200
SHOWN = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.75, 1.0)
"""Parts of the run that the table shows."""


@contextmanager
def served(bundle: Path, dtype: str) -> Iterator[tuple[psutil.Process, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"BUNDLE": bundle, "DTYPE": dtype, "PORT": port, "MODE": "shadow", "THREADS": 1}
    environment = os.environ | {f"PSIM_{name}": str(value) for name, value in settings.items()}
    # Nothing fails on a machine that is busy with other things.
    environment |= {"PSIM_REQUEST_TIMEOUT_S": "900", "PSIM_STALL_S": "900", "PSIM_QUEUE_S": "900"}
    environment["PSIM_LOG_LEVEL"] = "WARNING"
    process = subprocess.Popen([sys.executable, "-m", "service"], env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None and not is_ready(url):
            time.sleep(0.1)
        yield psutil.Process(process.pid), url
    finally:
        process.terminate()
        process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").is_success
    except httpx.TransportError:
        return False


def random_texts(bundle: Path, count: int, rng: np.random.Generator) -> Iterator[str]:
    """Yield texts by inverse transform sampling of their lengths in tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(bundle / "tokenizer")
    short, long = 1 / SHORTEST, 1 / read_manifest(bundle)[0].max_length
    for u in rng.random(count):
        length = round(1 / (short - u * (short - long)))
        ids = rng.integers(0, len(tokenizer), length - 2)
        yield tokenizer.decode(ids, skip_special_tokens=True).strip() or "word"


async def ask(client: httpx.AsyncClient, texts: list[str], callers: int) -> None:
    """Send each text in a request of its own, so many at a time."""
    waiting = iter(texts)

    async def caller() -> None:
        for text in waiting:
            (await client.post("/classify", json={"inputs": text})).raise_for_status()

    await asyncio.gather(*(caller() for _ in range(callers)))


async def curve(process: psutil.Process, url: str, texts: Iterator[str], count: int, seed: int) -> (
    list[tuple[int, float]]
):  # fmt: skip
    """Return resident memory in MB after so many requests, none first."""
    rng = np.random.default_rng(seed)
    size = max(1, count // SAMPLES)
    points = [(0, resident(process))]
    async with httpx.AsyncClient(base_url=url, timeout=1000) as client:
        for start in track(range(0, count, size)):
            chunk = [text for text, _ in zip(texts, range(min(size, count - start)), strict=False)]
            await ask(client, chunk, int(rng.integers(1, CALLERS + 1)))
            points.append((start + len(chunk), resident(process)))
    return points


def resident(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 2**20


def growth(points: list[tuple[int, float]]) -> float:
    """Return MB per 100,000 requests in the second half, by least squares."""
    requests, resident = np.array(points[len(points) // 2 :]).T
    return 1e5 * float(Polynomial.fit(requests, resident, 1).convert().coef[1])


def plot(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for dtype, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=dtype)
    axes.set(xlabel="requests of random lengths", ylabel="resident memory, MB", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main(
    bundle: Path,
    out: Path,
    requests: int = 100_000,
    dtypes: Annotated[list[str], typer.Option("--dtype")] = ["float32"],  # noqa: B006
    seed: int = 0,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    curves, table = {}, Table("dtype", "requests", "resident, MB")
    for dtype in dtypes:
        texts = random_texts(bundle, requests, np.random.default_rng(seed))
        with served(bundle, dtype) as (process, url):
            started = time.perf_counter()
            curves[dtype] = points = asyncio.run(curve(process, url, texts, requests, seed))
            seconds = time.perf_counter() - started
        shown = [0, *(round(part * (len(points) - 1)) for part in SHOWN)]
        for number in sorted(set(shown)):
            table.add_row(dtype, f"{points[number][0]:,}", f"{points[number][1]:.0f}")
        table.add_row(dtype, "second half", f"{growth(points):+.1f} per 100,000", end_section=True)
        table.add_row(dtype, "per second", f"{requests / seconds:.0f}", end_section=True)
    Console().print(table)
    (out / "memory.json").write_text(json.dumps(curves))
    plot(curves, out / "memory.png")


if __name__ == "__main__":
    typer.run(main)
