"""A million inputs through the service; every answer and every count is held against what was sent.

A server in a process of its own, over loopback, with the audit in SQLite. Callers take texts from a
pool, in requests of 1 to 128; some requests are wrong, and some callers hang up. Before it begins
each text is asked about alone: every later answer must be the same, so that one which is another
text's is noticed. At the end, metrics and audit must be what the callers counted.

    python benchmarks/soak.py run OUT                     # with a tiny bundle that is made for it
    python benchmarks/soak.py run OUT --bundle BUNDLE --texts sst-2/test.jsonl --docs
"""

import asyncio
import gc
import json
import os
import random
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from itertools import combinations, groupby
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import aiohttp
import numpy as np
import psutil
import torch
import typer
import uvicorn
from harness import Result, Setup
from matplotlib.figure import Figure
from memory import growth
from page import DOCS, fill, markdown
from prometheus_client.parser import text_string_to_metric_families
from rich.progress import track
from servers import Peer, Running, running
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from models.bundle.verify import read_manifest
from models.offline.attacks.corpus import generate
from models.offline.fitting.fit import fit
from models.offline.fitting.psim import PsimConfig
from models.offline.io.bases import encoder_path
from models.offline.io.samples import load_samples
from service.app import create_process_app
from service.http.server import KEEP_ALIVE_S
from service.observability.metrics import OUTCOMES
from service.schemas import Decision
from service.settings import load_settings

HOST, ROUTE, TEXTS, SAMPLES, ALIKE = "127.0.0.1", "/classify", 1500, 200, 500
SIZES = (1, 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 128)
"""Texts in a request."""
KINDS = {
    "whole": 0.9,
    "too long": 0.01,
    "too many": 0.01,
    "empty": 0.01,
    "malformed": 0.01,
    "half sent": 0.03,
    "hung up": 0.03,
}
"""What is sent, and how often."""
REFUSALS = {"too long": 413, "too many": 413, "empty": 422, "malformed": 400}
SCORES_DIFFER, PROBABILITIES_DIFFER = 1e-3, 1e-5
"""From one batch to another, in float32: 1.7e-4 and 1.5e-7 were seen."""
REST_S, PATIENCE = 3, 20
"""Seconds in which connections are closed, and looks at what is counted until it must add up."""
COUNTS = {
    "files": "open files",
    "threads": "threads",
    "tasks": "asyncio tasks",
    "objects": "Python objects",
}
app = typer.Typer()


@dataclass(frozen=True)
class Answer:
    """What was said of a text."""

    decision: str
    label: str | None
    score: float
    """Of the screen."""
    scores: tuple[float, ...]
    """Of the classifier, the best first; none if the text is rejected."""

    @classmethod
    def of(cls, result: Any) -> "Answer":
        scores = tuple(one["score"] for one in result["scores"] or ())
        return cls(result["decision"], result["label"], result["screen"]["score"], scores)

    def is_like(self, other: "Answer") -> bool:
        return (
            (self.decision, self.label) == (other.decision, other.label)
            and abs(self.score - other.score) <= SCORES_DIFFER * (1 + abs(other.score))
            and np.allclose(self.scores, other.scores, rtol=0, atol=PROBABILITIES_DIFFER)
        )


