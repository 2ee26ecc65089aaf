"""Open Inference over gRPC, asked by Triton's own client, and tensors after the JSON over HTTP."""

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.http as triton_http
from tritonclient.grpc import InferResult, service_pb2
from tritonclient.grpc import aio as triton
from tritonclient.utils import InferenceServerException

from models.errors import PsimError
from service.app import create_app
from service.audit.store import AuditStore
from service.grpc.inference import SERVICE
from service.grpc.messages import infer_response, model_metadata, request_json, server_metadata
from service.protocols.base import BadAnswer
from service.protocols.tensors import texts_of, with_binary
from service.security.keys.file import Scope
from service.settings import Settings
from tests.support.fakes import BROKEN, TRIGGER, FakeEngine, fake_bundle
from tests.support.keys import FEW, KEY, bearer, keys_file
from tests.support.protocols import INFER, infer
from tests.support.requests import CLEAN, POISONED, client_of, metric, until_metric
from tests.support.servers import free_port
from tests.support.upstreams import Peer, behind

OIP = {"upstream_protocol": "oip", "upstream_parity_s": 0, "upstream_max_length": 512}
ANSWER = (
    b'{"model_name":"fake","outputs":[{"name":"scores","datatype":"FP32","shape":[1,2],'
    b'"data":[0.25,0.75]}]}'
)
ROUTE = "/v2/models/{model}/infer"


@asynccontextmanager
async def served(**changes: Any) -> AsyncIterator[tuple[Any, Any]]:
    """Yield Triton's client, and one of the same gateway over HTTP."""
    port = free_port()
    async with client_of(oip_grpc_port=port, **changes) as http, asking(port) as client:
        yield client, http


@asynccontextmanager
async def asking(port: int) -> AsyncIterator[Any]:
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    try:
        yield client
    finally:
        await client.close()


def tensor(*texts: str | bytes) -> Any:
    """Return texts as Triton's client sends them: raw."""
    found = triton.InferInput("text", [len(texts)], "BYTES")
    return found.set_data_from_numpy(np.array(texts, dtype=object))


def message(*texts: str, **more: Any) -> Any:
    """Return texts as other clients send them: in the contents of a tensor."""
    contents = service_pb2.InferTensorContents(bytes_contents=[text.encode() for text in texts])
    given = service_pb2.ModelInferRequest.InferInputTensor(
        name="text", datatype="BYTES", shape=[len(texts)], contents=contents
    )
    return service_pb2.ModelInferRequest(model_name="fake", inputs=[given], **more)


async def sent(client: Any, request: Any, **more: Any) -> Any:
    """Return the answer to a message that Triton's client would not build."""
    return await client._client_stub.ModelInfer(request, **more)


async def test_health_and_metadata_are_those_of_http() -> None:
    async with served() as (client, http):
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("fake")
        metadata = await client.get_model_metadata("fake", as_json=True)
        over_http = (await http.get("/v2/models/fake")).json()
        assert [one["name"] for one in metadata["outputs"]] == ["label", "scores"]
        assert metadata["inputs"][0]["datatype"] == over_http["inputs"][0]["datatype"]
        assert (await client.get_server_metadata()).name == "psim-gateway"
        for name in ("other", "fake/versions/1", "../fake", ""):
            for asked in (client.is_model_ready, client.get_model_metadata):
                with pytest.raises(InferenceServerException) as error:
                    await asked(name)
                assert error.value.status() == "StatusCode.NOT_FOUND", name


async def test_clean_texts_get_the_answer_of_http_raw_and_in_contents() -> None:
    texts = [CLEAN, "ein Ölfilm", "日本"]
    async with served() as (client, http):
        expected = (await http.post(INFER, json=infer(*texts))).json()["outputs"]
        found = await client.infer("fake", [tensor(*texts)], request_id="7")
        assert found.get_response().id == "7"
        assert [label.decode() for label in found.as_numpy("label")] == expected[0]["data"]
        assert found.as_numpy("scores").shape == (3, 2)
        assert found.as_numpy("scores").ravel() == pytest.approx(expected[1]["data"])
        answer = await sent(client, message(*texts))
        assert not answer.raw_output_contents
        label, scores = answer.outputs
        assert [one.decode() for one in label.contents.bytes_contents] == expected[0]["data"]
        assert list(scores.contents.fp32_contents) == pytest.approx(expected[1]["data"])


