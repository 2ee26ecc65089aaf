"""Messages as Envoy sends them to an external processor."""

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
    encoding: str = "identity",
) -> ProcessingRequest:
    named = {":method": method, ":path": path, "content-encoding": encoding}
    named["content-type"] = "application/json"
    headers = [HeaderValue(key=name, raw_value=value.encode()) for name, value in named.items()]
    return ProcessingRequest(
        request_headers=HttpHeaders(headers=HeaderMap(headers), end_of_stream=ends),
        protocol_config=None if mode is None else ProtocolConfiguration(request_body_mode=mode),
    )
