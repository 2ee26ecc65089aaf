"""Conversations: screened part by part and to their end, and no text of them twice."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.detection.screen import Verdict
from service.app import create_app
from service.pipeline.seen import SeenTexts
from service.protocols.guardrails.litellm import (
    OVERLAP_CHARS,
    PART_CHARS,
    WORD_CHARS,
    GuardrailRequest,
    overlapping_parts,
)
from service.settings import Settings
from tests.support.fakes import BROKEN, TRIGGER, FakeEngine, bundle_with_override, fake_bundle
from tests.support.keys import BLIND, KEY, bearer, guarded
from tests.support.protocols import GUARDRAIL
from tests.support.requests import CLEAN, POISONED, ask, client_for, client_of, metric

TURNS = [f"a quiet film, turn {number}" for number in range(300)]


def chat(texts: list[str]) -> dict[str, Any]:
    """Return what LiteLLM sends of a conversation."""
    roles = ["user", "assistant"]
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"texts": texts, "structured_messages": messages, "input_type": "request"}


async def action(client: httpx.AsyncClient, body: Any, **more: Any) -> str:
    answer = await client.post(GUARDRAIL, json=body, **more)
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["action"]
    return found


async def test_a_long_conversation_passes_and_is_screened_once() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        assert await action(client, chat(TURNS)) == "NONE"
        screened = len(engine.screened)
        assert screened > len(TURNS)
        assert await action(client, chat(TURNS)) == "NONE"
        assert len(engine.screened) == screened
        seen = await metric(client, 'psim_seen_texts_total{model="fake"}')
        line = 'psim_inputs_total{decision="allow",mode="enforce",model="fake"}'
        assert await metric(client, line) == seen, "each counts once as an input, once as seen"


async def test_the_next_turn_costs_little_however_long_the_conversation_is() -> None:
    async def cost_of_the_last(turns: int) -> int:
        engine = FakeEngine()
        async with client_of(engine) as client:
            assert await action(client, chat(TURNS[: turns - 1])) == "NONE"
            before = len(engine.screened)
            assert await action(client, chat(TURNS[:turns])) == "NONE"
            return len(engine.screened) - before

    # Its own pass, and windows of the last part in three ways.
    part = 3 * (PART_CHARS // 4) // 24 + 1
    assert await cost_of_the_last(299) <= part
    assert await cost_of_the_last(149) <= part


@pytest.mark.parametrize("place", [0, 150, 299])
async def test_a_trigger_is_found_wherever_it_stands_and_stays_found(place: int) -> None:
    engine = FakeEngine()
    texts = [*TURNS[:place], POISONED, *TURNS[place + 1 :]]
    async with client_of(engine) as client:
        assert await action(client, chat(TURNS)) == "NONE"
        assert await action(client, chat(texts)) == "BLOCKED"
        screened = len(engine.screened)
        line = f'psim_requests_total{{outcome="rejected",route="{GUARDRAIL}"}}'
        before = await metric(client, line)
        assert await action(client, chat([CLEAN, POISONED])) == "BLOCKED"
        assert len(engine.screened) == screened, "it is known"
        assert await metric(client, line) == before + 1, "only the rejected text counts"


@pytest.mark.parametrize("place", [3, 140, 297])
async def test_a_trigger_that_is_split_over_two_of_many_texts_is_blocked(place: int) -> None:
    texts = [*TURNS[:place], "a film of m", "n and more", *TURNS[place + 2 :]]
    async with client_of() as client:
        assert await action(client, chat(texts)) == "BLOCKED"


async def test_what_was_screened_before_a_failure_is_not_screened_again() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        texts = [*TURNS[:200], f"a {BROKEN} film"]
        assert (await client.post(GUARDRAIL, json={"texts": texts})).status_code == 503
        first = len(engine.screened)
        assert (await client.post(GUARDRAIL, json={"texts": texts})).status_code == 503
        assert first - (len(engine.screened) - first) >= 192, "the parts before"


async def test_a_verdict_is_of_one_model_and_one_loaded_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[FakeEngine] = []

    def load(path: Path, *_: object, **__: object) -> Any:
        engines.append(FakeEngine())
        # What is poisoned for one bundle passes the other.
        return fake_bundle(engines[-1], threshold=3.0 if path.name == "strict" else 99.0)

    monkeypatch.setattr("service.app.load_bundle", load)
    entries = [f'[[models]]\nname = "{name}"\nbundle = "{name}"\n' for name in ("lax", "strict")]
    (tmp_path / "models.toml").write_text("".join(entries))
    app = create_app(Settings(models=tmp_path / "models.toml", admin=True))
    async with client_for(app) as client:
        for _ in range(2):
            for name, expected in (("lax", "NONE"), ("strict", "BLOCKED")):
                answer = await client.post(f"/for/{name}{GUARDRAIL}", json={"texts": [POISONED]})
                assert answer.json()["action"] == expected, name
        assert (await client.post("/admin/reload")).status_code == 200
        before = len(engines[2].screened)
        await client.post(f"/for/lax{GUARDRAIL}", json={"texts": [POISONED]})
        assert len(engines[2].screened) == before + 1, "the bundle that was loaded again"


async def test_a_verdict_is_of_one_caller(tmp_path: Path) -> None:
    engine = FakeEngine()
    (own,) = [key for scope, key in KEY.items() if scope == "classify"]
    async with guarded(tmp_path, engine=engine) as client:
        counts = []
        for key in (own, own, BLIND):
            assert await action(client, {"texts": [CLEAN]}, headers=bearer(key)) == "NONE"
            counts.append(len(engine.screened))
        assert [count - counts[0] for count in counts] == [0, 0, 1]


@pytest.mark.parametrize(("tokens_s", "again"), [(1e9, 0), (1e-9, 1)])
async def test_a_verdict_that_lacks_its_override_test_is_not_remembered(
    tokens_s: float, again: int
) -> None:
    engine = FakeEngine()
    settings = Settings(bundle=Path("unused"), override_tokens_s=tokens_s, mode="flag")
    async with client_for(create_app(settings, bundle_with_override(engine))) as client:
        assert await action(client, {"texts": [f"{TRIGGER} film"]}) == "NONE"
        screened = len(engine.screened)
        assert await action(client, {"texts": [f"{TRIGGER} film"]}) == "NONE"
        assert len(engine.screened) - screened == again


async def test_nothing_is_remembered_if_the_setting_says_so() -> None:
    engine = FakeEngine()
    async with client_of(engine, seen_texts=0) as client:
        before = len(engine.screened)
        for _ in range(2):
            assert await action(client, {"texts": [CLEAN]}) == "NONE"
        assert len(engine.screened) == before + 2


def test_of_too_many_texts_the_one_that_was_not_asked_for_the_longest_is_forgotten() -> None:
    seen, verdict = SeenTexts(2), Verdict(0.9, 1.0, "confidence", 3.0, 0.5, False, 0, None)
    seen.add("a", "x", verdict)
    seen.add("b", "x", verdict)
    assert seen.find("a", "x") is verdict
    seen.add("c", "x", verdict)
    found = {text: seen.find(text, "x") is verdict for text in "abc"}
    assert found == {"a": True, "b": False, "c": True}
    assert seen.find("a", "y") is None, "in another context"


def test_all_characters_and_those_of_a_text_are_limited_and_the_reason_says_so() -> None:
    cases: list[tuple[list[str], str]] = [
        (["a film " * 200], "a text has 1400 characters, over the limit of 1000"),
        ([f"{n:05}" for n in range(300)], "the conversation has 1500 characters"),
    ]
    for texts, reason in cases:
        answer = ask(GUARDRAIL, chat(texts), max_chars=1000, max_conversation_chars=1200).json()
        assert answer["action"] == "BLOCKED"
        assert reason in answer["blocked_reason"]


def test_texts_may_be_null() -> None:
    messages = [{"role": "user", "content": CLEAN}]
    given: list[list[str] | None] = [None, []]
    for texts in given:
        body = {"texts": texts, "structured_messages": messages}
        assert ask(GUARDRAIL, body).json()["action"] == "NONE"


@pytest.mark.parametrize(
    ("texts", "turns", "expected"),
    [
        ([POISONED, CLEAN, CLEAN], "latest", "NONE"),
        ([POISONED, CLEAN, CLEAN], "all", "BLOCKED"),
        ([CLEAN, POISONED, CLEAN], "latest", "NONE"),
        ([CLEAN, CLEAN, POISONED], "latest", "BLOCKED"),
        ([POISONED], "latest", "BLOCKED"),
        ([POISONED, CLEAN, POISONED], "latest", "BLOCKED"),
        ([CLEAN, CLEAN, POISONED, CLEAN], "latest", "BLOCKED"),  # an answer that was begun
    ],
)
async def test_the_latest_turn_alone_is_screened_if_the_proxy_says_so(
    texts: list[str], turns: str, expected: str
) -> None:
    async with client_of() as client:
        assert await action(client, chat(texts), headers={"x-psim-turns": turns}) == expected


async def test_what_is_in_no_message_is_screened_with_the_latest_turn_too() -> None:
    latest = {"x-psim-turns": "latest"}
    async with client_of() as client:
        body = chat([CLEAN, CLEAN, CLEAN])
        more = body | {"texts": [*body["texts"], POISONED]}
        assert await action(client, more, headers=latest) == "BLOCKED"
        assert await action(client, {"texts": [POISONED, CLEAN]}, headers=latest) == "BLOCKED"
        tools = [{"type": "function", "function": {"name": TRIGGER}}]
        assert await action(client, body | {"tools": tools}, headers=latest) == "BLOCKED"
        # A user's parameters are in the body. They turn nothing off.
        asked = {"additional_provider_specific_params": latest}
        assert await action(client, chat([POISONED, CLEAN, CLEAN]) | asked) == "BLOCKED"
        wrong = await client.post(GUARDRAIL, json=body, headers={"x-psim-turns": "none"})
        assert wrong.status_code == 422


@given(st.text(st.sampled_from("ab \n"), min_size=PART_CHARS, max_size=4 * PART_CHARS), st.data())
def test_what_is_no_longer_than_the_overlap_lies_whole_in_one_part(
    text: str, data: st.DataObject
) -> None:
    parts = overlapping_parts(text)
    assert max(map(len, parts)) <= PART_CHARS
    begin = data.draw(st.integers(0, len(text) - 1))
    assert any(text[begin : begin + OVERLAP_CHARS] in part for part in parts)
    assert overlapping_parts(text + " and more")[: len(parts) - 1] == parts[:-1], "they stay"


def test_parts_begin_and_end_between_words_if_words_are_not_very_long() -> None:
    words = " ".join(f"word{number}" for number in range(2000))
    for part in overlapping_parts(words):
        assert set(part.split()) <= set(words.split())
    assert len(overlapping_parts("a" * (PART_CHARS + WORD_CHARS))) == 2


def test_a_part_that_lies_in_a_long_text_is_not_screened_beside_it() -> None:
    long = "a quiet film " * 1000
    body = {"texts": [long, CLEAN]}
    texts = GuardrailRequest.model_validate(body).texts
    assert texts[:2] == [long, CLEAN]
    assert len(texts) <= 2 + 3, "the end of the long one with the other, in three ways"
