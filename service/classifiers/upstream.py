"""A classifier that is deployed elsewhere: inputs that passed the screen are forwarded to it.

If the upstream speaks the caller's protocol and every input passed, the bytes are forwarded as
received; else the request is rebuilt in the upstream's protocol. An answer is trusted for its body,
not for its status. When in doubt the call fails.
"""

import asyncio
import io
import logging
import math
import time
import traceback
from collections.abc import Sequence
from contextlib import AsyncExitStack
from http import HTTPStatus
from typing import Any

import aiohttp
from multidict import CIMultiDict
from pydantic import TypeAdapter

from service.classifiers.base import Call, Classified, ClassifierInput, Reply
from service.classifiers.circuit_breaker import CircuitBreaker
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
from service.protocols.headers import is_ambiguous
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
    "inference-header-content-length".split()
)
"""Headers that the gateway sets, or that could make the upstream read a different request."""
NOT_RETURNED = HOP_BY_HOP | {"content-length", "content-encoding", "date", "server", "x-request-id"}
OWN_PREFIX = "x-psim-"
DOWN = (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)
"""Statuses of an upstream that is down. Not 500, which a single input can cause."""
CONNECT_S = 2.0
CONNECT_TRIES = 2
KEEP_IDLE_S = 4.0
"""Less than the five seconds after which common servers close idle connections: of a request that
meets a closing connection, nobody knows whether it was read."""
MAX_BYTES = 32 * 2**20
PROBE_ID = "warm-up"
"""Request id of the service's own probes."""
METADATA = TypeAdapter(dict[str, Any])


class Incomparable(Exception):
    """The upstream's answer is sound, but gives no scores of the bundle's classes."""


