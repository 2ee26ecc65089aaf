"""Reloading: new models are loaded and tried beside the old ones, which serve until then."""

import asyncio
import gc
import logging
import traceback
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from models.errors import PsimError
from service.errors import ServiceError
from service.lifecycle.registry import Model, Registry
from service.observability.metrics import Metrics

log = logging.getLogger(__name__)


class ReloadRunning(PsimError):
    """Another reload has not ended yet."""


class ReloadFailed(PsimError):
    """The new models cannot be served; the old ones are."""


class Reloader:
    """Replaces all models at once, or none.

    Args:
        models: what is served.
        build: reads what is on disk, checks and loads it; called in a thread.
        metrics: counts reloads, and says what is served.
    """

    def __init__(
        self, models: Registry, build: Callable[[], Sequence[Model]], metrics: Metrics
    ) -> None:
        self._models, self._build, self._metrics = models, build, metrics
        self._running = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def reload(self) -> None:
        """Serve what is on disk now; the old models are let go once no request uses them.

        Raises:
            ReloadRunning: nothing was done.
            ReloadFailed: the old models go on serving.
        """
        if self._running:
            raise ReloadRunning("another reload is running; wait for its end")
        self._running = True
        try:
            fresh = await self._ready_to_serve()
        except Exception as error:
            self._metrics.describe(self._models.bundles)
            self._metrics.reloads.labels("failed").inc()
            said = _described(error)
            log.error("the reload failed", extra={"error": said})
            raise ReloadFailed(f"nothing was changed: {said}") from None
        finally:
            self._running = False
        old = [*self._models]
        self._models.replace(fresh)
        self._metrics.describe(self._models.bundles)
        self._metrics.reloads.labels("done").inc()
        log.info("reloaded")
        self._start(_let_go(old))

    def on_signal(self) -> None:
        """Reload; what is wrong is in the log."""
        self._start(self._reload_quietly())

    async def close(self) -> None:
        """Wait for what is running."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _reload_quietly(self) -> None:
        try:
            await self.reload()
        except ReloadFailed:
            pass  # it is in the log
        except ReloadRunning as error:
            log.warning("no reload: %s", error)

    async def _ready_to_serve(self) -> Sequence[Model]:
        fresh = await asyncio.to_thread(self._build)
        started = []
        try:
            for model in fresh:
                started.append(model)
                await model.start()
                if unready_reason := model.gateway.unready_reason:
                    raise ReloadFailed(f"{model.name}: {unready_reason}")
        except BaseException:
            for model in started:
                await model.close()
            raise
        return fresh

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _let_go(old: list[Model]) -> None:
    await asyncio.gather(*(model.retire() for model in old))
    old.clear()
    # A model has cycles, and its weights would stay until a full collection happens to come.
    await asyncio.to_thread(gc.collect)


def _described(error: Exception) -> str:
    """Say what went wrong; of what is not ours only its type, since it may quote anything."""
    if isinstance(error, PsimError | ServiceError):
        return str(error)
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("bug", extra={"error": type(error).__name__, "where": where})
    return f"{type(error).__name__}; the log says where"
