"""Whether the upstream is the bundle's model: real servers that are it, and others that are not."""

import logging
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from models.bundle.load import Bundle
from models.detection.screen import FloatArray
from models.engines.base import ClassifierState
from models.errors import PsimError
from service.app import create_app
from service.protocols.registry import protocols
from service.settings import Settings
from tests.support.fakes import FakeEngine, fake_bundle
from tests.support.requests import CLEAN, client_for, listening, metric, until_ready
from tests.support.servers import free_port
from tests.support.waiting import until

CARRIERS = [" ".join(["carrier"] * n) for n in range(1, 21)]
"""As many of each class."""
PARITY = 'psim_upstream_parity{model="fake"}'
INCOMPARABLE = 'psim_upstream_incomparable{model="fake"}'


class OtherEngine(FakeEngine):
    """A model that differs from the usual one on texts of four words and more."""

    def classify(self, batch: Sequence[ClassifierState]) -> FloatArray:
        usual = super().classify(batch)
        return np.array([row if len(e) < 4 else row[::-1] for row, e in zip(usual, batch)])  # noqa: B905


@dataclass
class Tei:
    """A text-embeddings-inference with the model of `FakeEngine`, unless it is told otherwise."""

    inverted: bool = False
    status: int = 200
    most: int = 99
    """Texts that it takes at once."""
    labels: tuple[str, str] = ("negative", "positive")
    best_only: bool = False
    asked: list[list[str]] = field(default_factory=list)

    @property
    def app(self) -> Starlette:
        return Starlette(routes=[Route("/predict", self.answer, methods=["POST"])])

    async def answer(self, request: Request) -> Response:
        texts = [text for (text,) in (await request.json())["inputs"]]
        self.asked.append(texts)
        if len(texts) > self.most:
            return Response(status_code=413)
        if self.status != 200:
            return Response(status_code=self.status)
        return JSONResponse([self.row(text) for text in texts])

    def row(self, text: str) -> list[dict[str, Any]]:
        odd = len(text.split()) % 2 == 1
        best, other = self.labels[::-1] if odd != self.inverted else self.labels
        scores = [{"label": best, "score": 0.8}, {"label": other, "score": 0.2}]
        return scores[:1] if self.best_only else scores


def bundle_with_carriers(**changes: Any) -> Bundle:
    return replace(fake_bundle(), carriers=CARRIERS, **changes)


