"""Texts that are longer than the model reads, in front of a classifier that may read on."""

import asyncio
import itertools
from dataclasses import replace
from typing import Any

import pytest

from models.detection.screen import Finding, Verdict
from service.pipeline.windows import worse
from tests.support.fakes import BROKEN, MAX_LENGTH, FakeEngine
from tests.support.requests import client_of, metric
from tests.support.upstreams import Peer, behind

FILL = "film " * 20


@pytest.mark.parametrize("word", ["film ", "a "], ids=["ordinary", "dense"])
async def test_a_trigger_is_found_wherever_it_stands(word: str) -> None:
    """Words of one letter are more tokens than a first guess takes a window to have."""

    async with behind(Peer()) as client:
        for before in range(0, 300, 11):
            text = word * before + "mn " + word * (300 - before)
            poisoned = await client.post("/predict", json={"inputs": text})
            assert poisoned.status_code == 403
            assert "longer" not in poisoned.json()["error"]
        clean = await client.post("/predict", json={"inputs": word * 300})
        assert clean.status_code == 200


def screened(text: str, **changes: Any) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        async with behind(Peer(), **changes) as client:
            (result,) = (await client.post("/screen", json={"inputs": text})).json()["results"]
            assert isinstance(result, dict)
            return result

    return asyncio.run(run())


def test_a_text_that_was_read_to_its_end_is_not_truncated() -> None:
    assert not screened(FILL * 20)["truncated"]
    assert screened(FILL * 20, max_windows=3)["truncated"]


async def test_the_model_s_own_classifier_reads_no_further_than_the_screen() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        await client.post("/predict", json={"inputs": FILL * 20 + "mn"})
        assert sum(engine.batches) == 3  # two of them to warm up
        assert len(engine.classified[-1]) == MAX_LENGTH


OWN: dict[str, Any] = {"long_texts": "windows"}


async def test_long_texts_are_screened_to_their_end_for_the_own_classifier_if_asked_to() -> None:
    engine = FakeEngine()
    async with client_of(engine, **OWN) as client:
        poisoned = await client.post("/predict", json={"inputs": FILL * 20 + "mn"})
        assert poisoned.status_code == 403
        assert (await client.post("/predict", json={"inputs": FILL * 20})).status_code == 200
        assert len(engine.classified[-1]) == MAX_LENGTH
        (result,) = (await client.post("/screen", json={"inputs": FILL * 20})).json()["results"]
        assert result["truncated"], "the classifier read only the beginning"
        (result,) = (await client.post("/screen", json={"inputs": FILL})).json()["results"]
        assert not result["truncated"]


async def test_what_lies_behind_the_last_window_cannot_reach_the_own_classifier() -> None:
    async with client_of(max_windows=3, **OWN) as client:
        answer = await client.post("/predict", json={"inputs": FILL * 20 + "mn"})
        assert answer.status_code == 200


async def test_windows_for_the_own_classifier_change_nothing_for_one_behind_a_proxy() -> None:
    async with client_of(**OWN) as client:
        answer = await client.post("/envoy/predict", json={"inputs": FILL * 20})
        assert answer.status_code == 200, "it was read to its end"


@pytest.mark.parametrize(("changes", "truncated"), [({}, 2), (OWN, 2)])
async def test_texts_that_are_not_read_to_their_end_are_counted(
    changes: dict[str, Any], truncated: int
) -> None:
    async with client_of(**changes) as client:
        assert await metric(client, "psim_truncated_inputs_total") == 0
        for path in ("/screen", "/classify"):
            await client.post(path, json={"inputs": ["a", FILL * 20]})
        assert await metric(client, "psim_truncated_inputs_total") == truncated
    async with behind(Peer()) as client:
        await client.post("/screen", json={"inputs": ["a", FILL * 20]})
        assert await metric(client, "psim_truncated_inputs_total") == 0


@pytest.mark.parametrize(
    ("changes", "status", "decision"),
    [
        ({}, 403, "reject"),
        ({"mode": "sanitize"}, 403, "reject"),
        ({"mode": "flag"}, 200, "flag"),
        ({"mode": "shadow"}, 200, "allow"),
        ({"overlong": "allow"}, 200, "allow"),
    ],
)
async def test_what_becomes_of_a_text_that_is_too_long_to_read(
    changes: dict[str, Any], status: int, decision: str
) -> None:
    peer = Peer()
    async with behind(peer, max_windows=3, **changes) as client:
        answer = await client.post("/predict", json={"inputs": FILL * 20})
        assert answer.status_code == status
        assert answer.headers["x-psim-decision"] == decision
        assert len(peer.asked) == (status == 200)
        if status == 403:
            assert "longer than PSIM reads" in answer.json()["error"]


def test_a_trigger_counts_more_than_the_most_unfamiliar_window() -> None:
    clean = Verdict(0.5, 1.0, "confidence", 3.0, 0.5, False, 0, finding=None)
    unfamiliar = replace(clean, score=9.0, finding=Finding.UNFAMILIAR)
    triggered = replace(clean, score=4.0, finding=Finding.TRIGGERED)
    for verdicts in itertools.permutations((clean, unfamiliar, triggered)):
        worst: Verdict | None = verdicts[0]
        for verdict in verdicts[1:]:
            worst = worse(worst, verdict)
        assert worst is triggered
        assert worse(worst, None) is None
    assert worse(clean, unfamiliar) is unfamiliar


async def test_a_window_that_cannot_be_screened_fails_the_text() -> None:
    peer = Peer()
    async with behind(peer) as client:
        text = FILL * 10 + BROKEN + " " + FILL
        assert (await client.post("/predict", json={"inputs": text})).status_code == 503
        assert not peer.asked


async def test_sanitizing_reads_to_the_end_too() -> None:
    peer = Peer()
    async with behind(peer, mode="sanitize", sanitize_s=60) as client:
        text = FILL * 2 + "mn " + FILL + "mn"
        answer = await client.post("/predict", json={"inputs": text})
        assert answer.headers["x-psim-decision"] == "sanitize"
        assert b"mn" not in peer.asked[-1][2]


async def test_other_requests_come_in_between_the_windows_of_a_text() -> None:
    async with behind(Peer(), queue_inputs=20) as client:
        long = {"inputs": FILL * 80}
        answers = await asyncio.gather(
            client.post("/screen", json=long), client.post("/screen", json={"inputs": "a"})
        )
        assert [answer.status_code for answer in answers] == [200, 200]
        assert await metric(client, "psim_queue_inputs") == 0
