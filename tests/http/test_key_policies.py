"""Policies of API keys: what a key says of its holder's texts counts before the settings."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.security.keys.__main__ import main as psim_keys
from service.security.keys.file import KeysError, hash_of, read_keys
from service.settings import Mode
from tests.support.audit import rows
from tests.support.fakes import fake_bundle
from tests.support.keys import bearer
from tests.support.models import two_models
from tests.support.requests import CLEAN, POISONED, UNFAMILIAR, client_of, metric
from tests.support.waiting import until

KEY = "psim_own-" + "k" * 40


def keys_with(folder: Path, policy: str) -> Path:
    """Write a file with one key that has a policy."""
    path = folder / "keys.toml"
    scopes = '["classify", "metrics"]'
    path.write_text(f'[keys.own]\nsha256 = "{hash_of(KEY)}"\nscopes = {scopes}\n{policy}\n')
    return path


@asynccontextmanager
async def client_with(folder: Path, policy: str, **changes: Any) -> AsyncIterator[Any]:
    """Yield a client that shows a key with a policy."""
    async with client_of(keys=keys_with(folder, policy), **changes) as client:
        client.headers.update(bearer(KEY))
        yield client


async def decisions(client: httpx.AsyncClient) -> tuple[int, list[str]]:
    """Return the status and the decisions on a clean, a triggered and an unfamiliar text."""
    body = {"inputs": [CLEAN, POISONED, UNFAMILIAR]}
    answer = await client.post("/classify", json=body)
    return answer.status_code, [one["decision"] for one in answer.json()["results"]]


@pytest.mark.parametrize("service", [Mode.ENFORCE, Mode.SHADOW])
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ('mode = "shadow"', ["allow", "allow", "allow"]),
        ('mode = "flag"', ["allow", "flag", "flag"]),
        ('mode = "enforce"', ["allow", "reject", "flag"]),
        ('mode = "sanitize"', ["allow", "sanitize", "flag"]),
        ('mode = "enforce"\nunfamiliar = "reject"', ["allow", "reject", "reject"]),
        ('mode = "enforce"\nunfamiliar = "allow"', ["allow", "reject", "allow"]),
    ],
)
async def test_a_key_decides_on_the_texts_of_its_holder(
    service: Mode, policy: str, expected: list[str], tmp_path: Path
) -> None:
    async with client_with(tmp_path, policy, mode=service) as client:
        assert await decisions(client) == (200, expected)
        mode = policy.split('"')[1]
        line = f'psim_inputs_total{{decision="allow",mode="{mode}",model="fake"}}'
        assert await metric(client, line) == expected.count("allow"), "counted in its own mode"
        assert (await client.get("/info")).json()["mode"] == mode


@pytest.mark.parametrize("mode", [Mode.ENFORCE, Mode.SHADOW, Mode.FLAG])
async def test_a_key_without_a_policy_has_that_of_the_service(mode: Mode, tmp_path: Path) -> None:
    expected = {
        Mode.ENFORCE: ["allow", "reject", "reject"],
        Mode.FLAG: ["allow", "flag", "flag"],
        Mode.SHADOW: ["allow", "allow", "allow"],
    }[mode]
    async with client_with(tmp_path, "", mode=mode, unfamiliar="reject") as client:
        assert await decisions(client) == (200, expected)


async def test_hooks_and_proxies_follow_the_key_and_so_does_the_audit(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/audit.db"
    async with client_with(tmp_path, 'mode = "shadow"', audit_url=url) as client:
        moderated = await client.post("/v1/moderations", json={"input": POISONED})
        assert moderated.json()["results"][0]["flagged"] is False
        body = {"texts": [POISONED], "input_type": "request"}
        guardrail = await client.post("/beta/litellm_basic_guardrail_api", json=body)
        assert guardrail.json() == {"action": "NONE"}
        passed = await client.post("/envoy/classify", json={"inputs": POISONED})
        assert passed.status_code == 200
    assert {(row.mode, row.decision, row.finding) for row in rows(url)} == {
        ("shadow", "allow", "triggered")
    }


async def test_a_conversation_that_was_seen_is_judged_by_the_policy_of_now(tmp_path: Path) -> None:
    body = {"texts": [POISONED], "input_type": "request"}
    path = "/beta/litellm_basic_guardrail_api"
    async with client_with(tmp_path, 'mode = "shadow"') as client:
        assert (await client.post(path, json=body)).json()["action"] == "NONE"
        keys_with(tmp_path, 'mode = "enforce"')

        async def changed() -> bool:
            return bool((await client.get("/info")).json()["mode"] == "enforce")

        await until(changed)
        assert (await client.post(path, json=body)).json()["action"] == "BLOCKED"


async def test_a_key_is_for_the_models_on_its_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = keys_with(tmp_path, 'models = ["team/topic"]')
    async with two_models(tmp_path, monkeypatch, keys=keys) as client:
        client.headers.update(bearer(KEY))
        for path in ("/classify", "/screen", "/for/mood/classify", "/envoy/classify"):
            refused = await client.post(path, json={"inputs": CLEAN})
            assert refused.status_code == 403, path
            assert "not for the model mood" in refused.text
        assert (await client.get("/info")).status_code == 403
        assert (await client.get("/v2/models/mood")).status_code == 403
        listed = (await client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == ["team/topic"]
        moderated = {"input": CLEAN, "model": "team/topic"}
        assert (await client.post("/v1/moderations", json=moderated)).status_code == 200


async def test_a_budget_that_the_bundle_does_not_hold_is_refused(tmp_path: Path) -> None:
    held = fake_bundle().manifest.frr_budget
    async with client_with(tmp_path, f"frr_budget = {held}") as client:
        assert (await client.post("/classify", json={"inputs": CLEAN})).status_code == 200
    async with client_with(tmp_path, f"frr_budget = {held / 2}") as client:
        refused = await client.post("/classify", json={"inputs": CLEAN})
        assert refused.status_code == 403
        assert f"budget of {held / 2:g}" in refused.json()["detail"]
        assert f"holds thresholds for {held:g} only" in refused.json()["detail"]


def test_the_command_writes_a_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    arguments = ["new", "team", "--scope", "classify", "--file", str(path), "--mode", "flag"]
    arguments += ["--unfamiliar", "reject", "--model", "a", "--model", "b", "--frr-budget", "0.02"]
    psim_keys(arguments)
    key = read_keys(path)["team"]
    assert hash_of(capsys.readouterr().out.strip()) == key.sha256
    assert (key.mode, key.unfamiliar, key.frr_budget) == (Mode.FLAG, "reject", 0.02)
    assert key.models == frozenset({"a", "b"})


@pytest.mark.parametrize(
    ("policy", "where"),
    [
        ('mode = "off"', "keys.own.mode"),
        ('unfamiliar = "maybe"', "keys.own.unfamiliar"),
        ("models = []", "keys.own.models"),
        ("frr_budget = 1", "keys.own.frr_budget"),
    ],
)
def test_a_policy_that_is_wrong_is_named(policy: str, where: str, tmp_path: Path) -> None:
    with pytest.raises(KeysError, match=where):
        read_keys(keys_with(tmp_path, policy))
