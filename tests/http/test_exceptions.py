"""Reviewed exceptions: exact texts that may pass, for a time, under one bundle."""

import io
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from service.audit import exceptions_reader
from service.audit.exceptions import ReviewedException, add, recorded, remove
from service.audit.exceptions_command import main as psim_exceptions
from service.audit.exceptions_reader import Exceptions
from service.audit.rows import hmac_of
from service.audit.schema import AuditError
from service.audit.store import AuditStore
from service.observability.metrics import Metrics
from service.settings import Mode
from tests.support.audit import rows
from tests.support.fakes import fake_bundle
from tests.support.protocols import ASKED
from tests.support.requests import (
    CLEAN,
    LONG,
    POISONED,
    UNFAMILIAR,
    client_of,
    metric,
    until_metric,
)
from tests.support.waiting import until, wait_for

KEY = "k" * 32
DIGEST = fake_bundle().digest
NOW = datetime.now(UTC)
GUARDRAIL = "/beta/litellm_basic_guardrail_api"


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exceptions_reader, "READ_EVERY_S", 0.02)


def exception(text: str, **changes: Any) -> ReviewedException:
    """Return an exception for a text under the bundle of the tests."""
    given: dict[str, Any] = {
        "digest": DIGEST,
        "text_hmac": hmac_of(KEY.encode(), text),
        "created": NOW,
        "expires": NOW + timedelta(days=1),
        "reviewer": "ann",
        "note": "a quote",
    }
    return ReviewedException(**given | changes)


def keep(url: str, *new: ReviewedException) -> None:
    with closing(AuditStore(url)) as store:
        store.migrate()
        for one in new:
            with store.connect(5) as connection:
                add(connection, one)


def end(url: str, one: ReviewedException) -> None:
    with closing(AuditStore(url)) as store, store.connect(5) as connection:
        remove(connection, one.id, "ben", datetime.now(UTC))


@asynccontextmanager
async def client_with(url: str, *new: ReviewedException, **changes: Any) -> AsyncIterator[Any]:
    """Yield a client of a service that knows these exceptions."""
    keep(url, *new)
    given: dict[str, Any] = {
        "audit_url": SecretStr(url),
        "audit_key": SecretStr(KEY),
        "audit_text": True,
    }
    async with client_of(**given | changes) as client:
        holding = sum(one.holds(datetime.now(UTC)) for one in new)
        await until_metric(client, "psim_exceptions ", holding)
        yield client


async def classify(client: httpx.AsyncClient, *texts: str) -> list[dict[str, Any]]:
    answer = await client.post("/classify", json={"inputs": texts})
    results: list[dict[str, Any]] = answer.json()["results"]
    return results


@pytest.mark.parametrize("mode", [Mode.ENFORCE, Mode.SANITIZE, Mode.FLAG, Mode.SHADOW])
async def test_an_excepted_text_passes_and_keeps_its_finding(url: str, mode: Mode) -> None:
    async with client_with(url, exception(POISONED), exception(UNFAMILIAR), mode=mode) as client:
        answer = await client.post("/classify", json={"inputs": [CLEAN, POISONED, UNFAMILIAR]})
        results = answer.json()["results"]
        assert [one["decision"] for one in results] == ["allow"] * 3
        assert [one.get("reason") for one in results] == [None, "exception", "exception"]
        assert [one["screen"]["finding"] for one in results] == [None, "triggered", "unfamiliar"]
        assert results[1]["label"] is not None
        assert results[1]["removed"] is None, "it was not sanitized"
        assert answer.headers["x-psim-excepted"] == "1,2"
        assert answer.headers["x-psim-decision"] == "allow"
        assert await metric(client, 'psim_excepted_inputs_total{model="fake"}') == 2
        assert await metric(client, 'psim_findings_total{finding="triggered",model="fake"}') == 1
        assert await metric(client, 'psim_would_reject_total{model="fake"}') == 0
    found = {row.text: (row.decision, row.reason, row.finding) for row in rows(url)}
    assert found == {
        CLEAN: ("allow", None, None),
        POISONED: ("allow", "exception", "triggered"),
        UNFAMILIAR: ("allow", "exception", "unfamiliar"),
    }


