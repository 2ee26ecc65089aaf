"""Guardrails that take a text back: mode `sanitize` through LiteLLM, agentgateway and Kong."""

from typing import Any

import pytest

from service.protocols.guardrails.litellm import GuardrailRequest
from tests.support.fakes import TRIGGER, FakeEngine
from tests.support.protocols import AGENTGATEWAY, GUARDRAIL, KONG
from tests.support.requests import CLEAN, LONG, POISONED, ask, client_of, metric


def chat(*texts: str, **more: Any) -> dict[str, Any]:
    """Return what LiteLLM sends of a conversation."""
    messages = [{"role": "user", "content": text} for text in texts]
    return {"texts": [*texts], "structured_messages": messages} | more


def prompt(*texts: str) -> dict[str, Any]:
    """Return what agentgateway sends of a conversation."""
    return {"body": {"messages": [{"role": "user", "content": text} for text in texts]}}


def test_litellm_gets_all_texts_back_in_their_places_without_the_trigger() -> None:
    answer = ask(GUARDRAIL, chat(CLEAN, POISONED, "and more", POISONED), mode="sanitize").json()
    assert answer["action"] == "GUARDRAIL_INTERVENED"
    first, *others = answer["texts"]
    assert [first, others[1]] == [CLEAN, "and more"]
    assert others[0] == others[2] and TRIGGER not in others[0].split()
    assert set(others[0].split()) <= set(POISONED.split()), "nothing is added"


async def test_what_is_masked_is_what_passes_when_it_is_asked_about_again() -> None:
    async with client_of(mode="sanitize") as client:
        masked = (await client.post(GUARDRAIL, json=chat(CLEAN, POISONED))).json()["texts"]
        again = await client.post(GUARDRAIL, json=chat(*masked))
        assert again.json() == {"action": "NONE"}
        assert (await client.post(GUARDRAIL, json=chat(CLEAN))).json() == {"action": "NONE"}


@pytest.mark.parametrize(
    "body",
    [
        # Split over texts that are read as one.
        chat("a film of m", "n and more"),
        # Places that LiteLLM does not take back.
        chat(POISONED, tool_calls=[{"function": {"name": TRIGGER, "arguments": "{}"}}]),
        chat(CLEAN, tools=[{"type": "function", "function": {"description": POISONED}}]),
        {"texts": [CLEAN], "structured_messages": [{"role": "user", "content": POISONED}]},
        {
            "texts": [POISONED],
            "structured_messages": chat(POISONED, POISONED)["structured_messages"],
        },
        {"texts": [POISONED], "structured_messages": [{"role": "user", "name": POISONED}]},
        # Nothing is left without it.
        chat(TRIGGER),
        chat(CLEAN, TRIGGER),
    ],
)
@pytest.mark.parametrize("mode", ["sanitize", "enforce"])
def test_what_cannot_be_cleaned_is_blocked(body: dict[str, Any], mode: str) -> None:
    answer = ask(GUARDRAIL, body, mode=mode).json()
    assert answer["action"] == "BLOCKED"
    assert "texts" not in answer


@pytest.mark.parametrize(("mode", "action"), [("enforce", "BLOCKED"), ("flag", "NONE")])
def test_no_other_mode_masks(mode: str, action: str) -> None:
    assert ask(GUARDRAIL, chat(POISONED), mode=mode).json()["action"] == action


def test_what_takes_too_long_to_clean_is_blocked() -> None:
    answer = ask(GUARDRAIL, chat(POISONED), mode="sanitize", sanitize_s=1e-6).json()
    assert answer["action"] == "BLOCKED"


async def test_a_masked_conversation_counts_as_sanitized() -> None:
    async with client_of(mode="sanitize") as client:
        await client.post(GUARDRAIL, json=chat(POISONED))
        await client.post(GUARDRAIL, json=chat(TRIGGER))
        for decision, count in (("sanitize", 1), ("reject", 1)):
            line = f'psim_inputs_total{{decision="{decision}",mode="sanitize",model="fake"}}'
            assert await metric(client, line) == count
        for outcome in ("ok", "rejected"):
            line = f'psim_requests_total{{outcome="{outcome}",route="{GUARDRAIL}"}}'
            assert await metric(client, line) == 1


