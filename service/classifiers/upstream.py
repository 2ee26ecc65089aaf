"""A classifier that is deployed elsewhere: what has passed the screen is forwarded to it.

The bytes go on as they came if the upstream speaks the caller's protocol and every input may pass;
else the request is put into the upstream's words. An answer is believed for its body and not for
its status; when in doubt the call fails.
"""

import asyncio
import io
import logging
import math
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

import aiohttp
from multidict import CIMultiDict
from pydantic import TypeAdapter

from service.classifiers.base import Call, Classified, ClassifierInput, Reply
from service.errors import (
    Invalid,
    NotReady,
    Overloaded,
    ServiceError,
    TimedOut,
    UpstreamDown,
    UpstreamFailed,
    UpstreamRefused,
)
from service.observability.metrics import ModelMetrics
from service.protocols.base import BadAnswer, ModelInfo, WireProtocol, parsed
from service.protocols.oip import OpenInference
from service.schemas import Score
from service.settings import UpstreamSettings

log = logging.getLogger(__name__)

HOP_BY_HOP = frozenset(
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    "transfer-encoding upgrade".split()
)
NOT_FORWARDED = HOP_BY_HOP | frozenset(
    "host expect accept-encoding content-type content-length content-encoding content-language "
    "inference-header-content-length x-http-method x-http-method-override x-method-override".split()
)
"""Ours to say, or a way to have the upstream read another request than was screened."""
NOT_RETURNED = HOP_BY_HOP | {"content-length", "content-encoding", "date", "server", "x-request-id"}
OURS = "x-psim-"
DOWN = (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)
"""What says that the upstream is down. A 500 does not: a single input can be the cause of it."""
CONNECT_S = 2.0
CONNECT_TRIES = 2
KEEP_IDLE_S = 4.0
"""Less than the five seconds after which common servers close: else a request can meet a connection
that is being closed, and it could not be said whether it was read."""
MOST_BYTES = 32 * 2**20
METADATA = TypeAdapter(dict[str, Any])


