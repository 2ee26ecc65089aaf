"""Whatever is sent to a running service with a real model: an answer as documented, never a bug."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from models.bundle.load import load_bundle
from service.app import create_app
from service.protocols.guardrails.dialects import GUARDRAILS
from service.protocols.openai import ModerationRequest
from service.protocols.registry import SERVED
from service.route_table import AUTHZ, MODERATIONS, ROUTES
from service.schemas import NOT_BLANK
from service.settings import Settings
from tests.support.bundles import fit_tiny
from tests.support.families import tiny_victim
from tests.support.protocols import AGENTGATEWAY, ASKED, GUARDRAIL, INFER, KONG, tensor
from tests.support.servers import serving

SECRET = "hunter2"
ENVOY_PATHS = [path.removeprefix("/") for path, _, _ in ASKED.values()] + ["health", "embed"]


@pytest.fixture(scope="module")
def url(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Serve a small model; yield the address."""
    path = fit_tiny(tiny_victim("bert"), tokenizer, tmp_path_factory.mktemp("fuzz") / "bundle")
    asked = Settings(bundle=path, model="fake", engine="torch", dtype="float32", admin=True)
    with serving(create_app(asked, load_bundle(path, "float32", "torch"))) as address:
        yield f"http://{address}"


def test_the_document_says_what_the_service_does(url: str, tmp_path: Path) -> None:
    """All checks of schemathesis, with requests that are as documented, and with others."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"]
    options = ["--checks", "all", "--max-examples", "40", "--no-color"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) generated, \d+ passed", done.stdout)[0]) > 200


def every_route(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document of all routes, those of the other protocols included."""
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    values = {"path": ENVOY_PATHS, "model": ["fake", "other"], "version": ["1"]}
    types: dict[str, list[type[BaseModel]]] = {
        **{guardrail.route: [guardrail.request_type] for guardrail in GUARDRAILS},
        MODERATIONS: [ModerationRequest],
        AUTHZ: [protocol.request_type for protocol in SERVED],
    }
    for route in ROUTES.values():
        operation: dict[str, Any] = {"responses": {"default": {"description": "any"}}}
        kinds = types.get(route.path, [protocol.request_type for protocol in route.protocols])
        bodies = [k.model_json_schema(ref_template="#/components/schemas/{model}") for k in kinds]
        for body in bodies:
            schemas |= body.pop("$defs", {})
        if "POST" in route.methods:
            content = {"application/json": {"schema": {"anyOf": bodies}}}
            operation["requestBody"] = {"required": True, "content": content}
        path = route.path.replace(":path", "")
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"enum": values[name]}}
            for name in re.findall(r"{(\w+)}", path)
        ]
        paths[path] = {method.lower(): operation for method in route.methods}
    info = {key: document[key] for key in ("openapi", "info")}
    return info | {"paths": paths, "components": {"schemas": schemas}}


def test_no_route_has_a_bug_that_a_request_can_find(url: str, tmp_path: Path) -> None:
    document = every_route(httpx.get(f"{url}/openapi.json").json())
    (tmp_path / "all.json").write_text(json.dumps(document))
    command = [sys.executable, "-m", "schemathesis.cli", "run", "all.json", "--url", url]
    options = ["--checks", "not_a_server_error", "--max-examples", "5", "--no-color"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) generated, \d+ passed", done.stdout)[0]) > 200


def test_a_blank_text_is_what_the_document_says_it_is() -> None:
    for code in range(0x110000):
        assert bool(re.match(NOT_BLANK, chr(code))) == bool(chr(code).strip()), hex(code)


