"""Bulk screening on Ray Data: whether every row is there once, in how much memory, how fast.

    python benchmarks/bulk.py count OUT [--bundle BUNDLE]       # 1,000,000 generated texts
    python benchmarks/bulk.py compare BUNDLE TEXTS.jsonl OUT    # beside local path and engine

`count` kills the command once half of the parts are there (SIGKILL), and starts it again. Memory is
the sum of the proportional set sizes of all its processes, Ray's own and shared memory among them.
Without a bundle it takes one of a victim that is tiny and untrained: then the rate is that of all
but the model.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import typer
from matplotlib.figure import Figure
from soak import tiny_bundle

from models.bundle.load import load_bundle
from models.offline.attacks.corpus import generate
from models.offline.io.inference import predict
from models.offline.io.samples import load_samples

app = typer.Typer()
MB = 2**20
ENGINE_WARM_UP = 256
"""Texts that compile the engine's graphs before it is timed."""
PSIM = [sys.executable, "-m", "psim", "screen"]


def write_inputs(folder: Path, rows: int, files: int) -> None:
    """Write Parquet files with ids from 0."""
    folder.mkdir(parents=True)
    for number, ids in enumerate(np.array_split(np.arange(rows), files)):
        texts = [sample.text for sample in generate(len(ids), number)]
        table = pa.table({"id": ids, "text": texts})
        pq.write_table(table, folder / f"{number:03}.parquet", row_group_size=20_000)


def command(bundle: Path, inputs: Path, out: Path, part_rows: int) -> list[str]:
    ray = ["--on", "ray", "--out", str(out), "--part-rows", str(part_rows)]
    return [*PSIM, str(inputs), "--bundle", str(bundle), *ray]


def memory(process: psutil.Process) -> float:
    """Return the proportional set sizes of a process and all below it, in MB."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            total += one.memory_full_info().pss
    return total / MB


@contextmanager
def watched(process: psutil.Process, out: Path, points: list[tuple[float, int, float]]) -> (
    Iterator[None]
):  # fmt: skip
    """Add seconds, parts and memory to `points`, every other second."""
    ended, started = threading.Event(), time.perf_counter()

    def watch() -> None:
        while not ended.wait(2):
            with suppress(psutil.NoSuchProcess):
                point = time.perf_counter() - started, len(list(out.glob("*.parquet")))
                size = memory(process)
                if process.status() != psutil.STATUS_ZOMBIE:
                    points.append((*point, size))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def run(asked: list[str], out: Path, kill_at: int | None) -> list[tuple[float, int, float]]:
    """Run the command to its end, or until so many parts are there; return the curve."""
    points: list[tuple[float, int, float]] = []
    process = subprocess.Popen(asked)
    own = psutil.Process(process.pid)
    with watched(own, out, points):
        while process.poll() is None:
            if kill_at is not None and len(list(out.glob("*.parquet"))) >= kill_at:
                below = own.children(recursive=True)
                process.send_signal(signal.SIGKILL)
                psutil.wait_procs(below, timeout=60)
                break
            time.sleep(0.5)
    if process.wait() != (0 if kill_at is None else -signal.SIGKILL):
        raise SystemExit(f"the command ended with {process.returncode}")
    return points


def check_rows(inputs: Path, out: Path) -> None:
    """Exit with an error unless every row is there once, with its text and a verdict."""
    asked = pads.dataset(inputs).to_table().sort_by("id")
    found = pads.dataset(sorted(out.glob("*.parquet"))).to_table().sort_by("id")
    same = asked.equals(found.select(["id", "text"]).cast(asked.schema))
    if not same or found["psim_poisoned"].null_count:
        raise SystemExit("rows are missing, doubled or without a verdict")
    print(
        f"{found.num_rows:,} rows, each of them once; {found['psim_error'].null_count:,} verdicts"
    )


def plot(legs: dict[str, list[tuple[float, int, float]]], part_rows: int, path: Path) -> None:
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, points in legs.items():
        axes.plot([p[1] * part_rows for p in points], [p[2] for p in points], label=name)
    axes.set(xlabel="rows that are written", ylabel="memory of all processes, MB", ylim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


@app.command()
def count(
    out: Path,
    bundle: Path | None = None,
    rows: int = 1_000_000,
    files: int = 20,
    part_rows: int = 10_000,
) -> None:
    bundle = bundle or tiny_bundle(out / "bundle")
    inputs, parts = out / "inputs", out / "parts"
    write_inputs(inputs, rows, files)
    asked = command(bundle, inputs / "*.parquet", parts, part_rows)
    total = sum(-(-len(ids) // part_rows) for ids in np.array_split(np.arange(rows), files))
    legs = {"until it is killed": run(asked, parts, total // 2)}
    before = {part.name: part.stat().st_mtime_ns for part in parts.glob("*.parquet")}
    legs["resumed"] = run(asked, parts, None)
    kept = sum((parts / name).stat().st_mtime_ns == time for name, time in before.items())
    print(f"killed with {len(before)} of {total} parts, of which {kept} were kept")
    check_rows(inputs, parts)
    for name, points in legs.items():
        working = [p for p in points if points[0][1] < p[1] < points[-1][1]]
        (start, first, _), (end, last, _) = working[0], working[-1]
        rate = (last - first) * part_rows / (end - start)
        halves = [np.mean([p[2] for p in half]) for half in np.array_split(working, 2)]
        print(
            f"{name}: {rate:,.0f} rows a second, memory up to {max(p[2] for p in working):.0f} MB, "
            f"on average {halves[0]:.0f} MB, then {halves[1]:.0f} MB"
        )
    (out / "bulk.json").write_text(json.dumps(legs))
    plot(legs, part_rows, out / "bulk.png")


def engine_rate(bundle: Path, texts: Sequence[str]) -> float:
    """Return texts per second of the first stage alone, tokenized before, in batches by length."""
    engine = load_bundle(bundle).engine
    encodings = engine.encode(texts)
    predict(engine, encodings[:ENGINE_WARM_UP])
    started = time.perf_counter()
    predict(engine, encodings)
    return len(texts) / (time.perf_counter() - started)


@app.command()
def compare(
    bundle: Path,
    texts: Path,
    out: Path,
    rows: int = 20_000,
    part_rows: int = 2_500,
    rounds: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    out.mkdir(parents=True)
    inputs = out / "texts.jsonl"
    lines = texts.read_text(encoding="utf-8").splitlines()
    inputs.write_text("\n".join(islice(cycle(lines), rows)), encoding="utf-8")
    known = [sample.text for sample in load_samples(str(texts), drop_empty=True)]
    for number in range(rounds):
        engine = engine_rate(bundle, known)
        asked = [*PSIM, str(inputs), "--bundle", str(bundle)]
        with (out / f"local-{number}.jsonl").open("w") as verdicts:
            started = time.perf_counter()
            subprocess.run(asked, check=True, stdout=verdicts)
            local = time.perf_counter() - started
        asked = command(bundle, inputs, out / f"parts-{number}", part_rows)
        started = time.perf_counter()
        subprocess.run(asked, check=True)
        on_ray = time.perf_counter() - started
        print(
            f"{rows / local:.0f} texts a second by the local path, {rows / on_ray:.0f} on Ray Data "
            f"with {len(os.sched_getaffinity(0))} processors, starts included; {engine:.0f} by the "
            f"engine alone: {rows / local / engine:.2f} and {rows / on_ray / engine:.2f} of that"
        )


if __name__ == "__main__":
    app()
