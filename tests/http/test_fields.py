"""Every field of each schema: read, refused or harmless, as docs/compatibility.md says."""

import re
from collections.abc import Iterator
from typing import get_args

import httpx
import pytest
from pydantic import BaseModel

from service.protocols.guardrails.dialects import KongRequest, PromptRequest
from service.protocols.guardrails.litellm import GuardrailRequest
from service.protocols.hf import HfRequest
from service.protocols.kserve import KserveRequest
from service.protocols.native import ClassifyRequest
from service.protocols.oip import OipRequest
from service.protocols.openai import ModerationRequest
from service.protocols.tei import TeiRequest
from service.protocols.vllm import VllmRequest
from service.route_table import GUARDRAIL_ROUTES, MODERATIONS
from tests.support.fakes import FakeEngine
from tests.support.fields import CUT, HARMLESS, READ, REFUSED, SCHEMAS
from tests.support.paths import ROOT
from tests.support.protocols import blocks
from tests.support.requests import client_of

TYPES = [
    (ClassifyRequest, ["native `/classify`"]),
    (TeiRequest, ["TEI `/predict`"]),
    (HfRequest, ["Hugging Face Inference"]),
    (VllmRequest, ["vLLM `/classify`", "SGLang `/v1/classify`"]),
    (KserveRequest, ["KServe v1 `:predict`"]),
    (ModerationRequest, ["OpenAI `/v1/moderations`"]),
    (OipRequest, ["Open Inference `infer`"]),
    (GuardrailRequest, ["LiteLLM's guardrail"]),
    (PromptRequest, ["agentgateway's webhook"]),
    (KongRequest, ["Kong's plugin"]),
]


def passes(answer: httpx.Response) -> bool:
    """Return whether a request was answered, or would be forwarded."""
    assert answer.status_code < 500, answer.text
    body = answer.json() if answer.content else {}
    return answer.is_success and not blocks(body)


def forwarded(path: str) -> bool:
    """Return whether a proxy may ask about requests to a path."""
    return path not in (*GUARDRAIL_ROUTES, MODERATIONS)


@pytest.mark.parametrize("name", SCHEMAS)
async def test_every_field_is_read_refused_or_harmless(name: str) -> None:
    schema, engine = SCHEMAS[name], FakeEngine()
    paths = [schema.path, *([f"/envoy{schema.path}"] if forwarded(schema.path) else [])]
    async with client_of(engine) as client:
        for path in paths:
            assert passes(await client.post(path, json=schema.clean))
            for field, treatment, body in schema.requests():
                classified = len(engine.classified)
                answer = await client.post(path, json=body)
                if treatment == READ:
                    assert "PSIM finds" in answer.text or "reject" in str(answer.headers), field
                elif treatment == REFUSED:
                    assert not passes(answer), field
                    assert "PSIM finds" not in answer.text, field
                    assert len(engine.classified) == classified, field
                elif treatment == HARMLESS:
                    assert passes(answer), (path, field, answer.text)


@pytest.mark.parametrize("name", SCHEMAS)
async def test_an_option_that_shortens_texts_takes_no_trigger_out_of_sight(name: str) -> None:
    schema = SCHEMAS[name]
    async with client_of() as client:
        for path in filter(forwarded, (schema.path, f"/envoy{schema.path}")):
            for _, treatment, body in schema.requests():
                if treatment == CUT:
                    poisoned = body | {key: "a mn b c" for key in body if key.startswith("input")}
                    assert not passes(await client.post(path, json=poisoned)), poisoned


def known(kind: object, prefix: str = "") -> Iterator[str]:
    """Yield the path of every field that a type accepts."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            place = f"{prefix}{field.alias or name}"
            yield place
            yield from known(field.annotation, f"{place}.")
    else:
        for inner in get_args(kind):
            yield from known(inner, prefix)


@pytest.mark.parametrize(("kind", "names"), TYPES)
def test_every_field_that_is_accepted_is_in_the_table(
    kind: type[BaseModel], names: list[str]
) -> None:
    requests = [row for name in names for row in SCHEMAS[name].requests()]
    rows = [(field.split(" ")[0].replace("[]", ""), treatment) for field, treatment, _ in requests]
    inside = tuple(f"{field}." for field, treatment in rows if treatment == READ)
    for place in known(kind):
        named = any(field == place or field.startswith(f"{place}.") for field, _ in rows)
        assert named or place.startswith(inside), place


def test_the_document_has_this_table() -> None:
    page = (ROOT / "docs/compatibility.md").read_text()
    section = page.split("\n## Every field\n")[1].split("\n## ")[0]
    said = {}
    for heading, table in re.findall(r"\n### ([^\n]+)\n(.*?)(?=\n### |\Z)", section, re.S):
        for treatment, fields in re.findall(r"^\| ([a-z]+) \| ([^|]+) \|", table, re.M):
            said[heading, treatment] = re.findall(r"`([^`]+)`(?: (\([^)]+\)))?", fields)
    for heading, schema in SCHEMAS.items():
        for treatment, fields in schema.fields.items():
            named = [" ".join(filter(None, one)) for one in said.pop((heading, treatment))]
            assert named == [*fields], (heading, treatment)
    assert {heading for heading, _ in said} <= {"Envoy `ext_authz`", "Envoy `ext_proc`"}
