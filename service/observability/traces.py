"""OpenTelemetry traces, off by default: a span for each request, and in it one for each stage.

Endpoint, headers and sampling are the `OTEL_*` variables of the OpenTelemetry specification. A
caller's `traceparent` is taken up even while traces are off: its id is in logs and exemplars.
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
"""Time that the last spans have to be exported."""
MAX_ID = 64
"""Of a request id in an exemplar, whose labels may have 128 characters in all."""


def open_provider(exporter: "SpanExporter | None" = None) -> "TracerProvider":
    """Return what makes tracers; spans go to `exporter`, by default OTLP over HTTP.

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
    ours = {"service.name": "psim-gateway", "service.version": version("psim-gateway")}
    resource = Resource(ours).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
    return provider


def close_provider(provider: "TracerProvider") -> None:
    """Export what is left, but do not wait long for a collector that does not answer."""
    closing = threading.Thread(target=provider.shutdown, name="traces", daemon=True)
    closing.start()
    closing.join(CLOSE_S)


@contextmanager
def caller_trace(headers: Mapping[str, str]) -> Iterator[None]:
    """Make the trace that the caller's headers name, if any, the one that spans belong to."""
    parent = TraceContextTextMapPropagator().extract(headers, context=context.Context())
    token = context.attach(parent)
    try:
        yield
    finally:
        context.detach(token)


def trace_id() -> str | None:
    """Return the id of the trace that this runs in, in hexadecimal; None if there is none."""
    current = trace.get_current_span().get_span_context()
    return trace.format_trace_id(current.trace_id) if current.is_valid else None


def exemplar(request_id: str) -> dict[str, str] | None:
    """Return the labels by which to find this request again."""
    labels = {"request_id": request_id} if 0 < len(request_id) <= MAX_ID else {}
    if (found := trace_id()) is not None:
        labels["trace_id"] = found
    return labels or None
