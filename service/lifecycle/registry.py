"""The models that are served; each request looks up its model anew."""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager

from models.bundle.load import Bundle
from service.errors import UnknownModel
from service.inference.batcher import Batcher
from service.observability.drift import Comparison
from service.pipeline.challenger import Challenger
from service.pipeline.gateway import Gateway

log = logging.getLogger(__name__)


class Model:
    """A model with everything that runs for it."""

    def __init__(
        self, gateway: Gateway, batcher: Batcher, challenger: Challenger | None = None
    ) -> None:
        self.gateway, self._batcher, self._challenger = gateway, batcher, challenger
        self.name = gateway.model_info.model
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @contextmanager
    def lease(self) -> Iterator[Gateway]:
        """Lend the gateway to a request; the model is not retired while the block runs."""
        self._users += 1
        self._unused.clear()
        try:
            yield self.gateway
        finally:
            self._users -= 1
            if not self._users:
                self._unused.set()

    async def start(self) -> None:
        """Start the worker, and prove that everything answers."""
        self._batcher.start()
        if self._challenger:
            await self._challenger.start()
        await self.gateway.start()
        digest, mode = self.gateway.model_info.bundle, self.gateway.mode
        log.info("ready", extra={"model": self.name, "bundle": digest, "mode": mode})

    @property
    def queued_characters(self) -> int:
        """Number of characters that wait or run."""
        return self._batcher.queued_characters

    async def retire(self) -> None:
        """Close the model once no request uses it."""
        await self._unused.wait()
        await self.close()

    async def close(self) -> None:
        """Close the classifier, answer all queued jobs, and end the worker, in any state."""
        async with AsyncExitStack() as stack:
            if self._challenger:
                stack.push_async_callback(self._challenger.close)
            stack.push_async_callback(self._batcher.close)
            stack.push_async_callback(self.gateway.close)


class Registry:
    """The models by name; the first is the default."""

    def __init__(self, models: Sequence[Model]) -> None:
        self.replace(models)

    def replace(self, models: Sequence[Model]) -> None:
        """Serve these models from the next request on."""
        self._by_name = {model.name: model for model in models}

    async def start(self) -> None:
        """Start all models."""
        for model in self:
            await model.start()

    async def close(self) -> None:
        """Close all models, even those that were not started, or not wholly."""
        async with AsyncExitStack() as stack:
            for model in self:
                stack.push_async_callback(model.close)

    def __iter__(self) -> Iterator[Model]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def bundles(self) -> dict[str, Bundle]:
        """The bundles by model name."""
        return {model.name: model.gateway.bundle for model in self}

    @property
    def queued_characters(self) -> int:
        """Number of characters that wait or run, in all models."""
        return sum(model.queued_characters for model in self)

    def drift(self) -> dict[str, list[Comparison]]:
        """Compare passing inputs with the calibration texts, by model; takes milliseconds."""
        return {model.name: model.gateway.drift.measure() for model in self}

    def get(self, *names: str | None) -> Model:
        """Return the model that a request names, possibly in several places; else the default.

        Raises:
            UnknownModel: there is no such model, or the names differ.
        """
        requested = {name for name in names if name is not None}
        if not requested:
            return next(iter(self))
        if len(requested) == 1 and (model := self._by_name.get(requested.pop())):
            return model
        raise UnknownModel(f"there is no such model; served are: {', '.join(self._by_name)}")

    def unready_reason(self, name: str | None = None) -> str | None:
        """Return why a model, or any model if none is named, is not served; None if it is."""
        models = [*self] if name is None else [self.get(name)]
        reasons = [f"{m.name}: {reason}" for m in models if (reason := m.gateway.unready_reason)]
        return "; ".join(reasons) or None

    @property
    def unrecoverable(self) -> str | None:
        """Why only a new process helps, because of dead workers; None if all is well."""
        reasons = [
            f"{m.name}: the inference worker {m.gateway.health}"
            for m in self
            if m.gateway.health.unrecoverable
        ]
        return "; ".join(reasons) or None