@dataclass
class Book:
    """What the callers know."""

    pool: list[tuple[str, Answer]] = field(default_factory=list)
    """Texts, and what is to be answered."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """Requests by the outcome that the service must have counted; none of those that hung up."""
    answered: dict[str, list[str]] = field(default_factory=dict)
    """Decisions on the inputs of a request, by its id."""
    hung_up: dict[str, list[str]] = field(default_factory=dict)
    """What they would have been, where nobody waited for them."""
    sent: int = 0
    """Requests of any kind."""
    inputs: int = 0
    """That were answered."""
    wrong: list[str] = field(default_factory=list)
    """What was not answered as it should have been."""


class Callers:
    """Send requests to a service, and keep book of them."""

    def __init__(self, session: aiohttp.ClientSession, port: int, book: Book, seed: int) -> None:
        self._session, self._port, self.book = session, port, book
        self._rng = random.Random(seed)

    async def learn(self, texts: Sequence[str]) -> None:
        """Ask about each text alone; leave those out whose answer may change with their batch."""
        for text in texts:
            name = self._name()
            _, body = await self._post(name, json.dumps({"inputs": [text]}).encode())
            (result,) = body["results"]
            self._note(name, [result["decision"]])
            answer = Answer.of(result)
            margin = abs(answer.score - result["screen"]["threshold"])
            lead = answer.scores[0] - answer.scores[1] if answer.scores else 1
            if margin > 10 * SCORES_DIFFER and lead > 10 * PROBABILITIES_DIFFER:
                self.book.pool.append((text, answer))

    async def ask(self, inputs: int, callers: int) -> None:
        """Send requests, so many at a time, until so many inputs were answered."""

        async def caller() -> None:
            while self.book.inputs < inputs:
                await self._send(self._rng.choices([*KINDS], [*KINDS.values()])[0])

        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(caller())

    async def _send(self, kind: str) -> None:
        name, chosen = self._name(), self._rng.choices(self.book.pool, k=self._rng.choice(SIZES))
        texts, due = [text for text, _ in chosen], [answer for _, answer in chosen]
        match kind:
            case "too long":
                texts = ["a" * 100_001]  # beside others, only this one would be refused
            case "too many":
                texts = texts[:1] * 129
            case "empty":
                texts = [" "]
        body = json.dumps({"inputs": texts}).encode()
        if kind == "half sent":
            await self._leave(name, body, len(body) // 2)
            self.book.outcomes["cancelled"] += 1
        elif kind == "hung up":
            self.book.hung_up[name] = [answer.decision for answer in due]
            await self._leave(name, body, len(body))
        elif kind == "whole":
            await self._check(name, body, due)
        else:
            status, _ = await self._post(name, body[:-1] if kind == "malformed" else body)
            self.book.outcomes["client_error"] += 1
            if status != REFUSALS[kind]:
                self.book.wrong.append(f"{name}, {kind}: {status}")

    async def _check(self, name: str, body: bytes, due: list[Answer]) -> None:
        status, answer = await self._post(name, body)
        if status == 429:
            self.book.outcomes["overloaded"] += 1
            await asyncio.sleep(answer)
            return
        decisions = [one.decision for one in due]
        got = [Answer.of(result) for result in answer["results"]] if status in (200, 403) else []
        if len(got) != len(due) or not all(a.is_like(b) for a, b in zip(got, due, strict=True)):
            self.book.wrong.append(f"{name}, {len(due)} inputs: {status}")
        if (status == 403) != (outcome(decisions) == "rejected"):
            self.book.wrong.append(f"{name}, {decisions}: {status}")
        self._note(name, decisions)

    def _note(self, name: str, decisions: list[str]) -> None:
        self.book.outcomes[outcome(decisions)] += 1
        self.book.answered[name] = decisions
        self.book.inputs += len(decisions)

    def _name(self) -> str:
        self.book.sent += 1
        return f"soak-{self.book.sent}"

    async def _post(self, name: str, body: bytes) -> tuple[int, Any]:
        """Return status and body, or after how many seconds to come back."""
        headers = {"content-type": "application/json", "x-request-id": name}
        async with self._session.post(ROUTE, data=body, headers=headers) as response:
            content = await response.json(content_type=None)
            if response.headers["x-request-id"] != name:
                self.book.wrong.append(f"{name} got the answer to another request")
            if response.status == 429:
                return 429, int(response.headers["retry-after"])
            return response.status, content

    async def _leave(self, name: str, body: bytes, sent: int) -> None:
        """Send so much of a request, and hang up some milliseconds later."""
        head = f"POST {ROUTE} HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\n"
        head += f"x-request-id: {name}\r\ncontent-length: {len(body)}\r\n\r\n"
        _, writer = await asyncio.open_connection(HOST, self._port)
        writer.write(head.encode() + body[:sent])
        await writer.drain()
        await asyncio.sleep(self._rng.uniform(0, 0.05))
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def outcome(decisions: Sequence[str]) -> str:
    """Return as what an answered request counts."""
    return "rejected" if {*decisions} == {"reject"} else "ok"


def client(url: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(None))


async def settled(session: aiohttp.ClientSession, book: Book, audit: Path) -> list[str]:
    """Return what does not add up when all has been written and counted."""
    for _ in range(PATIENCE):
        async with session.get("/metrics") as response:
            metrics = await response.text()
        found = differences(book, metrics, audited(audit))
        if not found:
            break
        await asyncio.sleep(1)
    return found


def differences(book: Book, metrics: str, rows: Mapping[str, list[str]]) -> list[str]:
    """Return what does not add up; nothing if metrics and audit are what the callers counted."""
    found = [*book.wrong, *differences_of_rows(book, rows)]
    # Nobody saw how those that hung up ended: what was answered is in the audit, and what is left
    # was cancelled or refused for load.
    late = Counter(outcome(d) for name, d in book.hung_up.items() if name in rows)
    left, sure = len(book.hung_up) - late.total(), book.outcomes + late
    requests = Counter(
        {one: counted(metrics, "psim_requests_total", route=ROUTE, outcome=one) for one in OUTCOMES}
    )
    more = requests.total() - sure.total()
    if sure - requests or more != left or (requests - sure).keys() - {"cancelled", "overloaded"}:
        found.append(f"{requests} were counted, not {sure} and {left} that hung up")
    inputs = {str(one): counted(metrics, "psim_inputs_total", decision=one) for one in Decision}
    decisions = Counter(decision for those in rows.values() for decision in those)
    if inputs != {one: decisions[one] for one in inputs}:
        found.append(f"{inputs} were counted, {decisions} are in the audit")
    for name in ("psim_queue_inputs", "psim_queue_characters", "psim_audit_dropped_total"):
        if count := counted(metrics, name):
            found.append(f"{name} is {count}")
    return found


def counted(metrics: str, name: str, **labels: str) -> int:
    """Return the sum of the samples that have these labels."""
    families = text_string_to_metric_families(metrics)
    samples = (sample for family in families for sample in family.samples)
    return int(
        sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())
    )


def differences_of_rows(book: Book, rows: Mapping[str, list[str]]) -> list[str]:
    """Return which requests the audit has otherwise than they were answered."""
    due = book.answered | {name: d for name, d in book.hung_up.items() if name in rows}
    return [
        f"{name}: {rows.get(name)} are in the audit, not {due.get(name)}"
        for name in sorted(due.keys() | rows.keys())
        if rows.get(name) != due.get(name)
    ]


def audited(audit: Path) -> dict[str, list[str]]:
    """Return the decisions on the inputs of each request; what is there twice is so here too."""
    with closing(sqlite3.connect(f"file:{audit}?mode=ro", uri=True)) as connection:
        rows = connection.execute(
            "SELECT request_id, decision FROM psim_audit ORDER BY request_id, number"
        )
        return {
            name: [decision for _, decision in those]
            for name, those in groupby(rows, key=lambda row: row[0])
        }


@dataclass(frozen=True)
class State:
    """How the service is after so many answered inputs."""

    inputs: int
    resident_mb: float
    files: int
    threads: int
    tasks: int
    """Of asyncio."""
    objects: int
    """That Python's garbage collector knows."""


