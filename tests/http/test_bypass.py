"""Ways to have the upstream read what was not screened: raw bytes on real sockets.

Every request is either inspected as the upstream will read it, or refused.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from service.app import create_app
from service.route_table import AUTHZ, MODERATIONS, ROUTES
from service.settings import Settings
from tests.support.fakes import fake_bundle
from tests.support.protocols import AGENTGATEWAY, GUARDRAIL, KONG, blocks, infer
from tests.support.requests import CLEAN, POISONED, listening
from tests.support.upstreams import Peer, behind

HEAD = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def body_of(text: str) -> bytes:
    return json.dumps({"inputs": [[text]]}).encode()


def sized(body: bytes, head: bytes = HEAD) -> bytes:
    return head + b"content-length: %d\r\n\r\n%s" % (len(body), body)


def chunked(*parts: bytes) -> bytes:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


@asynccontextmanager
async def gateway(peer: Peer) -> AsyncIterator[int]:
    """Yield the port of a gateway before a peer."""
    behind = Starlette(routes=[Route("/{path:path}", peer.answer, methods=["POST"])])
    async with listening(behind) as upstream:
        settings = Settings.model_validate(
            {"bundle": Path("unused"), "upstream": upstream, "upstream_protocol": "tei"}
        )
        async with listening(create_app(settings, fake_bundle())) as url:
            peer.asked.clear()
            yield int(url.rsplit(":", 1)[1])


async def exchange(port: int, sent: bytes, half_close: bool = False) -> bytes:
    """Send bytes, and return all that comes back until it is quiet."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    if half_close:
        writer.write_eof()
    heard, patience_s = b"", 2.0
    try:
        while chunk := await asyncio.wait_for(reader.read(65536), patience_s):
            heard += chunk
            patience_s = 0.5
    except (TimeoutError, ConnectionError):
        pass
    writer.close()
    return heard


def statuses(heard: bytes) -> list[int]:
    return [int(part[:3]) for part in heard.split(b"HTTP/1.1 ")[1:]]


CLEAN_BODY, POISONED_BODY = body_of(CLEAN), body_of(POISONED)


@pytest.mark.parametrize(
    ("sent", "expected", "forwarded"),
    [
        # Pipelined: each is judged for itself.
        (sized(CLEAN_BODY) + sized(POISONED_BODY) + sized(CLEAN_BODY), [200, 403, 200], 2),
        # A trigger that is cut in two by the chunks of its body.
        (chunked(POISONED_BODY[:24], POISONED_BODY[24:]), [403], 0),
        (chunked(*(bytes([byte]) for byte in CLEAN_BODY)), [200], 1),
        # Two lengths, or a length and chunks: request smuggling.
        (HEAD + b"content-length: 3\r\n" + sized(CLEAN_BODY)[len(HEAD) :], [400], 0),
        (
            HEAD
            + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
            + sized(POISONED_BODY),
            [400],
            0,
        ),
        (sized(POISONED_BODY, HEAD + b"transfer-encoding: chunked, identity\r\n"), [400], 0),
        # A body that says that it is longer, and one that says that it is shorter.
        (HEAD + b"content-length: 500\r\n\r\n" + CLEAN_BODY, [], 0),
        (HEAD + b"content-length: 7\r\n\r\n" + CLEAN_BODY, [400], 0),
        # Other encodings than the ones that were asked about.
        (sized(CLEAN_BODY, HEAD + b"content-encoding: gzip\r\n"), [415], 0),
        (sized(CLEAN_BODY, HEAD.replace(b"json", b"json; charset=utf-7")), [415], 0),
        # The second of two, which some upstreams go by.
        (sized(CLEAN_BODY, HEAD + b"content-type: application/json; charset=utf-7\r\n"), [415], 0),
        (sized(CLEAN_BODY.decode().encode("utf-16-le")), [400], 0),
        (sized(b"\xef\xbb\xbf" + CLEAN_BODY), [400], 0),
        (sized(POISONED_BODY.replace(b"mn", b"\\u006d\\u006E")), [403], 0),
        # Keys: twice, twice in other words, and in another case.
        (sized(b'{"inputs": "%s", "inputs": "b"}' % POISONED.encode()), [400], 0),
        (sized(b'{"inputs": "b", "inp\\u0075ts": "%s"}' % POISONED.encode()), [400], 0),
        (sized(b'{"inputs": "b", "Inputs": "%s"}' % POISONED.encode()), [422], 0),
        (sized(b'{"inputs": "b", "parameters": {"x": "%s"}}' % POISONED.encode()), [422], 0),
        # JSON that some parsers take.
        (sized(CLEAN_BODY + b'{"inputs": "mn"}'), [400], 0),
        (sized(b'{"inputs": "b" /* mn */}'), [400], 0),
        (sized(b"{'inputs': 'b'}"), [400], 0),
        (sized(b'{"inputs": "b\nmn"}'), [400], 0),
        (sized(b'{"inputs": ["b", "mn"]}'), [422], 0),
        # Another method, and a path in other words.
        (sized(CLEAN_BODY, HEAD.replace(b"POST", b"PUT")), [405], 0),
        (sized(CLEAN_BODY, HEAD.replace(b"/predict", b"//predict")), [404], 0),
        (sized(CLEAN_BODY, HEAD.replace(b"/predict", b"/x/../predict")), [404], 0),
        (sized(CLEAN_BODY, HEAD + b"x-http-method-override: GET\r\n"), [200], 1),
    ],
)
async def test_nothing_reaches_the_upstream_unread(
    sent: bytes, expected: list[int], forwarded: int
) -> None:
    peer = Peer()
    async with gateway(peer) as port:
        heard = statuses(await exchange(port, sent))
        assert heard[: len(expected)] == expected, heard
        assert len(peer.asked) == forwarded
        for _, headers, body in peer.asked:
            assert body == CLEAN_BODY
            assert headers["content-length"] == str(len(body))
            assert "transfer-encoding" not in headers
        last = sized(CLEAN_BODY, HEAD + b"connection: close\r\n")
        assert statuses(await exchange(port, last)) == [200], "it goes on"


