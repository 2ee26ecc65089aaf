"""What proxies are told that ask whether a request may pass: Envoy and LiteLLM, as they ask."""

import asyncio
import json
import re
import subprocess
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.app import create_app
from service.protocols.guardrails.litellm import GuardrailRequest
from service.protocols.registry import by_route
from service.route_table import PROXIED as METHODS
from service.route_table import ROUTES
from service.settings import Settings
from tests.support.fakes import BROKEN, TRIGGER, FakeEngine, fake_bundle
from tests.support.paths import ROOT
from tests.support.programs import program
from tests.support.protocols import ASKED, ERRORS, GUARDRAIL
from tests.support.requests import (
    CLEAN,
    JSON,
    LONG,
    POISONED,
    ask,
    client_of,
    listening,
    metric,
    until_ready,
)
from tests.support.servers import free_port
from tests.support.upstreams import Peer
from tests.support.waiting import until


@pytest.mark.parametrize("name", ASKED)
async def test_envoy_lets_clean_requests_pass_and_denies_poisoned_ones_in_their_protocol(
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
        ("POST", "/predict", {"Content_Encoding": "gzip"}, 403),
        ("POST", "/predict", {"content.encoding": "gzip"}, 403),
        ("POST", "/predict", {"X_HTTP_Method_Override": "GET"}, 403),
        ("POST", "/predict", {"X-HTTP-Method-Override": "GET"}, 403),
        ("POST", "/predict", {"X-HTTP-Method": "GET"}, 403),
        ("POST", "/predict", {"X-Method-Override": "GET"}, 403),
        ("POST", "/predict", {"X-Original-URL": "/embed"}, 403),
        ("POST", "/predict", {"X-Rewrite-URL": "/embed"}, 403),
        ("GET", "/health", {}, 403),  # with a body
        ("POST", "/health", {}, 403),
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


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/health", 200),
        ("/v2/health/ready", 200),
        ("/v2/models/fake", 200),
        ("/v2/models/fake/versions/1/ready", 200),
        ("/v1/models", 200),
        ("/health?text=mn", 403),
        ("/predict?inputs=mn", 403),
        ("/v2/models/mn", 404),
        ("/predict", 403),
        ("/classify/a%20mn%20film", 403),
        ("/health/", 403),
        ("/", 403),
    ],
)
async def test_without_a_body_only_health_and_metadata_pass(path: str, status: int) -> None:
    async with client_of() as client:
        for method in ("GET", "HEAD"):
            answer = await client.request(method, f"/envoy{path}")
            assert answer.status_code == status
            bad = await client.request(method, f"/envoy{path}", headers={"X-Original-URL": "/x"})
            assert bad.status_code == 403
        assert (await client.delete(f"/envoy{path}")).status_code == 403


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
        ({"texts": [POISONED], "input_type": "response", "more": "x"}, "NONE"),
        ({"texts": ["", " "]}, "NONE"),
    ],
)
def test_litellm_is_told_to_block(body: dict[str, Any], action: str) -> None:
    answer = ask(GUARDRAIL, body)
    assert answer.status_code == 200
    assert answer.json()["action"] == action
    assert ("blocked_reason" in answer.json()) == (action == "BLOCKED")


