"""A challenger on live traffic: it is compared, and nobody who asks can tell that it is there."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.bundle.load import Bundle
from service.app import create_app
from service.pipeline.challenger import WAITING
from service.settings import Settings
from tests.support.fakes import BROKEN, FakeEngine, fake_bundle
from tests.support.requests import CLEAN, LONG, POISONED, lifespan, metric, until_metric
from tests.support.waiting import until

OTHER = "e" * 64


@asynccontextmanager
async def on_trial(
    monkeypatch: pytest.MonkeyPatch, challenger: Bundle, **changes: Any
) -> AsyncIterator[httpx.AsyncClient]:
    bundles = {"served": fake_bundle, "challenger": lambda: challenger}
    monkeypatch.setattr("service.app.load_bundle", lambda path, *_, **__: bundles[path.name]())
    settings = Settings(bundle=Path("served"), challenger=Path("challenger"), admin=True, **changes)
    async with lifespan(app := create_app(settings)):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


def both(served: str, challenger: str) -> str:
    labels = f'challenger="{challenger}",model="fake",served="{served}"'
    return f"psim_challenger_inputs_total{{{labels}}}"


async def test_its_verdicts_are_compared_and_change_no_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    strict = fake_bundle(digest=OTHER, threshold=0.1)  # finds every text extreme
    async with on_trial(monkeypatch, strict) as client:
        inputs = [CLEAN, POISONED, CLEAN]
        headers = {"x-request-id": "mine"}
        with caplog.at_level("INFO"):
            asked = await client.post("/classify", json={"inputs": inputs}, headers=headers)
            await until_metric(client, "psim_challenger_score_count", 3)
        answer = asked.json()
        assert answer["bundle"] == "d" * 64
        assert [r["decision"] for r in answer["results"]] == ["allow", "reject", "allow"]
        for (served, own), count in {
            ("none", "triggered"): 2,
            ("triggered", "triggered"): 1,
            ("none", "none"): 0,
            ("triggered", "none"): 0,
            ("none", "unfamiliar"): 0,
        }.items():
            assert await metric(client, both(served, own)) == count
        assert await metric(client, "psim_challenger_dropped_total") == 0
        assert await metric(client, "psim_screen_score_count") == 3
        # To warm up, to screen, to classify; what the challenger screens does not count.
        assert await metric(client, "psim_batch_inputs_sum") == 3 + 3 + 2
        assert (await client.get("/info")).json()["challenger"] == OTHER
    logged = [r.__dict__ for r in caplog.records if r.message == "the challenger disagrees"]
    assert [(row["request_id"], row["number"]) for row in logged] == [("mine", 0), ("mine", 2)]
    assert {(row["served_finding"], row["challenger_finding"]) for row in logged} == {
        (None, "triggered")
    }
    assert "quiet" not in str(logged)


async def test_it_reads_as_far_as_the_served_bundle_did(monkeypatch: pytest.MonkeyPatch) -> None:
    async with on_trial(monkeypatch, fake_bundle(digest=OTHER)) as client:
        answer = await client.post("/screen", json={"inputs": LONG})
        assert answer.json()["results"][0]["poisoned"] is False
        await until_metric(client, both("none", "none"), 1)
        assert (await client.post("/envoy/predict", json={"inputs": LONG})).status_code == 403
        await until_metric(client, both("triggered", "triggered"), 1)
    other = fake_bundle(digest=OTHER)
    async with on_trial(monkeypatch, other, long_texts="windows") as client:
        answer = await client.post("/screen", json={"inputs": LONG})
        assert answer.json()["results"][0]["poisoned"] is True
        await until_metric(client, both("triggered", "triggered"), 1)


async def test_one_that_is_slow_holds_up_nobody_and_what_it_lacks_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = FakeEngine()
    async with on_trial(monkeypatch, fake_bundle(slow, digest=OTHER)) as client:
        slow.gate.clear()
        assert 2 * 100 <= WAITING < 3 * 100
        for _ in range(3):
            inputs = [CLEAN] * 100
            answer = await client.post("/classify", json={"inputs": inputs}, timeout=5)
            assert answer.status_code == 200
        assert await metric(client, "psim_challenger_dropped_total") == 100
        assert await metric(client, both("none", "none")) == 0
        slow.gate.set()
        await until_metric(client, both("none", "none"), 200)


async def test_one_that_fails_or_dies_fails_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    challenger = fake_bundle(engine, digest=OTHER)
    async with on_trial(monkeypatch, challenger, restarts=0) as client:
        assert (await client.post("/screen", json={"inputs": BROKEN})).status_code == 503
        await until_metric(client, "psim_challenger_dropped_total", 1)
        engine.dies = True
        for dropped in (2, 3):
            answer = await client.post("/classify", json={"inputs": CLEAN})
            assert answer.status_code == 200
            await until_metric(client, "psim_challenger_dropped_total", dropped)
        assert (await client.get("/ready")).status_code == 200
        assert (await client.get("/live")).status_code == 200


async def test_a_trial_ends_with_the_reload_even_if_inputs_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = FakeEngine()
    challenger = fake_bundle(engine, digest=OTHER)
    async with on_trial(monkeypatch, challenger) as client:
        engine.gate.clear()
        await client.post("/classify", json={"inputs": [CLEAN] * 100})
        fresh = replace(challenger, engine=FakeEngine())
        bundles = {"served": fresh, "challenger": fake_bundle()}
        monkeypatch.setattr("service.app.load_bundle", lambda path, *_, **__: bundles[path.name])
        assert (await client.post("/admin/reload")).status_code == 200
        info = (await client.get("/info")).json()
        assert (info["bundle"], info["challenger"]) == (OTHER, "d" * 64)
        await asyncio.sleep(0.1)  # the old challenger is told to end; it cannot say that it was
        engine.gate.set()
        await until(lambda: [t.name for t in threading.enumerate()].count("inference") == 2)
        assert len(engine.screened) < 100, "it screened what nobody waits for"


async def test_one_that_cannot_screen_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    async with on_trial(monkeypatch, fake_bundle(digest=OTHER), restarts=0) as client:
        dying = FakeEngine()
        dying.dies = True
        bundles = {"served": fake_bundle(), "challenger": fake_bundle(dying)}
        monkeypatch.setattr("service.app.load_bundle", lambda path, *_, **__: bundles[path.name])
        answer = await client.post("/admin/reload")
        assert (answer.status_code, answer.json()["code"]) == (422, "reload_failed")
        assert (await client.get("/info")).json()["challenger"] == OTHER
        assert len([t for t in threading.enumerate() if t.name == "inference"]) == 2
