"""The models that are served. Which one a request is for is looked up anew at each request."""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from models.bundle.load import Bundle
from service.errors import UnknownModel
from service.inference.batcher import Batcher
from service.observability.drift import Comparison
from service.pipeline.challenger import Challenger
from service.pipeline.gateway import Gateway

log = logging.getLogger(__name__)


class Model:
    """A model, from its start to its end."""

    def __init__(
        self, gateway: Gateway, batcher: Batcher, challenger: Challenger | None = None
    ) -> None:
        self.gateway, self._batcher, self._challenger = gateway, batcher, challenger
        self.name = gateway.served.model
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    @contextmanager
    def lease(self) -> Iterator[Gateway]:
        """Give the gateway to a request; while it runs inside, the model is not retired."""
        self._users += 1
        self._unused.clear()
        try:
            yield self.gateway
        finally:
            self._users -= 1
            if not self._users:
                self._unused.set()

    async def start(self) -> None:
        """Start the worker, and try whether all answers."""
        self._batcher.start()
        if self._challenger:
            await self._challenger.start()
        await self.gateway.start()
        digest, mode = self.gateway.served.bundle, self.gateway.mode
        log.info("ready", extra={"model": self.name, "bundle": digest, "mode": mode})

    @property
    def queued_characters(self) -> int:
        """How many characters wait or run."""
        return self._batcher.queued_characters

    async def retire(self) -> None:
        """Close once no request uses it."""
        await self._unused.wait()
        await self.close()

    async def close(self) -> None:
        """Let go of the classifier, answer what is queued, and end the worker."""
        await self.gateway.close()
        await self._batcher.close()
        if self._challenger:
            await self._challenger.close()


class Registry:
    """The models by name; the first one is the default."""

    def __init__(self, models: Sequence[Model]) -> None:
        self.replace(models)

    def replace(self, models: Sequence[Model]) -> None:
        """Serve these models from the next request on."""
        self._by_name = {model.name: model for model in models}

    async def start(self) -> None:
        """Start all."""
        for model in self:
            await model.start()

    async def close(self) -> None:
        """Close all."""
        for model in self:
            await model.close()

    def __iter__(self) -> Iterator[Model]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    @property
    def bundles(self) -> dict[str, Bundle]:
        """The bundles by the name of their model."""
        return {model.name: model.gateway.bundle for model in self}

    @property
    def queued_characters(self) -> int:
        """How many characters wait or run, of all."""
        return sum(model.queued_characters for model in self)

    def drift(self) -> dict[str, list[Comparison]]:
        """Compare what passes with what the bundles were calibrated with; takes milliseconds."""
        return {model.name: model.gateway.drift.measure() for model in self}

    def get(self, *names: str | None) -> Model:
        """Return the model of which a request gives the name, once or more; or the default one.

        Raises:
            UnknownModel: there is none, or the names differ.
        """
        given = {name for name in names if name is not None}
        if not given:
            return next(iter(self))
        if len(given) == 1 and (found := self._by_name.get(given.pop())):
            return found
        raise UnknownModel(f"there is no such model; served are: {', '.join(self._by_name)}")

    def unready_reason(self, name: str | None = None) -> str | None:
        """Say why a model does not answer, or any if none is named; None if they do."""
        asked = [*self] if name is None else [self.get(name)]
        found = [f"{m.name}: {said}" for m in asked if (said := m.gateway.unready_reason)]
        return "; ".join(found) or None

    @property
    def unrecoverable(self) -> str | None:
        """Say of which models the worker will not come back; None if there are none."""
        found = [
            f"{m.name}: the inference worker {m.gateway.health}"
            for m in self
            if m.gateway.health.unrecoverable
        ]
        return "; ".join(found) or None
