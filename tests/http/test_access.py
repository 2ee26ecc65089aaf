"""API keys: who gets in where, what nobody gets to see of a key, and what a key keeps from view."""

import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi.routing import iter_route_contexts
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import SecretStr

from service.app import create_app
from service.audit.store import AuditStore
from service.observability.metrics import Metrics
from service.observability.traces import open_provider
from service.protocols.registry import PREFIX
from service.security.access import OPEN, SCOPES, Access
from service.security.keys.file import Keys, KeysError, Scope, hash_of
from service.security.rate_limit import Limiter
from service.settings import Mode, Settings
from tests.support.fakes import FakeEngine, fake_bundle
from tests.support.keys import BLIND, FEW, KEY, bearer, classify, guarded, keys_file
from tests.support.protocols import ASKED, ERRORS, GUARDRAIL
from tests.support.requests import CLEAN, POISONED, client_of, lifespan
from tests.support.upstreams import ONE_TEI, Peer, behind


def every_route(folder: Path) -> list[tuple[str, str]]:
    """Return method and path of all that is served."""
    app = create_app(Settings(bundle=folder, keys=keys_file(folder), admin=True), fake_bundle())
    found = [(route.methods, route.path) for route in iter_route_contexts(app.routes)]
    assert all(path is not None for _, path in found), "something is mounted: test it too"
    return [(sorted(methods)[0], path) for methods, path in found if methods and path]


async def test_every_route_has_a_scope_and_keeps_to_it(tmp_path: Path) -> None:
    """The table is asked, and so is the service: it is what counts."""

    async with guarded(tmp_path) as client:
        routes = every_route(tmp_path)
        assert {"/classify", "/metrics", "/docs"} <= {path for _, path in routes}
        found = {path.removeprefix(PREFIX) for _, path in routes}
        # /replicas is there on Ray Serve only: test_ray_serve.py.
        assert found | {"/replicas"} == set(SCOPES), "each route, and nothing else"
        for method, path in routes:
            scope = SCOPES[path.removeprefix(PREFIX)]
            url = path.replace("{model}", "fake").replace("{name}", "fake").replace(":path", "")
            if scope is OPEN:
                answer = await client.request(method, url)
                assert answer.status_code not in (401, 403), path
                continue
            for headers in ({}, bearer("psim_unknown"), {"authorization": KEY[scope]}):
                answer = await client.request(method, url, headers=headers)
                assert answer.status_code == 401, path
                assert answer.headers["www-authenticate"] == 'Bearer realm="psim"'
            for other, key in KEY.items():
                answer = await client.request(method, url, headers=bearer(key))
                denied = 'scope="' in answer.headers.get("www-authenticate", "")
                assert denied == (other is not scope), (path, other)
                assert answer.status_code == 403 or not denied


async def test_a_route_that_nobody_gave_a_scope_needs_admin(tmp_path: Path) -> None:
    app = create_app(Settings(bundle=tmp_path, keys=keys_file(tmp_path)), fake_bundle())

    @app.get("/new")
    async def new() -> str:
        return "secret"

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        keys = (KEY[Scope.CLASSIFY], KEY[Scope.ADMIN])
        found = [(await client.get("/new", headers=bearer(k))).status_code for k in keys]
    assert found == [403, 200]


@pytest.mark.parametrize("name", ASKED)
async def test_who_has_no_key_is_told_in_its_own_protocol_before_its_body_is_read(
    name: str, tmp_path: Path
) -> None:
    read = []

    async def body_of() -> AsyncIterator[bytes]:
        read.append(True)
        yield b"{}"

    engine = FakeEngine()
    async with guarded(tmp_path, engine=engine) as client:
        path, body, _ = ASKED[name]
        json_type = {"content-type": "application/json"}
        denied = await client.post(path, content=body_of(), headers=json_type)
        assert (denied.status_code, read) == (401, [])
        # `/classify` is vLLM's too, which only its body tells.
        told = "native" if path == "/classify" else name
        assert "API key" in ERRORS[told](denied.json())
        for headers in (
            bearer(KEY[Scope.CLASSIFY]),
            {"authorization": f"bearer  {KEY[Scope.CLASSIFY]}"},
            {"x-api-key": KEY[Scope.CLASSIFY]},
        ):
            passed = await client.post(path, json=body([CLEAN]), headers=headers)
            assert passed.status_code == 200
        metrics = bearer(KEY[Scope.METRICS])
        line = 'psim_denied_total{reason="key"} 1.0'
        assert line in (await client.get("/metrics", headers=metrics)).text.splitlines()


