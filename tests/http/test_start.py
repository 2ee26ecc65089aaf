"""A start that fails: it is noticed, and leaves nothing open."""

import gc
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from models.engines.base import Encoding, Screening
from service.app import create_app
from service.classifiers.upstream import UpstreamClassifier
from service.errors import ScreenFailed
from service.settings import Settings
from tests.support.fakes import FakeEngine, fake_bundle
from tests.support.requests import lifespan, listening
from tests.support.upstreams import Peer

TWO = """
[[models]]
name = "first"
bundle = "first"

[[models]]
name = "second"
bundle = "second"
"""


class BlindEngine(FakeEngine):
    """Gives no readings."""

    def screen(self, batch: Sequence[Encoding]) -> Screening:
        found = super().screen(batch)
        return found._replace(readings=np.full_like(found.readings, np.nan))


def left_open() -> list[str]:
    """Return what a service that has ended must have closed."""
    threads = [t.name for t in threading.enumerate() if t.name in ("inference", "audit")]
    sessions = [o for o in gc.get_objects() if type(o) is aiohttp.ClientSession and not o.closed]
    return [*threads, *map(repr, sessions)]


@pytest.mark.parametrize("fail_open", [False, True])
@pytest.mark.parametrize("blind", ["served", "challenger"])
async def test_a_bundle_that_screens_nothing_is_not_served(
    blind: str, fail_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = {"served": fake_bundle(), "challenger": fake_bundle()}
    bundles[blind] = fake_bundle(BlindEngine())
    monkeypatch.setattr("service.app.load_bundle", lambda path, *_, **__: bundles[path.name])
    paths: dict[str, Any] = {"bundle": Path("served"), "challenger": Path("challenger")}
    with pytest.raises(ScreenFailed):
        async with lifespan(create_app(Settings(**paths, fail_open=fail_open))):
            raise AssertionError("it is served")
    assert not left_open()


@pytest.mark.parametrize("fails", ["first", "second", "upstream", "console", "ext_proc"])
async def test_a_start_that_fails_leaves_nothing_open(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = {
        name: BlindEngine() if name == fails else FakeEngine() for name in ("first", "second")
    }
    bundles = {name: fake_bundle(engine) for name, engine in engines.items()}
    monkeypatch.setattr("service.app.load_bundle", lambda path, *_, **__: bundles[path.name])
    (tmp_path / "models.toml").write_text(TWO)
    if fails == "upstream":

        async def bug(_: UpstreamClassifier) -> None:
            raise RuntimeError

        monkeypatch.setattr(UpstreamClassifier, "_probe", bug)
    peer = Starlette(routes=[Route("/{path:path}", Peer().answer, methods=["POST"])])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        changes: dict[str, Any] = {}
        if fails in ("console", "ext_proc"):
            changes[f"{fails}_port"] = taken.getsockname()[1]
        async with listening(peer) as url:
            settings = Settings(
                models=tmp_path / "models.toml",
                upstream=url,
                upstream_protocol="tei",
                audit_url=f"sqlite:///{tmp_path}/audit.db",
                **changes,
            )
            app = create_app(settings)
            with pytest.raises(Exception) as caught:
                async with lifespan(app):
                    raise AssertionError("it is served")
            assert not isinstance(caught.value, AssertionError)
    assert not left_open()


async def test_whatever_fails_to_close_the_rest_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    bundles = {"served": fake_bundle(), "challenger": fake_bundle()}
    monkeypatch.setattr("service.app.load_bundle", lambda path, *_, **__: bundles[path.name])
    paths: dict[str, Any] = {"bundle": Path("served"), "challenger": Path("challenger")}
    app = create_app(Settings(**paths))

    async def bug() -> None:
        raise RuntimeError

    for model in app.state.models:
        monkeypatch.setattr(model.gateway, "close", bug)
    with pytest.raises(RuntimeError):
        async with lifespan(app):
            pass
    assert not left_open()