# All of Unicode but for surrogates, and more than their share of what is read in odd ways.
ODD = "\0\t\n\r\x1b\x7f\x85\u200b\u200d\u202e\u2066\u2028\ufeff\ufffd\ufffe\U0001f469\U000e0001"
TEXTS = st.lists(
    st.text(st.characters(codec="utf-8") | st.sampled_from(ODD), max_size=60).map(
        lambda t: SECRET + t
    ),
    min_size=1,
    max_size=4,
    unique=True,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(texts=TEXTS)
def test_any_text_gets_the_same_answer_wherever_it_stands(
    url: str, caplog: pytest.LogCaptureFixture, texts: list[str]
) -> None:
    with httpx.Client(base_url=url) as client, caplog.at_level(logging.DEBUG):
        caplog.clear()
        verdicts = screened(client, texts)
        assert screened(client, texts[::-1])[::-1] == verdicts
        assert [screened(client, [text])[0] for text in texts] == verdicts
        for path, body, _ in ASKED.values():
            answer = client.post(path, json=body(texts))
            assert answer.status_code in ((200, 403) if any(verdicts) else (200,)), answer.text
            assert SECRET not in answer.text
        assert [record for record in caplog.records if record.name == "psim.request"]
        assert SECRET not in str([record.__dict__ for record in caplog.records])


def screened(client: httpx.Client, texts: list[str]) -> list[bool]:
    answer = client.post("/screen", json={"inputs": texts})
    assert answer.status_code == 200, answer.text
    return [result["poisoned"] for result in answer.json()["results"]]


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (SECRET + "\n" * 90_000, (200, 403)),
        (SECRET + "\u202e\u0627" * 45_000, (200, 403)),
        (SECRET + "\0" * 90_000, (200, 403)),
        (SECRET + "\U0001f469\u200d" * 45_000, (200, 403)),
        (SECRET + "a" * 90_000, (200, 403)),
        ("\n" * 100_000, (422,)),
        (SECRET + "\n" * 100_000, (413,)),
        (SECRET + "a" * 2**20, (413,)),
        (SECRET + "\u0627" * 2**20, (413,)),
        (SECRET + "\0" * 2**20, (413,)),
    ],
    ids=range(10),
)
def test_huge_texts_are_answered_or_refused(
    url: str, caplog: pytest.LogCaptureFixture, text: str, status: tuple[int, ...]
) -> None:
    with caplog.at_level(logging.DEBUG):
        for path, body, _ in ASKED.values():
            answer = httpx.post(f"{url}{path}", json=body([text]), timeout=60)
            assert answer.status_code in status, (path, answer.text)
            assert SECRET not in answer.text
    assert SECRET not in str([record.__dict__ for record in caplog.records])


@pytest.mark.parametrize("half", ["\\ud800", "\\uDFFF", "\\udc00\\ud800"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        *((path, body([SECRET, "HALF"])) for path, body, _ in ASKED.values()),
        ("/screen", {"inputs": "HALF"}),
        ("/explain", {"inputs": "HALF"}),
        (GUARDRAIL, {"texts": ["HALF"]}),
        (GUARDRAIL, {"texts": [SECRET], "model": "HALF"}),
        (GUARDRAIL, {"texts": [SECRET], "HALF": "HALF"}),
        (AGENTGATEWAY, {"body": {"messages": [{"role": "user", "content": "HALF"}]}}),
        (KONG, {"content": "HALF"}),
        (MODERATIONS, {"input": "HALF"}),
        (INFER, {"inputs": [tensor(SECRET)], "id": "HALF"}),
        (INFER, {"inputs": [tensor(SECRET)], "outputs": [{"name": "HALF"}]}),
        (INFER, {"inputs": [tensor(SECRET)], "model_name": "HALF"}),
        ("/v1/classify", {"input": SECRET, "model": "HALF"}),
        ("/v1/classify", {"input": SECRET, "user": "HALF"}),
    ],
)
def test_half_a_character_is_refused_wherever_it_stands(
    url: str, path: str, body: Any, half: str
) -> None:
    sent = json.dumps(body).replace("HALF", half).encode()
    for before in ("", "/envoy"):
        headers = {"content-type": "application/json"}
        answer = httpx.post(f"{url}{before}{path}", content=sent, headers=headers)
        if not before or path in {route for route, _, _ in ASKED.values()}:
            assert answer.status_code == 422, (before + path, answer.text)
            assert "must be in pairs" in answer.text
