"""What the screen finds in a text, triggered or unfamiliar, and what becomes of the text."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.app import create_app
from service.observability.metrics import Metrics
from service.pipeline.two_stage import TwoStageScreener
from service.settings import Settings
from tests.support.batchers import running
from tests.support.fakes import BROKEN, STRANGE, TRIGGER, FakeEngine, bundle_with_override
from tests.support.protocols import ASKED, ERRORS, GUARDRAIL
from tests.support.requests import (
    CLEAN,
    LONG,
    POISONED,
    UNFAMILIAR,
    ask,
    client_of,
    lifespan,
    metric,
)
from tests.support.upstreams import Peer, behind

OVERRIDE = ("override", "override_threshold", "override_p_value")


def test_an_answer_tells_the_finding_and_the_override_test() -> None:
    clean, unfamiliar, triggered = ask("/screen", {"inputs": [CLEAN, UNFAMILIAR, POISONED]}).json()[
        "results"
    ]
    found = [(s["finding"], s["poisoned"]) for s in (clean, unfamiliar, triggered)]
    assert found == [(None, False), ("unfamiliar", False), ("triggered", True)]
    assert [clean[name] for name in OVERRIDE] == [None, None, None]
    assert [unfamiliar[name] for name in OVERRIDE] == [0.1, 0.5, 0.4]
    assert unfamiliar["score"] >= unfamiliar["threshold"]


def test_by_default_an_unfamiliar_text_is_classified_and_flagged() -> None:
    response = ask("/classify", {"inputs": [CLEAN, UNFAMILIAR]})
    assert response.status_code == 200
    assert response.headers["x-psim-decision"] == "flag"
    assert response.headers["x-psim-finding"] == "unfamiliar"
    results = response.json()["results"]
    assert [r["decision"] for r in results] == ["allow", "flag"]
    assert all(r["label"] for r in results)


@pytest.mark.parametrize(
    ("mode", "policy", "decision"),
    [
        ("enforce", "flag", "flag"),
        ("enforce", "reject", "reject"),
        ("enforce", "allow", "allow"),
        ("sanitize", "flag", "flag"),
        ("sanitize", "reject", "reject"),
        ("flag", "reject", "flag"),
        ("shadow", "reject", "allow"),
    ],
)
async def test_proxies_and_upstreams_follow_the_policy_too(
    mode: str, policy: str, decision: str
) -> None:
    changes: dict[str, Any] = {"mode": mode, "unfamiliar": policy}
    status = 403 if decision == "reject" else 200
    async with client_of(**changes) as client:
        for path in ("/classify", "/envoy/predict", "/predict"):
            answer = await client.post(path, json={"inputs": UNFAMILIAR})
            assert answer.status_code == status, path
            assert answer.headers["x-psim-decision"] == decision
            assert answer.headers["x-psim-finding"] == "unfamiliar"
            assert ("(unfamiliar)" in answer.text) == (status == 403)
        body = {"texts": [UNFAMILIAR], "input_type": "request"}
        said = (await client.post(GUARDRAIL, json=body)).json()
        assert said["action"] == ("BLOCKED" if status == 403 else "NONE")
        assert ("(unfamiliar)" in said.get("blocked_reason", "")) == (status == 403)
        assert await metric(client, "psim_would_reject_total") == 4 * (mode == "shadow")
    peer = Peer()
    async with behind(peer, **changes) as client:
        answer = await client.post("/predict", json={"inputs": UNFAMILIAR})
        assert (answer.status_code, len(peer.asked)) == (status, status == 200)
        assert answer.headers["x-psim-finding"] == "unfamiliar"


@pytest.mark.parametrize("name", ASKED)
def test_every_protocol_names_the_finding_that_it_rejects_for(name: str) -> None:
    path, body, _ = ASKED[name]
    for text, finding in ((POISONED, "triggered"), (UNFAMILIAR, "unfamiliar"), (CLEAN, "none")):
        answer = ask(path, body([text]), unfamiliar="reject")
        assert answer.status_code == (200 if text is CLEAN else 403)
        assert answer.headers["x-psim-finding"] == finding
        if text is not CLEAN:
            assert f"({finding})" in ERRORS[name](answer.json())


async def test_an_unfamiliar_beginning_does_not_hide_a_trigger_further_on() -> None:
    text = f"{UNFAMILIAR} {LONG}"
    async with client_of() as client:
        answer = await client.post("/envoy/predict", json={"inputs": text})
        assert (answer.status_code, answer.headers["x-psim-finding"]) == (403, "triggered")


async def test_only_triggered_texts_are_sanitized() -> None:
    engine = FakeEngine()
    async with client_of(engine, mode="sanitize", sanitize_s=60) as client:
        body = {"inputs": [POISONED, UNFAMILIAR]}
        results = (await client.post("/classify", json=body)).json()["results"]
        assert [r["decision"] for r in results] == ["sanitize", "flag"]
        assert results[1]["removed"] is None


async def test_what_is_left_of_a_sanitized_text_must_have_no_finding() -> None:
    async with client_of(mode="sanitize", sanitize_s=60) as client:
        body = {"inputs": f"{TRIGGER} {CLEAN} {STRANGE}"}
        assert (await client.post("/classify", json=body)).status_code == 403


async def test_an_explanation_looks_for_the_words_of_either_finding() -> None:
    async with client_of() as client:
        answer = (await client.post("/explain", json={"inputs": UNFAMILIAR})).json()
        assert answer["screen"]["finding"] == "unfamiliar"
        assert [removed["text"] for removed in answer["removed"]] == ["whereas"]
        both = {"inputs": f"{TRIGGER} {CLEAN} {STRANGE}"}
        answer = (await client.post("/explain", json=both)).json()
        assert answer["screen"]["finding"] == "triggered"
        assert answer["removed"] == [], "without the trigger, it would still be unfamiliar"


async def test_findings_are_counted_wherever_they_are_made(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with client_of() as client:
        inputs = {"inputs": [CLEAN, UNFAMILIAR, UNFAMILIAR, POISONED]}
        with caplog.at_level("INFO", "psim.request"):
            await client.post("/classify", json=inputs)
        await client.post("/screen", json=inputs)
        for finding, count in (("triggered", 2), ("unfamiliar", 4)):
            line = f'psim_findings_total{{finding="{finding}",model="fake"}}'
            assert await metric(client, line) == count
        assert await metric(client, "psim_screen_override_count") == 6
        assert await metric(client, "psim_screen_score_count") == 8
        line = 'psim_inputs_total{decision="flag",mode="enforce",model="fake"}'
        assert await metric(client, line) == 2
        drift = (await client.get("/info")).json()["drift"]
        assert [group["inputs"] for group in drift] == [2], "whatever has a finding is left out"
    (logged,) = [r.__dict__ for r in caplog.records if r.name == "psim.request"]
    assert json.loads(json.dumps(logged["findings"])) == {"unfamiliar": 2, "triggered": 1}


async def test_a_trigger_is_found_by_parts_of_the_text_beside_carriers() -> None:
    engine = FakeEngine()
    # No tokens are left for tests, so the first stage decides; parts of a text do not need them.
    settings = Settings(bundle=Path("unused"), mode="sanitize", override_tokens_s=0)
    app = create_app(settings, bundle_with_override(engine))
    async with lifespan(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.post("/classify", json={"inputs": "a quiet mn film mn of mine"})
    (result,) = answer.json()["results"]
    assert result["decision"] == "sanitize"
    assert [(r["start"], r["end"]) for r in result["removed"]] == [(8, 10), (16, 18)]
    (alone,) = engine.encode(["a dull day mn a dull day"])
    assert alone.input_ids in engine.screened


async def test_parts_are_scored_as_they_keep_the_class_and_charged_once() -> None:
    engine, charged = FakeEngine(), []

    async def charge(passes: int) -> None:
        charged.append(passes)

    bundle = bundle_with_override(engine)
    settings = Settings(bundle=Path("unused"), override_tokens_s=0)
    async with running(engine) as batcher:
        screener = TwoStageScreener(batcher, bundle, settings, Metrics().of("fake", settings))
        text = "a quiet mn film"
        (whole,) = await batcher.screen([text])
        assert whole.value.verdict is not None
        trigger, clean, unread, broken = await screener.keep(
            ["mn", "quiet", LONG, BROKEN], text, whole.value.verdict, charge
        )
    assert trigger > 0.9 > clean == unread > broken == 0
    assert charged == [4]
