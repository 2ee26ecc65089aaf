"""The override test in the service: what is tested, what that costs, and what if it cannot be."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from models.bundle.load import Bundle
from models.detection.override import DRAWS, OverrideGeometry, OverrideGroup, OverrideTest
from models.detection.screen import SUSPICION, Layout, Screen
from models.engines.base import Encoding, Screening
from service.app import create_app
from service.inference.batcher import Batcher
from service.observability.metrics import Metrics
from service.pipeline.two_stage import (
    BURST_S,
    TextSample,
    TokenBudget,
    TwoStageScreener,
)
from service.settings import OverrideSettings, Settings
from tests.support.fakes import FakeEngine, fake_bundle
from tests.support.requests import CLEAN, lifespan, metric, until_metric

TRIGGER, STRANGE = "mn", "whereas"
"""Extreme, and so is a text with them; only the first overrides carriers."""
SLY, ODD = "sly", "odd"
"""Suspicious, and not extreme; only the first overrides carriers."""
HIDDEN = "hidden"
"""Not even suspicious, though it overrides carriers."""
CARRIER = "carrier"
WORDS = (CARRIER, TRIGGER, SLY, ODD, HIDDEN)
FILL = "film " * 8
TESTS = 'psim_override_tests_total{{model="fake",outcome="{}",suspected="{}"}}'
OVERRIDE_S = 'psim_stage_duration_seconds_count{model="fake",stage="override"}'


class OverridableEngine(FakeEngine):
    """Sure of class 0 without a carrier, and of class 1 beside one unless a word overrides it."""

    def __init__(self) -> None:
        super().__init__()
        self.beside_carriers: float | None = None
        """Every number that is read beside carriers; None leaves them."""
        self.breaks_tests = False

    def screen(self, batch: Sequence[Encoding]) -> Screening:
        code = {word: int(self.token_ids(word)[0]) for word in WORDS}
        readings = super().screen(batch).readings.copy()
        for row, encoding in zip(readings, batch, strict=True):
            words = {*encoding.input_ids}
            if code[CARRIER] in words:
                kept = 0.95 if words & {code[TRIGGER], code[SLY], code[HIDDEN]} else 0.1
                row[:] = [kept, 1 - kept]
                if self.beside_carriers is not None:
                    row[:] = self.beside_carriers
                if self.breaks_tests:
                    raise RuntimeError
            elif words & {code[SLY], code[ODD]}:
                row[1] = [0.9, 0.1]
        return Screening(readings, batch)


def two_stage_bundle(engine: FakeEngine | None = None, digest: str = "d" * 64) -> Bundle:
    """Return a bundle with both stages, a real screen and a real override test."""
    bundle = fake_bundle(engine or OverridableEngine(), digest=digest)
    carriers = [[], [bundle.engine.token_ids(CARRIER)]]
    groups = [OverrideGroup((0, 1), 0.5, np.linspace(0, 0.4, 99, dtype=np.float32))]
    test = OverrideTest(carriers, OverrideGeometry(8, 1), Layout(2), groups, others=groups)
    screen = Screen(bundle.screen.groups, bundle.screen.normalizer)
    return replace(bundle, screen=screen, override=test)


@asynccontextmanager
async def serving(
    engine: FakeEngine | None = None, **changes: Any
) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings(bundle=Path("unused"), **changes), two_stage_bundle(engine))
    async with lifespan(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


async def counts(client: httpx.AsyncClient, suspected: str = "yes") -> list[float]:
    return [
        await metric(client, TESTS.format(outcome, suspected))
        for outcome in ("confirmed", "cleared", "skipped")
    ]


async def findings(client: httpx.AsyncClient, *texts: str) -> list[str | None]:
    answer = await client.post("/screen", json={"inputs": texts})
    assert answer.status_code == 200, answer.text
    return [result["finding"] for result in answer.json()["results"]]


def around(word: str) -> str:
    return f"a {word} film"


async def test_suspicious_texts_are_tested_and_only_those_that_override_are_rejected() -> None:
    async with serving() as client:
        inputs = [CLEAN, *map(around, (STRANGE, TRIGGER, ODD, SLY))]
        answer = await client.post("/classify", json={"inputs": inputs})
        results = answer.json()["results"]
        assert [r["decision"] for r in results] == ["allow", "flag", "reject", "allow", "reject"]
        screens = [r["screen"] for r in results]
        assert [s["finding"] for s in screens] == [
            None, "unfamiliar", "triggered", None, "triggered",
        ]  # fmt: skip
        kept = [s["override"] for s in screens]
        assert kept == [None, *(pytest.approx(p, abs=1e-3) for p in (0.1, 0.95, 0.1, 0.95))]
        assert {s["override_threshold"] for s in screens[1:]} == {0.5}
        assert "override;dur=" in answer.headers["server-timing"]
        assert await counts(client) == [2, 2, 0]
        # Three words beside two carriers. Of those that lose their class, the extreme one meets a
        # second pair.
        assert await metric(client, "psim_override_tokens_total") == 5 * (2 * DRAWS + 2 + 1)
        assert await metric(client, OVERRIDE_S) == 4
        assert await metric(client, "psim_screen_override_count") == 4
        assert await metric(client, "psim_screen_score_count") == 5
        assert await metric(client, "psim_queue_inputs") == 0


async def test_thorough_tests_every_text() -> None:
    async with serving(screen="thorough") as client:
        others = await counts(client, "no")  # one of them to warm up
        answer = await client.post("/screen", json={"inputs": [CLEAN, around(TRIGGER)]})
        clean, triggered = answer.json()["results"]
        assert (clean["finding"], clean["override"]) == (None, pytest.approx(0.1, abs=1e-3))
        assert triggered["finding"] == "triggered"
        assert await counts(client) == [1, 0, 0]
        assert await counts(client, "no") == [others[0], others[1] + 1, others[2]]
        assert (await client.get("/info")).json()["override_test"] == "thorough"


async def test_of_texts_that_are_not_suspicious_a_sample_is_tested() -> None:
    async with serving(screen_sample=1) as client:
        assert (await client.get("/info")).json()["override_test"] == "suspicious"
        before = await counts(client, "no")
        assert await findings(client, around(HIDDEN), CLEAN) == ["triggered", None]
        assert await counts(client, "no") == [before[0] + 1, before[1] + 1, 0]
        assert await counts(client) == [0, 0, 0]
    async with serving(screen_sample=0) as client:
        assert await findings(client, around(HIDDEN)) == [None]
    async with serving(screen_sample=0.3) as client:
        texts = [f"{around(HIDDEN)} number {n}" for n in range(120)]
        found = await findings(client, *texts)
        assert 10 < found.count("triggered") < 62, "within five deviations"
        assert await findings(client, *texts) == found, "always the same ones"
    async with serving(screen_sample=0.3) as client:
        assert await findings(client, *texts) != found, "which nobody can know"


async def test_the_sample_leaves_half_of_the_budget_to_suspicious_texts() -> None:
    long = [f"{FILL} number {n}" for n in range(40)]
    async with serving(screen_sample=1, override_tokens_s=40) as client:
        before, started = await metric(client, "psim_override_tokens_total"), time.monotonic()
        await findings(client, *long)
        cost = await metric(client, "psim_override_tokens_total") - before
        came_meanwhile = 40 * (time.monotonic() - started)
        assert 150 < cost <= 200 + came_meanwhile, "half of 400 tokens"
        assert await findings(client, around(STRANGE)) == ["unfamiliar"], "it is still tested"
        assert (await counts(client, "no"))[2] == 0, "a text need not be tested for being drawn"


def test_the_default_sample_is_small() -> None:
    assert OverrideSettings().screen_sample == 0.01
    sample = TextSample(0.01)
    drawn = sum(np.array([n, 7]) in sample for n in range(20_000))
    assert 140 < drawn < 260


async def test_info_says_whether_there_is_a_test() -> None:
    async with serving() as client:
        assert (await client.get("/info")).json()["override_test"] == "suspicious"
    app = create_app(Settings(bundle=Path("unused"), screen="thorough"), fake_bundle())
    async with lifespan(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.get("/info")).json()["override_test"] is None


@pytest.mark.parametrize("tokens_s", [0, 0.4, 1.4])
async def test_beyond_the_budget_the_first_stage_decides_alone(tokens_s: float) -> None:
    """A test that is begun with the last tokens, and cannot be ended, says nothing either."""
    assert tokens_s * BURST_S < 5 * DRAWS
    async with serving(override_tokens_s=tokens_s) as client:
        answer = await client.post("/classify", json={"inputs": around(TRIGGER)})
        assert answer.status_code == 403
        assert await counts(client) == [0, 0, 1]
        strange = (await client.post("/screen", json={"inputs": around(STRANGE)})).json()
        (result,) = strange["results"]
        assert (result["finding"], result["override"]) == ("triggered", None)
        assert await findings(client, around(ODD), around(SLY)) == [None, None]
        assert await counts(client) == [0, 0, 4]
        assert await metric(client, "psim_override_tokens_total") <= tokens_s * BURST_S


def test_the_budget_is_saved_up_for_a_while_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("service.pipeline.two_stage.time.monotonic", lambda: now)
    budget = TokenBudget(100)
    assert budget.take(100 * BURST_S)
    assert not budget.take(1)
    now += 1
    assert not budget.take(101), "and none is taken"
    assert budget.take(100)
    now += 1e6
    assert not budget.take(100 * BURST_S + 1)
    assert budget.take(100 * BURST_S)
    assert not TokenBudget(0).take(1)


def test_the_budget_grows_with_the_share_of_texts_that_are_tested() -> None:
    usual, thorough = (OverrideSettings().override_budget(thorough=t) for t in (False, True))
    assert thorough == pytest.approx(usual / SUSPICION)
    assert OverrideSettings(override_tokens_s=7).override_budget(thorough=True) == 7
    assert OverrideSettings(override_tokens_s=0).override_budget(thorough=False) == 0


@pytest.mark.parametrize("screen", [None, "suspicious", "thorough"])
def test_all_texts_of_a_multi_label_classifier_are_tested_unless_told_otherwise(
    screen: str | None,
) -> None:
    bundle = two_stage_bundle()
    several = replace(bundle, manifest=bundle.manifest.model_copy(update={"multi_label": True}))
    for own, usual in ((bundle, "suspicious"), (several, "thorough")):
        thorough = own.manifest.tests_all_texts(OverrideSettings(screen=screen).thorough)
        assert thorough == ((screen or usual) == "thorough")


async def test_a_queue_that_is_full_during_a_test_refuses_no_request() -> None:
    long = around(TRIGGER) + " " + FILL * 2  # several windows, and each turn has all of them
    async with serving(queue_inputs=2) as client:
        assert await findings(client, long) == ["triggered"]
        assert await counts(client) == [0, 0, 1]
        assert await findings(client, around(STRANGE)) == ["unfamiliar"]
        assert await counts(client) == [0, 1, 1]
        assert await metric(client, "psim_queue_inputs") == 0


@pytest.mark.parametrize("trouble", ["breaks", "nan", "infinite"])
async def test_a_test_that_fails_says_nothing(trouble: str) -> None:
    engine = OverridableEngine()
    engine.breaks_tests = trouble == "breaks"
    engine.beside_carriers = {"nan": float("nan"), "infinite": float("inf")}.get(trouble)
    async with serving(engine) as client:
        inputs = [CLEAN, around(STRANGE), around(ODD)]
        assert await findings(client, *inputs) == [None, "triggered", None]
        assert await counts(client) == [0, 0, 2]


async def test_windows_of_long_texts_are_tested_each_by_itself() -> None:
    async with serving() as client:
        for text, status, finding in (
            (FILL * 30, 200, "none"),
            (FILL * 12 + around(SLY) + " " + FILL * 17, 403, "triggered"),
            # Of the windows in the queue together, the first one is not tested, or only it is.
            (FILL * 12 + around(STRANGE) + " " + FILL * 17, 200, "unfamiliar"),
            (around(STRANGE) + " " + FILL * 30, 200, "unfamiliar"),
            (FILL * 4 + around(STRANGE) + " " + FILL * 30, 200, "unfamiliar"),
        ):
            answer = await client.post("/envoy/predict", json={"inputs": text})
            assert (answer.status_code, answer.headers["x-psim-finding"]) == (status, finding)
        confirmed, cleared, skipped = await counts(client)
        assert confirmed >= 1
        assert cleared >= 3
        assert skipped == 0


async def test_a_long_text_is_tested_in_windows_that_do_not_outweigh_the_carriers() -> None:
    engine = OverridableEngine()
    async with serving(engine) as client:
        before = len(engine.screened)
        assert await findings(client, FILL * 2 + around(SLY)) == ["triggered"]
        tests = engine.screened[before + 1 :]
        assert len(tests) == 4 + (DRAWS - 1), "the best window goes on alone"
        assert {len(ids) for ids in tests} == {8 + 2}


async def test_only_the_pass_of_the_first_stage_is_charged() -> None:
    bundle, settings = two_stage_bundle(), Settings(bundle=Path("unused"))
    metrics = Metrics().of("fake", settings)
    batcher = Batcher(bundle, settings, metrics)
    batcher.start()
    charged: list[int] = []

    async def charge(passes: int) -> None:
        charged.append(passes)

    try:
        screener = TwoStageScreener(batcher, bundle, settings, metrics)
        answers = await screener.screen([around(TRIGGER), around(STRANGE), CLEAN], charge)
        assert [a.value.verdict and a.value.verdict.finding for a in answers] == [
            "triggered", "unfamiliar", None,
        ]  # fmt: skip
        ids = bundle.engine.token_ids(around(SLY))
        (answer,) = await screener.screen_tokens([ids], charge)
        assert answer.value.verdict is not None
        assert answer.value.verdict.poisoned
        assert charged == [3, 1]
        assert ["override" in a.stages for a in answers] == [True, True, False]
    finally:
        await batcher.close()


async def test_what_is_left_of_a_sanitized_text_is_tested_too() -> None:
    async with serving(mode="sanitize", sanitize_s=60) as client:
        inputs = [around(TRIGGER), f"{TRIGGER} a quiet {SLY} film"]
        results = (await client.post("/classify", json={"inputs": inputs})).json()["results"]
        assert results[0]["decision"] == "sanitize"
        assert [removed["text"] for removed in results[0]["removed"]] == [TRIGGER]
        assert results[1]["decision"] in ("reject", "sanitize")
        removed = [r["text"] for r in results[1]["removed"] or []]
        assert results[1]["decision"] == "reject" or any(SLY in text for text in removed)


async def test_a_challenger_has_a_test_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    bundles = {
        "served": fake_bundle(OverridableEngine()),
        "challenger": two_stage_bundle(digest="e" * 64),
    }
    monkeypatch.setattr("service.app.load_bundle", lambda path, *_, **__: bundles[path.name])
    app = create_app(Settings(bundle=Path("served"), challenger=Path("challenger")))
    async with lifespan(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert await findings(client, around(SLY), around(ODD)) == [None, None]
            series = 'psim_challenger_inputs_total{{challenger="{}",model="fake",served="none"}}'
            await until_metric(client, series.format("triggered"), 1)
            await until_metric(client, series.format("none"), 1)
            # What the challenger tests is no test of the served model.
            assert await counts(client) == [0, 0, 0]
            assert await metric(client, "psim_override_tokens_total") == 0