@pytest.mark.parametrize("texts", [[POISONED], [CLEAN, POISONED]])
async def test_a_trigger_never_reaches_the_classifier(texts: list[str]) -> None:
    engine = FakeEngine()
    async with served(engine=engine) as (client, http):
        before = len(engine.classified)
        for request in (client.infer("fake", [tensor(*texts)]), sent(client, message(*texts))):
            with pytest.raises((InferenceServerException, grpc.aio.AioRpcError)) as error:
                await request
            assert "PSIM finds a backdoor trigger" in str(error.value)
            assert TRIGGER not in str(error.value).replace("numbers", "").split()
        assert len(engine.classified) == before
        line = f'psim_requests_total{{outcome="rejected",route="{ROUTE}"}}'
        assert await metric(http, line) == 2


async def test_a_model_is_found_by_a_name_that_no_url_could_have() -> None:
    async with served(model="moods: 50 % ü") as (client, _):
        assert await client.is_model_ready("moods: 50 % ü")
        found = await client.infer("moods: 50 % ü", [tensor(CLEAN)])
        assert found.get_response().model_name == "moods: 50 % ü"


async def test_a_caller_that_waits_no_longer_is_counted_as_one_that_hung_up() -> None:
    port, peer = free_port(), Peer(ANSWER, wait_s=9)
    async with behind(peer, **OIP, oip_grpc_port=port) as http, asking(port) as client:
        asked = client.infer("fake", [tensor(CLEAN)], client_timeout=0.3)
        assert await status_of(asked) == "DEADLINE_EXCEEDED"
        await until_metric(http, f'psim_requests_total{{outcome="cancelled",route="{ROUTE}"}}', 1)


async def test_verdicts_are_in_the_metadata_and_modes_hold() -> None:
    async with served(mode="flag") as (client, _):
        call = client._client_stub.ModelInfer(message(POISONED))
        await call
        told = dict(await call.trailing_metadata())
        assert (told["x-psim-decision"], told["x-psim-finding"]) == ("flag", "triggered")
        assert told["x-request-id"]
    async with served(mode="sanitize") as (client, _):
        assert (await client.infer("fake", [tensor(POISONED)])).as_numpy("label").shape == (1,)


async def status_of(request: Any) -> str:
    """Return the status of a call, whose error quotes no text."""
    try:
        await request
    except InferenceServerException as error:
        assert "film" not in str(error)
        return str(error.status()).removeprefix("StatusCode.")
    except grpc.aio.AioRpcError as error:
        assert "film" not in str(error.details())
        return str(error.code().name)
    return "OK"


async def test_what_is_wrong_or_too_much_is_refused_as_over_http() -> None:
    async with served(max_inputs=2, max_chars=50, max_body_bytes=1000) as (client, _):
        for request, expected in (
            (client.infer("fake", [tensor(CLEAN)] * 2), "INVALID_ARGUMENT"),
            (client.infer("fake", []), "INVALID_ARGUMENT"),
            (client.infer("fake", [tensor("")]), "INVALID_ARGUMENT"),
            (client.infer("fake", [tensor(b"\xff film")]), "INVALID_ARGUMENT"),
            (client.infer("fake", [tensor(CLEAN)], "1"), "NOT_FOUND"),
            (client.infer("fake", [tensor(CLEAN)], "../x"), "NOT_FOUND"),
            (client.infer("other", [tensor(CLEAN)]), "NOT_FOUND"),
            (client.infer("fake", [tensor(CLEAN)], sequence_id=3), "INVALID_ARGUMENT"),
            (client.infer("fake", [tensor(CLEAN, CLEAN, CLEAN)]), "RESOURCE_EXHAUSTED"),
            (client.infer("fake", [tensor("film " * 11)]), "RESOURCE_EXHAUSTED"),
            (client.infer("fake", [tensor("film " * 300)]), "RESOURCE_EXHAUSTED"),
            (client.infer("fake", [tensor("film " * 30_000)]), "RESOURCE_EXHAUSTED"),
            (client.infer("fake", [tensor(f"a {BROKEN} film")]), "UNAVAILABLE"),
            (client.get_model_config("fake"), "UNIMPLEMENTED"),
            (client.infer("fake", [tensor(CLEAN)], priority=1, timeout=1000), "OK"),
        ):
            assert await status_of(request) == expected


