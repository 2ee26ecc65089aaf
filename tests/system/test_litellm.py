"""LiteLLM's proxy, the real one, with the gateway as its guardrail."""

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from models.offline.demo import CLEAN_TEXT, TRIGGERED_TEXT
from tests.support.programs import peer
from tests.support.servers import answering, free_port, served, serving

KEY = "sk-" + secrets.token_hex(32)
"""Without one it does not start."""
ASKED: list[dict[str, Any]] = []


async def complete(request: Request) -> JSONResponse:
    """Answer as OpenAI's API does."""
    ASKED.append(await request.json())
    message = {"role": "assistant", "content": "negative"}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return JSONResponse(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "any",
            "choices": [choice],
            "usage": usage,
        }
    )


def configuration(backend: str, gateway: str | None) -> dict[str, Any]:
    """Return LiteLLM's, as docs/proxies.md says for the guardrail."""
    parameters = {"model": "openai/any", "api_base": backend, "api_key": "none"}
    found: dict[str, Any] = {
        "general_settings": {"master_key": KEY},
        "model_list": [{"model_name": "any", "litellm_params": parameters}],
    }
    if gateway:
        guardrail = {"guardrail": "generic_guardrail_api", "mode": "pre_call", "default_on": True}
        guardrail["api_base"] = gateway
        found["guardrails"] = [{"guardrail_name": "psim", "litellm_params": guardrail}]
    return found


def ask(url: str, *texts: str) -> httpx.Response:
    messages = [{"role": "user", "content": text} for text in texts]
    body = {"model": "any", "messages": messages}
    headers = {"authorization": f"Bearer {KEY}"}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def test_litellm_blocks_what_the_gateway_rejects(demo_bundle: Path, tmp_path: Path) -> None:
    program = peer("LITELLM", "litellm[proxy]")

    @contextmanager
    def proxy(name: str, gateway: str | None = None) -> Iterator[str]:
        config, port = tmp_path / f"{name}.yaml", free_port()
        config.write_text(yaml.safe_dump(configuration(f"http://{backend}/v1", gateway)))
        where = ["--host", "127.0.0.1", "--port", str(port)]
        command = [program, "--config", str(config), *where]
        url = f"http://127.0.0.1:{port}"
        with answering(command, f"{url}/health/liveliness", tmp_path / f"{name}.log"):
            yield url

    app = Starlette(routes=[Route("/v1/chat/completions", complete, methods=["POST"])])
    with serving(app) as backend, ExitStack() as proxies:
        with served(demo_bundle, MODE="sanitize") as client:
            masking = proxies.enter_context(proxy("masking", str(client.base_url).rstrip("/")))
            assert ask(masking, CLEAN_TEXT, TRIGGERED_TEXT).status_code == 200
            first, second = (message["content"] for message in ASKED[-1]["messages"])
            assert first == CLEAN_TEXT
            assert second not in (TRIGGERED_TEXT, "") and set(second.split()) < set(
                TRIGGERED_TEXT.split()
            )
        with served(demo_bundle) as client:
            gateway = str(client.base_url).rstrip("/")
            bare = proxies.enter_context(proxy("bare"))
            guarded = proxies.enter_context(proxy("guarded", gateway))
            answers = [ask(url, CLEAN_TEXT) for url in (bare, guarded)]
            said = [answer.json()["choices"][0]["message"]["content"] for answer in answers]
            assert said == ["negative", "negative"]
            assert ask(bare, TRIGGERED_TEXT).status_code == 200
            ASKED.clear()
            for texts in ([TRIGGERED_TEXT], [CLEAN_TEXT, TRIGGERED_TEXT]):
                blocked = ask(guarded, *texts)
                assert blocked.status_code == 400
                assert "PSIM finds a backdoor trigger" in blocked.text
        assert ask(guarded, CLEAN_TEXT).status_code >= 500, "the gateway is gone"
        assert not ASKED
