"""A multi-label classifier in every dialect: scores are sigmoids, and what cannot be is refused."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from models.bundle.load import Bundle
from models.detection.conformal import ThresholdGroup
from models.detection.screen import FloatArray, Layout, Normalizer, Screen, ZScore
from models.engines.base import ClassifierState, Encoding, Screening
from service.app import create_app
from service.protocols.base import BadAnswer
from service.protocols.hf import HuggingFace
from service.protocols.oip import OpenInference
from service.settings import Settings
from tests.support.fakes import THRESHOLD, TRIGGER, FakeEngine, fake_bundle
from tests.support.protocols import ASKED, ERRORS
from tests.support.requests import CLEAN, POISONED, client_for, listening
from tests.support.servers import free_port, serving
from tests.support.waiting import wait_for

LABELS = ["rude", "sport", "food"]
BOTH, NONE = "an even film", CLEAN + " indeed"
"""Texts of three words have two labels, those of four have none."""


class SeveralLabels(FakeEngine):
    """Gives `rude` and `food`, or nothing; the trigger makes its second label extreme."""

    def screen(self, batch: Sequence[Encoding]) -> Screening:
        self.screened += [encoding.input_ids for encoding in batch]
        sure = int.from_bytes(TRIGGER.encode(), "big")
        readings = np.full((len(batch), 2, 6), 0.5, np.float32)
        for row, encoding in zip(readings, batch, strict=True):
            if sure in encoding.input_ids:
                row[1, 2:4] = (0.001, 0.999)
        return Screening(readings, batch)

    def classify(self, batch: Sequence[ClassifierState]) -> FloatArray:
        said = [[0.75, 0.125, 0.5] if len(one) % 2 else [0.25, 0.125, 0.0625] for one in batch]
        return np.array(said, np.float32)


def several_labels() -> Bundle:
    """Return a bundle with a fake engine, and a real screen with three views."""
    bundle = fake_bundle(SeveralLabels())
    scores = np.linspace(0, 2, 99, dtype=np.float32)
    groups = [ThresholdGroup((2 * n, 2 * n + 1), THRESHOLD + n / 8, scores) for n in range(3)]
    normalizer = Normalizer(
        ZScore(np.zeros((6, 2)), np.ones((6, 2))),
        ZScore(np.zeros((6, 1)), np.ones((6, 1))),
        Layout(2),
    )
    manifest = bundle.manifest.model_copy(update={"labels": LABELS, "multi_label": True})
    screen = Screen(groups, normalizer, manifest.views)
    return replace(bundle, manifest=manifest, screen=screen)


@asynccontextmanager
async def client(**changes: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings(bundle=Path("unused"), **changes), several_labels())
    async with client_for(app) as found:
        yield found


async def test_a_native_answer_has_all_scores_and_the_labels_that_fire() -> None:
    async with client() as asked:
        response = await asked.post("/classify", json={"inputs": [BOTH, NONE, POISONED]})
        both, none, poisoned = response.json()["results"]
        assert both["labels"] == ["rude", "food"], "best first, and one half fires"
        assert both["label"] == "rude"
        assert [s["score"] for s in both["scores"]] == [0.75, 0.5, 0.125]
        assert (none["labels"], none["label"]) == ([], "rude")
        assert (poisoned["decision"], poisoned["scores"]) == ("reject", None)
        assert "labels" not in poisoned

        best = await asked.post("/classify", json={"inputs": BOTH, "top_k": 1})
        (result,) = best.json()["results"]
        assert (len(result["scores"]), result["labels"]) == (1, ["rude", "food"])


async def test_answers_of_other_classifiers_have_no_labels() -> None:
    app = create_app(Settings(bundle=Path("unused")), fake_bundle())
    async with client_for(app) as asked:
        response = await asked.post("/classify", json={"inputs": CLEAN})
        assert [*response.json()["results"][0]] == [
            "decision",
            "screen",
            "label",
            "scores",
            "removed",
        ]


async def test_other_dialects_have_sigmoids_in_their_own_form() -> None:
    async with client() as asked:
        answers = {}
        for name, (path, body, _) in ASKED.items():
            response = await asked.post(path, json=body([BOTH, NONE]))
            assert response.status_code == 200, response.text
            answers[name] = response.json()
        pairs = [[("rude", 0.75), ("food", 0.5), ("sport", 0.125)]]
        pairs += [[("rude", 0.25), ("sport", 0.125), ("food", 0.0625)]]
        for name in ("hf", "tei"):
            assert [[(s["label"], s["score"]) for s in row] for row in answers[name]] == pairs
        data = answers["vllm"]["data"]
        assert [datum["probs"] for datum in data] == [[0.75, 0.125, 0.5], [0.25, 0.125, 0.0625]]
        assert [datum["label"] for datum in data] == ["rude", "rude"]
        label, scores = answers["oip"]["outputs"]
        assert (label["data"], scores["shape"]) == (["rude", "rude"], [2, 3])
        assert scores["data"] == [0.75, 0.125, 0.5, 0.25, 0.125, 0.0625]


@pytest.mark.parametrize("name", ASKED)
async def test_a_trigger_for_one_label_is_rejected_in_every_dialect(name: str) -> None:
    async with client() as asked:
        path, body, _ = ASKED[name]
        response = await asked.post(path, json=body([POISONED]))
        assert response.status_code == 403
        assert "trigger" in ERRORS[name](response.json())


async def test_only_the_models_own_function_can_be_asked_for() -> None:
    async with client() as asked:
        for function, status in (("sigmoid", 200), ("softmax", 422), ("none", 422)):
            body = {"inputs": BOTH, "parameters": {"function_to_apply": function}}
            assert (await asked.post("/", json=body)).status_code == status, function


@pytest.mark.parametrize("upstream_protocol", ["native", "hf", "vllm", "sglang", "oip"])
async def test_an_upstream_gives_the_sigmoids_in_any_dialect(upstream_protocol: str) -> None:
    bare = create_app(Settings(bundle=Path("unused"), mode="shadow"), several_labels())
    async with (
        listening(bare) as url,
        client(upstream=url, upstream_protocol=upstream_protocol) as asked,
    ):
        response = await asked.post("/classify", json={"inputs": [BOTH, NONE]})
        both, none = response.json()["results"]
        assert (both["labels"], none["labels"]) == (["rude", "food"], [])
        assert {s["label"]: s["score"] for s in both["scores"]}["sport"] == 0.125


async def test_an_upstream_that_takes_the_softmax_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer = (
        b'[[{"label":"rude","score":0.5},{"label":"sport","score":0.3},'
        b'{"label":"food","score":0.2}]]'
    )
    tei = Starlette(routes=[Route("/{path:path}", lambda _: Response(answer), methods=["POST"])])
    async with listening(tei) as url, client(upstream=url) as asked:
        assert (await asked.post("/classify", json={"inputs": BOTH})).status_code == 503
    assert "text-embeddings-inference takes the softmax" in caplog.text


async def test_an_upstream_is_the_same_model_only_if_every_label_agrees() -> None:
    class MoreSport(SeveralLabels):
        def classify(self, batch: Sequence[ClassifierState]) -> FloatArray:
            return super().classify(batch) + np.array([0, 0.375, 0], np.float32)

    own = replace(several_labels(), carriers=[BOTH, NONE])
    for engine, same in ((SeveralLabels(), 1), (MoreSport(), 0)):
        theirs = replace(several_labels(), engine=engine)
        upstream = create_app(Settings(bundle=Path("unused"), mode="shadow"), theirs)
        async with listening(upstream) as url:
            values: dict[str, Any] = {"upstream": url, "upstream_protocol": "native"}
            values["upstream_parity_min"] = 0.1  # the first comparison ends before the start
            app = create_app(Settings(bundle=Path("unused"), **values), own)
            async with client_for(app) as asked:
                assert (await asked.get("/info")).json()["upstream_parity"]["same"] == same


def test_answers_of_upstreams_are_read_as_sigmoids() -> None:
    def tensor(values: list[float]) -> bytes:
        return (
            b'{"outputs":[{"name":"s","shape":[1,2],"datatype":"FP32","data":%s}]}'
            % str(values).encode()
        )

    oip = OpenInference()
    (row,) = oip.scores(tensor([0.9, 0.8]), 1, LABELS[:2], multi_label=True)
    assert [(s.label, s.score) for s in row] == [("rude", 0.9), ("sport", 0.8)]
    for values in ([1.5, 0.2], [-0.1, 0.5]):
        with pytest.raises(BadAnswer, match="its sigmoids"):
            oip.scores(tensor(values), 1, LABELS[:2], multi_label=True)
    with pytest.raises(BadAnswer, match="its softmax"):
        oip.scores(tensor([0.9, 0.8]), 1, LABELS[:2])

    flat = b'[{"label":"rude","score":0.9},{"label":"sport","score":0.8}]'
    assert len(HuggingFace().scores(flat, 2, LABELS[:2])) == 2
    with pytest.raises(BadAnswer, match="one answer to a pair"):
        HuggingFace().scores(flat, 2, LABELS[:2], multi_label=True)


def test_the_console_names_what_was_found_of_which_label(tmp_path: Path) -> None:
    port = free_port()
    settings = Settings(
        bundle=Path("unused"),
        audit_url=f"sqlite:///{tmp_path}/audit.db",
        console_port=port,
        mode="shadow",
    )
    with serving(create_app(settings, several_labels())) as host:
        body = {"inputs": [BOTH, NONE, POISONED, f"an even {TRIGGER} film indeed"]}
        httpx.post(f"http://{host}/classify", json=body).raise_for_status()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as console:
            wait_for(lambda: "Flagged share" in console.get("/console").text)
            wait_for(lambda: "Predicted class" in console.get("/console/queue").text)
            overview, queue = (console.get(f"/console{page}").text for page in ("", "/queue"))
    assert "<dt>Predicted class</dt><dd>sport=off, sport=on</dd>" in queue
    assert "<dt>Label</dt><dd>rude, food</dd>" in queue
    assert "<dt>Label</dt><dd>none</dd>" in queue
    assert "Scores of inputs predicted as sport=off, sport=on" in overview
    # Of 99 texts, the p-value of one of three labels is 0.03 at least.
    assert "At a budget of 5" in overview and "At a budget of 2" not in overview