async def test_what_a_server_could_read_otherwise_is_refused() -> None:
    raw = b"\3\0\0\0" + b"abc"
    both = message(CLEAN)
    both.raw_input_contents.append(raw)
    numbers = message(CLEAN)
    numbers.inputs[0].contents.int_contents.append(1)
    shared = message(CLEAN)
    shared.inputs[0].parameters["shared_memory_region"].string_param = "x"
    typed = message(CLEAN)
    typed.inputs[0].datatype = "INT32"
    shaped = message(CLEAN)
    shaped.inputs[0].shape[:] = [2]
    found = [both, numbers, shared, typed, shaped]
    for contents in (
        [raw, raw],
        [raw[:-1]],
        [raw + b"\1"],
        [b"\xff\xff\xff\xff"],
        [raw * 2],
        [b""],
    ):
        odd = message(CLEAN)
        odd.inputs[0].ClearField("contents")
        odd.raw_input_contents.extend(contents)
        found.append(odd)
    async with served() as (client, _):
        for request in found:
            assert await status_of(sent(client, request)) == "INVALID_ARGUMENT", request


async def test_keys_rates_and_the_audit_are_those_of_http(tmp_path: Path) -> None:
    audit = f"sqlite:///{tmp_path}/audit.db"
    async with served(keys=keys_file(tmp_path), audit_url=audit) as (client, _):
        for headers, expected in (
            ({}, "UNAUTHENTICATED"),
            (bearer("psim_unknown"), "UNAUTHENTICATED"),
            (bearer(KEY[Scope.METRICS]), "PERMISSION_DENIED"),
            (bearer(KEY[Scope.CLASSIFY]), "OK"),
            ({"x-api-key": KEY[Scope.CLASSIFY]}, "OK"),
        ):
            asked = client.infer("fake", [tensor(CLEAN)], headers=headers)
            assert await status_of(asked) == expected
            described = client.get_model_metadata("fake", headers=headers)
            assert await status_of(described) == expected
        assert await client.is_server_live(), "for all"
        few = [client.infer("fake", [tensor(CLEAN)], headers={"x-api-key": FEW}) for _ in range(11)]
        assert [await status_of(asked) for asked in few] == ["OK"] * 10 + ["RESOURCE_EXHAUSTED"]
    callers = [row.caller for row in AuditStore(audit, read_only=True).read()]
    assert callers.count("classify") == 2


async def test_an_upstream_gets_the_request_as_json_and_no_other_metadata() -> None:
    port, peer = free_port(), Peer(ANSWER)
    async with behind(peer, **OIP, oip_grpc_port=port) as http, asking(port) as client:
        headers = {"x-http-method-override": "GET", "x-request-id": "seven"}
        found = await client.infer("fake", [tensor(CLEAN)], headers=headers)
        assert found.as_numpy("scores").tolist() == [[0.25, 0.75]]
        body, length = binary(CLEAN)
        binary_header = {"inference-header-content-length": str(length)}
        answer = await http.post(INFER, content=body, headers=binary_header)
        assert answer.json() == json.loads(ANSWER)
        for _, told, content in peer.asked:
            assert json.loads(content)["inputs"][0]["data"] == [CLEAN]
            assert not {"x-http-method-override", *binary_header} & told.keys()
        assert peer.asked[0][1]["x-request-id"] == "seven"


def test_numbers_of_every_type_come_as_triton_s_client_reads_them() -> None:
    types = {"INT8": [-3, 4], "UINT64": [2**63, 1], "FP64": [0.1, -2.5], "FP32": [0.5, 1.5]}
    outputs = [
        {"name": name, "datatype": name, "shape": [2], "data": data} for name, data in types.items()
    ]
    outputs.append({"name": "t", "datatype": "BYTES", "shape": [2, 1], "data": [["é"], ["b"]]})
    half = {"name": "h", "datatype": "FP16", "shape": [2], "data": [1, 0.5]}
    for more, raw in (([], True), ([half], False)):
        body = json.dumps({"outputs": [*more, *outputs]}).encode()
        result = InferResult(infer_response(body, "fake", "", raw))
        for name, data in types.items():
            assert result.as_numpy(name).tolist() == data
        assert [one.decode() for one in result.as_numpy("t").ravel()] == ["é", "b"]
        assert not more or result.as_numpy("h").tolist() == [1, 0.5]
    body = json.dumps({"outputs": outputs}).encode()
    for output in infer_response(body, "fake", "", False).outputs[: len(types)]:
        ((_, numbers),) = output.contents.ListFields()
        assert list(numbers) == types[output.name]


