"""Several models in one process: every route finds the one that a request names."""

from pathlib import Path
from typing import Any

import pytest

from service.lifecycle.models_file import ModelsError, settings_by_model
from service.settings import Settings
from tests.support.fakes import FakeEngine
from tests.support.models import TWO, two_models
from tests.support.paths import ROOT
from tests.support.protocols import ASKED, ERRORS, GUARDRAIL, infer
from tests.support.requests import CLEAN, POISONED, metric


def prefixed(name: str) -> str:
    """Return the route of a protocol after the name of a model without a slash."""
    return "/for/topic" + ASKED[name][0].replace("fake", "topic")


def body_of(name: str, model: str) -> Any:
    body = ASKED[name][1]([CLEAN])
    return body | {"model": model} if "model" in body else body


@pytest.mark.parametrize("name", ASKED)
async def test_before_any_route_a_model_can_be_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = TWO.replace("team/", "")
    async with two_models(tmp_path, monkeypatch, content) as client:
        answer = await client.post(prefixed(name), json=body_of(name, "topic"))
        assert answer.status_code == 200, answer.text
        assert ASKED[name][2](answer.json()) == ["sport"]
        for unknown, model in (("/for/other", "topic"), ("/for/topic", "other")):
            if unknown == "/for/topic" and name not in ("vllm", "oip"):
                continue  # names no model in path or body
            path = unknown + ASKED[name][0].replace("fake", model)
            answer = await client.post(path, json=body_of(name, model))
            assert answer.status_code == 404
            assert "served are: mood, topic" in ERRORS[name](answer.json())
        clash = "/for/mood" + ASKED[name][0].replace("fake", "topic")
        answer = await client.post(clash, json=body_of(name, "topic"))
        assert answer.status_code == (404 if name in ("vllm", "kserve", "oip") else 200)


NAMED: dict[str, tuple[str, str, Any]] = {
    "vllm": ("vllm", "/v1/classify", {"model": "team/topic", "input": [CLEAN]}),
    "vllm at the native route": ("vllm", "/classify", {"model": "team/topic", "input": [CLEAN]}),
    "hf": ("hf", "/models/team/topic", {"inputs": [CLEAN]}),
}


