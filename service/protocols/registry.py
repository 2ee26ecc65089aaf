"""All dialects."""

from service.protocols.base import Dialect
from service.protocols.hf import HuggingFace
from service.protocols.native import Native
from service.protocols.oip import OpenInference
from service.protocols.tei import Tei
from service.protocols.vllm import Sglang, Vllm

SERVED: tuple[Dialect, ...] = (Native(), Tei(), OpenInference(), Vllm(), HuggingFace())
"""What clients are answered in."""

PREFIX = "/for/{name}"
"""Before any route, for clients that have no other way to name a model than their base URL."""


def by_route() -> dict[str, list[Dialect]]:
    """Return what is served at each route; where two share one, the first one is the default."""
    found: dict[str, list[Dialect]] = {}
    for dialect in SERVED:
        for route in dialect.routes:
            found.setdefault(route, []).append(dialect)
    return found


def dialects(input_name: str = "text") -> dict[str, Dialect]:
    """Return what an upstream may speak, by name, in the order in which it is tried.

    Args:
        input_name: what an upstream that speaks Open Inference calls the input with the texts.
    """
    known = (Tei(), OpenInference(input_name), Vllm(), Sglang(), Native(), HuggingFace())
    return {dialect.name: dialect for dialect in known}