class Breaker:
    """Opens after some failures in a row; then one attempt may pass every `pause_s` seconds."""

    FAILURES = 5

    def __init__(self, pause_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._pause_s, self._clock = pause_s, clock
        self._failures, self._retry_at = 0, 0.0

    @property
    def open(self) -> bool:
        """True while the upstream is thought to be down."""
        return self._failures >= self.FAILURES

    def admit(self) -> bool:
        """Return whether an attempt may be made now."""
        if self.open:
            if self._clock() < self._retry_at:
                return False
            self._retry_at = self._clock() + self._pause_s
        return True

    def record(self, failed: bool) -> None:
        """Take note of how an attempt ended."""
        self._failures = self._failures + 1 if failed else 0
        if failed and self.open:
            self._retry_at = self._clock() + self._pause_s


class UpstreamClassifier:
    """The classifier at `settings.upstream`.

    Args:
        candidates: the protocols that it may speak; the first one that it answers in is taken.
        served: the model that it is asked for.

    Raises from `classify`:
        NotReady, UpstreamDown: nothing was sent, or it says that it is down.
        UpstreamFailed, TimedOut: no answer, or none that can be used.
        UpstreamRefused, Overloaded, Invalid: the upstream says that it is the request's fault, or
            that it is busy.
    """

    def __init__(
        self,
        settings: UpstreamSettings,
        candidates: Sequence[WireProtocol],
        served: ModelInfo,
        metrics: ModelMetrics,
    ) -> None:
        self._base = str(settings.upstream).rstrip("/")
        self._settings, self._served, self._metrics = settings, served, metrics
        self._candidates = candidates
        self._breaker = Breaker(settings.upstream_retry_s)
        self.protocol: WireProtocol | None = None
        """What it speaks; None until it has answered for the first time."""

    async def start(self) -> None:
        """Open the pool, and ask the upstream until it answers; again whenever it is down."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._settings.upstream_connections, keepalive_timeout=KEEP_IDLE_S
            ),
            # Cookies of one caller must not reach another.
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=self._settings.upstream_timeout_s, sock_connect=CONNECT_S
            ),
            auto_decompress=False,
            skip_auto_headers=("accept", "user-agent"),
        )
        await self._probe()
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stop asking, and close the pool."""
        self._watching.cancel()
        await asyncio.wait((self._watching,))
        await self._session.close()

    @property
    def ready(self) -> bool:
        """Whether the upstream has answered, and has not failed too often since."""
        return self.protocol is not None and not self._breaker.open

    @property
    def upstream_protocol(self) -> str | None:
        """Name of its protocol."""
        return None if self.protocol is None else self.protocol.name

    async def classify(self, call: Call, inputs: Sequence[ClassifierInput]) -> Classified:
        """Have the upstream classify the inputs."""
        if self.protocol is None:
            raise NotReady("the upstream has not answered yet")
        own = self.protocol.request_type is type(call.asked)
        if call.asked.unsupported_option and not own:
            raise Invalid(
                f"{call.asked.unsupported_option}: the classifier behind the gateway has no such"
            )
        texts = [one.text for one in inputs]
        body = self._body(call, texts, own)
        if not self._breaker.admit():
            self._count("open")
            raise UpstreamDown("the upstream is down", math.ceil(self._settings.upstream_retry_s))
        started = time.perf_counter()
        reply = await self._send(
            self.protocol.path(self._served.model, call.version), self._headers(call), body
        )
        seconds = time.perf_counter() - started
        self._metrics.stage_seconds["upstream"].observe(seconds)
        if reply.status != HTTPStatus.OK:
            raise self._refusal(reply, own)
        every = len(texts) == len(call.asked.texts)
        ready_made = own and every and call.protocol.passthrough
        scores = self._checked(self.protocol, call, reply, len(texts), ready_made)
        return Classified(scores, [{"upstream": seconds}], reply=reply if ready_made else None)

    async def metadata(self, path: str) -> dict[str, Any] | None:
        """Return what an upstream that speaks Open Inference says at a path."""
        if not isinstance(self.protocol, OpenInference):
            return None
        reply = await self._send(path, CIMultiDict(), b"", "GET")
        try:
            return parsed(METADATA, reply.body)
        except BadAnswer as error:
            raise self._unusable(error) from None

    def _body(self, call: Call, texts: Sequence[str], own: bool) -> bytes:
        if own and call.asked.forward_as_is and texts == call.asked.texts:
            return call.body
        assert self.protocol is not None  # noqa: S101 - checked by the caller
        same = (
            call.asked.with_texts(texts)
            if own
            else self.protocol.build_request(texts, self._served)
        )
        return same.model_dump_json(exclude_none=True).encode()

    def _headers(self, call: Call) -> CIMultiDict[str]:
        """Return the caller's end-to-end headers, and what is ours to say."""
        pairs = [(k.decode("latin-1").lower(), v.decode(errors="replace")) for k, v in call.headers]
        headers = CIMultiDict(_end_to_end(pairs, NOT_FORWARDED))
        headers["content-type"] = "application/json"
        headers["accept-encoding"] = "identity"
        headers["x-request-id"] = call.request_id
        if secret := self._settings.upstream_authorization:
            headers["authorization"] = secret.get_secret_value()
        return headers

    def _checked(
        self, protocol: WireProtocol, call: Call, reply: Reply, count: int, ready_made: bool
    ) -> list[list[Score]]:
        """Return the scores, or none if the reply can be passed on as it is."""
        try:
            if ready_made:
                protocol.check(reply.body, count)
                return []
            scores = protocol.scores(reply.body, count, self._served.labels)
            if protocol.request_type is not type(call.asked):
                _check_labels(scores, self._served.labels, call.protocol.requires_all_scores)
            return scores
        except BadAnswer as error:
            raise self._unusable(error) from None

    def _unusable(self, error: BadAnswer) -> UpstreamFailed:
        self._count("answer")
        log.error("the upstream's answer cannot be used: %s", error)
        return UpstreamFailed("the upstream's answer cannot be used; see the log")

    async def _send(
        self, path: str, headers: CIMultiDict[str], body: bytes, method: str = "POST"
    ) -> Reply:
        """Return the upstream's answer, of any status; tell the breaker whether there is one."""
        try:
            reply = await self._exchange(method, path, headers, body)
        except TimeoutError:
            self._failed("timeout")
            seconds = self._settings.upstream_timeout_s
            raise TimedOut(f"the upstream did not answer within {seconds} s") from None
        except aiohttp.ClientConnectorError as error:
            self._failed("connect")
            raise UpstreamFailed("the upstream cannot be reached") from error
        except BadAnswer as error:
            raise self._unusable(error) from None
        except aiohttp.ClientError as error:
            self._failed("broken")
            raise UpstreamFailed("the connection to the upstream broke off") from error
        self._breaker.record(failed=reply.status in DOWN)
        if reply.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self._count("status")
        return reply

    def _failed(self, kind: str) -> None:
        self._breaker.record(failed=True)
        self._count(kind)

    async def _exchange(
        self, method: str, path: str, headers: CIMultiDict[str], body: bytes
    ) -> Reply:
        """Send a request; again only if there was no connection, so that nothing was sent."""
        for tries_left in reversed(range(CONNECT_TRIES)):
            try:
                async with self._session.request(
                    method,
                    self._base + path,
                    data=io.BytesIO(body) if body else None,
                    headers=headers,
                    allow_redirects=False,
                ) as response:
                    content = await _limited(response)
                    pairs = [(k.lower(), v) for k, v in response.headers.items()]
                    return Reply(response.status, _end_to_end(pairs, NOT_RETURNED), content)
            except aiohttp.ClientConnectorError:
                if not tries_left:
                    raise
        raise AssertionError("the last try returns or raises")

    def _refusal(self, reply: Reply, own: bool) -> ServiceError:
        """Return the error for an answer other than 200."""
        said = f"the upstream answered with HTTP {reply.status}"
        if reply.status == HTTPStatus.TOO_MANY_REQUESTS:
            return Overloaded("upstream", _retry_after(reply))
        if reply.status == HTTPStatus.SERVICE_UNAVAILABLE:
            return UpstreamDown(said, _retry_after(reply))
        if own and 400 <= reply.status < 500:
            return UpstreamRefused(said, reply.status, reply.headers, reply.body)
        if reply.status in (400, 413, 422):
            return Invalid(said)
        return UpstreamFailed(said)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.upstream_retry_s)
            if not self.ready:
                await self._probe()

    async def _probe(self) -> None:
        """Have the upstream classify something; learn from the first time what it speaks."""
        heard = []
        for protocol in self._candidates if self.protocol is None else [self.protocol]:
            call = Call(
                protocol.build_request(["warm up"], self._served), protocol, request_id="warm-up"
            )
            body = call.asked.model_dump_json(exclude_none=True).encode()
            try:
                path = protocol.path(self._served.model)
                reply = await self._send(path, self._headers(call), body)
                if reply.status == HTTPStatus.OK:
                    protocol.check(reply.body, 1)
                    self.protocol = protocol
                    log.info("upstream answers", extra={"protocol": protocol.name})
                    return
                heard.append(f"{protocol.name}: HTTP {reply.status}")
            except BadAnswer as error:
                heard.append(f"{protocol.name}: {error}")
            except ServiceError as error:
                heard.append(f"{protocol.name}: {error}")
                break  # it is not there, whatever it speaks
        log.warning("the upstream has no answer yet: %s", "; ".join(heard))

    def _count(self, kind: str) -> None:
        self._metrics.upstream_errors[kind].inc()