async def test_metrics_tell_who_was_refused_and_why(tmp_path: Path) -> None:
    async with guarded(tmp_path) as client:
        await client.post("/classify", json={"inputs": CLEAN})
        for _ in range(2):
            await client.get("/info", headers=bearer(KEY[Scope.METRICS]))
        answer = await client.get("/metrics", headers=bearer(KEY[Scope.METRICS]))
        lines = answer.text.splitlines()
    assert 'psim_denied_total{reason="key"} 1.0' in lines
    assert 'psim_denied_total{reason="scope"} 2.0' in lines
    assert "psim_keys_stale 0.0" in lines


async def test_no_key_reaches_the_upstream_and_what_is_none_of_ours_does(tmp_path: Path) -> None:
    ours, theirs = KEY[Scope.CLASSIFY], "Bearer for the upstream"

    peer = Peer()
    async with behind(peer, keys=keys_file(tmp_path)) as client:
        for sent, passed_on in (
            (bearer(ours), {}),
            ({"x-api-key": ours}, {}),
            ({"x-api-key": ours} | bearer(KEY[Scope.ADMIN]), {}),
            ({"x-api-key": ours, "authorization": theirs}, {"authorization": theirs}),
            ({"x-api-key": "theirs"} | bearer(ours), {"x-api-key": "theirs"}),
        ):
            answer = await client.post("/predict", json=ONE_TEI, headers=sent)
            assert answer.status_code == 200
            got = peer.asked[-1][1]
            assert {n: got[n] for n in ("authorization", "x-api-key") if n in got} == passed_on
            assert not any(key in str(got) for key in KEY.values())


async def test_a_proxy_asks_with_a_key_of_its_own_whatever_its_user_sends(tmp_path: Path) -> None:
    async with guarded(tmp_path) as client:
        user = {"authorization": "Bearer of the user"}
        proxy = {"x-api-key": KEY[Scope.CLASSIFY]}
        texts = {"texts": [CLEAN]}
        for path, body in (("/envoy/predict", ONE_TEI), (GUARDRAIL, texts)):
            assert (await client.post(path, json=body, headers=user)).status_code == 401
            answer = await client.post(path, json=body, headers=user | proxy)
            assert answer.status_code == 200


async def test_the_console_takes_the_key_as_a_password_that_browsers_ask_for(
    tmp_path: Path,
) -> None:
    metrics = Metrics()
    access = Access(Keys(keys_file(tmp_path)), Limiter(None, metrics), metrics)
    app = FastAPI()

    @app.get("/console")
    async def page(who: Annotated[str, Depends(access.console)]) -> str:
        return who

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        keys = (KEY[Scope.CONSOLE], KEY[Scope.CLASSIFY], "psim_unknown")
        answers = [await client.get("/console", auth=("anybody", key)) for key in keys]
        garbage = {"authorization": "Basic !"}
        answers = [*answers, *[await client.get("/console", headers=h) for h in (garbage, {})]]
    assert [answer.status_code for answer in answers] == [200, 403, 401, 401, 401]
    assert answers[0].json() == "console"
    assert answers[2].headers["www-authenticate"] == 'Basic realm="psim"'


async def test_log_audit_and_traces_know_the_name_and_never_the_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = InMemorySpanExporter()
    audit = f"sqlite:///{tmp_path / 'audit.db'}"
    settings = Settings(bundle=tmp_path, keys=keys_file(tmp_path), audit_url=SecretStr(audit))
    app = create_app(settings, fake_bundle(), open_provider(exporter))

    caplog.set_level(logging.DEBUG)
    transport = httpx.ASGITransport(app)
    async with lifespan(app), httpx.AsyncClient(transport=transport) as client:
        for key in (KEY[Scope.CLASSIFY], KEY[Scope.METRICS], "psim_unknown"):
            url = "http://test/classify"
            await client.post(url, json={"inputs": CLEAN}, headers=bearer(key))
    (line,) = [r for r in caplog.records if r.name == "psim.request"]
    assert line.__dict__["caller"] == "classify"
    (row,) = AuditStore(audit, read_only=True).read()
    assert row.caller == "classify"
    spans = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert "POST /classify" in spans
    kept = (tmp_path / "audit.db").read_bytes() + spans.encode()
    kept += str([r.__dict__ for r in caplog.records]).encode()
    assert not any(key.encode() in kept for key in (*KEY.values(), "psim_unknown"))


