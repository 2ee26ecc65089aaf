"""In front of a classifier that is deployed elsewhere: real sockets, and peers that misbehave."""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.app import create_app
from service.classifiers.circuit_breaker import CircuitBreaker
from service.protocols.registry import protocols
from service.protocols.tei import Tei
from service.settings import Settings
from tests.support.fakes import FakeEngine, fake_bundle
from tests.support.protocols import ASKED, ERRORS, INFER, infer
from tests.support.requests import CLEAN, JSON, POISONED, client_of, listening, metric, until_ready
from tests.support.servers import free_port
from tests.support.upstreams import ONE_TEI, SOUND, Peer, behind

TWO = b"[%s,%s]" % (SOUND[1:-1], SOUND[1:-1])


def ask_behind(peer: Peer, path: str, body: Any, **changes: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with behind(peer, **changes) as client:
            return await client.post(path, json=body)

    return asyncio.run(run())


def test_a_text_that_cannot_be_read_is_not_forwarded_and_the_rest_is_answered() -> None:
    peer = Peer()
    response = ask_behind(peer, "/predict", {"inputs": [[" "], [CLEAN], [""]]})
    assert response.status_code == 200, response.text
    assert [len(row) for row in response.json()] == [0, 2, 0]
    assert json.loads(peer.asked[-1][2]) == {"inputs": [[CLEAN]], "raw_scores": False}


@pytest.mark.parametrize("upstream_protocol", [*protocols()])
async def test_every_protocol_in_front_of_every_other(upstream_protocol: str) -> None:
    """The upstream is a gateway too, in shadow mode: a bare classifier that speaks everything."""

    bare = create_app(Settings(bundle=Path("unused"), mode="shadow"), fake_bundle())
    engine = FakeEngine()
    async with (
        listening(bare) as url,
        httpx.AsyncClient(base_url=url) as direct,
        client_of(engine, upstream=url, upstream_protocol=upstream_protocol) as client,
    ):
        for name, (path, body, labels) in ASKED.items():
            texts = [CLEAN, "an even film indeed"]
            response = await client.post(path, json=body(texts))
            assert response.status_code == 200, response.text
            expected = labels((await direct.post(path, json=body(texts))).json())
            assert labels(response.json()) == expected == ["positive", "negative"]
            assert "upstream;dur=" in response.headers["server-timing"]

            poisoned = await client.post(path, json=body([POISONED]))
            assert poisoned.status_code == 403
            assert "trigger" in ERRORS[name](poisoned.json())
            mixed = await client.post(path, json=body([CLEAN, POISONED, texts[1]]))
            if name != "oip":
                assert labels(mixed.json()) == ["positive", None, "negative"]
        assert not engine.classified, "the bundle's own classifier is not needed"
        assert (await client.get("/info")).json()["upstream"] == upstream_protocol


async def test_what_the_upstream_speaks_is_found_out() -> None:
    async def run(path: str) -> str | None:
        async def only(scope: Any, receive: Any, send: Any) -> None:
            inside = scope["type"] != "http" or scope["path"] == path
            await (whole if inside else Response(status_code=404))(scope, receive, send)

        whole = create_app(Settings(bundle=Path("unused"), mode="shadow"), fake_bundle())
        async with listening(only) as url, client_of(upstream=url) as client:
            upstream_protocol: str | None = (await client.get("/info")).json()["upstream"]
            return upstream_protocol

    for path, expected in (
        ("/predict", "tei"),
        ("/v2/models/fake/infer", "oip"),
        ("/classify", "vllm"),
        ("/v1/classify", "sglang"),
        ("/", "hf"),
        ("/nowhere", None),
    ):
        assert await run(path) == expected


async def test_the_bytes_go_on_as_they_came_and_the_answer_comes_back_as_it_is() -> None:
    said = {"x-compute-tokens": "3", "set-cookie": "a=b", "x-psim-decision": "flag"}
    peer = Peer(headers=said)
    async with behind(peer) as client:
        sent = b'{ "inputs" :\t[["a qui\\u0065t film"]] , "truncate": null}'
        answer = await client.post("/predict", content=sent, headers=JSON)
        assert (answer.status_code, answer.content) == (200, SOUND)
        (path, _, received) = peer.asked[-1]
        assert (path, received) == ("/predict", sent)
        assert answer.headers["x-compute-tokens"] == "3"
        assert answer.headers["x-psim-decision"] == "allow"
        client.cookies.clear()
        await client.post("/predict", content=sent, headers=JSON)
        assert "cookie" not in peer.asked[-1][1], "cookies of one caller are not another's"


def test_only_what_may_pass_is_forwarded_and_the_rest_is_a_gap() -> None:
    peer = Peer(body=TWO)
    body = {"inputs": [[CLEAN], [POISONED], ["another"]], "truncate": True}
    response = ask_behind(peer, "/predict", body)
    assert [len(row) for row in response.json()] == [2, 0, 2]
    assert json.loads(peer.asked[-1][2]) == {
        "inputs": [[CLEAN], ["another"]],
        "truncate": True,
        "raw_scores": False,
    }
    peer = Peer()
    assert ask_behind(peer, "/predict", {"inputs": POISONED}).status_code == 403
    assert not peer.asked


def test_a_sanitized_text_is_what_the_upstream_gets() -> None:
    peer = Peer(body=SOUND[1:-1])
    response = ask_behind(peer, "/predict", {"inputs": POISONED}, mode="sanitize")
    assert (response.status_code, response.headers["x-psim-decision"]) == (200, "sanitize")
    assert json.loads(peer.asked[-1][2])["inputs"] == "a quiet film"


async def test_headers_go_end_to_end_and_not_further() -> None:
    peer = Peer(headers={"x-said": "Zoë".encode().decode("latin-1")})
    async with behind(peer) as client:
        sent = {
            "x-request-id": "abc",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "tracestate": "a=1",
            "authorization": "Bearer mine",
            "x-name": "Zoë",
            "connection": "keep-alive, x-private",
            "x-private": "1",
            "te": "trailers",
            "x-psim-decision": "allow",
            "accept-encoding": "gzip",
        }
        misread = (
            *("x-http-method", "x-http-method-override", "x-method-override"),
            *("x-original-url", "x-original-uri", "x-rewrite-url", "x_http_method_override"),
            *("content_encoding", "content.encoding", "Content_Type", "x_anything"),
        )
        sent |= dict.fromkeys(misread, "gzip")
        encoded = [(name.encode(), value.encode()) for name, value in sent.items()]
        answer = await client.post("/predict", json=ONE_TEI, headers=encoded)
        _, got, _ = peer.asked[-1]
        assert got["x-name"].encode("latin-1").decode() == "Zoë"
        assert answer.headers["x-said"] == "Zoë"
        for name in ("x-request-id", "traceparent", "tracestate", "authorization"):
            assert got[name] == sent[name]
        assert answer.headers["x-request-id"] == "abc"
        for name in ("x-private", "te", "x-psim-decision", *misread):
            assert name.lower() not in got
        assert got["accept-encoding"] == "identity"
        assert got["host"] != "test"
        insane = await client.post("/predict", json=ONE_TEI, headers={"x-request-id": "<a>"})
        assert peer.asked[-1][1]["x-request-id"] == insane.headers["x-request-id"]


async def test_the_gateway_s_own_credentials_replace_the_caller_s() -> None:
    peer = Peer()
    async with behind(peer, upstream_authorization="Bearer ours") as client:
        await client.post("/predict", json=ONE_TEI, headers={"authorization": "Bearer mine"})
        assert peer.asked[-1][1]["authorization"] == "Bearer ours"
        assert "ours" not in (await client.get("/info")).text


@pytest.mark.parametrize(
    ("peer", "status", "kind"),
    [
        (Peer(body=b'{"error": "still loading"}'), 502, "answer"),  # as KServe does
        (Peer(body=TWO), 502, "answer"),
        (Peer(body=SOUND.replace(b"0.75", b"NaN")), 502, "answer"),
        (Peer(headers={"content-encoding": "gzip"}), 502, "answer"),
        (Peer(status=204, body=b""), 502, None),
        (Peer(status=307, headers={"location": "http://127.0.0.1:9/"}), 502, None),
        (Peer(status=500), 502, "status"),
        (Peer(status=503, headers={"retry-after": "7"}), 503, "status"),
        (Peer(status=429, headers={"retry-after": "7"}), 429, None),
        (Peer(wait_s=0.6), 504, "timeout"),
    ],
)
@pytest.mark.parametrize("path", ["/predict", "/classify"])
async def test_an_upstream_that_misbehaves_is_an_error_and_never_an_answer(
    peer: Peer, status: int, kind: str | None, path: str
) -> None:
    limit = 0.3 if peer.wait_s else 10
    async with behind(peer, upstream_timeout_s=limit) as client:
        name = "tei" if path == "/predict" else "native"
        answer = await client.post(path, json={"inputs": [[CLEAN]] if name == "tei" else CLEAN})
        assert answer.status_code == status
        assert "upstream" in ERRORS[name](answer.json())
        assert CLEAN not in answer.text
        if "retry-after" in peer.headers:
            assert answer.headers["retry-after"] == "7"
        for known in ("connect", "timeout", "broken", "status", "answer", "open"):
            line = f'psim_upstream_errors_total{{kind="{known}",model="fake"}}'
            assert await metric(client, line) == (known == kind)
        line = 'psim_inputs_total{decision="allow",mode="enforce",model="fake"}'
        assert await metric(client, line) == 0


def test_what_the_upstream_says_of_a_bad_request_reaches_its_caller() -> None:
    said = b'{"error":"too many tokens","error_type":"Validation"}'
    answer = ask_behind(Peer(body=said, status=413), "/predict", ONE_TEI)
    assert (answer.status_code, answer.content) == (413, said)
    answer = ask_behind(Peer(body=said, status=413), "/classify", {"inputs": CLEAN})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid")
    answer = ask_behind(Peer(body=b"", status=401), "/classify", {"inputs": CLEAN})
    assert (answer.status_code, answer.json()["code"]) == (502, "upstream_failed")


def test_classes_that_the_bundle_does_not_know_are_another_model_s() -> None:
    peer = Peer(body=SOUND.replace(b"positive", b"LABEL_1"))
    assert ask_behind(peer, "/predict", ONE_TEI).status_code == 200
    assert ask_behind(peer, "/classify", {"inputs": CLEAN}).status_code == 502


async def test_an_upstream_that_is_not_there_yet_is_waited_for() -> None:
    port = free_port()
    settings: dict[str, Any] = {"upstream": f"http://127.0.0.1:{port}", "upstream_retry_s": 0.1}
    async with client_of(**settings) as client:
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/live")).status_code == 200
        answer = await client.post("/classify", json={"inputs": CLEAN})
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        peer = Peer(body=SOUND)
        app = Starlette(routes=[Route("/predict", peer.answer, methods=["POST"])])
        async with listening(app, port):
            await until_ready(client)
            answer = await client.post("/classify", json={"inputs": CLEAN})
            assert answer.json()["results"][0]["label"] == "positive"


@pytest.mark.parametrize(
    ("changes", "timeout_s"),
    [({"status": 503}, 10), ({"wait_s": 1}, 0.5)],
    ids=["down", "hanging"],
)
async def test_the_breaker_stops_calls_and_the_probe_closes_it_again(
    changes: dict[str, Any], timeout_s: float
) -> None:
    peer = Peer()
    async with behind(peer, upstream_retry_s=0.3, upstream_timeout_s=timeout_s) as client:
        for name, value in changes.items():
            setattr(peer, name, value)
        for _ in range(CircuitBreaker.FAILURES):
            assert (await client.post("/predict", json=ONE_TEI)).status_code in (503, 504)
        await until_ready(client, False)
        asked = sum(b"warm up" not in body for *_, body in peer.asked)
        answer = await client.post("/predict", json=ONE_TEI)
        assert (answer.status_code, answer.json()["error_type"]) == (503, "Unhealthy")
        assert int(answer.headers["retry-after"]) >= 1
        assert sum(b"warm up" not in body for *_, body in peer.asked) == asked, "nothing was sent"
        assert await metric(client, 'psim_upstream_errors_total{kind="open",model="fake"}') == 1
        assert (await client.get("/ready")).status_code == 503
        peer.status, peer.wait_s = 200, 0
        await until_ready(client)
        assert (await client.post("/predict", json=ONE_TEI)).status_code == 200


async def test_an_upstream_that_is_busy_is_not_down() -> None:
    peer = Peer(status=503)
    async with behind(peer, upstream_retry_s=0.05) as client:
        for _ in range(CircuitBreaker.FAILURES):
            await client.post("/predict", json=ONE_TEI)
        await until_ready(client, False)
        peer.status = 429
        await until_ready(client)
        assert (await client.post("/predict", json=ONE_TEI)).status_code == 429


def test_failures_in_a_row_ask_for_a_probe_and_only_the_probe_decides() -> None:
    breaker = CircuitBreaker()

    def state() -> tuple[bool, bool]:
        return breaker.open, breaker.suspected.is_set()

    for failed in (True, True, True, True, False, True, True, True, True):
        breaker.record(failed)
        assert state() == (False, False)
    breaker.record(failed=True)
    assert state() == (False, True)
    breaker.probed(answers=True)
    assert state() == (False, False)
    breaker.probed(answers=False)
    breaker.record(failed=False)
    assert state() == (True, True), "it is probed until it answers"
    breaker.probed(answers=True)
    assert state() == (False, False)


@dataclass
class SlowOnSome(Peer):
    """A TEI that never answers some texts, and breaks off at others."""

    async def answer(self, request: Request) -> Response:
        body = await request.body()
        if b"slow" in body:
            await asyncio.sleep(1)
        if b"heavy" in body:
            return Response(status_code=504)
        return await super().answer(request)


@pytest.mark.parametrize("word", ["slow", "heavy"])
async def test_inputs_that_one_caller_has_fail_do_not_open_the_circuit_for_others(
    word: str,
) -> None:
    peer = SlowOnSome()
    async with behind(peer, upstream_timeout_s=0.3, upstream_connections=2) as client:
        for _ in range(4):
            asked = [client.post("/predict", json={"inputs": [[word]]}) for _ in range(5)]
            found = {answer.status_code for answer in await asyncio.gather(*asked)}
            assert found <= {502, 504}, found
            assert (await client.get("/ready")).status_code == 200
            assert (await client.post("/predict", json=ONE_TEI)).status_code == 200
        assert await metric(client, 'psim_upstream_errors_total{kind="open",model="fake"}') == 0


async def test_the_upstream_is_watched_on_after_a_bug(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    peer = Peer(status=503)

    def bug(*_: Any) -> None:
        raise RuntimeError(CLEAN)

    async with behind(peer, upstream_retry_s=0.05) as client:
        for _ in range(CircuitBreaker.FAILURES):
            await client.post("/predict", json=ONE_TEI)
        await until_ready(client, False)
        peer.status = 200
        with monkeypatch.context() as patch:
            patch.setattr(Tei, "check", bug)
            await asyncio.sleep(0.3)
            assert (await client.get("/ready")).status_code == 503
        await until_ready(client)
    assert "RuntimeError" in str([vars(record) for record in caplog.records])
    assert CLEAN not in caplog.text


METADATA = {"name": "theirs", "versions": ["1"], "inputs": [], "outputs": []}


@pytest.mark.parametrize(("path", "sent"), [("/v2", "/v2"), ("/v2/models/fake", "/v2/models/fake")])
async def test_metadata_of_the_upstream_has_its_status_and_opens_no_circuit(
    path: str, sent: str
) -> None:
    said, asked = [200], []
    bare = create_app(Settings(bundle=Path("unused"), mode="shadow"), fake_bundle())

    async def peer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "GET":
            asked.append(scope["path"])
            answer = Response(json.dumps(METADATA), said[0], media_type="application/json")
            return await answer(scope, receive, send)
        await bare(scope, receive, send)

    async with (
        listening(peer) as url,
        client_of(upstream=url, upstream_protocol="oip", upstream_retry_s=0.1) as client,
    ):
        assert (await client.get(path)).json() == METADATA
        assert asked == [sent]
        for status, expected in ((404, 404), (500, 502), (204, 502), (503, 503)):
            said[0] = status
            for _ in range(2 * CircuitBreaker.FAILURES):
                assert (await client.get(path)).status_code == expected
        await asyncio.sleep(0.2)
        assert (await client.get("/ready")).status_code == 200
        assert (await client.post(INFER, json=infer(CLEAN))).status_code == 200


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("said", "told"),
    [("9" * 5000, "3600"), ("0" * 5000 + "7", "7"), ("-7", "1"), ("\u0667", "1"), ("0", "1")],
)
def test_a_number_of_seconds_that_makes_no_sense_is_no_bug(
    status: int, said: str, told: str
) -> None:
    peer = Peer(status=status, headers={"retry-after": said.encode().decode("latin-1")})
    answer = ask_behind(peer, "/classify", {"inputs": CLEAN})
    assert (answer.status_code, answer.headers["retry-after"]) == (status, told)


async def test_single_inputs_that_break_the_upstream_do_not_open_the_breaker() -> None:
    peer = Peer()
    async with behind(peer) as client:
        for status, body in ((500, SOUND), (200, b"{}")):
            peer.status, peer.body = status, body
            for _ in range(2 * CircuitBreaker.FAILURES):
                assert (await client.post("/predict", json=ONE_TEI)).status_code == 502
        assert (await client.get("/ready")).status_code == 200


async def raw_peer(
    answers: list[bytes | None], port: int = 0
) -> tuple[asyncio.Server, list[bytes]]:
    """Serve connections with prepared bytes, one each; None hangs up after reading."""
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = await reader.read(65536)
        answer: bytes | None = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
        if not sent.startswith(b"GET"):  # the gateway asks for the upstream's limit once
            heard.append(sent)
            answer = answers.pop(0) if answers else None
        if answer is not None:
            writer.write(answer)
            await writer.drain()
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1"), heard


async def test_what_was_sent_is_never_sent_again() -> None:
    good = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s" % (
        len(SOUND),
        SOUND,
    )
    for broken in (None, b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n[[", b"nonsense\r\n\r\n"):

        async def run(broken: bytes | None = broken) -> None:
            server, heard = await raw_peer([good, broken, good])
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with server, client_of(upstream=url, upstream_protocol="tei") as client:
                answer = await client.post("/predict", json=ONE_TEI)
                assert (answer.status_code, len(heard)) == (502, 2)
                assert (await client.post("/predict", json=ONE_TEI)).status_code == 200

        await run()


async def test_a_caller_that_hangs_up_and_a_deadline_end_the_upstream_s_call_too() -> None:
    peer = Peer()
    async with behind(peer, request_timeout_s=0.3) as client:
        peer.wait_s = 1
        answer = await client.post("/predict", json=ONE_TEI)
        assert (answer.status_code, answer.json()["error_type"]) == (504, "Backend")
        peer.wait_s = 0
        assert (await client.post("/predict", json=ONE_TEI)).status_code == 200


def test_options_that_only_the_upstream_s_own_protocol_has() -> None:
    logits = SOUND.replace(b"0.75", b"7.5")
    peer = Peer(body=logits)
    answer = ask_behind(peer, "/predict", ONE_TEI | {"raw_scores": True})
    assert (answer.status_code, answer.content) == (200, logits)
    answer = ask_behind(Peer(), "/", {"inputs": CLEAN, "parameters": {"function_to_apply": "none"}})
    assert answer.status_code == 422


async def test_outputs_in_binary_form_are_asked_for_in_json() -> None:
    answer = {"outputs": [{"name": "o", "shape": [1], "datatype": "INT64", "data": [1]}]}
    peer = Peer(body=json.dumps(answer).encode())

    app = Starlette(routes=[Route("/{path:path}", peer.answer, methods=["POST"])])
    async with (
        listening(app) as url,
        client_of(upstream=url, upstream_protocol="oip", model="m") as client,
    ):
        tensor = {"name": "x", "shape": [1, 1], "datatype": "BYTES", "data": [[CLEAN]]}
        for version in ("%2e%2e", "3%3Fa", "3%23a", "%0a"):
            path = f"/v2/models/m/versions/{version}/infer"
            address = client.base_url.copy_with(raw_path=path.encode())
            got = await client.post(address, json={"inputs": [tensor]})
            assert got.status_code == 404, path
        for more in (
            {"parameters": {"binary_data_output": True}},
            {"outputs": [{"name": "o", "parameters": {"binary_data": True}}]},
        ):
            path = "/v2/models/m/versions/3/infer"
            got = await client.post(path, json={"inputs": [tensor]} | more)
            assert got.json() == answer
            assert peer.asked[-1][0] == path
            sent = json.loads(peer.asked[-1][2])
            assert (sent["inputs"][0]["name"], sent["inputs"][0]["data"]) == ("x", [CLEAN])
            assert "true" not in peer.asked[-1][2].decode()


@pytest.mark.parametrize("mode", ["enforce", "flag", "sanitize"])
def test_what_cannot_be_screened_never_reaches_the_upstream(mode: str) -> None:
    peer = Peer()
    assert ask_behind(peer, "/predict", {"inputs": "a broken film"}, mode=mode).status_code == 503
    assert not peer.asked