async def test_the_latest_turn_alone_is_masked_and_all_texts_come_back() -> None:
    messages = [
        {"role": "user", "content": CLEAN},
        {"role": "assistant", "content": "good"},
        {"role": "user", "content": POISONED},
    ]
    body = {"texts": [m["content"] for m in messages], "structured_messages": messages}
    async with client_of(mode="sanitize") as client:
        answer = await client.post(GUARDRAIL, json=body, headers={"x-psim-turns": "latest"})
        assert answer.json()["texts"][:2] == [CLEAN, "good"]
        assert TRIGGER not in answer.json()["texts"][2].split()


def test_a_text_that_messages_have_more_often_than_texts_cannot_be_taken_back() -> None:
    asked = GuardrailRequest.model_validate(chat("one", "two"))
    assert asked.replaceable == {"one", "two"}
    more = chat("one", "one", "two") | {"texts": ["one", "two"]}
    assert GuardrailRequest.model_validate(more).replaceable == {"two"}


def test_agentgateway_is_told_to_pass_to_mask_or_to_reject() -> None:
    passed = ask(AGENTGATEWAY, prompt(CLEAN, CLEAN), mode="sanitize").json()["action"]
    assert passed.keys() == {"reason"}
    masked = ask(AGENTGATEWAY, prompt(CLEAN, POISONED), mode="sanitize").json()["action"]
    first, second = masked["body"]["messages"]
    assert first == {"role": "user", "content": CLEAN}
    assert second["role"] == "user" and TRIGGER not in second["content"].split()
    for mode, texts in (("enforce", [POISONED]), ("sanitize", ["a film of m", "n and more"])):
        rejected = ask(AGENTGATEWAY, prompt(*texts), mode=mode).json()["action"]
        assert rejected["status_code"] == 403
        assert rejected["body"].startswith("PSIM finds"), "a text, not messages: no mask"


@pytest.mark.parametrize(
    "body",
    [
        {"body": {"messages": []}},
        {"body": {"messages": [{"role": "user", "content": None}]}},
        {"body": {"messages": [{"role": TRIGGER, "content": CLEAN}]}},
        {"body": {"messages": [{"role": "user", "content": CLEAN, "name": TRIGGER}]}},
        {"messages": [{"role": "user", "content": CLEAN}]},
    ],
)
def test_what_agentgateway_sends_and_cannot_be_screened_is_rejected(body: Any) -> None:
    action = ask(AGENTGATEWAY, body, mode="sanitize").json()["action"]
    assert action["status_code"] == 403
    assert "not all of the request can be screened" in action["body"]


def test_answers_of_a_model_pass() -> None:
    choice = {"message": {"role": "assistant", "content": POISONED}}
    answer = ask("/response", {"body": {"choices": [choice]}}).json()
    assert answer["action"].keys() == {"reason"}
    assert ask(KONG, {"content": POISONED, "source": "OUTPUT"}).json()["block"] is False


@pytest.mark.parametrize("mode", ["enforce", "sanitize"])
def test_kong_blocks_in_every_mode_since_it_takes_no_text_back(mode: str) -> None:
    assert ask(KONG, {"content": CLEAN}, mode=mode).json() == {"block": False, "block_message": ""}
    for content in (POISONED, LONG):
        answer = ask(KONG, {"content": content, "source": "INPUT"}, mode=mode).json()
        assert answer["block"] is True
        assert answer["block_message"]
    for body in ({"content": [CLEAN]}, {"content": CLEAN, "more": TRIGGER}, {}):
        assert ask(KONG, body, mode=mode).json()["block"] is True


async def test_what_replaces_a_text_is_screened_with_all_the_rest() -> None:
    engine = FakeEngine()
    async with client_of(engine, mode="sanitize") as client:
        await client.post(GUARDRAIL, json=chat(CLEAN))
        before = len(engine.screened)
        await client.post(GUARDRAIL, json=chat(POISONED))
        assert len(engine.screened) > before + 2, "the search, and what is left"