async def state(session: aiohttp.ClientSession, process: psutil.Process, inputs: int) -> State:
    async with session.get("/inside") as response:
        inside = await response.json()
    resident = process.memory_info().rss / 2**20
    return State(inputs, resident, process.num_fds(), process.num_threads(), **inside)


async def soak(
    server: Running, texts: Sequence[str], inputs: int, callers: int, seed: int, audit: Path
) -> Result:
    """Return what was counted, what does not add up, and how the service was meanwhile."""
    book, url = Book(), f"http://{HOST}:{server.port}"
    states: list[State] = []

    async def at_rest() -> State:
        await asyncio.sleep(REST_S)
        async with client(url) as session:
            return await state(session, server.process, book.inputs)

    async def watch() -> None:
        async with client(url) as session:
            for inputs_by_then in track(range(0, inputs, max(1, inputs // SAMPLES))):
                while book.inputs < inputs_by_then:
                    await asyncio.sleep(0.1)
                states.append(await state(session, server.process, book.inputs))

    async with client(url) as session:
        await Callers(session, server.port, book, seed).learn(texts)
    before, started = await at_rest(), time.perf_counter()
    async with client(url) as session:
        watching = asyncio.create_task(watch())
        await Callers(session, server.port, book, seed).ask(inputs, callers)
        await watching
    seconds, after = time.perf_counter() - started, await at_rest()
    async with client(url) as session:
        found = await settled(session, book, audit)
    rows = audited(audit)
    return {
        "requests": dict(book.outcomes),
        "hung_up": len(book.hung_up),
        "hung_up_answered": len(book.hung_up.keys() & rows.keys()),
        "decisions": Counter(one for decisions in rows.values() for one in decisions),
        "inputs": book.inputs,
        "pool": len(book.pool),
        "alike": alike([answer for _, answer in book.pool]),
        "differences": found,
        "seconds": seconds,
        "before": asdict(before),
        "after": asdict(after),
        "states": [asdict(one) for one in states],
    }


def alike(answers: Sequence[Answer]) -> float:
    """Return the share of pairs of texts whose answers could be exchanged unnoticed."""
    return mean(one.is_like(other) for one, other in combinations(answers[:ALIKE], 2))


def tiny_bundle(folder: Path, engine: str = "torch") -> Path:
    """Make a bundle of a random model that is small enough for a million inputs on one core."""
    if not folder.exists():
        torch.manual_seed(0)
        tokenizer: Any = AutoTokenizer.from_pretrained(encoder_path())
        size: dict[str, Any] = {
            "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 3,
            "name_or_path": "tiny",
        }  # fmt: skip
        victim: Any = BertForSequenceClassification(BertConfig(**size))
        victim.eval()
        torch.nn.init.normal_(victim.classifier.weight)  # else it has no opinions
        texts = [sample.text for sample in generate(400, seed=1)]
        training = PsimConfig(learning_rate=2e-3, max_steps=20)
        fit(
            victim, tokenizer, texts, folder, name="tiny", frr_budget=0.2, config=training,
            engine=engine,
        )  # fmt: skip
    return folder


def varied_texts(count: int, seed: int) -> list[str]:
    """Return texts of one sentence to two dozen, short ones the most."""
    rng, sentences = random.Random(seed), [sample.text for sample in generate(4 * count, seed)]
    lengths = [min(24, round((1 - rng.random()) ** -0.5)) for _ in range(count)]
    return [" ".join(rng.sample(sentences, length)) for length in lengths]


def plot(result: Result) -> Figure:
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    memory, objects, counts = figure.subplots(1, 3)
    inputs = [one["inputs"] / 1e6 for one in result["states"]]
    memory.plot(inputs, [one["resident_mb"] for one in result["states"]])
    memory.set(title="resident memory, MB")
    objects.plot(inputs, [one["objects"] / 1000 for one in result["states"]])
    objects.set(title="Python objects, thousands")
    for name in ("files", "threads", "tasks"):
        counts.plot(inputs, [one[name] for one in result["states"]], label=COUNTS[name])
    counts.legend(fontsize="small")
    for axes in (memory, objects, counts):
        axes.set(xlabel="million inputs", ylim=(0, None))
        axes.grid(alpha=0.3)
    return figure


def table(result: Result) -> str:
    """Return what was sent and counted, and whether the service grew."""
    late = result["states"][len(result["states"]) // 2 :]
    memory = [one["resident_mb"] for one in late]
    points = [(one["inputs"], one["resident_mb"]) for one in result["states"]]
    requests = result["requests"] | {"hung up": result["hung_up"]}
    lines = [
        ["inputs answered", f"{result['inputs']:,}"],
        ["requests", f"{sum(requests.values()):,}: "
         + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in requests.items())],
        ["hung-up requests that were answered anyway", f"{result['hung_up_answered']:,}"],
        ["inputs by decision, in metrics and audit",
         ", ".join(f"{count:,} {name}" for name, count in result["decisions"].items())],
        ["**wrong, lost or duplicate answers; mismatched counts**",
         f"**{len(result['differences'])}**"],
        ["distinct texts",
         f"{result['pool']:,}; {result['alike']:.3%} of their pairs have equal answers"],
        ["duration", f"{result['seconds'] / 60:.0f} min"],
        ["resident memory in the second half",
         f"{min(memory):.0f} to {max(memory):.0f} MB, {growth(points):+.1f} MB per 100,000 inputs"],
        *([f"{label}: idle before / peak under load / idle after",
           f"{result['before'][name]} / {max(one[name] for one in result['states'])} / "
           f"{result['after'][name]}"] for name, label in COUNTS.items()),
    ]  # fmt: skip
    return markdown([result["about"], ""], lines)


@app.command()
def serve() -> None:
    """Serve as `python -m service` does, with a route that says what is inside."""
    settings = load_settings()
    service = create_process_app(settings)

    @service.get("/inside")
    async def inside() -> dict[str, int]:
        return {"tasks": len(asyncio.all_tasks()), "objects": len(gc.get_objects())}

    uvicorn.run(
        service, port=settings.port, log_config=None, access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )  # fmt: skip


@app.command()
def run(
    out: Path,
    bundle: Path | None = None,
    texts: Annotated[str | None, typer.Option(help="Sentences of our own unless given.")] = None,
    engine: str = "openvino",
    inputs: int = 1_000_000,
    callers: int = 16,
    seed: int = 0,
    docs: Annotated[bool, typer.Option(help="Write docs/reliability.md and docs/img.")] = False,
) -> None:
    """Put a service through it; exit with 1 if anything does not add up."""
    out.mkdir(parents=True, exist_ok=True)
    audit = (out / "audit.db").absolute()
    audit.unlink(missing_ok=True)
    bundle = (bundle or tiny_bundle(out / "bundle", engine)).absolute()
    chosen = (
        [sample.text for sample in load_samples(texts, drop_empty=True)][:TEXTS]
        if texts
        else varied_texts(TEXTS, seed)
    )
    settings = {
        "BUNDLE": bundle,
        "THREADS": 1,
        "UNFAMILIAR": "reject",  # a model without opinions overrides nothing
        "AUDIT_URL": f"sqlite:///{audit}",
        # Nothing is late on a machine that is busy with other things.
        "REQUEST_TIMEOUT_S": 900,
        "STALL_S": 900,
        "ENGINE": engine,
        "DTYPE": "float32",
    }

    def command(python: str, setup: Setup, dtype: str, port: int) -> list[str]:
        return [python, __file__, "serve"]

    def variables(setup: Setup, dtype: str, port: int) -> dict[str, str]:
        return {f"PSIM_{name}": str(value) for name, value in (settings | {"PORT": port}).items()}

    peer = Peer("soak", command, "psim-gateway", variables=variables)
    cpus = tuple(os.sched_getaffinity(0))
    setup = Setup(bundle, tuple(chosen), (), server_cpus=cpus, build=out)
    with running(peer, Path(sys.executable), setup, "float32") as server:
        result = asyncio.run(soak(server, chosen, inputs, callers, seed, audit))
    name = read_manifest(bundle)[0].victim.name
    result["about"] = f"{time.strftime('%Y-%m-%d', time.gmtime())}, bundle `{name}`, `{engine}`"
    (out / "soak.json").write_text(json.dumps(result, indent=1))
    print(table(result))
    for difference in result["differences"][:20]:
        print(difference)
    plot(result).savefig((DOCS / "img" if docs else out) / "soak.png", dpi=110)
    if docs:
        fill(DOCS / "reliability.md", "reliability", {"soak": table(result)})
    raise typer.Exit(bool(result["differences"]))


if __name__ == "__main__":
    app()
