"""More than the service can do, and for long: nothing is lost, and all that is counted adds up.

The same by the million, and timed, is in docs/reliability.md.
"""

import asyncio
from collections import Counter
from pathlib import Path

import httpx
import soak
from pydantic import SecretStr

from service.app import create_app
from service.settings import Settings
from tests.support.fakes import FakeEngine, fake_bundle
from tests.support.servers import serving
from tests.support.waiting import until


async def test_a_burst_of_many_times_the_queue_is_answered_or_refused_and_all_of_it_counted() -> (
    None
):
    engine = FakeEngine()
    settings = Settings(bundle=Path("unused"), queue_inputs=16)

    async def burst(address: str) -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=f"http://{address}", limits=limits, timeout=30
        ) as client:
            engine.gate.clear()  # nothing is answered before all have come
            bodies = [{"inputs": [f"text {i}"] * (1 + i % 4)} for i in range(200)]
            calls = [asyncio.create_task(client.post("/classify", json=body)) for body in bodies]
            await until(lambda: sum(call.done() for call in calls) >= len(calls) - 16)
            engine.gate.set()
            return await asyncio.gather(*calls)

    with serving(create_app(settings, fake_bundle(engine))) as address:
        answers = await burst(address)
        metrics = httpx.get(f"http://{address}/metrics").text
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses.keys() == {200, 429}
    assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)
    lengths = {i: len(a.json()["results"]) for i, a in enumerate(answers) if a.status_code == 200}
    assert all(length == 1 + i % 4 for i, length in lengths.items())
    inputs = sum(lengths.values())
    assert 0 < inputs <= 16
    assert soak.counted(metrics, "psim_requests_total", outcome="ok") == statuses[200]
    assert soak.counted(metrics, "psim_requests_total", outcome="overloaded") == statuses[429]
    assert soak.counted(metrics, "psim_overload_total", reason="inputs") == statuses[429]
    assert soak.counted(metrics, "psim_inputs_total") == inputs
    for gauge in ("psim_queue_inputs", "psim_queue_characters", "psim_queue_seconds"):
        assert soak.counted(metrics, gauge) == 0


async def test_a_small_soak_adds_up_and_what_would_not_is_noticed(tmp_path: Path) -> None:
    audit = tmp_path / "audit.db"
    settings = Settings(
        bundle=soak.tiny_bundle(tmp_path / "bundle"),
        dtype="float32",
        threads=1,
        unfamiliar="reject",  # a model without opinions overrides nothing
        audit_url=SecretStr(f"sqlite:///{audit}"),
    )
    book = soak.Book()

    async def run(address: str) -> tuple[list[str], str]:
        async with soak.client(f"http://{address}") as session:
            port = int(address.rsplit(":", 1)[1])
            callers = soak.Callers(session, port, book, seed=0)
            await callers.learn(soak.varied_texts(100, seed=0))
            await callers.ask(3000, 8)
            found = await soak.settled(session, book, audit)
            async with session.get("/metrics") as response:
                return found, await response.text()

    with serving(create_app(settings)) as address:
        found, metrics = await run(address)
    assert found == []
    assert book.inputs >= 3000
    assert {"ok", "rejected", "client_error", "cancelled"} <= book.outcomes.keys()
    assert book.hung_up
    rows = soak.audited(audit)
    name = next(iter(book.answered))
    lost = {n: decisions for n, decisions in rows.items() if n != name}
    for other in (lost, rows | {name: rows[name] * 2}, rows | {"nobody": ["allow"]}):
        assert soak.differences(book, metrics, other)
    book.outcomes["ok"] += 1
    assert soak.differences(book, metrics, rows)
