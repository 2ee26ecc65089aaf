"""Two models in one process, by fake engines."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.app import create_app
from service.settings import Settings
from tests.support.fakes import FakeEngine, fake_bundle
from tests.support.requests import lifespan

TWO = """
[[models]]
name = "mood"
bundle = "mood"

[[models]]
name = "team/topic"
bundle = "topic"
mode = "flag"
"""


@asynccontextmanager
async def two_models(
    folder: Path, monkeypatch: pytest.MonkeyPatch, content: str = TWO, **changes: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """Serve `mood` and, in another mode and with other classes, `team/topic`; by fake engines."""
    bundles = {
        "mood": fake_bundle(),
        "topic": fake_bundle(FakeEngine(), ("politics", "sport"), "e" * 64),
    }
    monkeypatch.setattr("service.app.load_bundle", lambda path, *_, **__: bundles[path.name])
    (folder / "models.toml").write_text(content)
    app = create_app(Settings(models=folder / "models.toml", **changes))
    async with lifespan(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client