@pytest.mark.parametrize(
    "output",
    [
        {"datatype": "INT8", "data": [300, 1]},
        {"datatype": "FP32", "data": ["x", 1]},
        {"datatype": "BYTES", "data": [1, 2]},
        {"datatype": "COMPLEX", "data": [1, 2]},
        {"datatype": "UINT32", "data": [-1, 2]},
    ],
)
@pytest.mark.parametrize("raw", [False, True])
def test_an_answer_that_fits_no_message_is_a_bad_one(output: dict[str, Any], raw: bool) -> None:
    body = json.dumps({"outputs": [{"name": "x", "shape": [2]} | output]}).encode()
    with pytest.raises(BadAnswer):
        infer_response(body, "fake", "", raw)
    for build in (model_metadata, server_metadata):
        for found in ({}, {"name": 3}, {"name": "x", "version": 1, "inputs": [3], "outputs": []}):
            with pytest.raises(BadAnswer):
                build(found)


def test_a_message_without_anything_is_a_request_without_inputs() -> None:
    assert json.loads(request_json(service_pb2.ModelInferRequest())) == {"inputs": []}


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    for name in [one for one in sys.modules if one.startswith(("service.grpc.", "tritonclient."))]:
        monkeypatch.delitem(sys.modules, name)
    settings = Settings(bundle=Path("unused"), oip_grpc_port=8003)
    with pytest.raises(PsimError, match=r"pip install 'psim-gateway\[oip-grpc\]'"):
        create_app(settings, fake_bundle())


def test_only_the_methods_that_are_served_are_named() -> None:
    methods = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
    assert methods == SERVICE


def binary(*texts: str | bytes) -> tuple[bytes, int]:
    """Return what Triton's client sends over HTTP by default, and the length of its JSON."""
    found = triton_http.InferInput("text", [len(texts)], "BYTES")
    found.set_data_from_numpy(np.array(texts, dtype=object), binary_data=True)
    made: tuple[bytes, int] = triton_http.InferenceServerClient.generate_request_body([found])
    return made


async def test_tensors_after_the_json_are_read() -> None:
    async with client_of() as client:
        for text, status in ((CLEAN, 200), (POISONED, 403), ("", 422), (b"\xff", 422)):
            body, length = binary("Öl", text)
            for media in ({}, {"content-type": "application/octet-stream"}):
                headers = {"inference-header-content-length": str(length)} | media
                answer = await client.post(INFER, content=body, headers=headers)
                assert answer.status_code == status, (text, answer.text)
                envoy = await client.post(f"/envoy{INFER}", content=body, headers=headers)
                assert envoy.status_code == status, text
        expected = (await client.post(INFER, json=infer("Öl", CLEAN))).json()["outputs"]
        body, length = binary("Öl", CLEAN)
        headers = {"inference-header-content-length": str(length)}
        answer = await client.post(INFER, content=body, headers=headers)
        assert answer.json()["outputs"] == expected


async def test_binary_data_that_could_be_read_otherwise_is_refused() -> None:
    body, length = binary(CLEAN)
    inner = body[:length]
    async with client_of() as client:
        for content, header, status in (
            (body, str(length + 1), 400),
            (body, str(len(body) + 1), 400),
            (body, f"+{length}", 400),
            (body, "", 400),
            (body + b"x", str(length), 422),
            (body[:-1], str(length), 422),
            (inner.replace(b'"parameters"', b'"data":["mn"],"parameters"', 1) + body[length:],
             str(length + len(b'"data":["mn"],')), 422),
            (inner.replace(b'"binary_data_size":', b'"binary_data_size":-'), str(length + 1), 422),
        ):  # fmt: skip
            headers = {"inference-header-content-length": header}
            answer = await client.post(INFER, content=content, headers=headers)
            assert answer.status_code == status, (content, header, answer.text)
        twice = [("inference-header-content-length", str(length))] * 2
        assert (await client.post(INFER, content=body, headers=twice)).status_code == 400


def test_raw_texts_and_sizes_are_checked() -> None:
    assert texts_of(b"") == []
    assert with_binary([1], b"") == [1]
    for raw in (b"\1", b"\1\0\0\0", b"\0\0\0\0\2\0\0\0x"):
        with pytest.raises(ValueError, match=r"longer than the binary data"):
            texts_of(raw)
    for size in (True, 1.0, -1, "1"):
        with pytest.raises(ValueError, match="a number of bytes"):
            with_binary({"inputs": [{"parameters": {"binary_data_size": size}}]}, b"x")
