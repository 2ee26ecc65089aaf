"""The classifier in this process, on the weights that PSIM shares with it."""

from collections.abc import Sequence
from typing import Any

from service.classifiers.base import Call, Classified, ClassifierInput
from service.errors import Invalid, UnknownModel
from service.inference.batcher import Batcher
from service.protocols.base import ModelInfo
from service.schemas import best_first


class LocalClassifier:
    """Classifies in this process, continuing from the states that screening computed."""

    upstream_protocol = None
    max_length = None  # it reads what was screened

    def __init__(self, batcher: Batcher, model_info: ModelInfo) -> None:
        self._batcher, self._model_info = batcher, model_info

    async def start(self) -> None:
        """Classify a first text; the batcher must be running."""
        (screened,) = await self._batcher.screen(["warm up"])
        await self._batcher.classify([screened.value.state])

    async def close(self) -> None:
        """Do nothing: the owner of the batcher closes it."""

    @property
    def ready(self) -> bool:
        """Whether the worker is running."""
        return self._batcher.alive

    async def metadata(self, path: str) -> dict[str, Any] | None:
        """Return None: there is no upstream that has metadata."""
        return None

    async def classify(self, call: Call, inputs: Sequence[ClassifierInput]) -> Classified:
        """Classify the screened states: no text other than the screened one can be read.

        Raises:
            UnknownModel, Invalid: the call wants a version, or an option, that only upstreams have.
            NotReady, ClassifyFailed: as `Batcher.classify` does.
        """
        if call.version is not None:
            raise UnknownModel("the model has no versions")
        if option := call.request.unsupported_option(self._model_info):
            raise Invalid(f"{option}: the classifier behind the gateway has no such")
        answers = await self._batcher.classify([input.screened.state for input in inputs])
        labels = self._model_info.labels
        scores = [best_first(zip(labels, one.value.tolist(), strict=True)) for one in answers]
        return Classified(scores, [answer.stages for answer in answers])
