"""The service under overload: at half, full and double its capacity, then at half again.

Requests of one text arrive at random moments (a Poisson process), whether or not earlier ones are
answered. Times count from the moment at which a request was due. The capacity is measured first,
with enough connections to keep the service busy. The service runs on the server CPUs and this
command on a CPU of its own, as in bench.py.

    python benchmarks/overload.py OUT --bundle BUNDLE --texts sst-2/test.jsonl --docs
"""

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import Annotated

import aiohttp
import numpy as np
import typer
from harness import Result, Setup, machine, split_cpus, versions
from matplotlib.figure import Figure
from page import DOCS, fill, markdown
from servers import ANSWERED, PEERS, Running, running

from models.bundle.verify import read_manifest
from models.detection.screen import FloatArray
from models.offline.demo import build
from models.offline.io.samples import load_samples

PHASES = {"half": 0.5, "full": 1.0, "double": 2.0, "half again": 0.5}
"""Offered load by phase, as a share of the capacity."""
CONNECTIONS, WARM_UP_S, EVERY_S = 128, 5, 0.5
REFUSED = 429
DUE, SECONDS, STATUS, RETRY_AFTER = range(4)


@dataclass(frozen=True)
class Sent:
    """A request that has ended."""

    due: float
    """When it had to be sent."""
    seconds: float
    """From then to its end."""
    status: int
    """0 if there was no answer."""
    retry_after: int | None


class Sender:
    """Sends texts to a service, each in a request of its own."""

    def __init__(self, session: aiohttp.ClientSession, texts: Sequence[str]) -> None:
        self._session = session
        self._bodies = cycle([json.dumps({"inputs": text}).encode() for text in texts])
        self._rng = random.Random(0)
        self.sent: list[Sent] = []

    async def send(self, due: float) -> None:
        status, retry_after = 0, None
        headers = {"content-type": "application/json"}
        with suppress(aiohttp.ClientError, TimeoutError):
            async with self._session.post(
                "/classify", data=next(self._bodies), headers=headers
            ) as answer:
                await answer.read()
                status, retry_after = answer.status, answer.headers.get("retry-after")
        after = None if retry_after is None else int(retry_after)
        self.sent.append(Sent(due, time.perf_counter() - due, status, after))

    async def keep_busy(self, connections: int, seconds: float) -> float:
        """Return answers per second where each connection sends when it has its answer."""
        started, before = time.perf_counter(), len(self.sent)

        async def connection() -> None:
            while time.perf_counter() < started + seconds:
                await self.send(time.perf_counter())

        await asyncio.gather(*(connection() for _ in range(connections)))
        answered = sum(one.status in ANSWERED for one in self.sent[before:])
        return answered / (time.perf_counter() - started)

    async def offer(self, rate: float, seconds: float, group: asyncio.TaskGroup) -> None:
        """Send so many a second on average; what is sent then ends in the group."""
        due = started = time.perf_counter()
        while (due := due + self._rng.expovariate(rate)) < started + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(self.send(due))


async def measure(server: Running, texts: Sequence[str], seconds: float) -> Result:
    """Return what the service can do, all that was sent, when phases began, and its memory."""
    memory: list[tuple[float, float]] = []

    async def watch() -> None:
        while True:
            resident = server.process.memory_info().rss / 2**20
            memory.append((time.perf_counter(), resident))
            await asyncio.sleep(EVERY_S)

    url, patience = f"http://127.0.0.1:{server.port}", aiohttp.ClientTimeout(60)
    connector = aiohttp.TCPConnector(limit=0)  # or requests would wait here
    async with aiohttp.ClientSession(url, timeout=patience, connector=connector) as session:
        sender = Sender(session, texts)
        await sender.keep_busy(CONNECTIONS, WARM_UP_S)
        can = await sender.keep_busy(CONNECTIONS, seconds / 3)
        at_capacity = [one.seconds for one in sender.sent[-int(can * seconds / 6) :]]
        sender.sent.clear()
        watching, begins = asyncio.create_task(watch()), []
        async with asyncio.TaskGroup() as group:
            for share in PHASES.values():
                begins.append(time.perf_counter())
                await sender.offer(share * can, seconds, group)
        watching.cancel()
    start = begins[0]
    return {
        "can": can,
        "closed_p99": float(np.percentile(at_capacity, 99)),
        "begins": [one - start for one in begins],
        "sent": [
            (one.due - start, one.seconds, one.status, one.retry_after) for one in sender.sent
        ],
        "memory": [(when - start, resident) for when, resident in memory],
    }  # fmt: skip


def by_second(sent: FloatArray) -> dict[int, FloatArray]:
    """Return what was due in each second."""
    seconds = sent[:, DUE].astype(int)
    return {int(second): sent[seconds == second] for second in np.unique(seconds)}


def answered(sent: FloatArray) -> FloatArray:
    return sent[np.isin(sent[:, STATUS], [*ANSWERED])]


def percentile(sent: FloatArray, q: float) -> float:
    """Return a percentile of the answered requests' times in ms."""
    times = answered(sent)[:, SECONDS]
    return 1000 * float(np.percentile(times, q)) if len(times) else np.nan


def phases(result: Result) -> dict[str, FloatArray]:
    """Return what was due in each phase."""
    sent = array(result)
    edges = [*result["begins"], np.inf]
    return {
        name: sent[(begin <= sent[:, DUE]) & (sent[:, DUE] < end)]
        for name, (begin, end) in zip(PHASES, pairwise(edges), strict=True)
    }