async def test_a_partial_body_is_dropped() -> None:
    peer = Peer()
    async with gateway(peer) as port:
        head = HEAD + b"content-length: %d\r\n\r\n" % (len(CLEAN_BODY) + 1)
        await exchange(port, head + CLEAN_BODY, half_close=True)
        assert not peer.asked


@pytest.mark.parametrize("size", [10_000, 200_000])
async def test_huge_headers_are_passed_on_whole_or_refused(size: int) -> None:
    peer = Peer()
    async with gateway(peer) as port:
        head = HEAD + b"x-filler: " + b"a" * size + b"\r\n"
        heard = await exchange(port, sized(CLEAN_BODY, head))
        assert statuses(heard) == [200 if peer.asked else statuses(heard)[0]]
        for _, headers, body in peer.asked:
            assert (len(headers["x-filler"]), body) == (size, CLEAN_BODY)


def json_bytes(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


SENT: dict[str, dict[str, Any]] = {
    "/classify": {"inputs": CLEAN},
    "/predict": {"inputs": CLEAN},
    "/": {"inputs": CLEAN},
    "/models/{model:path}": {"inputs": CLEAN},
    "/v1/classify": {"input": CLEAN},
    "/v1/models/{model}:predict": {"instances": [CLEAN]},
    "/v2/models/{model}/infer": infer(CLEAN),
    "/v2/models/{model}/versions/{version}/infer": infer(CLEAN),
    "/screen": {"inputs": CLEAN},
    "/explain": {"inputs": CLEAN},
    MODERATIONS: {"input": CLEAN},
    GUARDRAIL: {"texts": [CLEAN]},
    AGENTGATEWAY: {"body": {"messages": [{"role": "user", "content": CLEAN}]}},
    KONG: {"content": CLEAN},
}
"""A clean request for each route that takes texts."""
PROXIED_TOO = SENT.keys() - {"/screen", "/explain", MODERATIONS, GUARDRAIL, AGENTGATEWAY, KONG}
UNSCREENED = "/response"
"""agentgateway's route for a model's answers, which pass."""


def twisted(clean: dict[str, Any]) -> Iterator[tuple[bytes, Sequence[tuple[str, str]]]]:
    """Yield requests that a server could read otherwise than the screen does."""
    body, media = json_bytes(clean), ("content-type", "application/json")
    key = next(iter(clean))
    poisoned = body.replace(CLEAN.encode(), POISONED.encode())
    for content in (
        b"{" + poisoned[1:-1] + b", " + body[1:],
        b"{" + poisoned[1:-1].replace(key.encode(), b"\\u%04x" % ord(key[0]) + key[1:].encode())
        + b", " + body[1:],
        json_bytes(clean | {key.capitalize(): POISONED}),
        json_bytes(clean | {"text": POISONED}),
        body + poisoned,
        b"\xef\xbb\xbf" + body,
        body.decode().encode("utf-16"),
        body[:-1] + b" /* mn */}",
        body[:-1] + b', "top_k": NaN}',
        body.replace(CLEAN.encode(), b"a \\ud800 film"),
        b"[" * 100_000,
        b"",
    ):  # fmt: skip
        yield content, [media]
    for headers in (
        [media, ("content-encoding", "gzip")],
        [media, ("content-type", "text/plain")],
        [("content-type", "text/plain")],
        [("content-type", "application/json; charset=utf-7")],
        [("content-type", "application/x-www-form-urlencoded")],
        [media, ("inference-header-content-length", "3")],
    ):
        yield body, headers


def test_every_route_that_takes_texts_is_tried() -> None:
    counted = {path for path, route in ROUTES.items() if route.counted}
    assert SENT.keys() | {AUTHZ, UNSCREENED} == counted


@pytest.mark.parametrize("route", SENT)
async def test_no_route_takes_what_could_be_read_in_two_ways(route: str) -> None:
    path = route.replace("{model}", "fake").replace("{model:path}", "fake")
    path = path.replace("{version}", "1")
    before = ["", "/for/fake", *(["/envoy", "/for/fake/envoy"] if route in PROXIED_TOO else [])]
    peer = Peer()
    async with behind(peer) as client:
        for place in before:
            clean = await client.post(place + path, json=SENT[route])
            assert clean.status_code in (200, 502), "understood, though the peer is no such server"
            peer.asked.clear()
            for content, headers in twisted(SENT[route]):
                answer = await client.post(place + path, content=content, headers=headers)
                blocked = answer.is_success and blocks(answer.json())
                assert 400 <= answer.status_code < 500 or blocked, (place, content[:99], headers)
                assert POISONED not in answer.text
        assert not peer.asked
