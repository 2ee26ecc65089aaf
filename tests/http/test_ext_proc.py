"""What ext_proc answers to a client of the public stubs, part by part; test_envoy has the rest."""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
import pytest
from betterproto2 import which_one_of
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ProcessingModeBodySendMode as Mode,
)
from envoy_data_plane.envoy.service.ext_proc.v3 import (
    HttpBody,
    HttpHeaders,
    HttpTrailers,
    ProcessingRequest,
    ProcessingResponse,
    ProtocolConfiguration,
)

from models.errors import PsimError
from service.app import create_app
from service.audit.store import AuditStore
from service.route_table import EXT_PROC
from service.security.keys.file import Scope
from service.settings import Settings
from tests.support.envoy import head
from tests.support.fakes import FakeEngine, fake_bundle
from tests.support.keys import FEW, KEY, bearer, keys_file
from tests.support.paths import ROOT
from tests.support.requests import CLEAN, POISONED, client_of, metric, until_metric
from tests.support.servers import free_port

CLEAN_BODY, POISONED_BODY = (f'{{"inputs": [["{text}"]]}}'.encode() for text in (CLEAN, POISONED))


@asynccontextmanager
async def stub(**changes: Any) -> AsyncIterator[tuple[Any, Any]]:
    """Yield what begins a stream, and a client of the same gateway over HTTP."""
    port = free_port()
    async with (
        client_of(ext_proc_port=port, **changes) as client,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield (
            channel.stream_stream(EXT_PROC, ProcessingRequest.__bytes__, ProcessingResponse.parse),
            client,
        )


def body(content: bytes, ends: bool = True) -> ProcessingRequest:
    return ProcessingRequest(request_body=HttpBody(body=content, end_of_stream=ends))


TRAILERS = ProcessingRequest(request_trailers=HttpTrailers())
RESPONSE = ProcessingRequest(response_headers=HttpHeaders())


async def answers(begin: Any, parts: Sequence[ProcessingRequest]) -> list[int | str]:
    """Return the kind of the answer to each part, or its status; and whether the stream goes on."""
    stream, found = begin(), []
    for part in parts:
        await stream.write(part)
        answer = await stream.read()
        refusal = answer.immediate_response
        found.append(int(refusal.status.code) if refusal else which_one_of(answer, "response")[0])
    try:
        assert await asyncio.wait_for(stream.read(), 0.3) is grpc.aio.EOF
        return [*found, f"ended {(await stream.code()).name}"]
    except TimeoutError:
        stream.cancel()
        return [*found, "goes on"]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([head()], ["request_headers", "goes on"]),
        ([head(), body(CLEAN_BODY)], ["request_headers", "request_body", "ended OK"]),
        ([head(), body(POISONED_BODY)], ["request_headers", 403, "ended OK"]),
        # A body with trailers is whole, though it does not end the stream.
        ([head(), body(CLEAN_BODY, False)], ["request_headers", "request_body", "ended OK"]),
        ([head(), body(POISONED_BODY, False)], ["request_headers", 403, "ended OK"]),
        ([head(), TRAILERS], ["request_headers", 403, "ended OK"]),
        # Nothing but the last part of a streamed one is a reason to pass it.
        (
            [head(mode=Mode.STREAMED), body(CLEAN_BODY[:9], False)],
            ["request_headers", "request_body", "goes on"],
        ),
        (
            [head(mode=Mode.STREAMED), body(CLEAN_BODY[:9], False), body(CLEAN_BODY[9:])],
            ["request_headers", "request_body", "request_body", "ended OK"],
        ),
        (
            [head(mode=Mode.STREAMED), body(POISONED_BODY[:19], False), body(POISONED_BODY[19:])],
            ["request_headers", "request_body", 403, "ended OK"],
        ),
        (
            [head(mode=Mode.STREAMED), body(CLEAN_BODY, False), TRAILERS],
            ["request_headers", "request_body", 403, "ended OK"],
        ),
        (
            [head(mode=Mode.STREAMED), *[body(b" " * 60, False)] * 3],
            ["request_headers", "request_body", "request_body", 413, "ended OK"],
        ),
        # Refused for its headers, before the body comes.
        ([head("/predict?inputs=mn")], [403, "ended OK"]),
        ([head("/embed")], [403, "ended OK"]),
        ([head("/pre%64ict"), body(POISONED_BODY)], ["request_headers", 403, "ended OK"]),
        ([head(encoding="gzip")], [415, "ended OK"]),
        ([head(method="TRACE")], [405, "ended OK"]),
        # Without a body.
        ([head("/health", ends=True, method="GET")], ["request_headers", "ended OK"]),
        (
            [head("/health", ends=True, mode=Mode.NONE, method="GET")],
            ["request_headers", "ended OK"],
        ),
        ([head(ends=True)], [400, "ended OK"]),
        # Of an Envoy that does not say that it will send the body.
        ([head(mode=Mode.NONE)], [403, "ended OK"]),
        ([head(mode=Mode.FULL_DUPLEX_STREAMED)], [403, "ended OK"]),
        ([head(mode=None)], [403, "ended OK"]),
        ([body(CLEAN_BODY)], [403, "ended OK"]),
        ([RESPONSE], [403, "ended OK"]),
        # An upstream that answers before it has got the body.
        ([head(), RESPONSE], ["request_headers", "response_headers", "goes on"]),
    ],
)
async def test_every_part_is_answered_and_only_a_verdict_ends_the_stream(
    parts: list[ProcessingRequest], expected: list[int | str]
) -> None:
    async with stub(max_body_bytes=100) as (begin, _):
        assert await answers(begin, parts) == expected


