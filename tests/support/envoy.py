"""Messages as Envoy sends them to an external processor."""

from collections.abc import Mapping
from types import MappingProxyType

from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ProcessingModeBodySendMode as Mode,
)
from envoy_data_plane.envoy.service.ext_proc.v3 import (
    HttpHeaders,
    ProcessingRequest,
    ProtocolConfiguration,
)


def head(
    path: str = "/predict",
    method: str = "POST",
    ends: bool = False,
    mode: Mode | None = Mode.BUFFERED,
    encoding: str | None = "identity",
    more: Mapping[str, str] = MappingProxyType({}),
) -> ProcessingRequest:
    named = {":method": method, ":path": path, "content-type": "application/json"}
    if encoding:
        named["content-encoding"] = encoding
    named |= more
    headers = [HeaderValue(key=name, raw_value=value.encode()) for name, value in named.items()]
    return ProcessingRequest(
        request_headers=HttpHeaders(headers=HeaderMap(headers), end_of_stream=ends),
        protocol_config=None if mode is None else ProtocolConfiguration(request_body_mode=mode),
    )
