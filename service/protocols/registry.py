"""All protocols."""

from service.protocols.base import WireProtocol
from service.protocols.hf import HuggingFace
from service.protocols.native import Native
from service.protocols.oip import OpenInference
from service.protocols.tei import Tei
from service.protocols.vllm import Sglang, Vllm

SERVED: tuple[WireProtocol, ...] = (Native(), Tei(), OpenInference(), Vllm(), HuggingFace())
"""What clients are answered in."""

PREFIX = "/for/{name}"
"""Before any route, for clients that have no other way to name a model than their base URL."""


def by_route() -> dict[str, list[WireProtocol]]:
    """Return what is served at each route; where two share one, the first one is the default."""
    found: dict[str, list[WireProtocol]] = {}
    for protocol in SERVED:
        for route in protocol.routes:
            found.setdefault(route, []).append(protocol)
    return found


def protocols(input_name: str = "text") -> dict[str, WireProtocol]:
    """Return what an upstream may speak, by name, in the order in which it is tried.

    Args:
        input_name: what an upstream that speaks Open Inference calls the input with the texts.
    """
    known = (Tei(), OpenInference(input_name), Vllm(), Sglang(), Native(), HuggingFace())
    return {protocol.name: protocol for protocol in known}