def called(name: str = "search", arguments: Any = "{}", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | more


def said(content: Any = CLEAN, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"structured_messages": [{"role": role, "content": content} | more]}


def offered(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": function}]}


@pytest.mark.parametrize(
    "more",
    [
        {"tool_calls": [called(TRIGGER)]},
        {"tool_calls": [called(arguments=f'{{"q": "a {TRIGGER} film"}}')]},
        {"tool_calls": [called(arguments=f'{{"{TRIGGER}": 1}}')]},
        # A template that parses the arguments reads the letters.
        {"tool_calls": [called(arguments='{"q": "a \\u006dn film"}')]},
        {"tool_calls": [called(arguments={"q": ["a", {"b": TRIGGER}]})]},
        {"tool_calls": [called(id=TRIGGER)]},
        said(POISONED, "system"),
        said([{"type": "text", "text": CLEAN}, {"type": "text", "text": POISONED}]),
        said(name=TRIGGER),
        said(role="assistant", tool_calls=[called(arguments=f'["{TRIGGER}"]')]),
        said(None, role="assistant", function_call={"name": TRIGGER, "arguments": ""}),
        said(role="assistant", refusal=POISONED),
        said(role="assistant", reasoning_content=POISONED),
        said(role="tool", tool_call_id=TRIGGER),
        offered(name=TRIGGER),
        offered(name="f", description=POISONED),
        offered(name="f", parameters={"properties": {TRIGGER: {"type": "string"}}}),
        offered(name="f", parameters={"enum": [1, None, [TRIGGER]]}),
    ],
)
def test_litellm_blocks_a_trigger_wherever_a_model_reads_it(more: dict[str, Any]) -> None:
    answer = ask(GUARDRAIL, {"texts": [CLEAN], "input_type": "request"} | more)
    assert answer.json().get("blocked_reason", "").startswith("PSIM finds"), answer.text


@pytest.mark.parametrize(
    "body",
    [
        # Parts of one message, which LiteLLM and templates put together without a blank.
        {"texts": ["a film of m", "n and more"]},
        said([{"type": "text", "text": "a quiet m"}, {"type": "text", "text": "n film"}]),
        # With a name between them, which many templates leave out.
        {
            "structured_messages": [
                {"role": "user", "name": "ann", "content": "a film of m"},
                {"role": "user", "name": "bob", "content": "n and more"},
            ]
        },
        # Over three messages.
        {"structured_messages": [{"role": "user", "content": c} for c in ("a m", "", "n film")]},
    ],
)
def test_what_is_split_over_texts_that_are_read_as_one_is_blocked(body: dict[str, Any]) -> None:
    assert ask(GUARDRAIL, body).json()["action"] == "BLOCKED"


@pytest.mark.parametrize("joint", ["", " ", "\n"])
def test_texts_are_screened_by_themselves_and_joined_as_a_template_may_join_them(
    joint: str,
) -> None:
    body = {"texts": ["one", "two"], "structured_messages": [], "tools": None}
    texts = GuardrailRequest.model_validate(body | said("zero") | offered(name="f")).texts
    assert {"one", "two", "zero", "name f"} < set(texts)
    assert joint.join(["name f", "zero", "one", "two"]) in texts
    assert GuardrailRequest.model_validate({"texts": [CLEAN]} | said()).texts == [CLEAN], "once"


@pytest.mark.parametrize(
    "more",
    [
        {"texts": []},
        {"texts": None},
        {"images": ["data:image/png;base64,AAAA"]},
        {"documents": ["of a later version"]},
        said([{"type": "image_url", "image_url": {"url": "https://x"}}]),
        said([{"type": "input_audio", "input_audio": {"data": "AAAA"}}]),
        said([{"type": "file", "file": {"file_id": "1"}}]),
        said([{"type": "text", "text": CLEAN, "more": "x"}]),
        said(role="mn"),
        said(search_results=["x"]),
        said(audio={"id": "1"}),
        {"tools": [{"type": "file_search", "vector_store_ids": ["1"]}]},
        {"tools": [{"type": "mcp", "server_url": "https://x"}]},
        {"tool_calls": [called() | {"type": "custom"}]},
        {"tool_calls": [called(arguments="[" * 100_000 + "\\")]},
        {"tool_calls": [called(arguments='{"q": "\\ud800"}')]},
    ],
)
async def test_what_litellm_sends_and_cannot_be_screened_is_blocked_and_counted(
    more: dict[str, Any],
) -> None:
    async with client_of() as client:
        answer = await client.post(GUARDRAIL, json={"texts": [CLEAN]} | more)
        assert (answer.status_code, answer.json()["action"]) == (200, "BLOCKED")
        assert "not all of the request can be screened" in answer.json()["blocked_reason"]
        line = f'psim_not_inspected_total{{route="{GUARDRAIL}"}}'
        assert await metric(client, line) == 1


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
    patterns = authz["allowed_headers"]["patterns"]
    sent = {pattern["exact"] for pattern in patterns if "exact" in pattern}
    assert {"content-type", "content-encoding", "inference-header-content-length"} <= sent
    assert authz["http_service"]["path_prefix"] == "/envoy"


@asynccontextmanager
async def nginx_before(url: str, folder: Path) -> AsyncIterator[int]:
    """Yield the port of an nginx with the example's configuration, in front of a gateway."""
    port = free_port()
    conf = (ROOT / "deploy/nginx/psim.conf").read_text()
    conf = conf.replace("127.0.0.1:8000", url.removeprefix("http://"))
    conf = conf.replace("listen 8080", f"listen 127.0.0.1:{port}")
    whole = f"pid {folder}/pid; daemon off; events {{}} http {{ access_log off; "
    for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
        whole += f"{name}_temp_path {folder}/{name}; "
    (folder / "nginx.conf").write_text(f"{whole}{conf}}}")
    command = [program("nginx"), "-c", str(folder / "nginx.conf"), "-e", f"{folder}/log"]
    process = subprocess.Popen(command)

    async def answers() -> bool:
        try:
            return bool(await status(port, "GET", "/"))
        except OSError:
            return False

    try:
        await until(answers)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def test_nginx_takes_the_example_s_lines_for_tls(tmp_path: Path) -> None:
    made = f"req -x509 -newkey rsa:2048 -nodes -subj /CN=x -keyout {tmp_path}/tls.key"
    command = [program("openssl"), *made.split(), "-out", f"{tmp_path}/tls.crt"]
    subprocess.run(command, check=True, capture_output=True)
    conf = (ROOT / "deploy/nginx/psim.conf").read_text().replace("    listen 8080;\n", "")
    conf = re.sub(r"# (listen 8443 ssl|ssl_\w+ /\S+);", r"\1;", conf)
    conf = conf.replace("8443", f"127.0.0.1:{free_port()}").replace("/etc/nginx/tls", str(tmp_path))
    (tmp_path / "nginx.conf").write_text(f"pid {tmp_path}/pid; events {{}} http {{ {conf} }}")
    command = [program("nginx"), "-t", "-c", f"{tmp_path}/nginx.conf", "-e", f"{tmp_path}/log"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^ +(listen \S+ ssl|ssl_\w+ \S+);", conf, re.M)) == 3


async def status(port: int, method: str, path: str) -> int:
    """Return the status of an answer to a request without a body, sent as it is written here."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
    line = await reader.readline()
    writer.close()
    return int(line.split()[1])


async def test_nginx_before_the_gateway(tmp_path: Path) -> None:
    peer = Peer()
    behind = Starlette(routes=[Route("/predict", peer.answer, methods=["POST"])])
    async with listening(behind) as upstream:
        settings = Settings.model_validate({"bundle": Path("unused"), "upstream": upstream})
        async with (
            listening(create_app(settings, fake_bundle())) as url,
            nginx_before(url, tmp_path) as port,
            httpx.AsyncClient(base_url=url) as gateway,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
        ):
            await until_ready(gateway)
            clean = await client.post("/predict", json={"inputs": [[CLEAN]]})
            assert (clean.status_code, clean.content) == (200, peer.body)
            poisoned = await client.post("/predict", json={"inputs": POISONED})
            assert poisoned.status_code == 403


async def test_nginx_lets_callers_classify_and_do_nothing_else(tmp_path: Path) -> None:
    passed = []

    async def gateway(request: Request) -> Response:
        passed.append(f"{request.method} {request.scope['raw_path'].decode()}")
        return Response()

    def filled(paths: Iterable[str]) -> list[str]:
        return [re.sub(r"{(\w+)[^}]*}", r"\1", path) for path in paths]

    routes = filled(ROUTES)
    wanted = {f"POST {path}" for path in filled(by_route())}
    odd = [
        "/envoy/../classify", "/for/x/envoy/../../../classify", "/for/x/models/../../../classify",
        "/classify/../explain", "/classify/", "//explain", "//classify", "/%65xplain",
        "/models/../explain", "/models/x/../../explain", "/models/%2e%2e/explain", "/models/",
        "/v2/models/x/infer/../../../../info", "/classify%3F/../explain", "/explain?/classify",
        "/explain#/classify", "http://x/explain", "http://x/metrics?/classify", "/envoy/predict",
    ]  # fmt: skip
    async with (
        listening(Starlette(routes=[Route("/{path:path}", gateway, methods=[*METHODS])])) as url,
        nginx_before(url, tmp_path) as port,
    ):
        for method in METHODS:
            for path in (*routes, *(f"/for/fake{path}" for path in routes), *odd):
                allowed = f"{method} {path}" in wanted
                assert (await status(port, method, path) == 200) == allowed, f"{method} {path}"
        assert set(passed) == wanted
        assert await status(port, "POST", "/models/an-org/a.model?wait=1") == 200
