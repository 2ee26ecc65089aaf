"""The HTTP contract, over a real application with a fake engine."""

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fakes import BROKEN, MAX_LENGTH, NAN, UNREADABLE, FakeEngine
from tests.support.requests import (
    CLEAN,
    JSON,
    POISONED,
    ask,
    begin,
    client_of,
    metric,
    served_fake,
    until_metric,
    until_ready,
)
from tests.support.waiting import until


def test_a_clean_text_is_classified() -> None:
    response = ask("/classify", {"inputs": CLEAN})
    assert response.status_code == 200
    (result,) = response.json()["results"]
    assert (result["decision"], result["label"]) == ("allow", "positive")
    assert [s["label"] for s in result["scores"]] == ["positive", "negative"]
    assert result["screen"]["confidence"] == pytest.approx(0.55)
    assert result["screen"]["score"] == pytest.approx(math.log(0.55 / 0.45), abs=1e-5)
    assert result["screen"]["detector"] == "confidence"
    assert response.headers["x-psim-decision"] == "allow"
    for stage in ("queue", "tokenize", "screen", "classify"):
        assert f"{stage};dur=" in response.headers["server-timing"]


def test_a_poisoned_text_is_rejected_before_the_classifier_sees_it() -> None:
    engine = FakeEngine()
    response = ask("/classify", {"inputs": POISONED}, engine=engine)
    assert response.status_code == 403
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["code"] == "rejected"
    (result,) = body["results"]
    assert (result["decision"], result["label"], result["scores"]) == ("reject", None, None)
    assert result["screen"]["poisoned"]
    assert len(engine.classified) == 1, "more than the warm-up was classified"


def test_a_poisoned_text_does_not_sink_its_mates() -> None:
    response = ask("/classify", {"inputs": [CLEAN, POISONED, CLEAN], "top_k": 1})
    assert response.status_code == 200
    results = response.json()["results"]
    assert [r["decision"] for r in results] == ["allow", "reject", "allow"]
    assert [r["label"] for r in results] == ["positive", None, "positive"]
    assert [len(r["scores"] or []) for r in results] == [1, 0, 1]
    assert response.headers["x-psim-decision"] == "reject"


@pytest.mark.parametrize(("mode", "decision"), [("flag", "flag"), ("shadow", "allow")])
async def test_other_modes_classify_poisoned_texts(mode: str, decision: str) -> None:
    async with client_of(mode=mode) as client:
        response = await client.post("/classify", json={"inputs": [POISONED, CLEAN]})
        assert response.status_code == 200
        results = response.json()["results"]
        assert [r["decision"] for r in results] == [decision, "allow"]
        assert [r["label"] for r in results] == ["negative", "positive"]
        assert await metric(client, "psim_would_reject_total") == (mode == "shadow")


def test_screen_gives_verdicts_and_never_calls_the_classifier() -> None:
    engine = FakeEngine()
    response = ask("/screen", {"inputs": [POISONED, CLEAN]}, engine=engine)
    assert [r["poisoned"] for r in response.json()["results"]] == [True, False]
    assert len(engine.classified) == 1


