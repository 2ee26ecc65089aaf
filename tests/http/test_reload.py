"""Reloading real bundles on running servers: nobody notices, and what is broken is not served."""

import asyncio
import json
import os
import shutil
import signal
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Route
from transformers import PreTrainedTokenizerBase

from models.bundle.layout import ADAPTER_WEIGHTS, MANIFEST
from models.bundle.load import Bundle, load_bundle
from service.app import create_app
from service.settings import Settings
from tests.support.bundles import fit_tiny
from tests.support.fakes import FakeEngine, fake_bundle
from tests.support.families import tiny_victim
from tests.support.requests import CLEAN, lifespan, metric
from tests.support.servers import free_port, served, serving
from tests.support.upstreams import Peer
from tests.support.waiting import until, wait_for

LABELS = {"a": ["bad", "fair", "good"], "b": ["news", "sport", "weather"]}


@dataclass
class Bundles:
    """Two real bundles, and a link that leads to one of them, as an operator would have it."""

    folder: Path
    link: Path

    def show(self, name: str) -> None:
        """Have the link lead to a bundle, from one moment to the next."""
        fresh = self.link.with_name("fresh")
        fresh.symlink_to(self.folder / name)
        fresh.replace(self.link)

    def digest(self, name: str) -> str:
        return load_bundle(self.folder / name).digest


