"""The classifier behind the screen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from service.inference.batcher import Screened
from service.protocols.base import ClientProtocol, InferenceRequest
from service.schemas import Score


@dataclass(frozen=True, slots=True)
class Call:
    """A request to classify texts, parsed and as received."""

    request: InferenceRequest
    protocol: ClientProtocol
    body: bytes = b""
    headers: Sequence[tuple[bytes, bytes]] = ()
    request_id: str = ""
    version: str | None = None
    """Version of the model, if the path names one."""
    unreadable: Mapping[int, str] = field(default_factory=dict)
    """Why texts cannot be read, by their numbers in the request; the others are answered."""

    @property
    def readable(self) -> dict[int, str]:
        """The other texts, by their numbers in the request."""
        texts = enumerate(self.request.texts)
        return {number: text for number, text in texts if number not in self.unreadable}


@dataclass(frozen=True, slots=True)
class ClassifierInput:
    """A text that may be classified."""

    text: str
    screened: Screened
    """Result of screening this text."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An upstream's answer, to be passed on unchanged."""

    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes


@dataclass(frozen=True, slots=True)
class Classified:
    """Answer of a classifier to some inputs."""

    scores: Sequence[Sequence[Score]]
    """Scores per input, best first; empty if there is a reply."""
    stages: Sequence[Mapping[str, float]]
    """Seconds by stage, for inputs that ran side by side."""
    reply: Reply | None = field(default=None, kw_only=True)
    """Complete answer to the call, in its protocol."""


class Classifier(Protocol):
    """Classifies inputs that have passed the screen."""

    async def start(self) -> None:
        """Get ready, and prove it with a first input."""

    async def close(self) -> None:
        """Release everything, in any state."""

    @property
    def ready(self) -> bool:
        """Whether the classifier is expected to answer."""

    @property
    def upstream_protocol(self) -> str | None:
        """Name of the upstream's protocol; None without an upstream, or while not known."""

    @property
    def max_length(self) -> int | None:
        """Tokens after which it cuts a text, special tokens included; None if not known."""

    async def metadata(self, path: str) -> dict[str, Any] | None:
        """Return the metadata at a path of Open Inference; None if there is none."""

    async def classify(self, call: Call, inputs: Sequence[ClassifierInput]) -> Classified:
        """Classify all inputs of the call, or some of them in its order."""