async def test_a_key_that_is_taken_out_of_the_file_is_good_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.security.keys.file.CHECK_S", 0.0)

    async with guarded(tmp_path) as client:

        async def status(key: str) -> int:
            answer = await client.get("/info", headers=bearer(key))
            return answer.status_code

        async def stale() -> bool:
            answer = await client.get("/metrics", headers=bearer(KEY[Scope.METRICS]))
            return "psim_keys_stale 1.0" in answer.text.splitlines()

        assert await status(KEY[Scope.CLASSIFY]) == 200
        path = tmp_path / "keys.toml"
        everything = path.read_text()
        path.write_text(everything.replace(hash_of(KEY[Scope.CLASSIFY]), hash_of("new")))
        assert [await status(key) for key in (KEY[Scope.CLASSIFY], "new")] == [401, 200]
        path.write_text("[keys.")
        assert await status("new") == 200, "who may stays in"
        assert await stale()
        path.unlink()
        assert await status("new") == 200
        other = tmp_path / "other.toml"
        other.write_text(everything)
        other.rename(path)
        assert [await status(key) for key in (KEY[Scope.CLASSIFY], "new")] == [200, 401]
        assert not await stale()


def test_the_file_is_not_looked_at_with_every_request(tmp_path: Path) -> None:
    now = 0.0
    path = keys_file(tmp_path)
    keys = Keys(path, lambda: now)
    path.write_text("")
    assert keys.find(FEW), "not a second later"
    now = 1.5
    assert keys.find(FEW) is None