@pytest.mark.parametrize("case", NAMED)
async def test_each_protocol_names_models_in_its_own_way(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_models(tmp_path, monkeypatch) as client:
        protocol, path, body = NAMED[case]
        labels = ASKED[protocol][2]
        answer = await client.post(path, json=body)
        assert labels(answer.json()) == ["sport"]
        path, body = (
            path.replace("team/", ""),
            body | ({"model": "topic"} if "model" in body else {}),
        )
        answer = await client.post(path, json=body)
        assert answer.status_code == 404
        assert "served are: mood, team/topic" in ERRORS[protocol](answer.json())


async def test_open_inference_names_models_in_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = TWO.replace("team/", "")
    async with two_models(tmp_path, monkeypatch, content) as client:
        for model, label in (("mood", "positive"), ("topic", "sport")):
            path = f"/v2/models/{model}"
            answer = (await client.post(f"{path}/infer", json=infer(CLEAN))).json()
            assert (answer["model_name"], answer["outputs"][0]["data"]) == (model, [label])
            assert (await client.get(path)).json()["name"] == model
            assert (await client.get(f"{path}/ready")).status_code == 200
        for answer in (
            await client.post("/v2/models/other/infer", json=infer(CLEAN)),
            await client.get("/v2/models/other"),
            await client.get("/v2/models/other/ready"),
        ):
            assert answer.status_code == 404
            assert answer.json() == {"error": "there is no such model; served are: mood, topic"}
        assert (await client.get("/v2")).json()["name"] == "psim-gateway"


async def test_a_route_that_names_no_model_takes_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two_models(tmp_path, monkeypatch) as client:
        for name in ("native", "tei", "hf"):
            path, body, labels = ASKED[name]
            answer = await client.post(path, json=body([CLEAN]))
            assert labels(answer.json()) == ["positive"]
        for path in ("/screen", "/explain"):
            answer = await client.post(path, json={"inputs": CLEAN})
            assert answer.json()["bundle"] == "d" * 64
        info = (await client.get("/info")).json()
        assert (info["model"], info["mode"]) == ("mood", "enforce")
        assert info["models"] == ["mood", "team/topic"]


async def test_the_native_routes_after_a_name_are_about_that_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = TWO.replace("team/", "")
    async with two_models(tmp_path, monkeypatch, content) as client:
        for path in ("/screen", "/explain"):
            answer = await client.post(f"/for/topic{path}", json={"inputs": CLEAN})
            assert answer.json()["bundle"] == "e" * 64
            answer = await client.post(f"/for/other{path}", json={"inputs": CLEAN})
            assert (answer.status_code, answer.json()["code"]) == (404, "unknown_model")
        info = (await client.get("/for/topic/info")).json()
        assert (info["bundle"], info["mode"]) == ("e" * 64, "flag")
        assert (await client.get("/for/other/info")).status_code == 404
        assert (await client.get("/for/topic/metrics")).status_code == 404


async def test_proxies_are_told_by_the_model_that_the_request_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = TWO.replace("team/", "")
    async with two_models(tmp_path, monkeypatch, content) as client:
        vllm = {"input": POISONED}
        for path, body, status in (
            ("/envoy/v2/models/mood/infer", infer(POISONED), 403),
            ("/envoy/v2/models/topic/infer", infer(POISONED), 200),
            ("/envoy/v2/models/other/infer", infer(CLEAN), 404),
            ("/envoy/classify", vllm | {"model": "topic"}, 200),
            ("/envoy/classify", vllm | {"model": "other"}, 404),
            ("/envoy/models/topic", {"inputs": POISONED}, 200),
            ("/envoy/predict", {"inputs": POISONED}, 403),
            ("/for/topic/envoy/predict", {"inputs": POISONED}, 200),
            ("/for/topic/envoy/v2/models/mood/infer", infer(CLEAN), 404),
        ):
            assert (await client.post(path, json=body)).status_code == status, path
        for path, named, action in (
            (GUARDRAIL, {}, "BLOCKED"),
            (GUARDRAIL, {"model": "topic"}, "NONE"),
            (f"/for/topic{GUARDRAIL}", {"model": "gpt"}, "NONE"),
        ):
            answer = await client.post(path, json={"texts": [POISONED]} | named)
            assert answer.json()["action"] == action
        unknown = await client.post(GUARDRAIL, json={"texts": [CLEAN], "model": "gpt"})
        assert unknown.status_code == 404


async def test_metrics_are_by_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with two_models(tmp_path, monkeypatch, queue_inputs=7) as client:
        await client.post("/models/team/topic", json={"inputs": [CLEAN, POISONED, CLEAN]})
        for line, value in {
            'psim_inputs_total{decision="allow",mode="flag",model="team/topic"}': 2,
            'psim_inputs_total{decision="flag",mode="flag",model="team/topic"}': 1,
            'psim_inputs_total{decision="allow",mode="enforce",model="mood"}': 0,
            'psim_screen_score_count{model="team/topic"}': 3,
            'psim_screen_score_count{model="mood"}': 0,
            'psim_max_queue_inputs{model="mood"}': 7,
            'psim_threshold{label="sport",model="team/topic"}': 3,
            'psim_bundle_info{digest="eeee': 1,
            'psim_ready{model="mood"}': 1,
            'psim_ready{model="team/topic"}': 1,
        }.items():
            assert await metric(client, line) == value, line


async def test_one_model_that_is_dead_is_named_and_leaves_the_other_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = TWO.replace("team/", "")
    async with two_models(tmp_path, monkeypatch, content, restarts=0) as client:
        topic = infer("dies")
        monkeypatch.setattr(FakeEngine, "screen", _die_of("dies", FakeEngine.screen))
        assert (await client.post("/v2/models/topic/infer", json=topic)).status_code == 503
        assert (await client.get("/v2/models/topic/ready")).status_code == 503
        assert (await client.get("/for/topic/health")).status_code == 503
        assert (await client.get("/v2/models/mood/ready")).status_code == 200
        assert (await client.get("/for/mood/ready")).status_code == 200
        for path in ("/ready", "/live"):
            answer = await client.get(path)
            assert answer.status_code == 503
            assert answer.json()["detail"].startswith("topic: the inference worker died")
        assert (await client.get("/v2/health/ready")).status_code == 503
        assert await metric(client, 'psim_ready{model="topic"}') == 0
        assert await metric(client, 'psim_ready{model="mood"}') == 1
        assert (await client.post("/predict", json={"inputs": CLEAN})).status_code == 200


def _die_of(word: str, screen: Any) -> Any:
    code = int.from_bytes(word.encode(), "big")

    def dying(engine: FakeEngine, batch: Any) -> Any:
        if any(code in encoding.input_ids for encoding in batch):
            engine.dies = True
        return screen(engine, batch)

    return dying


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("models = 3", "models: Input should be a valid list"),
        ("", "models: Field required"),
        ("models = []", "models: List should have at least 1 item"),
        ("[[models]]\nname = 'a'", "models.0.bundle: Field required"),
        (TWO + "moed = 'flag'", "models.1.moed: there is no such key"),
        (TWO + "port = 80", "models.1.port: there is no such key"),
        (f"level = 1\n{TWO}", "level: there is no such key"),
        (TWO.replace('"flag"', '"secret"'), "models.1.mode: Input should be 'enforce', "),
        (TWO.replace("team/topic", "mood"), "two models have the same name"),
        ("[[models", "(at end of document)"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_wrong_says_where_and_quotes_no_value(
    content: str | None, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "models.toml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ModelsError) as caught:
        settings_by_model(Settings(models=file))
    assert says in str(caught.value)
    assert str(file) in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_example_is_one() -> None:
    example = ROOT / "deploy/models.toml"
    mood, topic = settings_by_model(Settings(models=example))
    assert (mood.model, mood.upstream, mood.mode) == ("mood", None, "enforce")
    assert (topic.model, topic.upstream_protocol, topic.mode) == ("team/topic", "tei", "flag")


def test_a_model_has_what_the_settings_say_for_all_unless_it_says_otherwise(
    tmp_path: Path,
) -> None:
    file = tmp_path / "models.toml"
    file.write_text(
        "[[models]]\nname = 'a'\nbundle = 'x'\nchallenger = 'y'\n"
        "[[models]]\nname = 'b'\nbundle = '/y'\nmode = 'flag'\nupstream = 'http://b'\n"
        "[[models]]\nname = 'c'\nbundle = '/z'\nupstream_authorization = 'own'\n"
    )
    common: dict[str, Any] = {"mode": "shadow", "upstream": "http://all"}
    a, b, c = settings_by_model(
        Settings.model_validate(common | {"models": file, "upstream_authorization": "secret"})
    )
    assert (a.model, a.bundle, a.mode, str(a.upstream)) == (
        "a",
        tmp_path / "x",
        "shadow",
        "http://all/",
    )
    assert (a.challenger, b.challenger) == (tmp_path / "y", None)
    assert (b.model, b.bundle, b.mode, str(b.upstream)) == ("b", Path("/y"), "flag", "http://b/")
    assert a.upstream_authorization
    assert a.upstream_authorization.get_secret_value() == "secret"
    assert b.upstream_authorization is None, "a secret would reach another upstream"
    assert c.upstream_authorization
    assert c.upstream_authorization.get_secret_value() == "own"
