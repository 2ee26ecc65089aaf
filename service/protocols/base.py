"""What a wire format knows: to read a request, to answer it, and to ask an upstream in it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from service.schemas import Result, Score, TextsRequest

Parsed = TypeVar("Parsed")
Finite = Annotated[float, Field(allow_inf_nan=False)]


class BadAnswer(ValueError):
    """An upstream's answer that is not what was asked for; the message never holds a text."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is behind a route."""

    model: str
    """Name under which clients, and the upstream, know the classifier."""
    bundle: str
    """Digest of the bundle that guards it."""
    labels: Sequence[str]
    """The classes, in the classifier's order."""


class InferenceRequest(TextsRequest):
    """A request for the classes of texts; unknown fields are refused: text could hide there."""

    @property
    def limit(self) -> int | None:
        """How many scores are wanted per text; None for all."""
        return None

    @property
    def model_name(self) -> str | None:
        """The model that the body names, if it does."""
        return None

    @property
    def unsupported_option(self) -> str | None:
        """An option that is set and that only an upstream of the same protocol can honour."""
        return None

    @property
    def forward_as_is(self) -> bool:
        """Whether an upstream may get the bytes as they came."""
        return True

    @abstractmethod
    def with_texts(self, texts: Sequence[str]) -> Self:
        """Return the same request for other texts; for one that is no list, there is one."""

    @abstractmethod
    def to_response(self, results: Sequence[Result], served: ModelInfo) -> Any:
        """Return the JSON of an answer; rejected inputs are gaps in it."""


class WireProtocol(ABC):
    """One wire format."""

    name: ClassVar[str]
    routes: ClassVar[Sequence[str]]
    """Paths at which it is served."""
    request_type: ClassVar[type[InferenceRequest]]
    supports_partial: ClassVar[bool] = True
    """Whether an answer can leave out an input; if not, one rejected input refuses the request."""
    requires_all_scores: ClassVar[bool] = False
    """Whether its answers need a score for every class."""
    passthrough: ClassVar[bool] = True
    """Whether an upstream's answer for all inputs can be passed on as it is."""
    media_optional: ClassVar[bool] = False
    """Whether clients may leave out the content type."""
    error_media: ClassVar[str] = "application/json"

    def claims(self, data: object) -> bool:
        """Return whether a body is of this protocol, where several share a route."""
        return True

    @abstractmethod
    def error(self, status: int, code: str, detail: str) -> Any:
        """Return the JSON of an error."""

    def rejection(
        self, asked: InferenceRequest, results: Sequence[Result], served: ModelInfo, detail: str
    ) -> Any:
        """Return the JSON that says that inputs were rejected."""
        return self.error(HTTPStatus.FORBIDDEN, "rejected", detail)

    @abstractmethod
    def path(self, model: str, version: str | None = None) -> str:
        """Return where an upstream serves a model, below its base URL."""

    @abstractmethod
    def build_request(self, texts: Sequence[str], served: ModelInfo) -> InferenceRequest:
        """Return a request for all scores of some texts."""

    @abstractmethod
    def scores(self, body: bytes, count: int, labels: Sequence[str]) -> list[list[Score]]:
        """Return what an upstream's answer says of each of `count` texts.

        Raises:
            BadAnswer: it does not say that of each, or not with finite numbers.
        """

    def check(self, body: bytes, count: int) -> None:
        """Raise `BadAnswer` unless the answer has finite numbers for each of `count` texts."""
        self.scores(body, count, ())


class Wire(BaseModel):
    """A part of a request: what it does not name is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def parsed(kind: TypeAdapter[Parsed], body: bytes) -> Parsed:
    """Return an upstream's JSON as `kind`.

    Raises:
        BadAnswer: it is not.
    """
    try:
        return kind.validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        raise BadAnswer(f"{first['type']}, {error.error_count()} errors in all") from None


def checked_count(rows: Sequence[Parsed], count: int) -> list[Parsed]:
    """Return the rows, which must be as many as there were texts."""
    if len(rows) != count:
        raise BadAnswer(f"{len(rows)} predictions for {count} inputs")
    return list(rows)
