"""All wire formats."""

from service.protocols.base import ClientProtocol, WireProtocol
from service.protocols.hf import HuggingFace
from service.protocols.kserve import KserveV1
from service.protocols.native import Native
from service.protocols.oip import OpenInference
from service.protocols.tei import Tei
from service.protocols.vllm import Sglang, Vllm

SERVED: tuple[ClientProtocol, ...] = (
    Native(),
    Tei(),
    OpenInference(),
    Vllm(),
    HuggingFace(),
    KserveV1(),
)
"""Protocols for clients."""

PREFIX = "/for/{name}"
"""Prefix of every route, for clients that can name a model only in their base URL."""


def by_route() -> dict[str, list[ClientProtocol]]:
    """Return the protocols at each path; the first one is the default where several share it."""
    found: dict[str, list[ClientProtocol]] = {}
    for protocol in SERVED:
        for route in protocol.routes:
            found.setdefault(route, []).append(protocol)
    return found


def protocols(input_name: str = "text") -> dict[str, WireProtocol]:
    """Return the protocols of upstreams by name, in the order in which they are tried.

    Args:
        input_name: name of the input tensor at an upstream with Open Inference.
    """
    known = (Tei(), OpenInference(input_name), Vllm(), Sglang(), Native(), HuggingFace())
    return {protocol.name: protocol for protocol in known}
