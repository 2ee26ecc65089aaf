"""Whether several service processes on one machine share memory, and the weights among it.

Starts one, two, three processes on the same bundle, asks each a few texts, and adds up their
proportional set sizes: a page that n processes map counts 1/n in each of them. What a process adds
to the sum is what it costs. Processes of other programs with the same libraries make the first one
look smaller than it is.

    python benchmarks/sharing.py BUNDLE
"""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import typer
from memory import served
from rich.console import Console
from rich.table import Table

TEXTS = ["a quiet film", "a quiet film about people who do not talk much to each other"] * 4
MB = 2**20


def pages_of(process: psutil.Process, suffix: str) -> tuple[int, int]:
    """Return resident bytes that are pages of such files, and those of no other process."""
    maps = [m for m in process.memory_maps() if m.path.endswith(suffix)]
    return sum(m.rss for m in maps), sum(m.private_clean + m.private_dirty for m in maps)


def main(
    bundle: Path,
    processes: int = 3,
    engines: Annotated[list[str], typer.Option("--engine")] = ["torch", "openvino"],  # noqa: B006
    dtype: str = "float32",
) -> None:
    table = Table(
        "engine", "processes", "resident", "its own", "weights", "its own", "all", "added"
    )
    for engine in engines:
        os.environ["PSIM_ENGINE"] = engine
        before = 0.0
        with ExitStack() as stack:
            running: list[psutil.Process] = []
            for count in range(1, processes + 1):
                process, url = stack.enter_context(served(bundle, dtype))
                for _ in range(5):
                    httpx.post(f"{url}/classify", json={"inputs": TEXTS}).raise_for_status()
                running.append(process)
                size = process.memory_full_info()
                total = sum(one.memory_full_info().pss for one in running)
                added, before = total - before, total
                figures = size.rss, size.uss, *pages_of(process, ".safetensors"), total, added
                table.add_row(engine, str(count), *(f"{figure / MB:.0f}" for figure in figures))
    Console().print(table)
    files = sum(file.stat().st_size for file in bundle.rglob("*.safetensors"))
    Console().print(f"MB, {dtype}; all weights of the bundle are {files / MB:.0f} on disk")


if __name__ == "__main__":
    typer.run(main)
