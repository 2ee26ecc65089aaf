"""KServe's own client; runs in KServe's own environment, and prints what it hears as JSON.

python tests/support/peers/kserve_client.py URL TEXT ...
"""

import asyncio
import json
import sys
from typing import Any

import httpx
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig


async def ask(url: str, texts: list[str]) -> dict[str, Any]:
    """Return what the server says of itself, and of the texts."""
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    said: dict[str, Any] = {
        "live": await client.is_server_live(url),
        "ready": await client.is_server_ready(url),
        "model": await client.is_model_ready(url, "demo"),
    }
    tensor = InferInput("text", [len(texts)], "BYTES", texts)
    try:
        answer = await client.infer(url, InferRequest("demo", [tensor]), model_name="demo")
    except httpx.HTTPStatusError as error:
        return said | {"status": error.response.status_code, "error": error.response.json()}
    return said | {output.name: output.data for output in answer.outputs}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(ask(sys.argv[1], sys.argv[2:]))))  # noqa: T201