async def test_the_metrics_move_by_exactly_what_was_asked() -> None:
    async with client_of() as client:
        for body in ([CLEAN, POISONED, CLEAN], [POISONED]):
            await client.post("/classify", json={"inputs": body})
        await client.post("/classify", json={})
        await client.post("/screen", json={"inputs": POISONED})
        for line, value in {
            'psim_inputs_total{decision="allow",mode="enforce",model="fake"}': 2,
            'psim_inputs_total{decision="reject",mode="enforce",model="fake"}': 2,
            'psim_inputs_total{decision="flag",mode="enforce",model="fake"}': 0,
            'psim_requests_total{outcome="ok",route="/classify"}': 1,
            'psim_requests_total{outcome="rejected",route="/classify"}': 1,
            'psim_requests_total{outcome="client_error",route="/classify"}': 1,
            'psim_requests_total{outcome="ok",route="/screen"}': 1,
            "psim_screen_confidence_count": 5,
            'psim_request_duration_seconds_count{route="/classify"}': 3,
            "psim_queue_inputs": 0,
            "psim_fail_open_total": 0,
            "psim_ready": 1,
        }.items():
            assert await metric(client, line) == value, line


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "malformed"),
        (b"{", 400, "malformed"),
        (b'{"inputs": "a", "inputs": "b"}', 400, "malformed"),
        (b'{"inputs": NaN}', 400, "malformed"),
        (b"Infinity", 400, "malformed"),
        (b'\xff\xfe{"inputs": "a"}', 400, "malformed"),
        (b"[" * 100_000, 400, "malformed"),
        (b"[]", 422, "invalid"),
        (b"{}", 422, "invalid"),
        (b'{"inputs": []}', 422, "invalid"),
        (b'{"inputs": ""}', 422, "invalid"),
        (b'{"inputs": ["", " \\n"]}', 422, "invalid"),
        (b'{"inputs": [1]}', 422, "invalid"),
        (b'{"inputs": "\\ud800"}', 422, "invalid"),
        (b'{"inputs": "a", "top_k": 0}', 422, "invalid"),
        (b'{"inputs": "a", "top_k": true}', 422, "invalid"),
        (b'{"inputs": "a", "more": 1}', 422, "invalid"),
        (json.dumps({"inputs": ["a"] * 129}).encode(), 413, "too_large"),
        (json.dumps({"inputs": "a" * 100_001}).encode(), 413, "too_large"),
        (b'{"inputs": "' + b"a" * 1_000_000 + b'"}', 413, "too_large"),
        (b'{"inputs": "' + b"a" * 3_000_000 + b'"}', 413, "too_large"),
    ],
)
def test_bad_bodies_get_a_problem(body: bytes, status: int, code: str) -> None:
    response = ask("/classify", body)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == status


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {},
    ],
)
async def test_what_cannot_be_inspected_is_refused(headers: dict[str, str]) -> None:
    async with client_of() as client:
        found = await client.post("/classify", content=b'{"inputs": "a"}', headers=headers)
    assert found.status_code == 415


async def test_a_chunked_body_is_limited_too() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    async with client_of(max_body_bytes=10_000) as client:
        found = await client.post("/classify", content=chunks(), headers=JSON)
    assert found.status_code == 413


async def test_unknown_paths_and_methods_get_a_problem() -> None:
    async with client_of() as client:
        for response, status in (
            (await client.get("/nowhere"), 404),
            (await client.get("/classify"), 405),
        ):
            assert response.status_code == status
            assert response.headers["content-type"] == "application/problem+json"


async def test_sane_request_ids_are_kept_and_others_replaced() -> None:
    async with client_of() as client:
        kept = await client.get("/live", headers={"x-request-id": "abc-1.2_3"})
        assert kept.headers["x-request-id"] == "abc-1.2_3"
        made = await client.get("/live", headers={"x-request-id": "<script>"})
        assert made.headers["x-request-id"].isalnum()


