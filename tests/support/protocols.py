"""A request in each protocol, and what its answer and its error say."""

from collections.abc import Callable
from typing import Any

INFER = "/v2/models/fake/infer"


def tensor(*texts: str, **more: Any) -> dict[str, Any]:
    """Return texts as a tensor of the Open Inference Protocol."""
    return {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": [*texts]} | more


def infer(*texts: str, **more: Any) -> dict[str, Any]:
    """Return a request of the Open Inference Protocol."""
    return {"inputs": [tensor(*texts)]} | more


ASKED: dict[str, tuple[str, Callable[[list[str]], Any], Callable[[Any], list[str | None]]]] = {
    "native": (
        "/classify",
        lambda texts: {"inputs": texts},
        lambda body: [result["label"] for result in body["results"]],
    ),
    "tei": (
        "/predict",
        lambda texts: {"inputs": [[text] for text in texts]},
        lambda body: [row[0]["label"] if row else None for row in body],
    ),
    "hf": (
        "/",
        lambda texts: {"inputs": texts},
        lambda body: [row[0]["label"] if row else None for row in body],
    ),
    "vllm": (
        "/v1/classify",
        lambda texts: {"model": "fake", "input": texts},
        lambda body: [datum["label"] for datum in body["data"]],
    ),
    "kserve": (
        "/v1/models/fake:predict",
        lambda texts: {"instances": texts},
        lambda body: [found and found["label"] for found in body["predictions"]],
    ),
    "oip": (INFER, lambda texts: infer(*texts), lambda body: list(body["outputs"][0]["data"])),
}
"""By protocol: its path, a request for some texts, and the labels that an answer gives them."""
ERRORS: dict[str, Callable[[Any], str]] = {
    "native": lambda body: str(body["detail"]),
    "tei": lambda body: str(body["error"]),
    "hf": lambda body: str(body["error"]),
    "vllm": lambda body: str(body["error"]["message"]),
    "kserve": lambda body: str(body["error"]),
    "oip": lambda body: str(body["error"]),
}
GUARDRAIL = "/beta/litellm_basic_guardrail_api"
AGENTGATEWAY, KONG = "/request", "/guardrails/kong"


def blocks(answer: Any) -> bool:
    """Return whether a proxy that asked about a conversation is told to block it."""
    if not isinstance(answer, dict):
        return False
    action = answer.get("action")
    rejected = isinstance(action, dict) and "status_code" in action
    return action == "BLOCKED" or rejected or answer.get("block") is True
