"""Reloading: new models are loaded and tried while the old ones serve."""

import asyncio
import gc
import logging
import traceback
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any

from models.errors import PsimError
from service.errors import ServiceError
from service.lifecycle.registry import Model, Registry
from service.observability.metrics import Metrics

log = logging.getLogger(__name__)


class ReloadRunning(PsimError):
    """Another reload is still running."""


class ReloadFailed(PsimError):
    """The new models cannot be served; the old ones still are."""


class Reloader:
    """Replaces all models at once, or none.

    Args:
        models: the models that are served.
        build: loads new models from disk and checks them; called in a thread.
        metrics: counts reloads and describes the served bundles.
    """

    def __init__(
        self, models: Registry, build: Callable[[], Sequence[Model]], metrics: Metrics
    ) -> None:
        self._models, self._build, self._metrics = models, build, metrics
        self._running = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def reload(self) -> None:
        """Serve what is on disk now; old models are closed once no request uses them.

        Raises:
            ReloadRunning: nothing was done.
            ReloadFailed: the old models stay.
        """
        if self._running:
            raise ReloadRunning("another reload is running; wait for its end")
        self._running = True
        try:
            new = await self._load_and_start()
        except Exception as error:
            self._metrics.describe(self._models.bundles)
            self._metrics.reloads.labels("failed").inc()
            detail = _describe(error)
            log.error("the reload failed", extra={"error": detail})
            raise ReloadFailed(f"nothing was changed: {detail}") from None
        finally:
            self._running = False
        old = [*self._models]
        self._models.replace(new)
        self._metrics.describe(self._models.bundles)
        self._metrics.reloads.labels("done").inc()
        log.info("reloaded")
        self._start(_retire(old))

    def on_signal(self) -> None:
        """Reload; errors go to the log."""
        self._start(self._reload_quietly())

    async def close(self) -> None:
        """Wait for reloads and retirements that are running."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _reload_quietly(self) -> None:
        try:
            await self.reload()
        except ReloadFailed:
            pass  # it is in the log
        except ReloadRunning as error:
            log.warning("no reload: %s", error)

    async def _load_and_start(self) -> Sequence[Model]:
        new = await asyncio.to_thread(self._build)
        async with AsyncExitStack() as started:
            for model in new:
                started.push_async_callback(model.close)
                await model.start()
                if unready_reason := model.gateway.unready_reason:
                    raise ReloadFailed(f"{model.name}: {unready_reason}")
            started.pop_all()
        return new

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _retire(old: list[Model]) -> None:
    await asyncio.gather(*(model.retire() for model in old))
    old.clear()
    # Models have reference cycles: without this, weights stay until the next full collection.
    await asyncio.to_thread(gc.collect)


def _describe(error: Exception) -> str:
    """Describe an error; of one that is not ours, only its type: its message may quote anything."""
    if isinstance(error, PsimError | ServiceError):
        return str(error)
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("bug", extra={"error": type(error).__name__, "where": where})
    return f"{type(error).__name__}; the log says where"