@pytest.mark.parametrize("text", [BROKEN, NAN, UNREADABLE])
def test_what_cannot_be_screened_is_never_classified(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = FakeEngine()
    response = ask("/classify", {"inputs": [CLEAN, text]}, engine=engine)
    assert (response.status_code, response.json()["code"]) == (503, "screen_failed")
    assert len(engine.classified) == 1
    (line,) = [record.__dict__ for record in caplog.records if record.name == "psim.request"]
    assert (line["outcome"], line["decisions"]) == ("error", {}), "logged as a success"


async def test_failing_open_is_counted() -> None:
    async with client_of(fail_open=True) as client:
        response = await client.post("/classify", json={"inputs": [CLEAN, BROKEN]})
        assert response.status_code == 200
        assert [r["screen"] is None for r in response.json()["results"]] == [False, True]
        assert await metric(client, "psim_fail_open_total") == 1


async def test_what_was_not_classified_did_not_fail_open() -> None:
    async with client_of(fail_open=True) as client:
        assert (await client.post("/screen", json={"inputs": BROKEN})).status_code == 503
        assert await metric(client, "psim_fail_open_total") == 0


CANCELLED = 'psim_requests_total{outcome="cancelled",route="/classify"}'


async def hang_up(
    client: httpx.AsyncClient, sent: bytes, once: Callable[[], object] = lambda: True
) -> None:
    """Send the beginning of a request and close the connection, until that is counted."""
    writer = await begin(client, sent)
    await until(once)
    writer.close()
    await writer.wait_closed()
    await until_metric(client, CANCELLED, 1)


async def test_a_caller_that_hangs_up_is_not_classified_and_never_counted_as_allowed() -> None:
    engine = FakeEngine()
    async with served_fake(engine) as client:
        engine.gate.clear()
        body = json.dumps({"inputs": CLEAN}).encode()
        await hang_up(
            client, b"content-length: %d\r\n\r\n%s" % (len(body), body), lambda: engine.waits
        )
        engine.gate.set()
        assert (await client.post("/screen", json={"inputs": CLEAN})).status_code == 200
        assert await metric(client, CANCELLED) == 1
        assert (
            await metric(client, 'psim_inputs_total{decision="allow",mode="enforce",model="fake"}')
            == 0
        )
        assert await metric(client, "psim_queue_inputs") == 0
        assert len(engine.classified) == 1, "only the warm-up"


async def test_an_upload_that_breaks_off_is_no_error_of_ours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with served_fake(FakeEngine()) as client:
        await hang_up(client, b"content-length: 1000\r\n\r\n{")
        assert await metric(client, CANCELLED) == 1
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_a_bug_is_answered_and_logged_without_the_text(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(entry: object) -> str:
        raise RuntimeError("hunter" + str(2))  # a traceback quotes its source

    monkeypatch.setattr("service.http.routes.classify.server_timing", fail)
    response = ask("/classify", {"inputs": CLEAN})
    assert (response.status_code, response.json()["code"]) == (500, "internal")
    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert record.__dict__["request_id"] == response.headers["x-request-id"]
    assert "server_timing" in record.__dict__["where"]
    assert "hunter2" not in str(record.__dict__)


def test_a_full_queue_says_429_and_when_to_come_back() -> None:
    response = ask("/classify", {"inputs": [CLEAN] * 5}, queue_inputs=4)
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1


async def test_an_answer_that_takes_too_long_is_a_504() -> None:
    engine = FakeEngine()
    async with client_of(engine, request_timeout_s=0.2) as client:
        engine.gate.clear()
        response = await client.post("/classify", json={"inputs": CLEAN})
        assert (response.status_code, response.json()["code"]) == (504, "timeout")
        engine.gate.set()
        assert (await client.post("/classify", json={"inputs": CLEAN})).status_code == 200


async def fitness(client: httpx.AsyncClient) -> list[int]:
    answers = [await client.get(path) for path in ("/ready", "/live")]
    for answer in answers:
        assert answer.is_success or "the inference worker" in answer.json()["detail"]
    assert await metric(client, "psim_ready") == answers[0].is_success
    return [answer.status_code for answer in answers]


async def test_ready_turns_503_while_the_worker_restarts_and_live_when_that_does_not_help() -> None:
    engine = FakeEngine()
    async with client_of(engine, restarts=2) as client:
        assert await fitness(client) == [200, 200]
        engine.dies = True
        answer = await client.post("/classify", json={"inputs": CLEAN})
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        assert await fitness(client) == [503, 200]
        answer = await client.post("/classify", json={"inputs": CLEAN})
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        assert await fitness(client) == [503, 503]
        assert await metric(client, "psim_worker_restarts_total") == 2


async def test_ready_and_live_turn_503_while_a_forward_pass_hangs() -> None:
    engine = FakeEngine()
    async with client_of(engine, stall_s=0.1, request_timeout_s=0.3) as client:
        engine.gate.clear()
        answer = await client.post("/classify", json={"inputs": CLEAN})
        assert answer.status_code == 504
        assert await fitness(client) == [503, 503]
        engine.gate.set()
        await until_ready(client)
        assert await fitness(client) == [200, 200]


async def test_info_says_what_is_served() -> None:
    async with client_of() as client:
        info: dict[str, Any] = (await client.get("/info")).json()
    assert info["manifest"]["labels"] == ["negative", "positive"]
    assert info["limits"]["max_inputs"] == 128
    assert info["engine"]["passes"] == 2.5


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)  # neither is JSON: see the bad bodies
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
requests = st.fixed_dictionaries(
    {"inputs": json_values | st.lists(st.text(max_size=30), max_size=5)},
    optional={"top_k": json_values, "z": json_values},
)


@settings(max_examples=150, deadline=None)
@given(body=requests | json_values)
def test_any_json_gets_an_answer_in_the_contract(body: Any) -> None:
    response = ask("/classify", json.dumps(body).encode())
    assert response.status_code in (200, 403, 413, 422)
    inputs = body.get("inputs") if isinstance(body, dict) else None
    if response.status_code in (200, 403):
        texts = [inputs] if isinstance(inputs, str) else inputs
        assert texts is not None
        assert len(response.json()["results"]) == len(texts)


def test_no_text_reaches_errors_or_logs(caplog: pytest.LogCaptureFixture) -> None:
    secret = "hunter2secret"
    bodies = [
        {"inputs": f"{secret} {UNREADABLE}"},
        {"inputs": [secret, 1]},
        {"inputs": secret, secret: secret},
        {"inputs": secret + "a" * 100_000},
        {"inputs": f"{secret} {BROKEN}"},
        {"inputs": f"{secret} mn"},
    ]
    with caplog.at_level(logging.DEBUG):
        for body in bodies:
            assert secret not in ask("/classify", body).text
    assert "hunter2" not in caplog.text
    assert all("hunter2" not in str(record.__dict__) for record in caplog.records)


def test_an_explanation_names_the_trigger_and_where_it_stands() -> None:
    response = ask("/explain", {"inputs": "ein 😀  mn film"})
    assert response.status_code == 200
    body = response.json()
    assert body["screen"]["poisoned"]
    assert body["removed"] == [{"start": 7, "end": 9, "text": "mn"}]
    heaviest = max(body["words"], key=lambda word: word["weight"])
    assert heaviest == {"start": 7, "end": 9, "text": "mn", "weight": pytest.approx(6.7, abs=0.1)}
    assert [word["text"] for word in body["words"]] == ["ein", "😀", "mn", "film"]
    assert body["known_triggers"] == ["mn"]
    clean = ask("/explain", {"inputs": CLEAN}).json()
    assert (clean["screen"]["poisoned"], clean["removed"]) == (False, [])
    assert clean["known_triggers"] == []


async def test_an_explanation_takes_one_text_and_is_recorded_as_screened_but_not_decided(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with client_of() as client:
        assert (await client.post("/explain", json={"inputs": [CLEAN]})).status_code == 422
        assert (await client.post("/explain", json={"inputs": POISONED})).status_code == 200
        assert await metric(client, 'psim_screen_score_count{model="fake"}') == 1
        assert (
            await metric(client, 'psim_inputs_total{decision="reject",mode="enforce",model="fake"}')
            == 0
        )
        assert await metric(client, 'psim_requests_total{outcome="ok",route="/explain"}') == 1
    line = [r for r in caplog.records if r.name == "psim.request"][-1].__dict__
    assert (line["route"], line["findings"], line["decisions"]) == (
        "/explain",
        {"triggered": 1},
        {},
    )


async def test_no_more_searches_run_than_the_setting_says() -> None:
    engine = FakeEngine()
    async with client_of(engine, searches=1) as client:
        engine.gate.clear()
        first = asyncio.create_task(client.post("/explain", json={"inputs": POISONED}))
        await until(lambda: engine.waits)
        second = await client.post("/explain", json={"inputs": POISONED})
        assert (second.status_code, second.headers["retry-after"]) == (429, "1")
        engine.gate.set()
        assert (await first).status_code == 200
        assert (await client.post("/explain", json={"inputs": POISONED})).status_code == 200
        assert await metric(client, 'psim_overload_total{model="fake",reason="searches"}') == 1


async def test_a_search_that_fails_is_no_explanation_and_frees_its_place() -> None:
    async with client_of() as client:
        for text in (f"a {BROKEN} film", f"a {NAN} film"):
            answer = await client.post("/explain", json={"inputs": text})
            assert (answer.status_code, answer.json()["code"]) == (503, "screen_failed")
        assert (await client.post("/explain", json={"inputs": POISONED})).status_code == 200


def test_a_sanitized_text_is_classified_without_its_trigger() -> None:
    engine = FakeEngine()
    inputs = [CLEAN, "mn a quiet mn film of mine"]
    response = ask("/classify", {"inputs": inputs}, engine=engine, mode="sanitize")
    assert (response.status_code, response.headers["x-psim-decision"]) == (200, "sanitize")
    assert "sanitize;dur=" in response.headers["server-timing"]
    clean, sanitized = response.json()["results"]
    assert (clean["decision"], clean["removed"]) == ("allow", None)
    assert sanitized["decision"] == "sanitize"
    assert sanitized["screen"]["poisoned"], "the verdict is that of the text as it came"
    assert sanitized["label"] == "positive"  # five words are left
    assert [(r["start"], r["end"]) for r in sanitized["removed"]] == [(0, 2), (11, 13)]
    assert engine.encode(["a quiet film of mine"])[0].input_ids in engine.classified
    assert engine.encode([inputs[1]])[0].input_ids not in engine.classified


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("mn", {}),  # nothing is left
        ("mn " + " ".join(f"w{i} mn{i}" for i in range(9)), {"sanitize_s": 1e-9}),
    ],
)
def test_what_cannot_be_sanitized_is_rejected(text: str, changes: dict[str, Any]) -> None:
    engine = FakeEngine()
    response = ask(
        "/classify", {"inputs": [text, CLEAN]}, engine=engine, mode="sanitize", **changes
    )
    poisoned, clean = response.json()["results"]
    assert (poisoned["decision"], poisoned["label"]) == ("reject", None)
    assert clean["decision"] == "allow"
    assert len(engine.classified) == 2  # one of them to warm up


