"""Limits of inputs by key: in one process, and shared by replicas in a real Redis."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from limits import parse

from models.errors import PsimError
from service.errors import RateLimited, TooLarge
from service.observability.metrics import Metrics
from service.security import rate_limit as limits
from service.security.keys.file import Scope
from service.security.rate_limit import Limiter
from service.settings import Settings
from tests.support.databases import redis
from tests.support.fakes import MAX_LENGTH, FakeEngine
from tests.support.keys import FEW, KEY, bearer, classify, guarded, keys_file
from tests.support.protocols import ASKED, ERRORS
from tests.support.requests import CLEAN
from tests.support.servers import free_port

TEN = parse("10/day")


async def sample(client: httpx.AsyncClient, name: str) -> float:
    answer = await client.get("/metrics", headers=bearer(KEY[Scope.METRICS]))
    (line,) = [row for row in answer.text.splitlines() if row.startswith(f"{name} ")]
    return float(line.rsplit(" ", 1)[1])


@pytest.mark.parametrize("name", ASKED)
async def test_inputs_are_counted_and_too_many_are_told_so_in_their_protocol(
    name: str, tmp_path: Path
) -> None:
    engine = FakeEngine()
    async with guarded(tmp_path, engine=engine) as client:
        path, body, _ = ASKED[name]
        warm_up = len(engine.screened)
        for texts in (6, 4):
            answer = await client.post(path, json=body([CLEAN] * texts), headers=bearer(FEW))
            assert answer.status_code == 200
        answer = await client.post(path, json=body([CLEAN] * 2), headers=bearer(FEW))
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["retry-after"]) <= 86400
        assert "10 per 1 day" in ERRORS[name](answer.json())
        assert len(engine.screened) == warm_up + 10
        answer = await client.post(path, json=body([CLEAN] * 11), headers=bearer(FEW))
        assert answer.status_code == 413, "waiting would not help"
        assert await sample(client, "psim_rate_limited_passes_total") == 2
        others = bearer(KEY[Scope.CLASSIFY])
        assert (await client.post(path, json=body([CLEAN]), headers=others)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "passes"),
    [
        ("/screen", lambda text: {"inputs": text}, 1),
        ("/explain", lambda text: {"inputs": text}, 2),  # the text, and the text without its word
        ("/envoy/classify", lambda text: {"inputs": text}, 1),
        # Texts of conversations that were seen before take no pass.
        ("/beta/litellm_basic_guardrail_api", lambda text: {"texts": [text]}, 1),
    ],
)
async def test_no_route_is_a_way_around_the_limit(
    path: str, body: Callable[[str], Any], passes: int, tmp_path: Path
) -> None:
    async with guarded(tmp_path) as client:
        assert (await classify(client, 10 - passes)).status_code == 200
        answers = [
            await client.post(path, json=body(text), headers=bearer(FEW))
            for text in ("film", "room")
        ]
        assert await sample(client, "psim_rate_limited_passes_total") == 1
        outcome = f'psim_requests_total{{outcome="client_error",route="{answers[1].url.path}"}}'
        if "envoy" not in path:
            assert await sample(client, outcome) == 1
        found = [answer.status_code for answer in answers]
    assert found == [200, 429]


async def test_a_text_costs_as_many_passes_as_it_has_windows(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with guarded(tmp_path, engine=engine) as client:
        warm_up = len(engine.screened)
        body = {"inputs": "film " * 20 * MAX_LENGTH}
        path = "/envoy/classify"
        others = bearer(KEY[Scope.CLASSIFY])
        assert (await client.post(path, json=body, headers=others)).status_code == 200
        passes = len(engine.screened) - warm_up
        assert passes > 20
        for _ in range(3):
            answer = await client.post(path, json=body, headers=bearer(FEW))
            assert answer.status_code in (413, 429), answer.text
            assert "10 per 1 day" in answer.json()["detail"]
        assert len(engine.screened) - warm_up - passes <= 10, "no pass is run before it is paid"
        assert (await client.post(path, json=body, headers=others)).status_code == 200


async def test_a_request_that_costs_more_than_its_key_ever_has_is_told_so(tmp_path: Path) -> None:
    limiter, rate = Limiter(None, Metrics()), parse("10/second")
    with pytest.raises(TooLarge, match="11 passes"):
        await limiter.take("a", rate, 3, before=8)
    await limiter.take("a", rate, 2, before=8)


async def test_an_explanation_costs_its_passes(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with guarded(tmp_path, engine=engine) as client:
        warm_up = len(engine.screened)
        body = {"inputs": " ".join(f"word{i}" for i in range(MAX_LENGTH - 1)) + " mn"}
        answer = await client.post("/explain", json=body, headers=bearer(FEW))
        assert answer.status_code == 413, answer.text
        assert len(engine.screened) - warm_up <= 10
        assert await sample(client, "psim_rate_limited_passes_total") == 0, "it is too large"


async def test_what_there_is_no_rate_to_sanitize_stays_rejected(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with guarded(tmp_path, engine=engine, mode="sanitize") as client:
        warm_up = len(engine.screened)
        texts = [CLEAN, " ".join(f"word{i}" for i in range(MAX_LENGTH - 1)) + " mn"]
        answer = await client.post("/classify", json={"inputs": texts}, headers=bearer(FEW))
        decisions = [result["decision"] for result in answer.json()["results"]]
        assert decisions == ["allow", "reject"]
        assert len(engine.screened) - warm_up <= 10
        others = bearer(KEY[Scope.CLASSIFY])
        answer = await client.post("/classify", json={"inputs": texts}, headers=others)
        assert answer.json()["results"][1]["decision"] == "sanitize"


async def test_who_waits_as_told_gets_in(tmp_path: Path) -> None:
    limiter = Limiter(None, Metrics())
    rate = parse("3/second")
    await limiter.take("a", rate, 3)
    with pytest.raises(RateLimited) as caught:
        await limiter.take("a", rate, 1)
    await limiter.take("b", rate, 3)
    await asyncio.sleep(caught.value.retry_after_s)
    await limiter.take("a", rate, 1)
    with pytest.raises(TooLarge):
        await limiter.take("a", rate, 4)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    port = free_port()
    with redis(port, tmp_path_factory.mktemp("redis") / "log") as process:
        yield f"redis://127.0.0.1:{port}/0", process


async def test_replicas_share_a_limit_in_redis(shared: tuple[str, Any], tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        replicas = [
            await stack.enter_async_context(guarded(tmp_path, limits_url=shared[0]))
            for _ in range(2)
        ]
        answers = [await classify(replicas[i % 2], 4) for i in range(4)]
        for replica in replicas:
            assert await sample(replica, "psim_limits_failures_total") == 0
        found = [answer.status_code for answer in answers]
    assert found == [200, 200, 429, 429]


async def test_a_redis_that_hangs_or_is_gone_slows_nothing_and_each_replica_counts_for_itself(
    shared: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PAUSE_S", 0.3)
    url, process = shared

    metrics = Metrics()
    first, second = Limiter(url, metrics), Limiter(url, metrics)
    clock = asyncio.get_running_loop().time
    await first.take("hanging", TEN, 10)
    process.send_signal(signal.SIGSTOP)
    started = clock()
    await second.take("hanging", TEN, 10)
    assert 0.2 < clock() - started < 2
    started = clock()
    for _ in range(20):
        with pytest.raises(RateLimited):
            await second.take("hanging", TEN, 10)
    assert clock() - started < 1, "it is left alone for a while"
    assert metrics.limits_failures._value.get() == 1
    process.send_signal(signal.SIGCONT)
    await asyncio.sleep(0.4)  # the pause is over
    third = Limiter(url, metrics)
    for limiter in (first, second, third):
        with pytest.raises(RateLimited):
            await limiter.take("hanging", TEN, 1)
        await limiter.take("again", TEN, 3)
    with pytest.raises(RateLimited):
        await first.take("again", TEN, 2)
    assert metrics.limits_failures._value.get() == 1
    for limiter in (first, second, third):
        await limiter.close()

    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    async with guarded(tmp_path, limits_url=nowhere) as client:
        statuses = [(await classify(client, 4)).status_code for _ in range(4)]
        assert statuses == [200, 200, 429, 429]
        assert await sample(client, "psim_limits_failures_total") == 1


@pytest.mark.parametrize("url", ["http://localhost", "redis://user:secret@host:port", "nonsense"])
def test_a_url_that_is_none_of_redis_is_refused_and_not_quoted(url: str, tmp_path: Path) -> None:
    with pytest.raises(PsimError, match="PSIM_LIMITS_URL") as caught:
        Limiter(url, Metrics())
    assert "secret" not in str(caught.value)


def test_limits_without_keys_are_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PSIM_LIMITS_URL needs PSIM_KEYS"):
        Settings(bundle=tmp_path, limits_url="redis://localhost")
    Settings(bundle=tmp_path, limits_url="redis://localhost", keys=keys_file(tmp_path))
