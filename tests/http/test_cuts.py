"""Callers choose neither where a text is cut nor what it is joined with."""

import json
from typing import Any

import pytest

from service.protocols.base import BadAnswer
from service.protocols.registry import protocols
from tests.support.requests import CLEAN, client_of
from tests.support.upstreams import SOUND, Peer, behind

WORD = "mnemonic"
CUTS: list[tuple[str, str, dict[str, Any]]] = [
    ("/", "hf", {"inputs": WORD, "parameters": {"truncation": True, "max_length": 3}}),
    ("/", "hf", {"inputs": WORD, "parameters": {"max_length": 3}}),
    ("/models/fake", "hf", {"inputs": [WORD], "parameters": {"max_length": 3}}),
    ("/predict", "tei", {"inputs": WORD, "parameters": {"max_length": 3}}),
    ("/predict", "tei", {"inputs": WORD, "truncate": True, "truncation_direction": "Left"}),
    ("/v1/classify", "vllm", {"input": WORD, "truncate_prompt_tokens": 3}),
    ("/classify", "vllm", {"input": WORD, "truncate_prompt_tokens": -1}),  # on which side?
    ("/classify", "vllm", {"input": WORD, "truncation_side": "left"}),
    (
        "/classify",
        "sglang",
        {"input": WORD, "truncate_prompt_tokens": -1, "truncation_side": "left"},
    ),
]


@pytest.mark.parametrize(("path", "protocol", "body"), CUTS)
async def test_a_cut_that_the_caller_chooses_is_refused(
    path: str, protocol: str, body: dict[str, Any]
) -> None:
    async with client_of(upstream="http://127.0.0.1:9", upstream_protocol=protocol) as client:
        for prefix in ("", "/envoy"):
            answer = await client.post(prefix + path, json=body)
            assert answer.status_code == 422, answer.text
            assert "leave it out" in answer.text
            assert WORD not in answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/predict", {"inputs": CLEAN, "truncate": True, "truncation_direction": "Right"}),
        ("/predict", {"inputs": CLEAN, "truncate": False, "truncation_direction": None}),
        ("/", {"inputs": CLEAN, "parameters": {"truncation": True, "max_length": None}}),
        ("/classify", {"input": CLEAN, "truncate_prompt_tokens": None, "truncation_side": "right"}),
        ("/classify", {"input": CLEAN, "truncate_prompt_tokens": -1, "truncation_side": "right"}),
    ],
)
async def test_an_option_that_cuts_nothing_short_of_the_upstream_s_limit_is_harmless(
    path: str, body: dict[str, Any]
) -> None:
    async with client_of() as client:
        assert (await client.post("/envoy" + path, json=body)).status_code == 200
    async with behind(Peer()) as client:
        # Only vLLM has such an option for its own limit; other upstreams do not get it.
        expected = 422 if body.get("truncate_prompt_tokens") else 200
        answer = await client.post(path, json=body)
        assert answer.status_code == expected, answer.text


async def test_a_list_of_two_that_tei_would_read_as_a_pair_does_not_pass_a_proxy() -> None:
    async with client_of() as client:
        for path in ("/envoy/", "/envoy/models/fake"):
            for texts, status in (([CLEAN, CLEAN], 403), ([CLEAN], 200), ([CLEAN] * 3, 200)):
                answer = await client.post(path, json={"inputs": texts})
                assert answer.status_code == status, answer.text
                assert status == 200 or "pair" in answer.text
        # Here nobody else reads it.
        assert (await client.post("/", json={"inputs": [CLEAN, CLEAN]})).status_code == 200


@pytest.mark.parametrize("path", ["/", "/classify"])
async def test_the_answer_to_a_pair_is_not_taken_for_answers_to_two_texts(path: str) -> None:
    """A TEI at the root of an upstream that is thought to be a pipeline."""
    async with behind(Peer(body=SOUND[1:-1]), upstream_protocol="hf") as client:
        assert (await client.post(path, json={"inputs": CLEAN})).status_code == 200
        answer = await client.post(path, json={"inputs": [CLEAN, "another"]})
        assert answer.status_code == 502, answer.text


def flat(*rows: tuple[str, float]) -> bytes:
    return json.dumps([{"label": label, "score": score} for label, score in rows]).encode()


def test_flat_answers_are_read_in_one_way_or_not_at_all() -> None:
    hf = protocols()["hf"]
    hf.check(flat(("positive", 0.75), ("negative", 0.25)), 1)
    for rows in (
        (("positive", 0.9), ("negative", 0.8)),
        (("positive", 0.5), ("positive", 0.5)),
        (("positive", 0.6), ("positive", 0.4)),
    ):
        hf.check(flat(*rows), 2)
    for ambiguous in (
        (("positive", 0.75), ("negative", 0.25)),
        (("a", 0.5), ("b", 0.3), ("c", 0.2)),
    ):
        with pytest.raises(BadAnswer, match="pair"):
            hf.check(flat(*ambiguous), len(ambiguous))
    assert hf.scores(b"[%s, %s]" % (SOUND[1:-1], SOUND[1:-1]), 2, ["negative", "positive"])
