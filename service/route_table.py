"""Every route of the service, declared once.

Routers, access control, metrics and the OpenAPI document read this table. A route that it lacks
needs the scope `admin`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from service.protocols.base import ClientProtocol
from service.protocols.guardrails.dialects import GUARDRAILS
from service.protocols.hf import HuggingFace
from service.protocols.kserve import KserveV1
from service.protocols.native import Native
from service.protocols.oip import OpenInference
from service.protocols.registry import PREFIX, by_route
from service.protocols.vllm import Vllm

GET, POST = ("GET",), ("POST",)
HEALTH = ("GET", "HEAD")
PROXIED = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
AUTHZ = "/envoy/{path:path}"
MODERATIONS = "/v1/moderations"
GUARDRAIL_ROUTES = tuple(guardrail.route for guardrail in GUARDRAILS)
EXT_PROC = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
"""gRPC method, counted like a route."""


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """Declaration of a route."""

    path: str
    methods: Sequence[str]
    scope: Literal["classify", "metrics", "admin"] | None
    """Scope that an API key needs; None lets everyone in, with or without a key."""
    protocols: Sequence[ClientProtocol] = (Native(),)
    """Wire formats of its bodies; errors are in the first one until the body tells which it is."""
    counted: bool = False
    """Whether requests have metrics, a span, a line in the log and rows in the audit."""
    documented: bool = False
    """Whether it is in the OpenAPI document."""


_OIP, _OPENAI, _KSERVE = (OpenInference(),), (Vllm(),), (KserveV1(),)
_CLASSIFY = [
    RouteSpec(path, POST, "classify", protocols, counted=True, documented=path in Native.routes)
    for path, protocols in by_route().items()
]
_DECLARED = (
    *_CLASSIFY,
    RouteSpec("/screen", POST, "classify", counted=True, documented=True),
    RouteSpec("/explain", POST, "classify", counted=True, documented=True),
    RouteSpec(MODERATIONS, POST, "classify", _OPENAI, counted=True, documented=True),
    RouteSpec(AUTHZ, PROXIED, "classify", counted=True),
    *(RouteSpec(path, POST, "classify", counted=True) for path in GUARDRAIL_ROUTES),
    RouteSpec("/info", GET, "classify", documented=True),
    RouteSpec("/v1/models", GET, "classify", _OPENAI, documented=True),
    RouteSpec("/v2", GET, "classify", _OIP),
    RouteSpec("/v2/models/{model}", GET, "classify", _OIP),
    RouteSpec("/metrics", GET, "metrics", documented=True),
    RouteSpec("/replicas", GET, "metrics", documented=True),  # only on Ray Serve
    RouteSpec("/admin/reload", POST, "admin", documented=True),  # only with PSIM_ADMIN
    RouteSpec("/live", HEALTH, None, documented=True),
    RouteSpec("/ready", HEALTH, None, documented=True),
    RouteSpec("/health", HEALTH, None),
    RouteSpec("/v2/health/live", HEALTH, None),
    RouteSpec("/v2/health/ready", HEALTH, None),
    RouteSpec("/v2/models/{model}/ready", HEALTH, None, _OIP),
    RouteSpec("/v1/models/{model}", HEALTH, None, _KSERVE),
    RouteSpec("/openapi.json", HEALTH, None),
    RouteSpec("/docs", HEALTH, None),
    RouteSpec("/docs/oauth2-redirect", HEALTH, None),
    RouteSpec("/redoc", HEALTH, None),
)
ROUTES: Mapping[str, RouteSpec] = {route.path: route for route in _DECLARED}
"""Declarations by path, without the prefix that names a model."""
COUNTED_ROUTES = (*(route.path for route in _DECLARED if route.counted), EXT_PROC)
"""Values of the label `route`."""
_UNKNOWN: Sequence[tuple[str, ClientProtocol]] = (
    ("/v1/", Vllm()),
    ("/v2/", OpenInference()),
    ("/models/", HuggingFace()),
)


def protocol_of_unknown(path: str) -> ClientProtocol:
    """Return the protocol in which to say that there is no such path."""
    found = (protocol for prefix, protocol in _UNKNOWN if path.startswith(prefix))
    return next(found, Native())


def route_of(scope: Mapping[str, Any]) -> RouteSpec | None:
    """Return the declaration of the route that an ASGI scope was matched to, if it has one."""
    route = scope.get("route")
    return None if route is None else ROUTES.get(route.path.removeprefix(PREFIX))
