"""A batcher with a fake engine."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from service.inference.batcher import Batcher
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.support.fakes import FakeEngine, fake_bundle


@asynccontextmanager
async def running(engine: FakeEngine, **changes: Any) -> AsyncIterator[Batcher]:
    """Run a batcher until the block ends; its queue is empty then."""
    bundle = fake_bundle(engine)
    settings = Settings(bundle=Path("unused"), **changes)
    batcher = Batcher(bundle, settings, Metrics().of("fake", settings))
    batcher.start()
    try:
        yield batcher
        engine.gate.set()
        await batcher.close()
        assert value(batcher, "queue_inputs") == value(batcher, "queue_characters") == 0
    finally:
        engine.gate.set()


def value(batcher: Batcher, metric: str) -> float:
    """Return the value of one of its metrics."""
    (found,) = getattr(batcher._metrics, metric).collect()
    return float(found.samples[0].value)
