"""The real Envoy with our examples of its configuration, between a client and a classifier."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from starlette.applications import Starlette
from starlette.routing import Route

from service.app import create_app
from service.protocols.headers import REWRITING
from service.route_table import EXT_PROC
from service.security.keys.file import Scope
from service.settings import Settings
from tests.support.fakes import BROKEN, FakeEngine, fake_bundle
from tests.support.keys import KEY, keys_file
from tests.support.paths import ROOT
from tests.support.programs import program
from tests.support.protocols import ASKED, ERRORS
from tests.support.requests import CLEAN, JSON, POISONED, listening, metric, until_metric
from tests.support.servers import free_port
from tests.support.upstreams import SOUND, Peer
from tests.support.waiting import until

EXAMPLES = ROOT / "deploy/envoy"
BOTH = pytest.mark.parametrize("example", ["envoy", "ext_proc"])


def configuration(
    example: str, ports: dict[str, int], processing: dict[str, str], key: str | None
) -> Any:
    """Return an example of ours, with addresses on this machine."""
    text = (EXAMPLES / f"{example}.yaml").read_text()
    if key:
        text = text.replace("# initial_metadata", "initial_metadata").replace("psim_…", key)
        assert key in text
    found = yaml.safe_load(text)
    (listener,) = found["static_resources"]["listeners"]
    listener["address"]["socket_address"] = {
        "address": "127.0.0.1",
        "port_value": ports["listener"],
    }
    for cluster in found["static_resources"]["clusters"]:
        endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
        endpoint["address"]["socket_address"] = {
            "address": "127.0.0.1",
            "port_value": ports[cluster["name"]],
        }
        if "health_check_config" in endpoint:
            endpoint["health_check_config"]["port_value"] = ports["http"]
    if processing:
        filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
        filters[0]["typed_config"]["processing_mode"] |= processing
    return found


@dataclass
class Around:
    """A client of an Envoy, with a gateway at its side and a classifier behind it."""

    client: httpx.AsyncClient
    gateway: httpx.AsyncClient
    peer: Peer
    away: AsyncExitStack
    """Close it, and the gateway is gone."""


@asynccontextmanager
async def envoy(
    example: str,
    folder: Path,
    engine: FakeEngine | None = None,
    processing: dict[str, str] | None = None,
    key: str | None = None,
) -> AsyncIterator[Around]:
    """Run Envoy; with `key`, the gateway asks for keys, and Envoy sends this one."""
    installed = program("envoy")
    ext_proc = free_port()
    keys = keys_file(folder) if key else None
    settings = Settings(bundle=Path("unused"), ext_proc_port=ext_proc, keys=keys)
    peer = Peer()
    methods = ["GET", "POST", "PUT"]
    behind = Starlette(routes=[Route("/{path:path}", peer.answer, methods=methods)])
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(listening(behind))
        away = await stack.enter_async_context(AsyncExitStack())
        url = await away.enter_async_context(listening(create_app(settings, fake_bundle(engine))))
        http = int(url.rsplit(":", 1)[1])
        ports = {
            "listener": free_port(),
            "http": http,
            "gateway": ext_proc if example == "ext_proc" else http,
            "classifier": int(upstream.rsplit(":", 1)[1]),
        }
        config = folder / "envoy.json"
        config.write_text(json.dumps(configuration(example, ports, processing or {}, key)))
        options = ["--disable-hot-restart", "--concurrency", "1"]
        process = subprocess.Popen(
            [installed, "-c", config, *options, "--log-path", folder / "log"]
        )
        stack.callback(process.wait, 20)
        stack.callback(process.terminate)
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports['listener']}", timeout=30)
        )
        gateway = await stack.enter_async_context(httpx.AsyncClient(base_url=url))

        async def healthy() -> bool:
            assert process.poll() is None, (folder / "log").read_text()
            status = (await client.get("/health")).status_code
            return status == 200 or (
                status == 403 and bool(processing)
            )  # what is not sent is denied

        await until(healthy)
        peer.asked.clear()
        yield Around(client, gateway, peer, away)


@BOTH
async def test_a_clean_request_passes_as_it_is_and_a_poisoned_one_is_answered_in_its_protocol(
    example: str, tmp_path: Path
) -> None:
    async with envoy(example, tmp_path) as around:
        for name, (path, body, _) in ASKED.items():
            content = json.dumps(body([CLEAN] * 3), indent=1).encode()
            forged = {"x-psim-decision": "forged", "x-psim-finding": "forged"}
            headers = JSON | forged | {"x-mine": "yes"}
            clean = await around.client.post(path, content=content, headers=headers)
            assert (clean.status_code, clean.content) == (200, SOUND)
            (asked_path, asked_headers, asked_body) = around.peer.asked.pop()
            assert (asked_path, asked_body) == (path, content)
            assert asked_headers["x-psim-decision"] == "allow"
            assert asked_headers["x-psim-finding"] == "none"
            assert asked_headers["x-mine"] == "yes"

            poisoned = await around.client.post(path, json=body([CLEAN, POISONED, CLEAN]))
            assert poisoned.status_code == 403
            assert poisoned.headers["x-psim-decision"] == "reject"
            assert poisoned.headers["x-psim-finding"] == "triggered"
            assert "trigger" in ERRORS[name](poisoned.json())
            assert "json" in poisoned.headers["content-type"]
            assert not around.peer.asked
        route = EXT_PROC if example == "ext_proc" else "/envoy/{path:path}"
        line = f'psim_requests_total{{outcome="ok",route="{route}"}}'
        # The request for health is one too.
        assert await metric(around.gateway, line) >= 2 * len(ASKED) + 1


@BOTH
async def test_what_cannot_be_inspected_gets_nowhere(example: str, tmp_path: Path) -> None:
    body = json.dumps({"inputs": [[CLEAN]]}).encode()
    other = json.dumps(ASKED["oip"][1]([CLEAN])).encode()
    twice = [("content-type", "application/json"), ("content-type", "text/plain")]
    refused: list[tuple[str, str, Any, bytes, int]] = [
        ("POST", "/predict", JSON | {"content-encoding": "gzip"}, body, 415),
        ("POST", "/predict", JSON | {"inference-header-content-length": "3"}, body, 415),
        ("POST", "/predict", {"content-type": "text/plain"}, body, 415),
        ("POST", "/predict", twice, body, 415),
        ("POST", "/predict", JSON, b'{"inputs": "b", "inputs": "mn"}', 400),
        ("POST", "/predict", JSON, b'{"inputs": "b", "more": "mn"}', 422),
        ("POST", "/predict", JSON, b"", 400),
        ("POST", "/predict", JSON, b" " * 3_000_000, 413),
        ("POST", "/predict?inputs=mn", JSON, body, 403),
        ("POST", "/embed", JSON, body, 403),
        ("POST", "/v2/models/different/infer", JSON, other, 404),
        ("PUT", "/predict", JSON, body, 403),
        ("GET", "/predict", JSON, body, 403),
        ("GET", "/predict?inputs=mn", {}, b"", 403),
        ("GET", "/predict", {}, b"", 403),
        ("GET", "/classify/a%20mn%20film", {}, b"", 403),
        ("GET", "/v2/models/mn", {}, b"", 404),
        ("POST", "/predict", JSON | {"content.encoding": "gzip"}, body, 403),
        ("POST", "/predict", JSON, json.dumps({"inputs": f"a {BROKEN} film"}).encode(), 503),
    ]  # fmt: skip

    async with envoy(example, tmp_path) as around:
        for method, path, headers, content, status in refused:
            answer = await around.client.request(method, path, headers=headers, content=content)
            assert answer.status_code == status, (method, path, headers, answer.text)
        assert not around.peer.asked
        forged = {"x-psim-decision": "forged", "x-psim-finding": "forged"}
        assert (await around.client.get("/health", headers=forged)).status_code == 200
        (seen,) = around.peer.asked
        assert not forged.keys() & seen[1].keys()


@BOTH
async def test_headers_that_a_server_may_misread_are_dropped(example: str, tmp_path: Path) -> None:
    names = ("content_encoding", "X_HTTP_Method_Override", "x_anything", *REWRITING)
    headers = JSON | dict.fromkeys(names, "gzip")
    async with envoy(example, tmp_path) as around:
        answer = await around.client.post("/predict", json={"inputs": [[CLEAN]]}, headers=headers)
        assert answer.status_code == 200, answer.text
        (seen,) = around.peer.asked
        assert not {name.lower() for name in names} & seen[1].keys()


@BOTH
async def test_without_the_gateway_nothing_passes(example: str, tmp_path: Path) -> None:
    async with envoy(example, tmp_path) as around:
        await around.gateway.aclose()
        await around.away.aclose()
        answer = await around.client.post("/predict", json={"inputs": [[CLEAN]]})
        assert answer.status_code >= 500
        assert (await around.client.get("/health")).status_code >= 500
        assert not around.peer.asked


async def test_requests_that_are_being_screened_end_while_the_gateway_drains(
    tmp_path: Path,
) -> None:
    engine = FakeEngine()
    async with envoy("ext_proc", tmp_path, engine) as around:
        around.peer.wait_s = 1  # and one that Envoy waits for the answer of goes on as well
        forwarded = asyncio.create_task(around.client.post("/predict", json={"inputs": [[CLEAN]]}))
        await until(lambda: around.peer.asked)
        engine.gate.clear()
        tasks = [
            asyncio.create_task(around.client.post("/predict", json={"inputs": [[text]]}))
            for text in (CLEAN, POISONED)
        ]
        await until_metric(around.gateway, "psim_queue_inputs", 2)
        await around.gateway.aclose()
        asyncio.get_running_loop().call_later(0.5, engine.gate.set)
        await around.away.aclose()
        assert (await forwarded).status_code == 200
        assert [(await task).status_code for task in tasks] == [200, 403]


async def chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 10):
        yield body[start : start + 10]
        await asyncio.sleep(0.02)  # so that each comes alone


async def test_a_body_that_is_streamed_is_held_until_all_of_it_is_screened(tmp_path: Path) -> None:
    streamed = {"request_body_mode": "STREAMED", "response_header_mode": "SEND"}
    async with envoy("ext_proc", tmp_path, processing=streamed) as around:
        for text, status, sent in ((CLEAN, 200, 1), (POISONED, 403, 0)):
            body = json.dumps({"inputs": [[text]]}).encode()
            forged = JSON | {"x-psim-decision": "forged", "x-psim-finding": "forged"}
            answer = await around.client.post("/predict", content=chunks(body), headers=forged)
            assert answer.status_code == status
            complete = [asked for asked in around.peer.asked if asked[2]]
            assert [asked[2] for asked in complete] == [body] * sent
            for _, headers, _ in around.peer.asked:
                assert not {"x-psim-decision", "x-psim-finding"} & headers.keys()
            around.peer.asked.clear()


@pytest.mark.parametrize(
    "processing",
    [
        {"request_body_mode": "NONE"},
        {"request_body_mode": "BUFFERED_PARTIAL"},
        {"request_header_mode": "SKIP"},
        {
            "request_header_mode": "SKIP",
            "request_body_mode": "NONE",
            "response_header_mode": "SEND",
        },
    ],
)
async def test_an_envoy_that_does_not_send_all_is_noticed(
    processing: dict[str, str], tmp_path: Path
) -> None:
    async with envoy("ext_proc", tmp_path, processing=processing) as around:
        answer = await around.client.post("/predict", json={"inputs": [[CLEAN]]})
        assert answer.status_code == 403
        assert "screened" in answer.text
        if "response_header_mode" not in processing:
            assert not around.peer.asked


async def test_ext_proc_needs_the_key_of_the_example_and_nothing_passes_without(
    tmp_path: Path,
) -> None:
    async with envoy("ext_proc", tmp_path, key=KEY[Scope.CLASSIFY]) as around:
        clean, poisoned = (ASKED["tei"][1]([text]) for text in (CLEAN, POISONED))
        assert (await around.client.post("/predict", json=clean)).status_code == 200
        assert (await around.client.post("/predict", json=poisoned)).status_code == 403
        (tmp_path / "keys.toml").write_text("")

        async def denied() -> bool:
            return (await around.client.post("/predict", json=clean)).status_code == 500

        await until(denied)  # the file of keys is looked at every second
        asked = len(around.peer.asked)
        assert (await around.client.post("/predict", json=clean)).status_code == 500
        assert len(around.peer.asked) == asked