class UpstreamClassifier:
    """The classifier at `settings.upstream`.

    Args:
        candidates: protocols that the upstream may speak; the first that it answers in is used.
        model_info: the model that the upstream serves.

    Raises from `classify`:
        NotReady, UpstreamDown: nothing was sent, or the upstream answered that it is down.
        UpstreamFailed, TimedOut: there is no answer, or none that can be used.
        UpstreamRefused, Overloaded, Invalid: the upstream answered that the request is at fault, or
            that it is busy.
    """

    def __init__(
        self,
        settings: UpstreamSettings,
        candidates: Sequence[WireProtocol],
        model_info: ModelInfo,
        metrics: ModelMetrics,
    ) -> None:
        self._base = str(settings.upstream).rstrip("/")
        self._settings, self._model_info, self._metrics = settings, model_info, metrics
        self._candidates = candidates
        self._breaker = CircuitBreaker()
        self._opened = AsyncExitStack()
        self.protocol: WireProtocol | None = None
        """Protocol of the upstream; None until its first answer."""
        self.max_length: int | None = None
        """Tokens after which the upstream says that it cuts a text."""
        self.back = asyncio.Event()
        """Set when the upstream answers for the first time, or after an outage."""

    async def start(self) -> None:
        """Open the pools; probe the upstream now, and whenever it may be down."""
        connections = self._settings.upstream_connections
        self._session = await self._opened.enter_async_context(self._pool(connections))
        # Callers may keep all of theirs busy.
        self._probe_session = await self._opened.enter_async_context(self._pool(1))
        await self._probe()
        watcher = asyncio.create_task(self._watch())
        self._opened.push_async_callback(asyncio.wait, (watcher,))
        self._opened.callback(watcher.cancel)

    async def close(self) -> None:
        """Stop probing, and close the pools; does nothing if they are not open."""
        await self._opened.aclose()

    def _pool(self, connections: int) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections, keepalive_timeout=KEEP_IDLE_S),
            # Cookies of one caller must not reach another.
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=self._settings.upstream_timeout_s, sock_connect=CONNECT_S
            ),
            auto_decompress=False,
            skip_auto_headers=("accept", "user-agent"),
        )

    @property
    def ready(self) -> bool:
        """Whether the upstream has answered once, and the circuit breaker is closed."""
        return self.protocol is not None and not self._breaker.open

    @property
    def upstream_protocol(self) -> str | None:
        """Name of the upstream's protocol; None until its first answer."""
        return None if self.protocol is None else self.protocol.name

    async def classify(self, call: Call, inputs: Sequence[ClassifierInput]) -> Classified:
        """Forward the inputs to the upstream."""
        if self.protocol is None:
            raise NotReady("the upstream has not answered yet")
        same_protocol = self.protocol.request_type is type(call.request)
        option = call.request.unsupported_option(self._model_info)
        if option and not same_protocol:
            raise Invalid(f"{option}: the classifier behind the gateway has no such")
        texts = [input.text for input in inputs]
        body = self._body(self.protocol, call, texts)
        self._require_closed()
        path = self.protocol.path(self._model_info.model, call.version)
        started = time.perf_counter()
        try:
            headers = self._headers(call.headers, call.request_id)
            reply = await self._send(self._session, path, headers, body)
        except ServiceError:
            self._breaker.record(failed=True)
            raise
        self._breaker.record(failed=reply.status in DOWN)
        seconds = time.perf_counter() - started
        self._metrics.stage_seconds["upstream"].observe(seconds)
        if reply.status != HTTPStatus.OK:
            raise self._refusal(reply, same_protocol)
        complete = len(texts) == len(call.request.texts)
        passthrough = same_protocol and complete and call.protocol.passthrough
        scores = self._scores(self.protocol, call, reply, len(texts), passthrough)
        return Classified(scores, [{"upstream": seconds}], reply=reply if passthrough else None)

    async def scores(self, texts: Sequence[str]) -> list[list[Score]]:
        """Return scores of texts of the service's own.

        They take a connection of the callers' pool: a probe must not wait for them.

        Raises:
            Incomparable: they are not of the bundle's classes.
            ServiceError: as from `classify`. The circuit breaker is not told: a probe says more.
        """
        protocol = self.protocol
        if protocol is None:
            raise NotReady("the upstream has not answered yet")
        self._require_closed()
        reply = await self._ask(self._session, protocol, texts, "parity")
        if reply.status != HTTPStatus.OK:
            raise self._refusal(reply, same_protocol=False)
        known = self._model_info
        try:
            protocol.check(reply.body, len(texts))
        except BadAnswer as error:
            raise self._unusable(error) from None
        try:
            scores = protocol.scores(
                reply.body, len(texts), known.labels, multi_label=known.multi_label
            )
            _check_labels(scores, known.labels, complete=False)
        except BadAnswer as error:
            raise Incomparable(str(error)) from None
        return scores

    async def metadata(self, path: str) -> dict[str, Any] | None:
        """Return the metadata at a path of an upstream that speaks Open Inference.

        Raises:
            ServiceError: as from `classify`. The circuit breaker is not told: metadata say nothing
                of whether the upstream classifies.
        """
        if not isinstance(self.protocol, OpenInference):
            return None
        self._require_closed()
        reply = await self._send(self._session, path, CIMultiDict(), b"", "GET")
        if reply.status != HTTPStatus.OK:
            raise self._refusal(reply, same_protocol=True)
        try:
            return parsed(METADATA, reply.body)
        except BadAnswer as error:
            raise self._unusable(error) from None

    def _require_closed(self) -> None:
        if self._breaker.open:
            self._count("open")
            raise UpstreamDown("the upstream is down", math.ceil(self._settings.upstream_retry_s))

    def _body(self, protocol: WireProtocol, call: Call, texts: Sequence[str]) -> bytes:
        if protocol.request_type is not type(call.request):
            request = protocol.build_request(texts, self._model_info)
        elif call.request.forward_as_is and texts == call.request.texts:
            return call.body
        else:
            request = call.request.with_texts(texts)
        return request.model_dump_json(exclude_none=True).encode()

    def _headers(
        self, received: Sequence[tuple[bytes, bytes]], request_id: str
    ) -> CIMultiDict[str]:
        """Return the caller's end-to-end headers, and those that the gateway sets."""
        pairs = [(k.decode("latin-1").lower(), v.decode(errors="replace")) for k, v in received]
        kept = [(name, value) for name, value in pairs if not is_ambiguous(name)]
        headers = CIMultiDict(_end_to_end(kept, NOT_FORWARDED))
        headers["content-type"] = "application/json"
        headers["accept-encoding"] = "identity"
        headers["x-request-id"] = request_id
        if secret := self._settings.upstream_authorization:
            headers["authorization"] = secret.get_secret_value()
        return headers

    def _scores(
        self, protocol: WireProtocol, call: Call, reply: Reply, count: int, passthrough: bool
    ) -> list[list[Score]]:
        """Return the scores of a reply; only check them if it is passed on unchanged."""
        try:
            if passthrough:
                protocol.check(reply.body, count)
                return []
            known = self._model_info
            scores = protocol.scores(reply.body, count, known.labels, multi_label=known.multi_label)
            if protocol.request_type is not type(call.request):
                _check_labels(scores, self._model_info.labels, call.protocol.requires_all_scores)
            return scores
        except BadAnswer as error:
            raise self._unusable(error) from None

    def _unusable(self, error: BadAnswer) -> UpstreamFailed:
        self._count("answer")
        log.error("the upstream's answer cannot be used: %s", error)
        return UpstreamFailed("the upstream's answer cannot be used; see the log")

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        protocol: WireProtocol,
        texts: Sequence[str],
        request_id: str,
    ) -> Reply:
        """Have the upstream classify texts of the service's own, as `_send` does."""
        request = protocol.build_request(texts, self._model_info)
        body = request.model_dump_json(exclude_none=True).encode()
        path = protocol.path(self._model_info.model)
        return await self._send(session, path, self._headers((), request_id), body)

    async def _send(
        self,
        session: aiohttp.ClientSession,
        path: str,
        headers: CIMultiDict[str],
        body: bytes,
        method: str = "POST",
    ) -> Reply:
        """Return the upstream's answer, of any status, and count failures."""
        try:
            reply = await self._exchange(session, method, path, headers, body)
        except TimeoutError:
            self._count("timeout")
            seconds = self._settings.upstream_timeout_s
            raise TimedOut(f"the upstream did not answer within {seconds} s") from None
        except aiohttp.ClientConnectorError as error:
            self._count("connect")
            raise UpstreamFailed("the upstream cannot be reached") from error
        except BadAnswer as error:
            raise self._unusable(error) from None
        except aiohttp.ClientError as error:
            self._count("broken")
            raise UpstreamFailed("the connection to the upstream broke off") from error
        if reply.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self._count("status")
        return reply

    async def _exchange(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        headers: CIMultiDict[str],
        body: bytes,
    ) -> Reply:
        """Send a request; retry only if no connection was made, when nothing can have been sent."""
        for tries_left in reversed(range(CONNECT_TRIES)):
            try:
                async with session.request(
                    method,
                    self._base + path,
                    data=io.BytesIO(body) if body else None,
                    headers=headers,
                    allow_redirects=False,
                ) as response:
                    content = await _read_limited(response)
                    pairs = [(k.lower(), v) for k, v in response.headers.items()]
                    return Reply(response.status, _end_to_end(pairs, NOT_RETURNED), content)
            except aiohttp.ClientConnectorError:
                if not tries_left:
                    raise
        raise AssertionError("the last try returns or raises")

    def _refusal(self, reply: Reply, same_protocol: bool) -> ServiceError:
        """Return the error for a status other than 200."""
        detail = f"the upstream answered with HTTP {reply.status}"
        if reply.status == HTTPStatus.TOO_MANY_REQUESTS:
            return Overloaded("upstream", _retry_after(reply))
        if reply.status == HTTPStatus.SERVICE_UNAVAILABLE:
            return UpstreamDown(detail, _retry_after(reply))
        if same_protocol and 400 <= reply.status < 500:
            return UpstreamRefused(detail, reply.status, reply.headers, reply.body)
        if reply.status in (400, 413, 422):
            return Invalid(detail)
        return UpstreamFailed(detail)

    async def _watch(self) -> None:
        while True:
            await self._breaker.suspected.wait()
            await self._probe()
            await asyncio.sleep(self._settings.upstream_retry_s)

    async def _probe(self) -> None:
        """Tell the circuit breaker whether the upstream answers."""
        first = self.protocol is None
        try:
            answers = await self._answers()
        except Exception as error:
            # Only place and type: the message may quote anything. A bug must not end the watch.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("bug", extra={"error": type(error).__name__, "where": where})
            answers = False
        if answers and (first or self._breaker.open):
            self.back.set()
        self._breaker.probed(answers)

    async def _answers(self) -> bool:
        """Have the upstream classify a text; the first time, find out its protocol."""
        failures = []
        for protocol in self._candidates if self.protocol is None else [self.protocol]:
            try:
                reply = await self._ask(self._probe_session, protocol, ["warm up"], PROBE_ID)
                if reply.status == HTTPStatus.OK:
                    protocol.check(reply.body, 1)
                    if self._model_info.multi_label and protocol.why_no_multi_label:
                        failures.append(protocol.why_no_multi_label)
                        break  # it may answer in other protocols too, and no better
                    self.max_length = await self._ask_max_length(protocol)
                    self.protocol = protocol
                    known = {"protocol": protocol.name, "max_length": self.max_length}
                    log.info("upstream answers", extra=known)
                    return True
                if reply.status == HTTPStatus.TOO_MANY_REQUESTS and self.protocol:
                    return True  # it is busy, not down
                failures.append(f"{protocol.name}: HTTP {reply.status}")
            except BadAnswer as error:
                failures.append(f"{protocol.name}: {error}")
            except ServiceError as error:
                failures.append(f"{protocol.name}: {error}")
                break  # it cannot be reached, in any protocol
        log.warning("the upstream has no answer yet: %s", "; ".join(failures))
        return False

    async def _ask_max_length(self, protocol: WireProtocol) -> int | None:
        """Return after how many tokens the upstream cuts a text, if it tells.

        Raises:
            UpstreamFailed: there is no answer, so the limit may be told later.
            BadAnswer: the limit cannot be read.
        """
        if protocol.limit_path is None:
            return None
        headers = self._headers((), PROBE_ID)
        try:
            reply = await self._exchange(
                self._probe_session, "GET", protocol.limit_path, headers, b""
            )
        except (TimeoutError, aiohttp.ClientError):
            raise UpstreamFailed(f"no answer at {protocol.limit_path}") from None
        if reply.status != HTTPStatus.OK:
            return None
        return protocol.max_length(reply.body, self._model_info.model)

    def _count(self, kind: str) -> None:
        self._metrics.upstream_errors[kind].inc()


