"""The gateway over HTTP beside other servers of the same model, in the same rounds.

Servers run one at a time on the server CPUs, with one thread to a CPU; the load generator has a CPU
of its own. Every request is one text, from the same file in the same order.
"""

import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from guarded_pass import TEXTS, guarded, load_engine, rates_of
from harness import Result, Setup, pin
from servers import (
    ANSWERED,
    PEERS,
    CannotRunError,
    Peer,
    Running,
    load,
    python_of,
    running,
    version_of,
)
from tqdm import tqdm

from models.engines.base import Engine

WARM_UP_S, OPEN_CONNECTIONS, SHARE = 0.5, 128, 0.7


def summary(level: dict[str, Any]) -> Result:
    """Return throughput in requests a second, and times in ms, of one level."""
    statuses = Counter(level["statuses"])
    p50, p99 = np.percentile(level["ms"], (50, 99)) if level["ms"] else (np.nan, np.nan)
    return {
        "connections": level["connections"],
        "rate": level.get("rate"),
        "per_second": level["per_second"],
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "requests": len(level["statuses"]),
        "errors": {str(s): n for s, n in statuses.items() if s not in ANSWERED},
    }


def under_load(peer: Peer, server: Running, setup: Setup, locust: Path) -> Result:
    """Return what a server does at each number of connections, and the gateway at 70 % of that."""
    timing = {"seconds": setup.seconds, "warm_up": min(WARM_UP_S, setup.seconds)}
    levels: list[dict[str, Any]] = [{"connections": n, **timing} for n in setup.connections]
    found = [summary(level) for level in load(peer, server, setup, levels, locust)]
    paced = None
    if peer is PEERS[0]:
        rate = SHARE * max(level["per_second"] for level in found)
        timing["seconds"] *= 2  # the 99th percentile wants many requests
        steady = {"connections": OPEN_CONNECTIONS, "rate": rate, **timing}
        paced = summary(load(peer, server, setup, [steady], locust)[0])
    return {
        "levels": found, "at_70_percent": paced, "start_s": server.start_s,
        "peak_mb": server.peak_mb,
    }  # fmt: skip


def engine_rates(engine: Engine, setup: Setup) -> dict[str, float]:
    """Return the engine's own guarded texts per second at batches of 1 and 32."""
    allowed = os.sched_getaffinity(0)
    pin(setup)
    encodings = engine.encode(setup.texts[:TEXTS])
    rates = {}
    for size in (1, 32):
        batches = [encodings[i : i + size] for i in range(0, len(encodings), size)]
        rates[str(size)] = rates_of({"": partial(guarded, engine)}, batches, 1)[""][0]
    os.sched_setaffinity(0, allowed)
    return rates


def measure(setup: Setup) -> Result:
    """Return start-up time, memory, and what load did, by peer, dtype and round."""
    locust = python_of(setup, "locust")
    peers = [p for p in PEERS if not setup.peers or p.name in setup.peers]
    engines = {dtype: load_engine(setup, dtype) for dtype in setup.dtypes}
    pythons: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for peer in peers:
        try:
            pythons[peer.name] = python_of(setup, peer.environment, constrained=peer.constrained)
        except CannotRunError as error:
            missing[peer.name] = str(error)
    rows, own = [], []
    turns = [(r, d, p) for r in range(setup.rounds) for d in setup.dtypes for p in peers]
    for number, dtype, peer in (bar := tqdm(turns, desc="http")):
        bar.set_postfix_str(f"{peer.name}, {dtype}")
        if peer is peers[0]:
            own.append({"dtype": dtype, "round": number, **engine_rates(engines[dtype], setup)})
        if peer.name in missing or f"{peer.name}, {dtype}" in missing:
            continue
        try:
            with running(peer, pythons[peer.name], setup, dtype) as server:
                found = under_load(peer, server, setup, locust)
        except CannotRunError as error:
            missing[f"{peer.name}, {dtype}"] = str(error)
            continue
        rows.append({"peer": peer.name, "dtype": dtype, "round": number, **found})
    ran = [peer for peer in peers if peer.name in pythons]
    return {
        "engine": next(iter(engines.values())).name,
        "generator": f"Locust {version_of(locust, 'locust')}",
        "versions": {p.name: version_of(pythons[p.name], p.package) for p in ran},
        "packages": {p.name: p.package for p in peers},
        "guards": [p.name for p in peers if p.guards],
        "weights_mb": {dtype: weights_mb(setup.bundle, dtype) for dtype in setup.dtypes},
        "missing": missing,
        "own": own,
        "rows": rows,
    }


def weights_mb(bundle: Path, dtype: str) -> float:
    """Return the size of the victim's weights, one copy of them, in a dtype; saved in float32."""
    saved = sum(file.stat().st_size for file in (bundle / "victim").glob("*.safetensors"))
    return saved / 2**20 / (2 if dtype == "bfloat16" else 1)