HASH = hash_of("some key")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read"),
        ("[keys.a", "is not TOML"),
        (b"\xff", "is not UTF-8"),
        ("[kyes.a]", "kyes: Extra inputs"),
        ('[keys.a]\nsha256 = "psim_plain"\nscopes = ["classify"]', "keys.a.sha256"),
        (f'[keys.a]\nsha256 = "{HASH}"', "keys.a.scopes"),
        (f'[keys.a]\nsha256 = "{HASH}"\nscopes = []', "keys.a.scopes"),
        (f'[keys.a]\nsha256 = "{HASH}"\nscopes = ["clasify"]', "keys.a.scopes"),
        (f'[keys.a]\nsha256 = "{HASH}"\nscopes = ["admin"]\nrate = "often"', "keys.a.rate"),
        (f'[keys.a]\nsha256 = "{HASH}"\nscopes = ["admin"]\nscore = false', "keys.a.score"),
        (f'[keys."a b"]\nsha256 = "{HASH}"\nscopes = ["admin"]', "keys.a b"),
        (
            f'[keys.a]\nsha256 = "{HASH}"\nscopes = ["admin"]\n'
            f'[keys.b]\nsha256 = "{HASH}"\nscopes = ["classify"]',
            "two names",
        ),
    ],
)
def test_a_file_that_is_not_right_is_refused_at_the_start_and_never_quoted(
    content: str | bytes | None, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(KeysError, match=complaint) as caught:
        create_app(Settings(bundle=tmp_path, keys=path), fake_bundle())
    assert "psim_plain" not in str(caught.value)


def new_key(
    folder: Path, *arguments: str, command: Sequence[str] = ("service.security.keys",)
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", *command, "new", *arguments],
        env=os.environ | {"PSIM_KEYS": str(folder / "keys.toml")},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_command_makes_keys_that_open_and_leaves_only_hashes(tmp_path: Path) -> None:
    done = new_key(tmp_path, "team-a", "--scope", "classify", "--rate", "5/second", "--no-scores")
    first = done.stdout.strip()
    assert (done.returncode, len(first)) == (0, 48)
    scopes = ("--scope", "metrics", "--scope", "admin")
    psim = ("psim", "keys")
    second = new_key(tmp_path, "scraper", *scopes, command=psim).stdout.strip()
    path = tmp_path / "keys.toml"
    assert path.stat().st_mode & 0o777 == 0o600
    assert first not in path.read_text()
    assert second not in path.read_text()
    keys = Keys(path)
    found = keys.find(first)
    assert found is not None
    assert (found[0], found[1].scopes, str(found[1].rate), found[1].scores) == (
        "team-a",
        frozenset({Scope.CLASSIFY}),
        "5 per 1 second",
        False,
    )
    found = keys.find(second)
    assert found is not None
    assert (found[0], found[1].scopes) == ("scraper", frozenset({Scope.METRICS, Scope.ADMIN}))
    before = path.read_text()
    for arguments, complaint in (
        (["team-a", "--scope", "classify"], "already"),
        (["a]b", "--scope", "classify"], "a]b"),
        (["b", "--scope", "classify", "--rate", "often"], "rate"),
        (["b", "--scope", "all"], "invalid choice"),
    ):
        done = new_key(tmp_path, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert complaint in done.stderr
        assert "Traceback" not in done.stderr
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("host", "keys", "warned"),
    [
        ("0.0.0.0", False, True),
        ("gateway.internal", False, True),
        ("0.0.0.0", True, False),
        ("127.0.0.1", False, False),
        ("::1", False, False),
        ("localhost", False, False),
    ],
)
async def test_a_port_that_is_open_to_all_is_warned_of(
    host: str, keys: bool, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with client_of(host=host, keys=keys_file(tmp_path) if keys else None):
        pass
    assert any("PSIM_KEYS is not set" in r.getMessage() for r in caplog.records) == warned


NUMBERS = ("confidence", "score", "detector", "threshold", "p_value")
OVERRIDE = ("override", "override_threshold", "override_p_value")


@pytest.mark.parametrize("mode", list(Mode))
async def test_a_key_for_decisions_is_told_no_number_of_the_screen(
    mode: Mode, tmp_path: Path
) -> None:
    async with guarded(tmp_path, mode=mode, searches=1) as client:
        for key, hidden in ((BLIND, True), (KEY[Scope.CLASSIFY], False)):
            screens = []
            for path in ("/classify", "/screen"):
                for texts in ([CLEAN, POISONED], [POISONED, POISONED]):
                    answer = await client.post(path, json={"inputs": texts}, headers=bearer(key))
                    results = answer.json()["results"]
                    screens += [result.get("screen", result) for result in results]
                    assert {"decision", "label"} <= results[0].keys() or path == "/screen"
            assert [s["poisoned"] for s in screens] == [False, True, True, True] * 2
            assert [s["finding"] for s in screens] == [None, *["triggered"] * 3] * 2
            for screen in screens:
                assert [screen[name] is None for name in NUMBERS] == [hidden] * len(NUMBERS)
                asked = not hidden and screen["poisoned"]
                assert [screen[name] is not None for name in OVERRIDE] == [asked] * len(OVERRIDE)


async def test_a_key_for_decisions_is_neither_told_thresholds_nor_what_the_screen_minds(
    tmp_path: Path,
) -> None:
    async with guarded(tmp_path) as client:
        for key, hidden in ((BLIND, True), (KEY[Scope.CLASSIFY], False)):
            body = {"inputs": POISONED}
            answer = await client.post("/explain", json=body, headers=bearer(key))
            assert answer.status_code == (403 if hidden else 200)
            assert ("trigger" in answer.text) != hidden
            info = (await client.get("/info", headers=bearer(key))).text
            assert ("threshold" not in info) == hidden
            assert "labels" in info


async def test_a_key_for_decisions_learns_nothing_of_its_score_from_info(tmp_path: Path) -> None:
    """On a quiet service, drift after one text is the exact rank of its score."""
    async with guarded(tmp_path) as client:

        async def info(key: str) -> dict[str, Any]:
            found: dict[str, Any] = (await client.get("/info", headers=bearer(key))).json()
            return found

        before, seen = await info(BLIND), await info(KEY[Scope.CLASSIFY])
        assert {"calibrations", "recalibration"} <= seen["manifest"].keys(), "with scores"
        assert (await classify(client, 1, BLIND)).status_code == 200
        assert await info(BLIND) == before, "nothing moves"
        assert (await info(KEY[Scope.CLASSIFY]))["drift"] != seen["drift"]
        assert before.keys() == seen.keys() - {"drift"}
        assert not before["manifest"].keys() & {"calibrations", "recalibration"}
