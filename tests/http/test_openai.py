"""OpenAI's moderations and models, asked by its own client; KServe v1, as its schema says."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from models.detection.screen import Finding, Verdict
from service.app import create_app
from service.protocols.openai import moderation
from service.route_table import MODERATIONS
from service.settings import Settings
from tests.support.fakes import BROKEN, FakeEngine, fake_bundle
from tests.support.keys import BLIND, KEY, bearer, guarded
from tests.support.requests import (
    CLEAN,
    LONG,
    POISONED,
    UNFAMILIAR,
    ask,
    client_of,
    listening,
    metric,
)

TRIGGERED_NAME, UNFAMILIAR_NAME = "backdoor/triggered", "backdoor/unfamiliar"


@asynccontextmanager
async def official(engine: FakeEngine, **changes: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """Yield OpenAI's client of a gateway."""
    app = create_app(Settings(bundle=Path("unused"), **changes), fake_bundle(engine))
    async with (
        listening(app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_openais_client_has_texts_moderated_and_none_classified() -> None:
    engine = FakeEngine()
    async with official(engine) as client:
        answer = await client.moderations.create(input=[CLEAN, POISONED, UNFAMILIAR])
        clean, poisoned, strange = answer.results
        assert (answer.model, answer.id[:5]) == ("fake", "modr-")
        assert [one.flagged for one in answer.results] == [False, True, False]
        assert poisoned.categories.to_dict() == {TRIGGERED_NAME: True, UNFAMILIAR_NAME: False}
        assert strange.categories.to_dict() == {TRIGGERED_NAME: False, UNFAMILIAR_NAME: True}
        assert not any(clean.categories.to_dict().values())
        scores: list[Any] = [one.category_scores.to_dict() for one in answer.results]
        assert scores[1][TRIGGERED_NAME] == pytest.approx(0.99)
        assert scores[0][TRIGGERED_NAME] < scores[2][TRIGGERED_NAME] < scores[1][TRIGGERED_NAME]
        assert scores[0][UNFAMILIAR_NAME] < scores[2][UNFAMILIAR_NAME]
        one = await client.moderations.create(input=POISONED, model="omni-moderation-latest")
        assert one.results[0].flagged
        assert len(engine.classified) == 1, "more than the warm-up was classified"


async def test_openais_client_finds_the_models_and_raises_its_own_errors() -> None:
    parts: Any = [{"type": "text", "text": CLEAN}]
    async with official(FakeEngine()) as client:
        (model,) = (await client.models.list()).data
        assert (model.id, model.object) == ("fake", "model")
        assert (await client.models.retrieve("fake")).id == "fake"
        with pytest.raises(openai.NotFoundError, match="served are: fake"):
            await client.moderations.create(input=CLEAN, model="other")
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")
        with pytest.raises(openai.UnprocessableEntityError, match=r"input\.1: "):
            await client.moderations.create(input=[CLEAN, ""])
        with pytest.raises(openai.UnprocessableEntityError):
            await client.moderations.create(input=parts)
        with pytest.raises(openai.NotFoundError, match="Not Found"):
            await client.embeddings.create(input=CLEAN, model="fake")
        with pytest.raises(openai.InternalServerError, match="could not be screened"):
            await client.moderations.create(input=f"a {BROKEN} film")


@pytest.mark.parametrize(
    ("changes", "flagged"),
    [
        ({}, [False, True, False]),
        ({"unfamiliar": "reject"}, [False, True, True]),
        ({"mode": "flag", "unfamiliar": "reject"}, [False, True, True]),
        ({"mode": "sanitize", "unfamiliar": "allow"}, [False, True, False]),
        ({"mode": "shadow", "unfamiliar": "reject"}, [False, False, False]),
    ],
)
def test_what_enforce_would_reject_is_flagged_in_every_mode_but_shadow(
    changes: dict[str, Any], flagged: list[bool]
) -> None:
    answer = ask(MODERATIONS, {"input": [CLEAN, POISONED, UNFAMILIAR]}, **changes).json()
    assert [one["flagged"] for one in answer["results"]] == flagged
    assert answer["results"][1]["categories"][TRIGGERED_NAME], "categories do not depend on modes"


def test_texts_are_moderated_to_their_end() -> None:
    (found,) = ask(MODERATIONS, {"input": LONG}).json()["results"]
    assert found["flagged"]


def verdict(p_value: float, finding: Finding | None, override_p_value: float | None) -> Verdict:
    return Verdict(
        confidence=0.9,
        score=1.0,
        detector="confidence",
        threshold=3.0,
        p_value=p_value,
        truncated=False,
        predicted=0,
        finding=finding,
        override_p_value=override_p_value,
    )


@pytest.mark.parametrize(
    ("judged", "scores"),
    [
        (verdict(0.25, None, None), (0.0, 0.75)),
        (verdict(0.25, Finding.TRIGGERED, None), (0.75, 0.75)),
        (verdict(0.25, Finding.UNFAMILIAR, 0.5), (0.5, 0.75)),
        (verdict(0.75, Finding.TRIGGERED, 0.125), (0.875, 0.25)),
        (verdict(2.0, None, 2.0), (0.0, 0.0)),
        (None, (0.0, 0.0)),
    ],
)
def test_scores_are_one_less_the_p_value_of_the_stage_that_decides(
    judged: Verdict | None, scores: tuple[float, float]
) -> None:
    found = moderation(judged, flagged=False, with_scores=True).category_scores
    assert (found["backdoor/triggered"], found["backdoor/unfamiliar"]) == scores


async def test_moderations_need_a_key_and_keep_scores_from_those_who_may_not_see_them(
    tmp_path: Path,
) -> None:
    async with guarded(tmp_path) as client:
        for path in (MODERATIONS, "/v1/models/fake:predict"):
            answer = await client.post(path, json={})
            assert answer.status_code == 401
            assert "API key" in str(answer.json()["error"])
        answer = await client.post(MODERATIONS, json={"input": POISONED}, headers=bearer(BLIND))
        (found,) = answer.json()["results"]
        assert found["category_scores"] == {TRIGGERED_NAME: 1.0, UNFAMILIAR_NAME: 0.0}
        line = f'psim_requests_total{{outcome="rejected",route="{MODERATIONS}"}}'
        (metrics_key,) = [key for scope, key in KEY.items() if scope == "metrics"]
        assert await metric(client, line, bearer(metrics_key)) == 1


async def test_kserve_v1_predicts_and_says_whether_a_model_is_ready() -> None:
    async with client_of() as client:
        body = {"instances": [CLEAN, POISONED, "an even film indeed"]}
        answer = await client.post("/v1/models/fake:predict", json=body)
        assert answer.headers["x-psim-rejected"] == "1"
        first, second, third = answer.json()["predictions"]
        assert (first["label"], second, third["label"]) == ("positive", None, "negative")
        assert first["scores"] == pytest.approx({"positive": 0.8, "negative": 0.2})
        ready = await client.get("/v1/models/fake")
        assert (ready.json()["name"], ready.json()["ready"]) == ("fake", True)
        assert (await client.head("/v1/models/fake")).status_code == 200
        for path in ("/v1/models/other", "/v1/models/other:predict"):
            method = "GET" if path.endswith("other") else "POST"
            missing = await client.request(method, path, json=body if method == "POST" else None)
            assert missing.status_code == 404
            assert "served are: fake" in missing.json()["error"]
