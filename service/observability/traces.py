"""OpenTelemetry traces, off by default: a span per request, with a child span per stage.

The `OTEL_*` variables of the OpenTelemetry specification set endpoint, headers and sampling. The
trace id of a caller's `traceparent` is in logs and exemplars even while traces are off.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from models.errors import PsimError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

CLOSE_S = 3
"""Time for exporting the last spans."""
MAX_ID = 64
"""Longest request id in an exemplar, whose labels may have 128 characters in all."""


def open_provider(exporter: "SpanExporter | None" = None) -> "TracerProvider":
    """Return a provider of tracers that export to `exporter`, by default OTLP over HTTP.

    Raises:
        PsimError: the extra `otel` is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise PsimError(
            f"PSIM_TRACES needs {error.name}: pip install 'psim-gateway[otel]'"
        ) from error
    attributes = {"service.name": "psim-gateway", "service.version": version("psim-gateway")}
    resource = Resource(attributes).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
    return provider


def close_provider(provider: "TracerProvider") -> None:
    """Export the remaining spans; wait at most `CLOSE_S` for the collector."""
    closing = threading.Thread(target=provider.shutdown, name="traces", daemon=True)
    closing.start()
    closing.join(CLOSE_S)


@contextmanager
def caller_trace(headers: Mapping[str, str]) -> Iterator[None]:
    """Continue the trace of the caller's headers, if any, while the block runs."""
    if "traceparent" not in headers:
        yield
        return
    parent = TraceContextTextMapPropagator().extract(headers, context=context.Context())
    token = context.attach(parent)
    try:
        yield
    finally:
        context.detach(token)


def trace_id() -> str | None:
    """Return the id of the current trace in hexadecimal; None if there is none."""
    current = trace.get_current_span().get_span_context()
    return trace.format_trace_id(current.trace_id) if current.is_valid else None


def exemplar(request_id: str) -> dict[str, str] | None:
    """Return exemplar labels that identify the request; None if there are none."""
    labels = {"request_id": request_id} if 0 < len(request_id) <= MAX_ID else {}
    if (found := trace_id()) is not None:
        labels["trace_id"] = found
    return labels or None
