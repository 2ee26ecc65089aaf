"""Traces, exemplars and logs lead from one to the other, and none of them holds a text."""

import logging
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from service.app import create_app
from service.observability.traces import open_provider
from service.settings import Settings
from tests.support.fakes import BROKEN, fake_bundle
from tests.support.servers import serving

CLEAN, POISONED = "a quiet film", "a quiet mn film"
TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "x-request-id": "seen-1"}


def traced(*bodies: Any, **changes: Any) -> list[ReadableSpan]:
    """Send requests of one caller; return the spans once the service is down."""
    exporter = InMemorySpanExporter()
    settings = Settings(bundle=Path("unused"), **changes)
    with (
        serving(create_app(settings, fake_bundle(), open_provider(exporter))) as address,
        httpx.Client(base_url=f"http://{address}", headers=CALLER) as client,
    ):
        for body in bodies:
            client.post("/classify", json=body)
    return list(exporter.get_finished_spans())


def test_a_request_is_a_span_of_the_caller_s_trace_with_its_stages_inside() -> None:
    screen, classify, request = traced({"inputs": [CLEAN, POISONED]})
    assert [span.name for span in (screen, classify, request)] == [
        "screen", "classify", "POST /classify",
    ]  # fmt: skip
    assert request.parent is not None
    assert f"{request.parent.span_id:x}" == "b7ad6b7169203331"
    for span in (screen, classify, request):
        assert f"{span.context.trace_id:032x}" == TRACE
    for stage in (screen, classify):
        assert stage.parent is not None
        assert stage.parent.span_id == request.context.span_id
    attributes = dict(request.attributes or {})
    assert attributes["psim.request_id"] == "seen-1"
    assert [attributes[f"psim.{name}"] for name in ("inputs", "triggered", "unfamiliar")] == [
        2,
        1,
        0,
    ]
    assert attributes["psim.outcome"] == "ok"
    assert request.resource.attributes["service.name"] == "psim-gateway"


def test_a_sanitized_request_says_where_its_time_went() -> None:
    names = [span.name for span in traced({"inputs": POISONED}, mode="sanitize")]
    assert names == ["screen", "sanitize", "classify", "POST /classify"]


def test_errors_are_marked_rejections_are_not_and_no_text_is_in_a_span() -> None:
    secret = "hunter2secret"
    spans = traced(
        {"inputs": f"{secret} {BROKEN}"}, {"inputs": f"{secret} mn"}, {"inputs": [secret, 1]}
    )
    outcomes = {
        str((span.attributes or {})["psim.outcome"]): span.status.status_code.name
        for span in spans
        if span.name == "POST /classify"
    }
    assert outcomes == {"error": "ERROR", "rejected": "UNSET", "client_error": "UNSET"}
    assert secret not in "".join(span.to_json() for span in spans)


def exemplars(client: httpx.Client) -> dict[str, Sample]:
    """Return a sample with its exemplar by the name of its series."""
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    text = client.get("/metrics", headers=accept).text
    families = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    return {s.name: s for family in families for s in family.samples if s.exemplar}


@pytest.mark.parametrize("tracing", [False, True])
def test_exemplars_and_logs_name_the_request_and_its_trace(
    tracing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    provider = open_provider(InMemorySpanExporter()) if tracing else None
    app = create_app(Settings(bundle=Path("unused")), fake_bundle(), provider)
    with (
        caplog.at_level(logging.INFO),
        serving(app) as address,
        httpx.Client(base_url=f"http://{address}", headers=CALLER) as client,
    ):
        client.post("/classify", json={"inputs": POISONED})
        found = exemplars(client)
        for name in (
            "psim_requests_total",
            "psim_inputs_total",
            "psim_request_duration_seconds_bucket",
            "psim_screen_score_bucket",
            "psim_screen_confidence_bucket",
        ):
            exemplar = found[name].exemplar
            assert exemplar is not None
            assert exemplar.labels == {"request_id": "seen-1", "trace_id": TRACE}
    (line,) = [r.__dict__ for r in caplog.records if r.name == "psim.request"]
    assert (line["request_id"], line["trace_id"]) == ("seen-1", TRACE)


def test_an_id_too_long_for_an_exemplar_harms_no_request() -> None:
    app = create_app(Settings(bundle=Path("unused")), fake_bundle())
    with (
        serving(app) as address,
        httpx.Client(base_url=f"http://{address}") as client,
    ):
        for length in (64, 65, 128):
            headers = CALLER | {"x-request-id": "a" * length}
            answer = client.post("/classify", json={"inputs": CLEAN}, headers=headers)
            assert answer.status_code == 200
        exemplar = exemplars(client)["psim_request_duration_seconds_bucket"].exemplar
        assert exemplar is not None
        assert exemplar.labels["trace_id"] == TRACE


class Collector(BaseHTTPRequestHandler):
    """Keeps what it is sent, as an OpenTelemetry collector would get it."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append(ExportTraceServiceRequest.FromString(body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


def test_spans_reach_a_collector_where_the_variables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = HTTPServer(("127.0.0.1", 0), Collector)
    collector.got = []  # type: ignore[attr-defined]
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    app = create_app(Settings(bundle=Path("unused"), traces=True), fake_bundle())
    with serving(app) as address:
        httpx.post(f"http://{address}/classify", json={"inputs": CLEAN})
    collector.shutdown()
    collector.server_close()
    (resource,) = [r for got in collector.got for r in got.resource_spans]  # type: ignore[attr-defined]
    names = {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
    assert names == {"mine"}
    spans = [span for scope in resource.scope_spans for span in scope.spans]
    assert {span.name for span in spans} == {"screen", "classify", "POST /classify"}


def test_a_collector_that_is_not_there_delays_neither_requests_nor_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    app = create_app(Settings(bundle=Path("unused"), traces=True), fake_bundle())
    with serving(app) as address:
        answer = httpx.post(f"http://{address}/classify", json={"inputs": CLEAN}, timeout=5)
        assert answer.status_code == 200
        started = time.monotonic()
    assert time.monotonic() - started < 10


@pytest.mark.slow
def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['opentelemetry.sdk.resources'] = None\n"
    )
    code = "from service.observability.traces import open_provider; open_provider()"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert "pip install 'psim-gateway[otel]'" in done.stderr
