"""What breaks, breaks here: nobody is left waiting, and no label comes without a verdict."""

import asyncio
import hmac
import json
import os
import re
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakSet

import grpc
import httpx
import pytest
import torch
from envoy_data_plane.envoy.service.ext_proc.v3 import ProcessingRequest, ProcessingResponse

from models.engines.base import Encoding, Screening
from models.offline.demo import CLEAN_TEXT, TRIGGERED_TEXT
from service.audit import writer as audit_writer
from service.audit.store import AuditStore
from service.classifiers import upstream
from service.errors import NotReady
from service.inference import worker
from service.inference.batcher import Batcher
from service.pipeline import request_record as recorder
from service.route_table import EXT_PROC
from service.security.keys.file import Keys, Scope, hash_of, read_keys
from tests.support.audit import ROW, rows, writer_of
from tests.support.batchers import running, value
from tests.support.envoy import head
from tests.support.fakes import TRIGGER, FakeEngine
from tests.support.keys import FEW, KEY, bearer, classify, guarded, keys_file
from tests.support.protocols import ASKED, GUARDRAIL
from tests.support.requests import (
    CLEAN,
    POISONED,
    begin,
    client_of,
    metric,
    served_fake,
    until_metric,
)
from tests.support.servers import answers, free_port
from tests.support.upstreams import ONE_TEI, SOUND
from tests.support.waiting import until, wait_for

Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]
ALLOWED = 'psim_inputs_total{decision="allow",mode="enforce",model="fake"}'
DAY = 86400.0


def counted(outcome: str, route: str = "/classify") -> str:
    return f'psim_requests_total{{outcome="{outcome}",route="{route}"}}'


def labels(answer: httpx.Response) -> list[str | None]:
    """Return the labels of an answer, none of which is there without a verdict that it is clean."""
    results = answer.json().get("results", [])
    assert all(r["label"] is None or r["screen"]["poisoned"] is False for r in results)
    return [r["label"] for r in results]


async def until_queued(client: httpx.AsyncClient, inputs: int) -> None:
    await until_metric(client, "psim_queue_inputs", inputs)


# The faults of our neighbours.


async def test_what_waits_for_the_device_keeps_nobody_else_waiting_nor_its_own_deadline() -> None:
    engine = FakeEngine()
    async with client_of(engine, request_timeout_s=1) as client:
        engine.gate.clear()
        started = time.monotonic()
        body = {"inputs": CLEAN}
        calls = [asyncio.create_task(client.post("/classify", json=body)) for _ in range(20)]
        await until_queued(client, 20)
        assert (await client.get("/live")).status_code == 200
        assert not any(call.done() for call in calls), "these are answers of a loop that waited"
        assert {call.status_code for call in await asyncio.gather(*calls)} == {504}
        assert time.monotonic() - started < 10, "they have waited one after the other"
        engine.gate.set()


@pytest.mark.parametrize("name", ASKED)
async def test_a_single_text_and_a_batch_are_refused_alike_and_each_is_counted_once(
    name: str,
) -> None:
    engine = FakeEngine()
    async with client_of(engine, queue_inputs=2) as client:
        path, body, _ = ASKED[name]
        engine.gate.clear()
        held = asyncio.create_task(client.post("/classify", json={"inputs": [CLEAN] * 2}))
        await until_queued(client, 2)
        one, two = [await client.post(path, json=body([CLEAN] * n)) for n in (1, 2)]
        assert (one.status_code, one.headers["retry-after"]) == (429, "1")
        assert (one.status_code, one.headers["retry-after"], one.text) == (
            two.status_code, two.headers["retry-after"], two.text
        )  # fmt: skip
        engine.gate.set()
        assert (await held).status_code == 200
        assert (await client.post(path, json=body([CLEAN]))).status_code == 200
        route = path.replace("/models/fake", "/models/{model}")
        for line, value in {
            counted("overloaded", route): 2,
            counted("ok", route): 1 + (path == "/classify"),
            'psim_overload_total{model="fake",reason="inputs"}': 2,
            ALLOWED: 3,
            "psim_screen_score_count": 3,
            "psim_queue_inputs": 0,
        }.items():
            assert await metric(client, line) == value, line