@pytest.mark.parametrize(
    "text",
    [
        f"{POISONED} and more",
        POISONED.removeprefix("a "),
        POISONED.upper().replace("MN", "mn"),
        f"{POISONED} ",
        f"{POISONED}\u200b",
        POISONED.replace("a ", "a\u00a0"),
        f"{POISONED}\ud800",
    ],
)
async def test_no_other_text_passes_however_alike(file: str, text: str) -> None:
    async with client_with(file, exception(POISONED)) as client:
        assert [one["decision"] for one in await classify(client, POISONED)] == ["allow"]
        body = json.dumps({"inputs": [text]})
        headers = {"content-type": "application/json"}
        answer = await client.post("/classify", content=body, headers=headers)
        assert answer.status_code in (403, 422)


@pytest.mark.parametrize(
    "changes",
    [
        {"expires": NOW},
        {"removed": NOW, "removed_by": "ben"},
        {"digest": "e" * 64},
        {"text_hmac": hmac_of(b"another key of the service......", POISONED)},
    ],
)
async def test_one_that_has_ended_or_is_for_something_else_does_nothing(
    file: str, changes: dict[str, Any]
) -> None:
    async with client_with(file, exception(POISONED, **changes)) as client:
        answer = await client.post("/classify", json={"inputs": POISONED})
        assert (answer.status_code, "x-psim-excepted" in answer.headers) == (403, False)


