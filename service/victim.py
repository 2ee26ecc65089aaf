"""The classifier behind the screen."""

from collections.abc import Sequence
from typing import Protocol

from models.screen import FloatArray
from service.batcher import Batcher, Screened, Timed


class Victim(Protocol):
    """Classifies inputs that have passed the screen."""

    async def classify(self, inputs: Sequence[Screened]) -> list[Timed[FloatArray]]:
        """Return probabilities, each of shape (C,), in the order of the inputs."""


class LocalVictim:
    """The victim in this process, on the weights that PSIM shares with it."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher

    async def classify(self, inputs: Sequence[Screened]) -> list[Timed[FloatArray]]:
        """Classify what was screened, from where screening left it: nothing else can be read."""
        return await self._batcher.classify([screened.state for screened in inputs])