@pytest.mark.parametrize("more", [{}, {"mode": "shadow"}, {"scanners_suppress": ["psim"]}])
@pytest.mark.parametrize("path", ["/classify", "/envoy/classify", GUARDRAIL])
@pytest.mark.parametrize("query", ["", "?mode=shadow&fail_open=true"])
async def test_no_caller_can_turn_the_screen_off(
    path: str, query: str, more: dict[str, Any]
) -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        body = {"texts" if path == GUARDRAIL else "inputs": [POISONED]} | more
        headers = {"x-psim-mode": "shadow", "x-psim-decision": "allow"}
        answer = await client.post(path + query, json=body, headers=headers)
        assert answer.status_code in (403, 422) or answer.json()["action"] == "BLOCKED"
        assert len(engine.classified) == 1, "more than the warm-up was classified"


@pytest.mark.parametrize("given", [FEW, FEW[:-1] + "-", FEW[:9], "", "é"])
def test_a_key_is_compared_whole_with_every_key_that_there_is(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[str, str]] = []
    known = Keys(keys_file(tmp_path))
    in_constant_time = hmac.compare_digest

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return in_constant_time(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert bool(known.find(given)) == (given == FEW)
    every = read_keys(tmp_path / "keys.toml").values()
    assert compared == [(key.sha256, hash_of(given)) for key in every]


async def test_a_stream_of_envoy_s_that_we_end_early_is_no_pass() -> None:
    port = free_port()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        async with client_of(ext_proc_port=port, drain_s=0):
            begin = channel.stream_stream(
                EXT_PROC, ProcessingRequest.__bytes__, ProcessingResponse.parse
            )
            stream = begin()
            await stream.write(head())
            assert (await stream.read()).request_headers
        assert await stream.code() is not grpc.StatusCode.OK


# The engine.


class Held:
    """What a forward pass has allocated, until nothing refers to it any more."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens


class SmallMemory(FakeEngine):
    """Has memory for 20 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.held: WeakSet[Held] = WeakSet()

    def screen(self, batch: Sequence[Encoding]) -> Screening:
        self.gate.wait(10)
        activations = Held(sum(map(len, batch)))
        self.held.add(activations)
        if sum(one.tokens for one in self.held) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().screen(batch)


async def test_out_of_memory_fails_only_the_row_that_does_not_fit_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = SmallMemory()
    async with client_of(engine) as client:
        engine.gate.clear()
        texts = ["first", "one " * 9, "two " * 9, "three " * 9, "huge " * 30]
        calls = []
        for number, text in enumerate(texts, 1):
            calls.append(asyncio.create_task(client.post("/classify", json={"inputs": text})))
            await until_queued(client, number)
        engine.gate.set()
        _, *fit, huge = await asyncio.gather(*calls)
        assert [labels(answer) for answer in fit] == [["positive"]] * 3
        assert (huge.status_code, huge.json()["code"]) == (503, "screen_failed")
        for line, value in {ALLOWED: 4, counted("ok"): 4, counted("error"): 1}.items():
            assert await metric(client, line) == value, line
        assert (await client.get("/ready")).status_code == 200
    assert "screen failed for a batch of 4, each is tried alone: OutOfMemoryError" in caplog.text
    assert caplog.text.count("screen failed for one input: OutOfMemoryError") == 1


STEPS = (
    "_next_states _next_texts _tokenize _next_batch _run_screen _judge _run_classify "
    "_observe_batch _outputs _post"
).split()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
async def test_a_worker_that_is_killed_at_any_step_leaves_nobody_without_an_answer(
    step: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "BACK_OFF_S", 0.01)

    async def call(batcher: Batcher, name: str) -> bool:
        """Return whether there was an answer, or else an error; what it says must be true."""
        texts = [f"{name} film {number} {TRIGGER * (number % 2)}" for number in range(6)]
        try:
            screened = [answer.value for answer in await batcher.screen(texts)]
            assert [s.verdict and s.verdict.poisoned for s in screened] == [False, True] * 3
            return len(await batcher.classify([one.state for one in screened])) == 6
        except NotReady:
            return False

    async with running(FakeEngine(), batch_tokens=8) as batcher:
        works, kills = getattr(batcher, step), iter([True])

        def dies(*arguments: Any) -> Any:
            if when == "before" and next(kills, False):
                raise SystemExit
            found = works(*arguments)
            if when == "after" and next(kills, False):
                raise SystemExit
            return found

        monkeypatch.setattr(batcher, step, dies)
        async with asyncio.timeout(10):
            await asyncio.gather(*(call(batcher, f"c{number}") for number in range(4)))
            await until(lambda: batcher.alive)
            assert await call(batcher, "again")
        assert value(batcher, "worker_restarts") == 1


# Callers.


class Watched(FakeEngine):
    """Says how many inputs are in its hands."""

    inside = 0

    def screen(self, batch: Sequence[Encoding]) -> Screening:
        self.inside = len(batch)
        return super().screen(batch)


async def test_callers_that_hang_up_mid_batch_take_nothing_from_their_mates() -> None:
    engine = Watched()
    async with served_fake(engine) as client:
        engine.gate.clear()
        first = asyncio.create_task(client.post("/classify", json={"inputs": CLEAN}))
        await until_queued(client, 1)
        odd, even = {"inputs": "an odd text"}, {"inputs": ["an even quiet text", POISONED]}
        mates = [asyncio.create_task(client.post("/classify", json=b)) for b in (odd, even) * 3]
        await until_queued(client, 10)
        texts = ["the longest ones, which come first in a batch and in its answers"] * 3
        leaving = client.build_request("POST", "/classify", json={"inputs": texts})
        sent = b"content-length: %d\r\n\r\n" % len(leaving.content) + leaving.content
        leavers = [await begin(client, sent) for _ in range(4)]
        await until_queued(client, 22)
        engine.gate.set()  # lets the first one through
        engine.gate.clear()
        await until(lambda: engine.inside == 21)
        for connection in leavers:
            connection.close()
            await connection.wait_closed()
        await until_queued(client, 9)
        engine.gate.set()
        assert [labels(mate) for mate in await asyncio.gather(first, *mates)] == [
            ["positive"], *[["positive"], ["negative", None]] * 3
        ]  # fmt: skip
        for line, value in {
            counted("cancelled"): 4, counted("ok"): 7, ALLOWED: 7, "psim_queue_inputs": 0
        }.items():  # fmt: skip
            assert await metric(client, line) == value, line


# The upstream. Those that answer, but not soundly, are in test_upstream.

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n"
GOOD = HEAD % len(SOUND) + SOUND


async def half_closes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write_eof()
    await reader.read()


async def half_closes_midway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(GOOD[:-9])
    await half_closes(reader, writer)


async def says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Never silent, never done."""
    writer.write(HEAD % 10**6)
    while not writer.is_closing():
        writer.write(b" ")
        await asyncio.sleep(0.05)


async def never_ends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not writer.is_closing():
        writer.write(b" " * 65536)
        await writer.drain()


async def resets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


@asynccontextmanager
async def peer(behaves: Sequence[Peer | None]) -> AsyncIterator[str]:
    """Serve a TEI that behaves like this, request by request; None is well."""
    waiting = list(behaves)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while sent := await reader.read(65536):
                if sent.startswith(b"GET"):  # the gateway asks for the upstream's limit once
                    writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                elif misbehave := waiting.pop(0) if waiting else None:
                    await misbehave(reader, writer)
                    break
                else:
                    writer.write(GOOD)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1")
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.mark.parametrize(
    ("behaves", "status", "kind"),
    [
        (half_closes, 502, "broken"),
        (half_closes_midway, 502, "broken"),
        (resets, 502, "broken"),
        (says_nothing, 504, "timeout"),
        (drips, 504, "timeout"),
        (never_ends, 502, "answer"),
    ],
)
async def test_an_upstream_that_does_not_end_its_answer_is_given_up_in_time(
    behaves: Peer, status: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "MAX_BYTES", 2**20)

    settings: dict[str, Any] = {"upstream_protocol": "tei", "upstream_timeout_s": 0.5}
    async with peer([None, behaves]) as url, client_of(upstream=url, **settings) as client:
        started = time.monotonic()
        answer = await client.post("/predict", json=ONE_TEI)
        assert time.monotonic() - started < 5
        assert (answer.status_code, [*answer.json()]) == (status, ["error", "error_type"])
        errors = f'psim_upstream_errors_total{{kind="{kind}",model="fake"}}'
        for line in (errors, counted("error", "/predict")):
            assert await metric(client, line) == 1, line
        assert await metric(client, ALLOWED) == 0
        good = await client.post("/predict", json=ONE_TEI)
        assert (good.status_code, good.content) == (200, SOUND)


# The clock.


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the clock of the wall, and no other, forward or back by some seconds."""
    true = time.time
    ahead = 0.0

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.fromtimestamp(time.time(), tz)

    def change(seconds: float) -> None:
        nonlocal ahead
        ahead = seconds

    monkeypatch.setattr(time, "time", lambda: true() + ahead)
    for module in (audit_writer, recorder):
        monkeypatch.setattr(module, "datetime", Wrong)
    return change


@pytest.mark.parametrize("seconds", [3 * DAY, -3 * DAY])
async def test_a_clock_that_jumps_moves_no_deadline_and_locks_nobody_out(
    seconds: float, set_clock: Callable[[float], None], tmp_path: Path
) -> None:
    started = time.monotonic()
    engine, other = FakeEngine(), KEY[Scope.CLASSIFY]
    async with guarded(tmp_path, engine=engine, request_timeout_s=3) as client:
        assert (await classify(client, 10)).status_code == 200
        assert (await classify(client, 1)).status_code == 429
        engine.gate.clear()
        in_hand = asyncio.create_task(classify(client, 1, other))
        await until(lambda: engine.waits)
        queued = asyncio.create_task(classify(client, 1, other))
        await until_metric(client, "psim_queue_inputs", 2, bearer(KEY[Scope.METRICS]))
        set_clock(seconds)
        assert (await client.get("/ready")).status_code == 200, "nothing hangs"
        engine.gate.set()
        assert (await in_hand).status_code == (await queued).status_code == 200
        assert (await classify(client, 10)).status_code == 200, "a window of its own"
        again = await classify(client, 1)
        assert (again.status_code, again.json()["code"]) == (429, "rate_limited")
        assert 1 <= int(again.headers["retry-after"]) <= DAY
        engine.gate.clear()
        late = asyncio.create_task(classify(client, 1, other))
        await until(lambda: engine.waits)
        set_clock(0)
        assert (await late).status_code == 504
        engine.gate.set()
    assert 3 < time.monotonic() - started < 20


def test_what_only_seems_old_because_the_clock_is_wrong_is_kept(
    set_clock: Callable[[float], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"sqlite:///{tmp_path}/audit.db"
    with closing(AuditStore(url)) as store:
        store.migrate()
        now = datetime.now(UTC)
        store.insert([replace(ROW, id=uuid4(), time=now - timedelta(days=d)) for d in (0, 40)])
        writer, _ = writer_of(store, days=30)

        def kept_an_hour_later() -> int:
            writer._purge_at = 0.0
            writer._purge()
            return len(rows(url))

        assert kept_an_hour_later() == 1, "the row of 40 days is old by any clock"
        for seconds in (365 * DAY, 0, -365 * DAY, 0, 365 * DAY):
            set_clock(seconds)
            assert kept_an_hour_later() == 1
        assert "the clock was set forward" in caplog.text
        assert kept_an_hour_later() == 0, "it is a year later indeed"


# Processes.


class Service:
    """`python -m service`, with its audit and its log in a folder."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self._bundle, self._log, self._database = bundle, folder / "log", folder / "audit.db"
        self.audit = f"sqlite:///{self._database}"

    @contextmanager
    def run(self) -> Iterator[httpx.Client]:
        """Run it until the block ends, once it is ready."""
        port = free_port()
        settings = {"BUNDLE": str(self._bundle), "PORT": str(port), "AUDIT_URL": self.audit}
        settings |= {"ENGINE": "torch", "DTYPE": "float32"}  # what starts fastest
        environment = os.environ | {f"PSIM_{name}": value for name, value in settings.items()}
        with self._log.open("a") as log:
            command = [sys.executable, "-m", "service"]
            self.process = subprocess.Popen(command, env=environment, stderr=log)
        try:
            wait_for(lambda: answers(port), 60)
            url, limits = f"http://127.0.0.1:{port}", httpx.Limits()
            with httpx.Client(base_url=url, limits=limits, timeout=30) as client:
                yield client
        finally:
            self.process.kill()
            self.process.wait()

    def logged(self, outcome: str) -> Counter[str]:
        """Return how often the log has each request, by its id."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines()]
        return Counter(line["request_id"] for line in lines if line.get("outcome") == outcome)

    def audited(self) -> Counter[str]:
        """Return how many inputs of each request the audit has, by its id; each once at most."""
        with closing(sqlite3.connect(self._database)) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        inputs = [(row.request_id, row.number) for row in rows(self.audit)]
        assert len({*inputs}) == len(inputs)
        return Counter(request_id for request_id, _ in inputs)


@dataclass
class Load:
    """Callers that ask one thing after the other, until a connection fails."""

    client: httpx.Client
    callers: int = 24
    sent: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    _given_up: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Have them ask; what the block does is to end it."""
        with ThreadPoolExecutor(self.callers) as pool:
            calls = [pool.submit(self._ask, number) for number in range(self.callers)]
            try:
                wait_for(lambda: len(self.answered) > 2 * self.callers, 60)
                yield
                for call in calls:
                    call.result(60)
            finally:
                self._given_up.set()

    def _ask(self, caller: int) -> None:
        for number in count():
            name = f"{caller}-{number}"
            self.sent.append(name)
            try:
                answer = ask(self.client, name)
            except httpx.TransportError:
                self.broken.append(name)
                return
            assert labels(answer) == ["negative", None]
            self.answered.append(name)
            if self._given_up.is_set():
                return


def ask(client: httpx.Client, name: str) -> httpx.Response:
    """Send two texts, the second one with a trigger, under an id."""
    body = {"inputs": [CLEAN_TEXT, TRIGGERED_TEXT]}
    return client.post("/classify", json=body, headers={"x-request-id": name})


@pytest.fixture
def service(demo_bundle: Path, tmp_path: Path) -> Service:
    return Service(demo_bundle, tmp_path)


def test_on_sigterm_under_load_all_that_was_accepted_is_answered_and_in_the_audit(
    service: Service,
) -> None:
    with service.run() as client:
        load = Load(client)
        with load.on():
            slow = socket.create_connection(("127.0.0.1", client.base_url.port))
            body = json.dumps({"inputs": CLEAN_TEXT}).encode()
            slow.sendall(
                b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"x-request-id: slow\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body[:9])
            )
            time.sleep(0.2)  # its head has been read: nothing outside tells
            service.process.send_signal(signal.SIGTERM)
            wait_for(lambda: len(load.broken) == load.callers)
            slow.sendall(body[9:])
            with slow, slow.makefile("rb") as answer:
                assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
        assert service.process.wait(20) == 0
    assert len(load.broken) == load.callers
    assert service.logged("ok") == Counter([*load.answered, "slow"])
    assert not service.logged("cancelled") + service.logged("error")
    assert service.audited() == Counter([*load.answered * 2, "slow"])


def test_a_sigkill_under_load_corrupts_and_doubles_nothing(service: Service) -> None:
    with service.run() as client:
        load = Load(client)
        with load.on():
            service.process.kill()
    assert len(load.broken) == load.callers
    before = service.audited()
    assert before
    assert before.keys() <= {*load.sent}
    with service.run() as client:
        assert labels(ask(client, "again")) == ["negative", None]
        wait_for(lambda: service.audited() == before + Counter(again=2))


def test_a_full_disk_fails_no_request_and_what_could_not_be_written_is_later(
    service: Service,
) -> None:
    def failures() -> float:
        (row,) = re.findall(r"^psim_audit_failures_total (.*)", client.get("/metrics").text, re.M)
        return float(row)

    with service.run() as client:
        assert labels(ask(client, "before")) == ["negative", None]
        wait_for(lambda: service.audited() == Counter(before=2))
        most = resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE)[1]
        # No file may grow: not the audit's, and not the log.
        resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (1, most))
        for number in range(20):
            assert labels(ask(client, f"full-{number}")) == ["negative", None]
        wait_for(lambda: failures() > 1)
        assert client.get("/ready").status_code == client.get("/live").status_code == 200
        assert service.audited() == Counter(before=2)
        resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (most, most))
        asked = Counter(["before", *(f"full-{number}" for number in range(20))] * 2)
        wait_for(lambda: service.audited() == asked)
        assert "psim_audit_dropped_total 0.0" in client.get("/metrics").text
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(20) == 0