def _end_to_end(
    headers: Sequence[tuple[str, str]], dropped: frozenset[str]
) -> list[tuple[str, str]]:
    """Return the headers for the next hop (RFC 9110, section 7.6.1), less the dropped ones."""
    hop_by_hop = {
        name.strip().lower()
        for key, value in headers
        if key == "connection"
        for name in value.split(",")
    }
    return [
        (key, value)
        for key, value in headers
        if key not in dropped and key not in hop_by_hop and not key.startswith(OWN_PREFIX)
    ]


def _check_labels(scores: Sequence[Sequence[Score]], labels: Sequence[str], complete: bool) -> None:
    for row in scores:
        found = {score.label for score in row}
        if not found <= set(labels):
            raise BadAnswer(f"its classes are not those of the bundle, {', '.join(labels)}")
        if complete and len(found) < len(labels):
            raise BadAnswer("it does not give a score for every class")


async def _read_limited(response: aiohttp.ClientResponse) -> bytes:
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise BadAnswer("a compressed answer, which was not asked for")
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > MAX_BYTES:
            raise BadAnswer(f"an answer of over {MAX_BYTES} bytes")
    return bytes(content)


def _retry_after(reply: Reply) -> int:
    """Return the seconds that the upstream asks for, of any number of digits, within an hour."""
    value = dict(reply.headers).get("retry-after", "")
    return (int(min(float(value), 3600)) or 1) if value.isascii() and value.isdigit() else 1
