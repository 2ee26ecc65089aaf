"""Every protocol, in front of the classifier in this process: answers, rejections, errors."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.protocols.base import BadAnswer, ModelInfo
from service.protocols.registry import SERVED, protocols
from service.schemas import Decision, Result, Score
from tests.support.fakes import BROKEN, FakeEngine
from tests.support.protocols import ASKED, ERRORS, INFER, infer, tensor
from tests.support.requests import CLEAN, JSON, POISONED, ask, client_of, metric

LABELS = ["negative", "positive"]
BEST = [{"label": "positive", "score": 0.8}, {"label": "negative", "score": 0.2}]


def rounded(value: Any) -> Any:
    """Return JSON with floats that compare."""
    return json.loads(json.dumps(value), parse_float=lambda number: round(float(number), 5))


each_dialect = pytest.mark.parametrize("name", ASKED)


def test_every_served_protocol_is_tested() -> None:
    assert {protocol.name for protocol in SERVED} == set(ASKED) == set(ERRORS)


@each_dialect
def test_clean_texts_are_answered_in_order(name: str) -> None:
    path, body, labels = ASKED[name]
    response = ask(path, body([CLEAN, "an even film indeed", CLEAN]))
    assert response.status_code == 200, response.text
    assert labels(response.json()) == ["positive", "negative", "positive"]
    assert response.headers["x-psim-decision"] == "allow"
    assert "screen;dur=" in response.headers["server-timing"]


@each_dialect
def test_a_rejection_is_an_error_of_the_protocol(name: str) -> None:
    engine = FakeEngine()
    path, body, _ = ASKED[name]
    response = ask(path, body([POISONED]), engine=engine)
    assert response.status_code == 403
    assert "trigger" in ERRORS[name](response.json())
    assert (response.headers["x-psim-decision"], response.headers["x-psim-rejected"]) == (
        "reject",
        "0",
    )
    assert len(engine.classified) == 1, "more than the warm-up was classified"


@pytest.mark.parametrize("name", [n for n in ASKED if n != "oip"])
def test_one_poisoned_text_is_a_gap_in_the_answer(name: str) -> None:
    path, body, labels = ASKED[name]
    response = ask(path, body([CLEAN, POISONED, CLEAN]))
    assert response.status_code == 200
    assert labels(response.json()) == ["positive", None, "positive"]
    assert response.headers["x-psim-rejected"] == "1"


async def test_a_tensor_has_no_gaps_so_one_poisoned_text_refuses_it_and_says_which() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        response = await client.post(INFER, json=infer(CLEAN, POISONED, CLEAN))
        assert response.status_code == 403
        assert "input 1 of 3" in response.json()["error"]
        assert len(engine.classified) == 1
        assert (
            await metric(client, 'psim_inputs_total{decision="reject",mode="enforce",model="fake"}')
            == 1
        )
        assert (
            await metric(client, 'psim_inputs_total{decision="allow",mode="enforce",model="fake"}')
            == 0
        )
        line = f'psim_requests_total{{outcome="rejected",route="{INFER}"}}'
        assert await metric(client, line.replace("fake", "{model}")) == 1


@each_dialect
def test_errors_are_in_the_protocols_own_form(name: str) -> None:
    path, body, _ = ASKED[name]
    for content, status, says in (
        (b"{", 400, "not valid JSON"),
        (json.dumps(body([CLEAN]) | {"more": "x"}).encode(), 422, "unknown field"),
        (json.dumps(body([CLEAN] * 129)).encode(), 413, "129 inputs"),
        (json.dumps(body([f"a {BROKEN} film"])).encode(), 503, "could not be screened"),
    ):
        response = ask(path, content)
        assert response.status_code == status
        assert says in ERRORS[name](response.json())


async def test_unknown_paths_and_methods_are_errors_in_the_form_that_the_path_stands_for() -> None:
    async with client_of() as client:
        for path, name, status in (
            ("/v2/models/fake/generate", "oip", 404),
            ("/v1/embeddings", "vllm", 404),
            ("/nowhere", "native", 404),
            (INFER, "oip", 405),
            ("/predict", "tei", 405),
            ("/models/fake", "hf", 405),
            ("/v1/classify", "vllm", 405),
        ):
            answer = await client.get(path)
            assert answer.status_code == status, path
            assert ERRORS[name](answer.json()) in ("Not Found", "Method Not Allowed"), path


@each_dialect
def test_a_bug_is_an_error_in_the_protocols_own_form(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("service.http.routes.classify.server_timing")
    path, body, _ = ASKED[name]
    response = ask(path, body([CLEAN]))
    assert response.status_code == 500
    assert "the log has it" in ERRORS[name](response.json())


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        ("/classify", {"inputs": [CLEAN, 5, CLEAN]}, "inputs.1: "),
        ("/predict", {"inputs": [[CLEAN], [CLEAN], [None]]}, "inputs.2.0: "),
        ("/", {"inputs": [CLEAN, {"text": CLEAN}]}, "inputs.1: "),
        ("/v1/classify", {"input": [CLEAN, CLEAN, [1, 2]]}, "input.2: "),
        (INFER, {"inputs": [tensor(CLEAN, data=[CLEAN, 7])]}, "inputs.0.data.1: "),
        (INFER, {"inputs": [tensor(CLEAN, parameters={"hunter2": 1})]}, "inputs.0.parameters: "),
        ("/screen", {"inputs": [CLEAN, CLEAN, ""]}, "inputs.2: "),
    ],
)
def test_the_error_says_which_element_of_a_list_is_wrong(
    path: str, body: dict[str, Any], place: str
) -> None:
    answer = ask(path, body)
    assert answer.status_code == 422
    assert place in answer.text
    assert "hunter2" not in answer.text


@pytest.mark.parametrize("name", [n for n in ASKED if n != "oip"])
def test_a_text_that_cannot_be_read_is_a_gap_and_the_others_are_answered(name: str) -> None:
    path, body, labels = ASKED[name]
    response = ask(path, body([CLEAN, "", CLEAN, "a" * 100_001, POISONED]))
    assert response.status_code == 200, response.text
    assert labels(response.json()) == ["positive", None, "positive", None, None]
    assert response.headers["x-psim-rejected"] == "1,3,4"
    assert response.headers["x-psim-decision"] == "reject"
    if name == "native":
        errors = [result.get("error") for result in response.json()["results"]]
        assert errors[1] == "input 1 of 5 (from 0): the text is empty"
        assert "100001 characters" in errors[3]
        assert errors[::2] == [None] * 3


@each_dialect
def test_without_a_text_that_may_pass_the_error_says_what_is_wrong_with_each(name: str) -> None:
    path, body, _ = ASKED[name]
    for texts, status, says in (
        ([" ", ""], 422, "input 0 of 2" if name != "oip" else "inputs.0.data.1"),
        (
            [" ", POISONED],
            422 if name == "oip" else 403,
            "input 0 of 2 (from 0): the text is empty",
        ),
    ):
        response = ask(path, body(texts), engine=(engine := FakeEngine()))
        assert response.status_code == status
        assert says in ERRORS[name](response.json())
        assert len(engine.classified) == 1


async def test_health_has_a_head_as_load_balancers_ask() -> None:
    async with client_of() as client:
        for path in ("/live", "/ready", "/health", "/v2/health/live", "/v2/models/fake/ready"):
            assert (await client.head(path)).status_code == 200, path
        assert (await client.head("/v2/models/other/ready")).status_code == 404


@each_dialect
async def test_what_could_be_read_otherwise_is_refused(name: str) -> None:
    path, body, _ = ASKED[name]
    content = json.dumps(body([CLEAN])).encode()
    twice = content[:-1] + b", " + content[1:]

    async with client_of() as client:
        for sent, headers, status in (
            (twice, {}, 400),
            (content.decode().encode("utf-16"), {}, 400),
            (content, {"content-encoding": "gzip"}, 415),
            (content, {"content-type": "application/json; charset=utf-16"}, 415),
            (content, {"content-type": "application/octet-stream"}, 415),
            (content, {"inference-header-content-length": "10"}, 400 if name == "oip" else 415),
        ):
            answer = await client.post(path, content=sent, headers=JSON | headers)
            assert answer.status_code == status, (sent, headers)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/predict", {"inputs": ["a", "b"]}),  # a pair
        ("/predict", {"inputs": [["a", "b"]]}),
        ("/predict", {"inputs": [["a"], ["b", "mn"]]}),
        ("/predict", {"inputs": [["a"], "b"]}),
        ("/predict", {"inputs": [["a", "b", "c"]]}),
        ("/predict", {"inputs": []}),
        ("/predict", {"inputs": [[]]}),
        ("/predict", {"inputs": [[""]]}),
        ("/predict", {"inputs": "a", "raw_scores": True}),  # logits are not to be had
        ("/predict", {"inputs": "a", "truncation_direction": "Left"}),
        ("/predict", {"inputs": "a", "parameters": {"text_pair": "mn"}}),
        ("/", {"inputs": {"text": "a", "text_pair": "mn"}}),
        ("/", {"inputs": "a", "parameters": {"text_pair": "mn"}}),
        ("/", {"inputs": "a", "parameters": {"function_to_apply": "none"}}),
        ("/v1/classify", {"input": [1, 2]}),  # token ids
        ("/v1/classify", {"messages": [{"role": "user", "content": "mn"}]}),
        ("/v1/classify", {"input": "a", "messages": []}),
        ("/v1/classify", {"input": "a", "add_special_tokens": False}),
        ("/v1/classify", {"input": "a", "use_activation": False}),
        ("/classify", {"input": "a", "inputs": "b"}),
        (INFER, {"inputs": [tensor("a"), tensor("mn", name="other")]}),
        (INFER, {"inputs": [tensor("a", datatype="FP32")]}),
        (INFER, {"inputs": [tensor("a", shape=[2])]}),
        (INFER, {"inputs": [tensor("a", "b", shape=[1, 2])]}),
        (INFER, {"inputs": [tensor("a", shape=[1, 1], data=[["a", "b"]])]}),
        (INFER, {"inputs": [tensor("a", parameters={"content_type": "base64"})]}),
        (INFER, {"inputs": [tensor("a", parameters={"binary_data_size": 5})]}),
        (INFER, {"inputs": [tensor("a")], "parameters": {"content_type": "pd"}}),
        (INFER, {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES"}]}),
    ],
)
def test_texts_that_the_screen_cannot_see_are_refused(path: str, body: dict[str, Any]) -> None:
    engine = FakeEngine()
    response = ask(path, body, engine=engine)
    assert response.status_code == 422, response.text
    assert len(engine.classified) == 1


def test_tei_answers_a_single_text_flat_and_says_what_kind_of_error_it_was() -> None:
    assert rounded(ask("/predict", {"inputs": CLEAN}).json()) == BEST
    assert rounded(ask("/predict", {"inputs": [CLEAN]}).json()) == BEST
    for body, kind in (
        ({"inputs": POISONED}, "Validation"),
        ({"inputs": ["a", "b"]}, "Validation"),
        ({"inputs": [[CLEAN]] * 9}, "Overloaded"),
        ({"inputs": BROKEN}, "Unhealthy"),
    ):
        assert ask("/predict", body, queue_inputs=8).json()["error_type"] == kind


def test_hugging_face_answers_a_single_text_nested_and_minds_top_k() -> None:
    assert rounded(ask("/", {"inputs": CLEAN}).json()) == [BEST]
    for top_k in (1, 1.0):  # JSON has one kind of numbers
        body = {"inputs": CLEAN, "parameters": {"top_k": top_k}}
        assert rounded(ask("/models/fake", body).json()) == [BEST[:1]]


def test_vllm_gives_probabilities_in_the_order_of_the_classes() -> None:
    for path in ("/classify", "/v1/classify"):
        body = ask(path, {"input": [CLEAN, POISONED]}).json()
        assert (body["object"], body["model"]) == ("list", "fake")
        assert rounded(body["data"]) == [
            {"index": 0, "label": "positive", "probs": [0.2, 0.8], "num_classes": 2},
            {"index": 1, "label": None, "probs": [], "num_classes": 0},
        ]


def test_open_inference_gives_tensors_and_only_those_that_are_wanted() -> None:
    column = {"inputs": [tensor(CLEAN, CLEAN, shape=[2, 1], data=[[CLEAN], [CLEAN]])], "id": "7"}
    body = rounded(ask(INFER, column).json())
    assert (body["model_name"], body["id"]) == ("fake", "7")
    assert body["outputs"] == [
        {"name": "label", "shape": [2], "datatype": "BYTES", "data": ["positive"] * 2},
        {"name": "scores", "shape": [2, 2], "datatype": "FP32", "data": [0.2, 0.8, 0.2, 0.8]},
    ]
    wanted = {"outputs": [{"name": "scores", "parameters": {"binary_data": True}}]}
    (output,) = ask(INFER, infer(CLEAN) | wanted).json()["outputs"]
    assert output["name"] == "scores"


async def test_open_inference_clients_may_leave_out_the_content_type() -> None:
    content = json.dumps(infer(CLEAN)).encode()
    async with client_of() as client:
        found = [(await client.post(p, content=content)).status_code for p in (INFER, "/")]
    assert found == [200, 415]


async def test_kserve_s_client_names_the_model_in_the_body_too_and_reads_what_is_ready() -> None:
    async with client_of() as client:
        for name, status in (("fake", 200), ("other", 404)):
            answer = await client.post(INFER, json=infer(CLEAN, model_name=name))
            assert answer.status_code == status
        assert (await client.get("/v2/health/live")).json() == {"live": True}
        assert (await client.get("/v2/health/ready")).json() == {"ready": True}
        ready = (await client.get("/v2/models/fake/ready")).json()
        assert ready == {"name": "fake", "ready": True}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (INFER.replace("fake", "other"), infer(CLEAN)),
        (INFER.replace("fake", "other/versions/1"), infer(CLEAN)),
        ("/models/other", {"inputs": CLEAN}),
        ("/v1/classify", {"model": "other", "input": CLEAN}),
    ],
)
def test_another_model_is_not_found(path: str, body: dict[str, Any]) -> None:
    assert ask(path, body).status_code == 404
    assert ask(path, body, model="other").status_code == (404 if "versions" in path else 200)


@pytest.mark.parametrize("mode", ["flag", "shadow", "sanitize"])
@each_dialect
def test_other_modes_answer_poisoned_texts_too(name: str, mode: str) -> None:
    path, body, labels = ASKED[name]
    response = ask(path, body([POISONED, CLEAN]), mode=mode)
    left = "positive" if mode == "sanitize" else "negative"  # three words, or four
    assert labels(response.json()) == [left, "positive"]
    decision = {"shadow": "allow"}.get(mode, mode)
    assert response.headers["x-psim-decision"] == decision


# As a client of upstreams: what is asked is understood, and what is answered is believed if sound.

TEXTS = st.lists(st.text(min_size=1, max_size=9).filter(str.strip), min_size=1, max_size=4)
WORLD = ModelInfo("fake", "d" * 64, LABELS)


@settings(max_examples=200, deadline=None)
@given(texts=TEXTS, odds=st.floats(0.51, 0.99), name=st.sampled_from([*protocols()]))
def test_what_a_protocol_asks_and_answers_it_reads_itself(
    texts: list[str], odds: float, name: str
) -> None:
    protocol = protocols()[name]
    asked = protocol.build_request(texts, WORLD)
    wire = json.loads(asked.model_dump_json(exclude_none=True))
    again = protocol.request_type.model_validate(wire)
    assert again.texts == texts
    assert protocol.claims(wire)
    scores = [Score(label="positive", score=odds), Score(label="negative", score=1 - odds)]
    result = Result(decision=Decision.ALLOW, screen=None, label="positive", scores=scores)
    answer = json.dumps(again.to_response([result] * len(texts), WORLD)).encode()
    protocol.check(answer, len(texts))
    assert protocol.scores(answer, len(texts), LABELS) == [scores] * len(texts)
    with pytest.raises(BadAnswer):
        protocol.check(answer, len(texts) + 1)


def flat(score: str) -> str:
    return f'[{{"label": "positive", "score": {score}}}]'


BAD: list[tuple[str, str]] = [
    *((name, '{"error": "the model is loading"}') for name in protocols()),
    *((name, "") for name in protocols()),
    *((name, "[]") for name in protocols()),
    *((n, f"[{flat('NaN')}]") for n in ("tei", "hf")),
    *((n, f"[{flat('1e999')}]") for n in ("tei", "hf")),
    *((n, "[[]]") for n in ("tei", "hf")),
    ("tei", f"[{flat('1')}, {flat('1')}]"),
    ("vllm", '{"data": []}'),
    ("vllm", '{"data": [{"index": 0, "label": "a", "probs": [NaN, 1]}]}'),
    ("vllm", '{"data": [{"index": 0, "label": null, "probs": []}]}'),
    ("vllm", '{"data": [{"index": 1, "label": "a", "probs": [0, 1]}]}'),
    ("oip", '{"outputs": []}'),
    ("oip", '{"outputs": [{"name": "o", "shape": [2], "datatype": "FP32", "data": [0, 1]}]}'),
    ("oip", '{"outputs": [{"name": "o", "shape": [1, 2], "datatype": "FP32", "data": [1]}]}'),
    ("oip", '{"outputs": [{"name": "o", "shape": [1], "datatype": "FP32", "data": [NaN]}]}'),
    ("oip", '{"outputs": [{"name": "o", "shape": [1], "datatype": "FP32", "data": [null]}]}'),
    ("oip", '{"outputs": [{"name": "o", "shape": [1, 2], "datatype": "FP32", "data": [[0], 1]}]}'),
    (
        "oip",
        '{"outputs": [{"name": "o", "shape": [1], "datatype": "FP32", "data": [1%s]}]}'
        % ("0" * 400),
    ),
    ("native", '{"results": [{"label": null, "scores": null}]}'),
]


@pytest.mark.parametrize(("name", "body"), BAD)
def test_an_answer_that_is_not_sound_is_not_believed(name: str, body: str) -> None:
    with pytest.raises(BadAnswer):
        protocols()[name].check(body.encode(), 1)


def outputs(*tensors: tuple[list[int], str, list[Any]]) -> bytes:
    found = [{"name": "o", "shape": s, "datatype": t, "data": d} for s, t, d in tensors]
    return json.dumps({"model_name": "m", "outputs": found}).encode()


def scores_of(name: str, body: bytes, count: int = 1) -> list[dict[str, float]]:
    rows = protocols()[name].scores(body, count, LABELS)
    return [{score.label: score.score for score in row} for row in rows]


def test_open_inference_servers_answer_in_several_ways() -> None:
    expected = [{"negative": 0.25, "positive": 0.75}]
    assert scores_of("oip", outputs(([1, 2], "FP32", [0.25, 0.75]))) == expected
    nested = outputs(([1], "INT64", [1]), ([1, 2], "FP64", [[0.25, 0.75]]))
    assert scores_of("oip", nested) == expected
    # MLServer's Hugging Face runtime
    said = json.dumps({"label": "positive", "score": 0.75})
    assert scores_of("oip", outputs(([1, 1], "BYTES", [said]))) == [{"positive": 0.75}]
    for unclear in (
        outputs(([1, 2], "FP32", [-1.5, 2.0])),  # logits
        outputs(([1], "INT64", [1])),  # KServe, without probabilities: the best class only
        outputs(([1], "BYTES", ["{0: 0.25, 1: 0.75}"])),  # KServe: Python, not JSON
    ):
        protocols()["oip"].check(unclear, 1)
        with pytest.raises(BadAnswer):
            scores_of("oip", unclear)


def test_pipelines_answer_flat_or_nested() -> None:
    one, other = {"label": "positive", "score": 0.5}, {"label": "negative", "score": 0.6}
    for answer, count, expected in (
        ([one, other], 1, [{"positive": 0.5, "negative": 0.6}]),
        ([[one, other]], 1, [{"positive": 0.5, "negative": 0.6}]),
        ([one, other], 2, [{"positive": 0.5}, {"negative": 0.6}]),
        ([[one], [other]], 2, [{"positive": 0.5}, {"negative": 0.6}]),
    ):
        assert scores_of("hf", json.dumps(answer).encode(), count) == expected


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(ASKED)),
    field=st.text(max_size=9),
    value=st.none() | st.integers() | st.text(max_size=9) | st.lists(st.text(max_size=9)),
)
def test_no_field_that_is_not_known_gets_past(name: str, field: str, value: Any) -> None:
    _, body, _ = ASKED[name]
    (protocol,) = [d for d in SERVED if d.name == name]
    if field not in protocol.request_type.model_fields:
        with pytest.raises(ValueError, match="extra"):
            protocol.request_type.model_validate(body([CLEAN]) | {field: value})