async def test_an_envoy_that_only_observes_is_denied_and_counted() -> None:
    async with stub() as (begin, client):
        observed = head()
        observed.observability_mode = True
        assert await answers(begin, [observed]) == [403, "ended OK"]
        assert await metric(client, f'psim_not_inspected_total{{route="{EXT_PROC}"}}') == 1


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("Content-Encoding", 415),
        ("content_encoding", 403),
        ("x-original-url", 403),
        ("x-http-method-override", 403),
    ],
)
async def test_a_header_that_hides_what_is_read_is_refused(name: str, status: int) -> None:
    async with stub() as (begin, _):
        begun = head(encoding=None, more={name: "gzip"})
        assert await answers(begin, [begun]) == [status, "ended OK"]


def test_every_field_of_the_messages_is_in_the_document() -> None:
    section = (ROOT / "docs/compatibility.md").read_text().split("\n### Envoy `ext_proc`\n")[1]
    parts: dict[str, Any] = {
        "request_headers": HttpHeaders,
        "request_body": HttpBody,
        "protocol_config": ProtocolConfiguration,
    }
    for field in fields(ProcessingRequest):
        for inner in fields(parts[field.name]) if field.name in parts else [None]:
            name = f"{field.name}.{inner.name}" if inner else field.name
            assert f"`{name}`" in section, name


async def test_a_caller_that_hangs_up_is_counted_and_costs_no_pass() -> None:
    engine = FakeEngine()
    async with stub(engine=engine) as (begin, client):
        screened = len(engine.screened)
        stream = begin()
        await stream.write(head())
        await stream.read()
        stream.cancel()
        line = f'psim_requests_total{{outcome="cancelled",route="{EXT_PROC}"}}'
        await until_metric(client, line, 1)
        assert len(engine.screened) == screened


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, "UNAUTHENTICATED"),
        (bearer("psim_unknown"), "UNAUTHENTICATED"),
        ({"x-api-key-bin": b"\xff"}, "UNAUTHENTICATED"),
        (bearer(KEY[Scope.METRICS]), "PERMISSION_DENIED"),
        (bearer(KEY[Scope.CLASSIFY]), "request_headers"),
        ({"x-api-key": KEY[Scope.CLASSIFY]}, "request_headers"),
    ],
)
async def test_envoy_needs_a_key_of_its_own_whatever_its_user_sends(
    metadata: dict[str, str | bytes], expected: str, tmp_path: Path
) -> None:
    """The key is in the metadata of the call; what is in the request is its user's."""
    audit = f"sqlite:///{tmp_path}/audit.db"
    async with stub(keys=keys_file(tmp_path), audit_url=audit) as (begin, client):
        stream = begin(metadata=tuple(metadata.items()))
        try:
            await stream.write(head(more=bearer(KEY[Scope.CLASSIFY])))
            answer = await stream.read()
            found = which_one_of(answer, "response")[0]
            await stream.write(body(CLEAN_BODY))
            assert which_one_of(await stream.read(), "response")[0] == "request_body"
        except grpc.aio.AioRpcError as error:
            found = error.code().name
            assert "psim_" not in str(error.details())
        assert found == expected
        metrics = await client.get("/metrics", headers=bearer(KEY[Scope.METRICS]))
        denied = 'psim_denied_total{reason="key"} 1.0' in metrics.text.splitlines()
        assert denied == (expected == "UNAUTHENTICATED")
    callers = [row.caller for row in AuditStore(audit, read_only=True).read()]
    assert callers == (["classify"] if expected == "request_headers" else [])


async def test_the_rate_of_the_key_holds_here_too(tmp_path: Path) -> None:
    async with stub(keys=keys_file(tmp_path)) as (begin, _):
        metadata = (("x-api-key", FEW),)
        passed = ["request_headers", "request_body", "ended OK"]
        for expected in (*[passed] * 10, ["request_headers", 429, "ended OK"]):
            parts = [head(), body(CLEAN_BODY)]
            assert await answers(lambda: begin(metadata=metadata), parts) == expected


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False)])
async def test_a_port_that_is_open_to_all_is_warned_of_here_too(
    host: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with stub(host=host):
        pass
    assert any("reaches PSIM_EXT_PROC_PORT" in r.getMessage() for r in caplog.records) == warned


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    monkeypatch.delitem(sys.modules, "service.envoy.ext_proc", raising=False)
    settings = Settings(bundle=Path("unused"))
    create_app(settings, fake_bundle())
    with pytest.raises(PsimError, match=r"needs grpc: pip install 'psim-gateway\[envoy\]'"):
        create_app(settings.model_copy(update={"ext_proc_port": 8002}), fake_bundle())