def recovery(result: Result) -> int | None:
    """Return after how many seconds p99 of a second is one that it was before; None if never."""
    by_phase = phases(result)
    usual = max(percentile(those, 99) for those in by_second(by_phase["half"]).values())
    begin = result["begins"][-1]
    for second, those in by_second(by_phase["half again"]).items():
        if percentile(those, 99) <= usual:
            return max(0, second - int(begin))
    return None


def array(result: Result) -> FloatArray:
    return np.array(result["sent"], float)  # None becomes NaN


def table(result: Result) -> str:
    """Return what became of what was offered, by phase."""
    rows, memory = [], np.array(result["memory"])
    for (name, sent), (begin, end) in zip(
        phases(result).items(), pairwise([*result["begins"], np.inf]), strict=True
    ):
        refused = sent[sent[:, STATUS] == REFUSED]
        other = len(sent) - len(refused) - len(answered(sent))
        resident = memory[(begin <= memory[:, 0]) & (memory[:, 0] < end), 1]
        after = refused[:, RETRY_AFTER]
        rows.append([
            name, f"{len(sent) / result['seconds']:.0f}",
            f"{len(answered(sent)) / result['seconds']:.0f}",
            f"{len(refused) / len(sent):.1%}", str(other),
            f"{percentile(sent, 50):.0f} / {percentile(sent, 99):.0f}",
            f"{1000 * np.percentile(refused[:, SECONDS], 99):.0f}" if len(refused) else "-",
            f"{after.min():.0f} to {after.max():.0f}" if len(refused) else "-",
            f"{resident.min():.0f} to {resident.max():.0f}",
        ])  # fmt: skip
    header = [
        "offered load", "requests/s", "answered/s", "429", "other errors", "p50 / p99, ms",
        "p99 of a 429, ms", "Retry-After, s", "memory, MB",
    ]  # fmt: skip
    return markdown(header, rows)


def summary(result: Result) -> str:
    """Return the table, what it amounts to, and the conditions."""
    by_phase = phases(result)
    full, double = (percentile(by_phase[name], 99) for name in ("full", "double"))
    after = recovery(result)
    back = "never returns to normal" if after is None else f"is back to normal {after} s"
    used = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    here = result["machine"]
    return (
        f"{table(result)}\n\n"
        f"The p99 of answered requests at double load is **{double / full:.2f}** times the p99 at "
        f"full load. With {CONNECTIONS} connections that keep it busy, the service answers "
        f"{result['can']:.0f} requests a second, with a p99 of "
        f"{1000 * result['closed_p99']:.0f} ms. Latency {back} after the double load ends.\n\n"
        f"{result['at']}, {here['processor']}, one core for the service and one for the load "
        f"generator, {result['seconds']:.0f} s per phase, bundle `{result['bundle']}`, "
        f"{result['texts']} texts; {used}."
    )


def plot(result: Result) -> Figure:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    rates, times, memory = figure.subplots(1, 3)
    seconds = by_second(array(result))
    at = [*seconds]
    rates.plot(at, [len(those) for those in seconds.values()], label="offered", alpha=0.5)
    rates.plot(at, [len(answered(those)) for those in seconds.values()], label="answered")
    refused = [int((those[:, STATUS] == REFUSED).sum()) for those in seconds.values()]
    rates.plot(at, refused, label="429")
    for q in (50, 99):
        times.plot(at, [percentile(those, q) for those in seconds.values()], label=f"p{q}")
    memory.plot(*np.array(result["memory"]).T)
    rates.set(title="requests per second", ylim=(0, None))
    times.set(title="answered within, ms", yscale="log")
    memory.set(title="resident memory, MB", ylim=(0, None))
    for axes in (rates, times, memory):
        axes.set(xlabel="s")
        axes.grid(alpha=0.3)
    rates.legend(fontsize="small")
    times.legend(fontsize="small")
    return figure


def main(
    out: Path,
    bundle: Annotated[Path | None, typer.Option(help="The demo's unless given.")] = None,
    texts: Annotated[str | None, typer.Option(help="The demo's test texts unless given.")] = None,
    dtype: str = "float32",
    seconds: Annotated[float, typer.Option(help="Of each load.")] = 60,
    docs: Annotated[bool, typer.Option(help="Write docs/reliability.md and docs/img.")] = False,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    bundle = (bundle or build()).absolute()
    samples = load_samples(texts or str(bundle.parent / "test.jsonl"), drop_empty=True)
    servers, load = split_cpus()
    chosen = tuple(sample.text for sample in samples)
    setup = Setup(bundle, chosen, (dtype,), server_cpus=servers, load_cpus=load, build=out)
    before = machine()
    with running(PEERS[0], Path(sys.executable), setup, dtype) as server:
        os.sched_setaffinity(0, load)
        result = asyncio.run(measure(server, chosen, seconds))
    result |= {
        "seconds": seconds, "machine": before, "versions": versions(), "texts": len(chosen),
        "bundle": read_manifest(bundle)[0].victim.name,
        "at": time.strftime("%Y-%m-%d", time.gmtime()),
    }  # fmt: skip
    (out / "overload.json").write_text(json.dumps(result))
    print(summary(result))
    plot(result).savefig((DOCS / "img" if docs else out) / "overload.png", dpi=110)
    if docs:
        fill(DOCS / "reliability.md", "reliability", {"load": summary(result)})


if __name__ == "__main__":
    typer.run(main)
