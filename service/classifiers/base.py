"""The classifier behind the screen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from service.errors import Invalid, UnknownModel
from service.inference.batcher import Batcher, Screened
from service.protocols.base import InferenceRequest, WireProtocol
from service.schemas import Score, best_first


@dataclass(frozen=True, slots=True)
class Call:
    """A request for classes, as it came."""

    asked: InferenceRequest
    protocol: WireProtocol
    body: bytes = b""
    headers: Sequence[tuple[bytes, bytes]] = ()
    request_id: str = ""
    version: str | None = None
    """Of the model, where the path names one."""


@dataclass(frozen=True, slots=True)
class ClassifierInput:
    """A text that may be classified."""

    text: str
    screened: Screened
    """Of this text."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An upstream's answer, to be passed on as it is."""

    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes


@dataclass(frozen=True, slots=True)
class Classified:
    """What a classifier says of some inputs."""

    scores: Sequence[Sequence[Score]]
    """Of each input, best first; of none if there is a reply."""
    stages: Sequence[Mapping[str, float]]
    """Seconds by stage, of inputs side by side."""
    reply: Reply | None = field(default=None, kw_only=True)
    """The answer for all inputs of the call, ready-made in its protocol."""


class Classifier(Protocol):
    """Classifies inputs that have passed the screen."""

    async def start(self) -> None:
        """Get ready, and try it."""

    async def close(self) -> None:
        """Let go of everything."""

    @property
    def ready(self) -> bool:
        """Whether it can be expected to answer."""

    @property
    def upstream_protocol(self) -> str | None:
        """Name of the protocol that it has to be asked in, if any and if known."""

    async def metadata(self, path: str) -> dict[str, Any] | None:
        """Return what it says of itself at a path of Open Inference; None if it does not."""

    async def classify(self, call: Call, inputs: Sequence[ClassifierInput]) -> Classified:
        """Classify the inputs, which are those of the call or, in its order, some of them."""


class LocalClassifier:
    """The classifier in this process, on the weights that PSIM shares with it."""

    def __init__(self, batcher: Batcher, labels: Sequence[str]) -> None:
        self._batcher, self._labels = batcher, labels

    upstream_protocol = None

    async def start(self) -> None:
        """Classify something, with the batcher running."""
        (screened,) = await self._batcher.screen(["warm up"])
        await self._batcher.classify([screened.value.state])

    async def close(self) -> None:
        """Do nothing: the batcher is closed by who made it."""

    @property
    def ready(self) -> bool:
        """As the worker is."""
        return self._batcher.alive

    async def metadata(self, path: str) -> dict[str, Any] | None:
        """Return None: what is served here is described by others."""
        return None

    async def classify(self, call: Call, inputs: Sequence[ClassifierInput]) -> Classified:
        """Classify what was screened, from where screening left it: nothing else can be read."""
        if call.version is not None:
            raise UnknownModel("the model has no versions")
        if call.asked.unsupported_option:
            raise Invalid(
                f"{call.asked.unsupported_option}: the classifier behind the gateway has no such"
            )
        answers = await self._batcher.classify([one.screened.state for one in inputs])
        scores = [
            best_first(zip(self._labels, answer.value.tolist(), strict=True)) for answer in answers
        ]
        return Classified(scores, [answer.stages for answer in answers])