def _end_to_end(headers: Sequence[tuple[str, str]], ours: frozenset[str]) -> list[tuple[str, str]]:
    """Return what the next hop is to get (RFC 9110, section 7.6.1), without what is ours to say."""
    named = {
        name.strip().lower()
        for key, value in headers
        if key == "connection"
        for name in value.split(",")
    }
    return [
        (key, value)
        for key, value in headers
        if key not in ours and key not in named and not key.startswith(OURS)
    ]


def _check_labels(scores: Sequence[Sequence[Score]], labels: Sequence[str], every: bool) -> None:
    for row in scores:
        found = {score.label for score in row}
        if not found <= set(labels):
            raise BadAnswer(f"its classes are not those of the bundle, {', '.join(labels)}")
        if every and len(found) < len(labels):
            raise BadAnswer("it does not give a score for every class")


async def _limited(response: aiohttp.ClientResponse) -> bytes:
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise BadAnswer("a compressed answer, which was not asked for")
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > MOST_BYTES:
            raise BadAnswer(f"an answer of over {MOST_BYTES} bytes")
    return bytes(content)


def _retry_after(reply: Reply) -> int:
    given = dict(reply.headers).get("retry-after", "")
    return min(int(given), 3600) if given.isascii() and given.isdigit() and int(given) else 1