@pytest.fixture(scope="module")
def both(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("both")
    for seed, (name, labels) in enumerate(LABELS.items()):
        victim = tiny_victim("bert", seed)
        victim.config.id2label = dict(enumerate(labels))
        fit_tiny(victim, tokenizer, folder / name)
    shutil.copytree(folder / "b", folder / "broken")
    alter_a_weight(folder / "broken")
    return folder


@pytest.fixture
def bundles(both: Path, tmp_path: Path) -> Bundles:
    found = Bundles(both, tmp_path / "current")
    found.show("a")
    return found


def app_of(bundles: Bundles, **changes: Any) -> FastAPI:
    """Return an application in shadow mode: random weights find anything suspicious."""
    return create_app(Settings(bundle=bundles.link, mode="shadow", admin=True, **changes))


def reload(client: httpx.Client) -> httpx.Response:
    return client.post("/admin/reload", timeout=60)


def rows(client: httpx.Client, name: str) -> list[str]:
    return [row for row in client.get("/metrics").text.splitlines() if row.startswith(name)]


def test_under_load_every_request_is_answered_by_the_old_bundle_or_the_new(
    bundles: Bundles,
) -> None:
    digests = {bundles.digest(name): name for name in LABELS}
    done = threading.Event()
    answers: list[tuple[int, str, set[str]]] = []

    def ask(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not done.is_set():
                answer = client.post("/classify", json={"inputs": [CLEAN, "a quiet bad film"]})
                found = answer.json()
                labels = {s["label"] for r in found["results"] for s in r["scores"]}
                answers.append((answer.status_code, found["bundle"], labels))

    with serving(app_of(bundles)) as address, ThreadPoolExecutor(6) as pool:
        url = f"http://{address}"
        with httpx.Client(base_url=url) as client:
            callers = [pool.submit(ask, url) for _ in range(6)]
            try:
                for name, serves in (("b", "b"), ("broken", "b"), ("a", "a"), ("b", "b")):
                    more = len(answers) + 20
                    wait_for(partial(_longer, answers, more))
                    bundles.show(name)
                    answer = reload(client)
                    assert answer.status_code == (200 if name == serves else 422), answer.text
                    after = client.post("/classify", json={"inputs": CLEAN}).json()
                    assert digests[after["bundle"]] == serves
            finally:
                done.set()
            for caller in callers:
                caller.result(60)
            assert rows(client, "psim_reloads_total{") == [
                'psim_reloads_total{outcome="done"} 3.0',
                'psim_reloads_total{outcome="failed"} 1.0',
            ]
            (info,) = rows(client, "psim_bundle_info{")
            assert bundles.digest("b") in info
            thresholds = " ".join(rows(client, "psim_threshold{"))
            assert "news" in thresholds
            assert "good" not in thresholds
            wait_for(lambda: rows(client, "psim_queue_inputs{")[0].endswith(" 0.0"))
    assert {status for status, _, _ in answers} == {200}
    assert {digest for _, digest, _ in answers} == set(digests)
    assert all(labels == set(LABELS[digests[digest]]) for _, digest, labels in answers)


def _longer(found: list[Any], than: int) -> bool:
    return len(found) > than


def alter_a_weight(bundle: Path) -> None:
    file = bundle / "psim" / ADAPTER_WEIGHTS
    file.write_bytes(file.read_bytes()[:-1] + b"x")


def raise_a_threshold(bundle: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["calibrations"][0]["groups"][0]["threshold"] += 5
    (bundle / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (alter_a_weight, "was altered: its SHA-256 is not the manifest's"),
        (raise_a_threshold, "a threshold is not what its calibration texts give"),
        (shutil.rmtree, "is not a bundle"),
    ],
)
def test_what_is_broken_is_not_served_and_said_to_be_so(
    damage: Callable[[Path], None],
    says: str,
    bundles: Bundles,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(bundles.folder / "b", broken)
    damage(broken)
    with serving(app_of(bundles)) as address, httpx.Client(base_url=f"http://{address}") as client:
        before = rows(client, "psim_bundle_info{") + rows(client, "psim_threshold{")
        bundles.link.unlink()
        bundles.link.symlink_to(broken)
        answer = reload(client)
        assert (answer.status_code, answer.json()["code"]) == (422, "reload_failed")
        assert answer.headers["content-type"] == "application/problem+json"
        assert says in answer.json()["detail"]
        answer = client.post("/classify", json={"inputs": CLEAN})
        assert (answer.status_code, answer.json()["bundle"]) == (200, bundles.digest("a"))
        assert rows(client, "psim_bundle_info{") + rows(client, "psim_threshold{") == before
        assert 'psim_reloads_total{outcome="failed"} 1.0' in rows(client, "psim_reloads_total{")
        assert client.get("/ready").status_code == 200
        bundles.show("b")
        assert reload(client).status_code == 200
        answer = client.post("/classify", json={"inputs": CLEAN})
        assert answer.json()["bundle"] == bundles.digest("b")
    assert "the reload failed" in caplog.text


def test_the_memory_of_what_was_replaced_is_free_again(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []

    def load(*arguments: Any, **options: Any) -> Bundle:
        bundle = load_bundle(*arguments, **options)
        loaded.extend(map(weakref.ref, (bundle, bundle.engine, bundle.screen)))
        return bundle

    monkeypatch.setattr("service.app.load_bundle", load)
    with serving(app_of(bundles)) as address, httpx.Client(base_url=f"http://{address}") as client:
        client.post("/classify", json={"inputs": CLEAN})
        client.post("/explain", json={"inputs": CLEAN})
        threads = threading.active_count()
        assert reload(client).status_code == 200
        wait_for(lambda: not any(one() for one in loaded[:3]))
        assert all(one() for one in loaded[3:])
        inference = [t for t in threading.enumerate() if t.name == "inference"]
        assert len(inference) == 1, "the old worker runs on"
        assert threading.active_count() <= threads + 1  # a thread of the pool


def test_the_admin_s_routes_are_there_only_if_a_setting_says_so(bundles: Bundles) -> None:
    with (
        serving(create_app(Settings(bundle=bundles.link))) as address,
        httpx.Client(base_url=f"http://{address}") as client,
    ):
        assert reload(client).status_code == 404
        assert not [path for path in client.get("/openapi.json").json()["paths"] if "admin" in path]


@pytest.mark.slow
def test_a_real_process_reloads_its_file_of_models_on_sighup(
    bundles: Bundles, tmp_path: Path
) -> None:
    def entry(name: str, bundle: str, *more: str) -> str:
        path = json.dumps(str(bundles.folder / bundle))
        return "\n".join(["[[models]]", f'name = "{name}"', f"bundle = {path}", *more, ""])

    file = tmp_path / "models.toml"
    challenger = f"challenger = {json.dumps(str(bundles.folder / 'b'))}"
    file.write_text(entry("mood", "a", challenger) + entry("topic", "b", 'mode = "flag"'))
    with served(Path("unused"), MODELS=str(file), MODE="shadow") as client:
        pid = int(client.headers["x-server-pid"])

        def labels(model: str) -> list[str]:
            tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [CLEAN]}
            answer = client.post(f"/v2/models/{model}/infer", json={"inputs": [tensor]})
            assert answer.status_code == 200, answer.text
            (label,) = answer.json()["outputs"][0]["data"]
            scored = client.post(f"/for/{model}/classify", json={"inputs": CLEAN}).json()
            (result,) = scored["results"]
            assert result["label"] == label
            return sorted(score["label"] for score in result["scores"])

        assert (labels("mood"), labels("topic")) == (LABELS["a"], LABELS["b"])
        assert client.get("/for/topic/info").json()["mode"] == "flag"
        assert client.get("/for/mood/info").json()["challenger"] == bundles.digest("b")
        compared = 'psim_challenger_score_count{model="mood"} 2.0'
        wait_for(lambda: compared in client.get("/metrics").text)

        file.write_text(entry("topic", "b", 'moed = "flag"'))
        os.kill(pid, signal.SIGHUP)
        wait_for(lambda: 'psim_reloads_total{outcome="failed"} 1.0' in client.get("/metrics").text)
        assert (labels("mood"), labels("topic")) == (LABELS["a"], LABELS["b"])

        file.write_text(entry("topic", "a") + entry("third", "b"))
        os.kill(pid, signal.SIGHUP)
        wait_for(lambda: client.get("/info").json()["models"] == ["topic", "third"], 60)
        assert (labels("topic"), labels("third")) == (LABELS["a"], LABELS["b"])
        assert client.get("/for/topic/info").json()["mode"] == "shadow"
        assert client.get("/v2/models/mood").status_code == 404
        metrics = client.get("/metrics").text
        assert 'model="mood"' not in metrics
        assert 'psim_ready{model="third"} 1.0' in metrics


# With fake engines, where a test must say when something happens.


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with lifespan(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


def load_in_turn(monkeypatch: pytest.MonkeyPatch, *bundles: Bundle) -> None:
    """Have each loading give the next one of the bundles."""
    waiting = list(bundles)
    monkeypatch.setattr("service.app.load_bundle", lambda *_, **__: waiting.pop(0))


OLD, NEW = "d" * 64, "e" * 64


async def test_a_request_in_flight_ends_on_the_old_model(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    load_in_turn(monkeypatch, fake_bundle(engine), fake_bundle(digest=NEW))
    app = create_app(Settings(bundle=Path("unused"), admin=True))
    async with client_of(app) as client:
        engine.gate.clear()
        first = asyncio.create_task(client.post("/classify", json={"inputs": CLEAN}))
        await until(lambda: engine.waits)
        assert (await client.post("/admin/reload")).status_code == 200
        fresh = await client.post("/classify", json={"inputs": CLEAN})
        assert fresh.json()["bundle"] == NEW
        assert await metric(client, "psim_queue_inputs") == 1
        assert not first.done()
        engine.gate.set()
        answer = await first
        assert (answer.status_code, answer.json()["bundle"]) == (200, OLD)
        assert await metric(client, "psim_queue_inputs") == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # a program
        ({"sec-fetch-site": "same-origin", "origin": "http://test"}, 200),
        ({"origin": "http://test"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "cross-site", "origin": "http://test"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://test:81"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"origin": "http://["}, 403),
    ],
)
async def test_no_page_of_another_site_can_make_a_browser_reload(
    headers: dict[str, str], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_in_turn(monkeypatch, fake_bundle(), fake_bundle(digest=NEW))
    async with client_of(create_app(Settings(bundle=Path("unused"), admin=True))) as client:
        answer = await client.post("/admin/reload", headers=headers)
        assert answer.status_code == status
        assert status == 200 or answer.json()["code"] == "cross_site"
        served = await client.post("/classify", json={"inputs": CLEAN})
        assert served.json()["bundle"] == (NEW if status == 200 else OLD)


async def test_only_one_reload_runs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = FakeEngine()
    load_in_turn(monkeypatch, fake_bundle(), fake_bundle(slow, digest=NEW), fake_bundle())
    app = create_app(Settings(bundle=Path("unused"), admin=True))
    async with client_of(app) as client:
        slow.gate.clear()
        first = asyncio.create_task(client.post("/admin/reload"))
        await until(lambda: slow.waits)
        second = await client.post("/admin/reload")
        assert (second.status_code, second.json()["code"]) == (409, "reload_running")
        between = await client.post("/classify", json={"inputs": CLEAN})
        assert between.json()["bundle"] == OLD, "served before it was tried"
        slow.gate.set()
        assert (await first).json() == {"bundles": {"fake": NEW}}
        assert (await client.post("/admin/reload")).json() == {"bundles": {"fake": OLD}}


async def test_a_model_that_does_not_stand_its_trial_is_not_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dying = FakeEngine()
    dying.dies = True
    load_in_turn(monkeypatch, fake_bundle(), fake_bundle(dying, digest=NEW))
    app = create_app(Settings(bundle=Path("unused"), admin=True, restarts=0))
    async with client_of(app) as client:
        threads = threading.active_count()
        answer = await client.post("/admin/reload")
        assert (answer.status_code, answer.json()["code"]) == (422, "reload_failed")
        assert "the inference worker" in answer.json()["detail"]
        again = await client.post("/admin/reload")  # there is no third bundle
        assert again.json()["detail"] == "nothing was changed: IndexError; the log says where"
        answer = await client.post("/classify", json={"inputs": CLEAN})
        assert (answer.status_code, answer.json()["bundle"]) == (200, OLD)
        assert threading.active_count() <= threads + 1  # a thread of the pool


async def test_the_upstream_is_let_go_and_one_that_is_down_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind = Starlette(routes=[Route("/predict", Peer().answer, methods=["POST"])])
    config = uvicorn.Config(behind, port=0, log_config=None, timeout_keep_alive=60)
    upstream = uvicorn.Server(config)
    running = asyncio.create_task(upstream.serve())
    await until(lambda: upstream.started)
    port = upstream.servers[0].sockets[0].getsockname()[1]
    connections = upstream.server_state.connections

    def entry(port: int) -> str:
        protocol = 'upstream_protocol = "tei"'
        where = f'bundle = "x"\nupstream = "http://127.0.0.1:{port}"'
        return f'[[models]]\nname = "m"\n{where}\n{protocol}\n'

    file = tmp_path / "models.toml"
    file.write_text(entry(port))
    monkeypatch.setattr("service.app.load_bundle", lambda *_, **__: fake_bundle())
    try:
        async with client_of(create_app(Settings(models=file, admin=True))) as client:
            (old,) = connections
            assert (await client.post("/admin/reload")).status_code == 200
            await until(lambda: old not in connections)
            assert len(connections - {old}) == len(connections) == 1

            file.write_text(entry(free_port()))
            answer = await client.post("/admin/reload")
            assert answer.status_code == 422
            assert answer.json()["detail"] == "nothing was changed: m: the upstream is down"
            answer = await client.post("/predict", json={"inputs": [[CLEAN]]})
            assert answer.status_code == 200
            inference = [t for t in threading.enumerate() if t.name == "inference"]
            assert len(inference) == 1, "the worker of what was not taken runs on"
    finally:
        upstream.should_exit = upstream.force_exit = True
        await running
