"""How long a lone short request waits beside bulk load, and what the bulk gets.

Callers with 128 long texts each keep the batcher busy, in a closed loop; beside them one asks for a
short text every now and then. No HTTP, which does not queue.

    python benchmarks/fairness.py BUNDLE
"""

import asyncio
import time
from pathlib import Path

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from models.bundle.load import load_bundle
from service.inference.batcher import Batcher
from service.observability.metrics import Metrics
from service.settings import Settings

BATCH_TOKENS, CALLERS = (512, 1024, 1536, 2048, 4096), (0, 1, 4)
SHORT, LONG = "a quiet film", "the film was a quiet one and nobody minded " * 15
BULK, PAUSE_S = 128, 0.05


async def measure(
    batcher: Batcher, callers: int, seconds: float
) -> tuple[list[float], list[float], float]:
    """Return seconds of lone requests, those of bulk requests, and texts per second."""
    end = time.perf_counter() + seconds

    async def ask(texts: list[str]) -> float:
        started = time.perf_counter()
        screened = await batcher.screen(texts)
        await batcher.classify([answer.value.state for answer in screened])
        return time.perf_counter() - started

    async def repeat(texts: list[str], pause: float) -> list[float]:
        times = []
        while time.perf_counter() < end:
            times.append(await ask(texts))
            await asyncio.sleep(pause)
        return times

    started = time.perf_counter()
    lone, *bulk = await asyncio.gather(
        repeat([SHORT], PAUSE_S), *(repeat([LONG] * BULK, 0) for _ in range(callers))
    )
    took = time.perf_counter() - started
    bulk_times = [one for times in bulk for one in times]
    return lone, bulk_times, (len(lone) + BULK * len(bulk_times)) / took


def main(
    bundle: Path,
    engine: str | None = None,
    dtype: str | None = None,
    seconds: float = 20,
    threads: int = torch.get_num_threads(),
) -> None:
    torch.set_num_threads(threads)
    loaded = load_bundle(bundle, dtype, engine)
    header = ("lone p50, ms", "lone p99, ms", "bulk p50, ms", "texts/s")
    table = Table("PSIM_BATCH_TOKENS", "bulk callers", *header)

    async def run(batch_tokens: int) -> None:
        settings = Settings(
            bundle=bundle, request_timeout_s=600, queue_s=600, batch_tokens=batch_tokens
        )
        batcher = Batcher(loaded, settings, Metrics().of("fairness", settings))
        batcher.start()
        for callers in CALLERS:
            lone, bulk, rate = await measure(batcher, callers, seconds)
            p50, p99 = 1000 * np.percentile(lone, [50, 99])
            of_bulk = f"{1000 * np.median(bulk):.0f}" if bulk else "-"
            figures = (f"{p50:.0f}", f"{p99:.0f}", of_bulk, f"{rate:.0f}")
            table.add_row(str(batch_tokens), str(callers), *figures)
        await batcher.close()

    for batch_tokens in BATCH_TOKENS:
        asyncio.run(run(batch_tokens))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
