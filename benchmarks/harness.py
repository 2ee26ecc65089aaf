"""What the benchmarks share: the CPUs they run on, ways timed in turn, ratios with their spread."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

Result = dict[str, Any]
"""What a stage measured, as it goes into its JSON file."""


@dataclass(frozen=True)
class Setup:
    """What is measured, and on what; the same for every peer."""

    bundle: Path
    texts: tuple[str, ...]
    dtypes: tuple[str, ...]
    engine: str | None = None
    """None takes the service's default."""
    rounds: int = 3
    seconds: float = 3
    """Of load for each number of connections, in each round."""
    connections: tuple[int, ...] = (1, 8, 32, 128)
    server_cpus: tuple[int, ...] = (0,)
    """What is measured runs here, one thread to a CPU: engines and servers."""
    load_cpus: tuple[int, ...] = (0,)
    """The load generator runs here."""
    peers: tuple[str, ...] = ()
    """Names of the servers to measure; none for all."""
    build: Path = field(default=Path("build/bench"))
    quick: bool = False
    """A smoke test: so few rounds and sizes that the figures mean nothing."""

    @property
    def threads(self) -> int:
        """Threads of one forward pass."""
        return len(self.server_cpus)


def split_cpus() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return CPUs for what is measured and for the load generator: one of them is the latter's."""
    cpus = sorted(os.sched_getaffinity(0))
    return tuple(cpus[:-1] or cpus), (cpus[-1],)


def pin(setup: Setup) -> None:
    """Keep this process's forward passes to the CPUs that servers get."""
    os.sched_setaffinity(0, setup.server_cpus)
    torch.set_num_threads(setup.threads)


def timed(run: Callable[[], object]) -> float:
    """Return how many seconds a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_turn(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each way by round.

    Taken in turns, so that what else the machine does hits all of them; after one run that warms up
    and is not counted.
    """
    for run in ways.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            seconds[name].append(timed(run))
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return ratios round by round: what slowed a whole round cancels."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median of the rounds, and the least and the most of them in brackets."""
    if not values:
        return "-"
    low, middle, high = (f"{v:.{digits}f}" for v in (min(values), median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def versions() -> dict[str, str]:
    """Return the versions of what all of it is built on."""
    names = ("psim-gateway", "torch", "transformers", "fastapi", "uvicorn", "pydantic")
    return {name: version(name) for name in names}


def machine() -> dict[str, Any]:
    """Return what the machine is: processor, CPUs, memory, and how busy it was before."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else "unknown",
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "load_before": round(os.getloadavg()[0], 1),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
