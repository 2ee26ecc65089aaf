"""What proxies are told that ask whether a request may pass: Envoy and LiteLLM, as they ask."""

import asyncio
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from service.app import create_app
from service.settings import Settings
from tests.support.fakes import BROKEN, FakeEngine, fake_bundle
from tests.support.paths import ROOT
from tests.support.protocols import ASKED, ERRORS, GUARDRAIL
from tests.support.requests import CLEAN, JSON, LONG, POISONED, ask, client_of, listening, metric
from tests.support.servers import free_port
from tests.support.upstreams import Peer


@pytest.mark.parametrize("name", ASKED)
async def test_envoy_lets_clean_requests_pass_and_denies_poisoned_ones_in_their_dialect(
    name: str,
) -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        path, body, _ = ASKED[name]
        allowed = await client.post(f"/envoy{path}", json=body([CLEAN] * 3))
        assert (allowed.status_code, allowed.content) == (200, b"")
        assert allowed.headers["x-psim-decision"] == "allow"
        for texts in ([CLEAN, POISONED, CLEAN], [LONG]):
            denied = await client.post(f"/envoy{path}", json=body(texts))
            assert (denied.status_code, denied.headers["x-psim-decision"]) == (403, "reject")
            assert "trigger" in ERRORS[name](denied.json())
        assert len(engine.classified) == 1, "only to warm up"


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/predict", {"x-envoy-auth-partial-body": "true"}, 403),
        ("POST", "/predict", {"content-encoding": "gzip"}, 415),
        ("POST", "/predict", {"content-type": "text/plain"}, 415),
        ("POST", "/predict", {"inference-header-content-length": "3"}, 415),
        ("PUT", "/predict", {}, 403),
        ("POST", "/embed", {}, 403),
        ("POST", "/v2/repository/models/x/load", {}, 403),
        ("GET", "/predict", {}, 403),  # with a body
        ("POST", "/predict?inputs=mn", {}, 403),
        ("POST", "/v2/models/other/infer", {}, 422),
    ],
)
async def test_what_cannot_be_inspected_does_not_pass(
    method: str, path: str, headers: dict[str, str], status: int
) -> None:
    async with client_of() as client:
        content = json.dumps({"inputs": [[CLEAN]]}).encode()
        assert (
            await client.request(method, f"/envoy{path}", content=content, headers=JSON | headers)
        ).status_code == status


async def test_health_checks_pass_but_not_texts_in_a_query() -> None:
    async with client_of() as client:
        assert (await client.get("/envoy/v2/health/ready")).status_code == 200
        assert (await client.get("/envoy/predict?inputs=mn")).status_code == 403


@pytest.mark.parametrize(
    ("mode", "status", "decision"),
    [("flag", 200, "flag"), ("shadow", 200, "allow"), ("sanitize", 403, "reject")],
)
def test_modes_hold_for_envoy_too(mode: str, status: int, decision: str) -> None:
    answer = ask("/envoy/predict", {"inputs": POISONED}, mode=mode)
    assert (answer.status_code, answer.headers["x-psim-decision"]) == (status, decision)


def test_no_verdict_is_no_pass() -> None:
    assert ask("/envoy/predict", {"inputs": f"a {BROKEN} film"}).status_code == 503
    assert ask(GUARDRAIL, {"texts": [f"a {BROKEN} film"]}).status_code == 503


@pytest.mark.parametrize(
    ("body", "action"),
    [
        ({"texts": [CLEAN], "input_type": "request"}, "NONE"),
        ({"texts": [CLEAN, POISONED], "input_type": "request", "litellm_call_id": "1"}, "BLOCKED"),
        ({"texts": [LONG], "request_data": {"user_api_key_hash": "x"}}, "BLOCKED"),
        ({"texts": [POISONED], "input_type": "response"}, "NONE"),
        ({"texts": ["", " "]}, "NONE"),
        ({"texts": []}, "NONE"),
    ],
)
def test_litellm_is_told_to_block(body: dict[str, Any], action: str) -> None:
    answer = ask(GUARDRAIL, body)
    assert answer.status_code == 200
    assert answer.json()["action"] == action
    assert ("blocked_reason" in answer.json()) == (action == "BLOCKED")


async def test_verdicts_for_proxies_are_counted() -> None:
    async with client_of() as client:
        await client.post("/envoy/predict", json={"inputs": [[CLEAN], [POISONED]]})
        await client.post(GUARDRAIL, json={"texts": [POISONED]})
        for decision, count in (("allow", 1), ("reject", 2)):
            line = f'psim_inputs_total{{decision="{decision}",mode="enforce",model="fake"}}'
            assert await metric(client, line) == count
        line = f'psim_requests_total{{outcome="rejected",route="{GUARDRAIL}"}}'
        assert await metric(client, line) == 1


def test_the_example_of_envoy_fails_closed_and_sends_what_we_need_to_see() -> None:
    example = yaml.safe_load((ROOT / "deploy/envoy/envoy.yaml").read_text())
    (listener,) = example["static_resources"]["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    authz = manager["http_filters"][0]["typed_config"]
    assert authz["failure_mode_allow"] is False
    assert authz["with_request_body"]["allow_partial_message"] is False
    limit = Settings.model_fields["max_body_bytes"].default
    assert authz["with_request_body"]["max_request_bytes"] == limit
    sent = {pattern["exact"] for pattern in authz["allowed_headers"]["patterns"]}
    assert {"content-type", "content-encoding", "inference-header-content-length"} <= sent
    assert authz["http_service"]["path_prefix"] == "/envoy"


async def test_nginx_before_the_gateway(tmp_path: Path) -> None:
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if not nginx:
        pytest.skip("nginx is not installed")

    from starlette.applications import Starlette
    from starlette.routing import Route

    peer = Peer()
    behind = Starlette(routes=[Route("/predict", peer.answer, methods=["POST"])])
    async with listening(behind) as upstream:
        settings = Settings.model_validate({"bundle": Path("unused"), "upstream": upstream})
        async with listening(create_app(settings, fake_bundle())) as url:
            port = free_port()
            conf = (ROOT / "deploy/nginx/psim.conf").read_text()
            conf = conf.replace("127.0.0.1:8000", url.removeprefix("http://"))
            conf = conf.replace("listen 8080", f"listen 127.0.0.1:{port}")
            whole = f"pid {tmp_path}/pid; daemon off; events {{}} http {{ access_log off; "
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
                whole += f"{name}_temp_path {tmp_path}/{name}; "
            (tmp_path / "nginx.conf").write_text(f"{whole}{conf}}}")
            command = [nginx, "-c", str(tmp_path / "nginx.conf"), "-e", f"{tmp_path}/log"]
            process = subprocess.Popen(command)
            try:
                async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                    for _ in range(50):
                        await asyncio.sleep(0.1)
                        try:
                            if (await client.get("/ready")).status_code == 200:
                                break
                        except httpx.TransportError:
                            pass
                    clean = await client.post("/predict", json={"inputs": [[CLEAN]]})
                    assert (clean.status_code, clean.content) == (200, peer.body)
                    poisoned = await client.post("/predict", json={"inputs": POISONED})
                    assert poisoned.status_code == 403
                    assert (await client.get("/metrics")).status_code == 404
            finally:
                process.terminate()
                process.wait(10)
