"""Interface of a wire format: it reads and answers requests, and calls an upstream."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)

from service.schemas import Result, Score, TextsRequest

Parsed = TypeVar("Parsed")
Finite = Annotated[float, Field(allow_inf_nan=False)]


def harmless_cut(*values: object) -> BeforeValidator:
    """Return a validator for an option that cuts texts: it takes null and the given values.

    A text is screened whole, and as the upstream cuts it by itself. Anywhere else, a cut could
    leave the beginning of a word that is a trigger.
    """

    def check(value: object, info: ValidationInfo) -> object:
        if value is not None and value not in values:
            raise ValueError(
                f"{info.field_name} chooses where a text is cut, and it is not screened so; "
                "leave it out"
            )
        return value

    return BeforeValidator(check)


class BadAnswer(ValueError):
    """An upstream's answer is unusable; the message never quotes a text."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Name, bundle and classes of a served model."""

    model: str
    """Name by which clients and the upstream know the classifier."""
    bundle: str
    """Digest of the bundle that screens its inputs."""
    labels: Sequence[str]
    """In the classifier's order."""
    multi_label: bool = False
    """Whether a text may have any number of the labels."""


class InferenceRequest(TextsRequest):
    """A request to classify texts; unknown fields are refused, since text could hide there."""

    @property
    def limit(self) -> int | None:
        """Scores to return per text; None for all."""
        return None

    @property
    def model_name(self) -> str | None:
        """The model that the body names; None if it names none."""
        return None

    def unsupported_option(self, model_info: ModelInfo) -> str | None:
        """Return an option in use that only an upstream of the same protocol supports, if any."""
        return None

    @property
    def may_be_pair(self) -> bool:
        """Whether a server of another protocol at the same path would read two texts as one."""
        return False

    @property
    def forward_as_is(self) -> bool:
        """Whether an upstream of the same protocol may get the body unchanged."""
        return True

    @abstractmethod
    def with_texts(self, texts: Sequence[str]) -> Self:
        """Return the same request for other texts; for exactly one if its text is not in a list."""

    @abstractmethod
    def to_response(self, results: Sequence[Result], model_info: ModelInfo) -> Any:
        """Return the JSON of an answer, without scores for rejected inputs."""


class ClientProtocol(ABC):
    """A wire format in which clients ask."""

    name: ClassVar[str]
    routes: ClassVar[Sequence[str]]
    """Paths at which clients use it."""
    request_type: ClassVar[type[InferenceRequest]]
    supports_partial: ClassVar[bool] = True
    """Whether an answer may lack an input; if not, one rejected input refuses the request."""
    requires_all_scores: ClassVar[bool] = False
    """Whether its answers need a score for every class."""
    passthrough: ClassVar[bool] = True
    """Whether an upstream's answer for all inputs can be passed on unchanged."""
    media_optional: ClassVar[bool] = False
    """Whether clients may leave out the content type."""
    binary_tensors: ClassVar[bool] = False
    """Whether tensors may stand after the JSON."""
    error_media: ClassVar[str] = "application/json"

    def claims(self, data: object) -> bool:
        """Return whether a body is in this protocol, where several share a route."""
        return True

    @abstractmethod
    def error(self, status: int, code: str, detail: str) -> Any:
        """Return the JSON of an error."""

    def rejection(
        self,
        request: InferenceRequest,
        results: Sequence[Result],
        model_info: ModelInfo,
        detail: str,
    ) -> Any:
        """Return the JSON of the error for rejected inputs."""
        return self.error(HTTPStatus.FORBIDDEN, "rejected", detail)


class WireProtocol(ClientProtocol):
    """A wire format that upstreams speak too."""

    why_no_multi_label: ClassVar[str | None] = None
    """Why its servers give no labels of multi-label classifiers; None if they do."""
    limit_path: ClassVar[str | None] = None
    """Path at which an upstream tells after how many tokens it cuts a text."""

    @abstractmethod
    def path(self, model: str, version: str | None = None) -> str:
        """Return the path at which an upstream serves a model, below its base URL."""

    @abstractmethod
    def build_request(self, texts: Sequence[str], model_info: ModelInfo) -> InferenceRequest:
        """Return a request for all scores of some texts."""

    @abstractmethod
    def scores(
        self, body: bytes, count: int, labels: Sequence[str], *, multi_label: bool = False
    ) -> list[list[Score]]:
        """Return the scores of each of `count` texts in an upstream's answer.

        Args:
            body: the answer.
            count: number of texts.
            labels: of the classifier, in its order.
            multi_label: whether a text may have any number of them.

        Raises:
            BadAnswer: a text lacks scores, or they are not finite.
        """

    def max_length(self, body: bytes, model: str) -> int | None:
        """Return the limit that the answer at `limit_path` tells; None if it tells none.

        Raises:
            BadAnswer: it cannot be read.
        """
        return None

    def check(self, body: bytes, count: int) -> None:
        """Raise `BadAnswer` unless the answer has finite numbers for each of `count` texts."""
        self.scores(body, count, ())


class Wire(BaseModel):
    """A part of a request, without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def parsed(kind: TypeAdapter[Parsed], body: bytes) -> Parsed:
    """Return an upstream's JSON as `kind`.

    Raises:
        BadAnswer: the JSON does not fit.
    """
    try:
        return kind.validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        raise BadAnswer(f"{first['type']}, {error.error_count()} errors in all") from None


def checked_count(rows: Sequence[Parsed], count: int) -> list[Parsed]:
    """Return the rows.

    Raises:
        BadAnswer: there is not one row per text.
    """
    if len(rows) != count:
        raise BadAnswer(f"{len(rows)} predictions for {count} inputs")
    return list(rows)