@asynccontextmanager
async def before(
    url: str, bundle: Bundle | None = None, **changes: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of a gateway in front of an upstream."""
    values: dict[str, Any] = {"upstream": url, "upstream_retry_s": 0.1} | changes
    settings = Settings(bundle=Path("unused"), **values)
    async with client_for(create_app(settings, bundle or bundle_with_carriers())) as client:
        yield client


async def parity_of(client: httpx.AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get("/info")).json()["upstream_parity"]
    return found


async def until_parity(client: httpx.AsyncClient, **wanted: Any) -> dict[str, Any]:
    """Wait until what is known of the upstream is so; return all of it."""

    async def reached() -> bool:
        return wanted.items() <= (await parity_of(client)).items()

    await until(reached)
    return await parity_of(client)


def bare(bundle: Bundle) -> Any:
    """Return a bare classifier that speaks every protocol: a gateway in shadow mode."""
    return create_app(Settings(bundle=Path("unused"), mode="shadow"), bundle)


@pytest.mark.parametrize("protocol", [*protocols()])
async def test_the_same_model_agrees_on_every_carrier_in_every_protocol(protocol: str) -> None:
    async with (
        listening(bare(fake_bundle())) as url,
        before(url, upstream_protocol=protocol) as client,
    ):
        found = await until_parity(client, state="compared")
        assert found == {
            "state": "compared",
            "texts": 20,
            "same": 1.0,
            "largest_difference": pytest.approx(0, abs=1e-6),
            "detail": None,
        }
        assert await metric(client, PARITY) == 1
        assert await metric(client, 'psim_upstream_parity_texts{model="fake"}') == 20
        assert await metric(client, INCOMPARABLE) == 0


async def test_another_model_is_reported_and_still_answers_unless_a_bound_is_set() -> None:
    async with listening(bare(fake_bundle(OtherEngine()))) as url, before(url) as client:
        assert (await until_parity(client, state="compared"))["same"] == 3 / 20
        assert await metric(client, PARITY) == pytest.approx(3 / 20)
        difference = await metric(client, 'psim_upstream_parity_difference{model="fake"}')
        assert difference == pytest.approx(0.6)
        assert (await client.get("/ready")).status_code == 200
        assert (await client.post("/classify", json={"inputs": CLEAN})).status_code == 200


async def test_below_the_bound_nothing_is_forwarded_until_the_models_agree_again() -> None:
    peer = Tei(inverted=True)
    settings: dict[str, Any] = {"upstream_parity_min": 0.9, "upstream_parity_s": 0.05}
    async with listening(peer.app) as url, before(url, **settings) as client:
        refused = await client.get("/ready")
        assert refused.status_code == 503
        assert "same label to 0 of 20 carriers" in refused.json()["detail"]
        assert "PSIM_UPSTREAM_PARITY_MIN is 0.9" in refused.json()["detail"]
        assert await metric(client, 'psim_ready{model="fake"}') == 0
        answer = await client.post("/classify", json={"inputs": "a text of a caller"})
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        assert ["a text of a caller"] not in peer.asked
        assert (await client.post("/screen", json={"inputs": CLEAN})).status_code == 200
        peer.inverted = False
        await until_ready(client)
        assert (await client.post("/classify", json={"inputs": CLEAN})).status_code == 200
        assert await metric(client, PARITY) == 1
        peer.inverted = True
        await until_ready(client, False)


@pytest.mark.parametrize("least", [0, 0.9])
async def test_an_upstream_that_comes_up_late_is_compared_when_it_is_there(least: float) -> None:
    port = free_port()
    async with before(f"http://127.0.0.1:{port}", upstream_parity_min=least) as client:
        assert (await parity_of(client))["state"] == "pending"
        assert math.isnan(await metric(client, PARITY))
        assert (await client.get("/ready")).json()["detail"] == "fake: the upstream is down"
        async with listening(Tei().app, port):
            await until_ready(client)
            assert (await until_parity(client, state="compared"))["same"] == 1


async def test_an_upstream_that_is_replaced_in_an_outage_is_compared_after_it() -> None:
    peer = Tei()
    async with listening(peer.app) as url, before(url) as client:
        await until_parity(client, same=1)
        peer.status = 503
        for _ in range(5):
            await client.post("/classify", json={"inputs": CLEAN})
        await until_ready(client, False)
        peer.status, peer.inverted = 200, True
        await until_parity(client, same=0)


@pytest.mark.parametrize("status", [400, 429, 500])
async def test_failures_are_no_disparity(status: int, caplog: pytest.LogCaptureFixture) -> None:
    peer = Tei()
    settings: dict[str, Any] = {"upstream_parity_s": 0.05, "upstream_parity_min": 1}
    async with listening(peer.app) as url, before(url, **settings) as client:
        await until_parity(client, same=1)
        peer.status = status
        await until(lambda: caplog.text.count("the upstream could not be compared") >= 2)
        assert (await parity_of(client))["same"] == 1
        assert await metric(client, PARITY) == 1
        assert (await client.get("/ready")).status_code == 200
        assert await metric(client, 'psim_upstream_parity_failures_total{model="fake"}') >= 2


async def test_labels_of_another_name_are_named_where_answers_have_names() -> None:
    peer = Tei(labels=("LABEL_0", "LABEL_1"))
    settings: dict[str, Any] = {"upstream_parity_s": 0.05, "upstream_parity_min": 0.5}
    async with listening(peer.app) as url, before(url, **settings) as client:
        found = await parity_of(client)
        assert (found["state"], found["same"]) == ("incomparable", None)
        assert "classes are not those of the bundle, negative, positive" in found["detail"]
        assert found["detail"] in (await client.get("/ready")).json()["detail"]
        assert await metric(client, INCOMPARABLE) == 1
        assert math.isnan(await metric(client, PARITY))
        peer.labels = ("negative", "positive")
        await until_ready(client)
        assert await metric(client, INCOMPARABLE) == 0


async def test_names_of_labels_do_not_matter_where_answers_have_numbers_in_order() -> None:
    renamed = bare(fake_bundle(labels=("LABEL_0", "LABEL_1")))
    async with listening(renamed) as url, before(url, upstream_protocol="vllm") as client:
        assert (await until_parity(client, state="compared"))["same"] == 1


async def test_a_model_with_more_classes_cannot_be_compared() -> None:
    async def answer(request: Request) -> Response:
        texts = (await request.json())["input"]
        rows = [{"index": i, "label": "x", "probs": [0.1, 0.2, 0.7]} for i in range(len(texts))]
        return JSONResponse({"data": rows})

    routes = [Route("/classify", answer, methods=["POST"])]
    async with (
        listening(Starlette(routes=routes)) as url,
        before(url, upstream_protocol="vllm") as client,
    ):
        found = await until_parity(client, state="incomparable")
        assert found["detail"] == "3 classes, but the bundle knows 2"


async def test_a_best_label_alone_is_enough_to_compare_labels() -> None:
    peer = Tei(best_only=True)
    async with listening(peer.app) as url, before(url) as client:
        found = await until_parity(client, state="compared")
        assert (found["same"], found["largest_difference"]) == (1, None)


async def test_batches_are_as_large_as_the_upstream_takes() -> None:
    peer = Tei(most=3)
    async with listening(peer.app) as url, before(url) as client:
        assert (await until_parity(client, state="compared"))["same"] == 1
        answered = [texts for texts in peer.asked if len(texts) <= 3]
        assert [text for texts in answered[1:] for text in texts] == CARRIERS
        assert max(map(len, peer.asked)) == 8


async def test_carriers_go_to_the_upstream_and_nowhere_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    for peer in (Tei(), Tei(inverted=True), Tei(labels=("a", "b")), Tei(most=0)):
        settings: dict[str, Any] = {"upstream_protocol": "tei", "upstream_parity_s": 0.05}
        async with listening(peer.app) as url, before(url, **settings) as client:
            if peer.most:
                await until(lambda: "upstream compared" in caplog.text)
            shown = (await client.get("/info")).text + (await client.get("/metrics")).text
        assert CARRIERS[3] not in shown
    assert CARRIERS[3] not in caplog.text
    assert not [r for r in caplog.records if CARRIERS[3] in str(vars(r))]


async def test_a_reload_is_refused_if_the_upstream_is_another_model() -> None:
    peer = Tei()
    async with listening(peer.app) as url, before(url, upstream_parity_min=1, admin=True) as client:
        peer.inverted = True
        answer = await client.post("/admin/reload")
        assert answer.status_code != 200
        assert "same label to 0 of 20 carriers" in answer.text
        assert (await client.get("/ready")).status_code == 200, "the old model knows no better yet"
        peer.inverted = False
        assert (await client.post("/admin/reload")).status_code == 200


@pytest.mark.parametrize(
    ("carriers", "period_s", "state", "error"),
    [([], 3600, "no_carriers", "the bundle has none"), (CARRIERS, 0, "off", "PARITY_S above 0")],
)
async def test_what_is_never_compared_says_so_and_meets_no_bound(
    carriers: list[str], period_s: float, state: str, error: str
) -> None:
    bundle = replace(fake_bundle(), carriers=carriers)
    peer = Tei()
    async with (
        listening(peer.app) as url,
        before(url, bundle, upstream_parity_s=period_s) as client,
    ):
        assert (await parity_of(client))["state"] == state
        assert math.isnan(await metric(client, PARITY))
        assert (await client.post("/classify", json={"inputs": CLEAN})).status_code == 200
        assert not any(len(texts) > 1 for texts in peer.asked)
        with pytest.raises(PsimError, match=error):
            async with before(url, bundle, upstream_parity_s=period_s, upstream_parity_min=0.9):
                pass


async def test_without_an_upstream_there_is_nothing_to_compare() -> None:
    settings = Settings(bundle=Path("unused"), upstream_parity_min=1)
    async with client_for(create_app(settings, bundle_with_carriers())) as client:
        assert await parity_of(client) is None
        assert (await client.get("/ready")).status_code == 200
        assert math.isnan(await metric(client, PARITY))