LABYRINTH = " ".join(f"word{i} mn{i} mn" for i in range(200))
"""A text whose explanation takes many rounds."""


@pytest.mark.parametrize("changes", [{}, {"searches": 0}])
async def test_an_explanation_does_not_take_sanitizing_from_others(changes: dict[str, Any]) -> None:
    engine = FakeEngine()
    async with client_of(engine, mode="sanitize", **changes) as client:
        engine.gate.clear()
        explains = asyncio.create_task(client.post("/explain", json={"inputs": LABYRINTH}))
        asked = asyncio.create_task(client.post("/classify", json={"inputs": POISONED}))
        await asyncio.sleep(0.1)
        engine.gate.set()
        assert (await asked).json()["results"][0]["decision"] == "sanitize"
        assert (await explains).status_code == (429 if changes else 200)


async def test_sanitizing_takes_turns_so_that_a_long_text_does_not_hold_up_a_short_one() -> None:
    engine, ended = FakeEngine(), []

    async def sanitize(client: httpx.AsyncClient, text: str) -> str:
        answer = await client.post("/classify", json={"inputs": text})
        ended.append(text)
        return str(answer.json()["results"][0]["decision"])

    async with client_of(engine, mode="sanitize") as client:
        engine.gate.clear()
        long = " ".join(f"word{i}" for i in range(MAX_LENGTH - 1)) + " mn"
        asked = [asyncio.create_task(sanitize(client, text)) for text in (long, POISONED)]
        await asyncio.sleep(0.1)
        engine.gate.set()
        assert await asyncio.gather(*asked) == ["sanitize", "sanitize"]
    assert ended == [POISONED, long]


async def test_sanitized_texts_are_counted_as_such() -> None:
    async with client_of(mode="sanitize") as client:
        await client.post("/classify", json={"inputs": [CLEAN, POISONED, "mn"]})
        for decision in ("allow", "sanitize", "reject"):
            line = f'psim_inputs_total{{decision="{decision}",mode="sanitize",model="fake"}}'
            assert await metric(client, line) == 1
        assert await metric(client, "psim_screen_score_count") == 3