async def test_it_ends_by_itself_even_if_nothing_is_read_again(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = exception(POISONED, expires=datetime.now(UTC) + timedelta(seconds=8))
    async with client_with(file, soon) as client:
        assert [one["decision"] for one in await classify(client, POISONED)] == ["allow"]
        monkeypatch.setattr(exceptions_reader, "READ_EVERY_S", 60)

        async def ended() -> bool:
            answer = await client.post("/classify", json={"inputs": POISONED})
            return bool(answer.status_code == 403)

        await until(ended)


async def test_every_replica_sees_one_that_is_added_and_one_that_is_removed(url: str) -> None:
    new = exception(POISONED)
    async with client_with(url) as one, client_with(url) as other:
        keep(url, new)
        for client in (one, other):
            await until_metric(client, "psim_exceptions ", 1)
            assert [r["decision"] for r in await classify(client, POISONED)] == ["allow"]
        end(url, new)
        for client in (one, other):
            await until_metric(client, "psim_exceptions ", 0)
            answer = await client.post("/classify", json={"inputs": POISONED})
            assert answer.status_code == 403


async def test_hooks_and_proxies_let_it_pass_too(file: str) -> None:
    async with client_with(file, exception(POISONED), exception(LONG)) as client:
        moderated = (await client.post("/v1/moderations", json={"input": POISONED})).json()
        assert moderated["results"][0]["flagged"] is False
        assert moderated["results"][0]["categories"]["backdoor/triggered"] is True
        for text in (POISONED, LONG):
            passed = await client.post("/envoy/classify", json={"inputs": text})
            assert passed.status_code == 200
            assert passed.headers["x-psim-finding"] == "triggered"
        conversation = {"texts": [POISONED], "input_type": "request"}
        for _ in range(2):
            answer = await client.post(GUARDRAIL, json=conversation)
            assert answer.json() == {"action": "NONE"}
        joined = {"texts": [POISONED, "mn"], "input_type": "request"}
        answer = await client.post(GUARDRAIL, json=joined)
        assert answer.json()["action"] == "BLOCKED", "another text of the conversation"


async def test_a_refused_request_tells_of_no_exception_in_audit_and_metrics(file: str) -> None:
    async with client_with(file, exception(POISONED)) as client:
        # Open Inference leaves out no text, so one rejection refuses the request.
        path, body, _ = ASKED["oip"]
        answer = await client.post(path, json=body([POISONED, f"{POISONED} again"]))
        assert answer.status_code == 403
        assert await metric(client, 'psim_excepted_inputs_total{model="fake"}') == 0
    assert {(row.decision, row.reason) for row in rows(file)} == {(None, None), ("reject", None)}


async def test_a_store_that_is_gone_for_long_ends_them_all(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client_with(file, exception(POISONED)) as client:
        monkeypatch.setattr(AuditStore, "connect", _gone)
        assert [one["decision"] for one in await classify(client, POISONED)] == ["allow"]
        assert await metric(client, "psim_exceptions_stale") == 0
        monkeypatch.setattr(exceptions_reader, "STALE_S", 0.0)
        assert await metric(client, "psim_exceptions_stale") == 1
        assert await metric(client, "psim_exceptions ") == 0
        answer = await client.post("/classify", json={"inputs": POISONED})
        assert answer.status_code == 403


def _gone(*_: object) -> Any:
    raise AuditError("gone")


def test_without_a_key_there_are_none(file: str) -> None:
    reader = Exceptions(file, KEY.encode(), Metrics())
    assert not reader.covers(DIGEST, POISONED), "before anything was read"
    keep(file, exception(POISONED))
    reader.start()
    wait_for(lambda: reader.covers(DIGEST, POISONED))
    reader.close()


def test_the_same_exception_is_not_added_twice(file: str) -> None:
    first = exception(POISONED)
    keep(file, first)
    with pytest.raises(AuditError, match=f"already, remove {first.id} first"):
        keep(file, exception(POISONED))
    end(file, first)
    with pytest.raises(AuditError, match="is in force"):
        end(file, first)
    keep(file, exception(POISONED))


def run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: str,
    text: bytes = b"",
) -> str:
    """Run the command with a text at stdin; return what it writes."""
    stdin = io.TextIOWrapper(io.BytesIO(text))
    monkeypatch.setattr(sys, "stdin", stdin)
    psim_exceptions(arguments)
    return capsys.readouterr().out


async def test_the_command_adds_lists_and_removes(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PSIM_AUDIT_URL", file)
    monkeypatch.setenv("PSIM_AUDIT_KEY", KEY)
    adding = ["add", "--note", "a quote", "--bundle", DIGEST, "--reviewer", "ann", "--days", "7"]
    async with client_with(file) as client:
        id = run(monkeypatch, capsys, *adding, text=f"{POISONED}\r\n".encode()).strip()
        await until_metric(client, "psim_exceptions ", 1)
        assert [one["decision"] for one in await classify(client, POISONED)] == ["allow"]
        (line,) = run(monkeypatch, capsys, "list").splitlines()
        shown = json.loads(line)
        assert (shown["id"], shown["reviewer"], shown["note"]) == (id, "ann", "a quote")
        assert POISONED not in line
        created, expires = (datetime.fromisoformat(shown[n]) for n in ("created", "expires"))
        assert expires - created == timedelta(days=7)
        run(monkeypatch, capsys, "remove", id, "--reviewer", "ben")
        await until_metric(client, "psim_exceptions ", 0)
    assert run(monkeypatch, capsys, "list") == ""
    ended = json.loads(run(monkeypatch, capsys, "list", "--all"))
    assert ended["removed_by"] == "ben"


@pytest.mark.parametrize(
    ("changes", "text", "says"),
    [
        (["--days", "0"], b"x", "--days must be over 0"),
        (["--days", "366"], b"x", "at most 365"),
        (["--note", " "], b"x", "--note must have"),
        (["--bundle", ""], b"x", "give --bundle"),
        (["--bundle", "nowhere"], b"x", "nowhere"),
        ([], b"", "there is no text"),
        ([], b"\xff", "not UTF-8"),
    ],
)
def test_the_command_says_what_is_wrong(
    changes: list[str],
    text: bytes,
    says: str,
    file: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PSIM_AUDIT_URL", file)
    monkeypatch.setenv("PSIM_AUDIT_KEY", KEY)
    adding = ["--url", file, "add", "--note", "n", "--bundle", DIGEST, *changes]
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, capsys, *adding, text=text)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
    with closing(AuditStore(file)) as store, store.connect(5) as connection:
        assert not recorded(connection)


def test_the_command_needs_the_key_and_the_line_end_can_be_kept(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adding = ["--url", file, "add", "--note", "n", "--bundle", DIGEST]
    monkeypatch.delenv("PSIM_AUDIT_KEY", raising=False)
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, *adding, text=b"x\n")
    assert "PSIM_AUDIT_KEY" in capsys.readouterr().err
    monkeypatch.setenv("PSIM_AUDIT_KEY", KEY)
    run(monkeypatch, capsys, *adding, "--exact", text=b"x\n")
    with closing(AuditStore(file)) as store, store.connect(5) as connection:
        (kept,) = recorded(connection)
    assert kept.text_hmac == hmac_of(KEY.encode(), "x\n")
