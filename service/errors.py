"""Errors that end a request; each carries the answer that its caller gets."""

from collections.abc import Mapping, Sequence
from typing import ClassVar


class ServiceError(Exception):
    """An expected error; its message is for the caller and never quotes the caller's text."""

    status: ClassVar[int]
    """HTTP status of the answer."""
    code: ClassVar[str]
    """Stable name of the error, for programs."""
    outcome: ClassVar[str] = "error"
    """Outcome of the request, as metrics and logs count it."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the answer."""
        return {}


class ClientError(ServiceError):
    """The request is at fault, not the service."""

    outcome = "client_error"


class RetryLater(ServiceError):
    """The same request may succeed in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> Mapping[str, str]:
        """When to try again (RFC 9110, section 10.2.3)."""
        return {"retry-after": str(self.retry_after_s)}


class NotAllowed(ClientError):
    """The caller is unknown or lacks a permission; `challenge` names what is missing (RFC 6750)."""

    def __init__(self, message: str, challenge: str) -> None:
        super().__init__(message)
        self.challenge = challenge

    @property
    def headers(self) -> Mapping[str, str]:
        """The challenge."""
        return {"www-authenticate": self.challenge}


class Malformed(ClientError):
    """The body cannot be parsed."""

    status, code = 400, "malformed"


class Unauthorized(NotAllowed):
    """The request has no API key, or an unknown one."""

    status, code = 401, "unauthorized"


class Forbidden(NotAllowed):
    """The API key lacks a permission."""

    status, code = 403, "forbidden"


class CrossSite(ClientError):
    """A browser sends the request for a page of another site."""

    status, code = 403, "cross_site"


class NotInspected(ClientError):
    """A proxied request cannot be screened the way its upstream would read it."""

    status, code = 403, "not_inspected"


class UnknownModel(ClientError):
    """The request names a model that is not served."""

    status, code = 404, "unknown_model"


class TooLarge(ClientError):
    """The body, or one of its texts, is over the limit."""

    status, code = 413, "too_large"


class UnsupportedMedia(ClientError):
    """The body's type or encoding could hide a text from the screen."""

    status, code = 415, "unsupported_media"


class Invalid(ClientError):
    """The body can be parsed but is not a valid request."""

    status, code = 422, "invalid"


class RateLimited(ClientError, RetryLater):
    """The API key is over its rate limit."""

    status, code = 429, "rate_limited"

    def __init__(self, rate: str, retry_after_s: int) -> None:
        message = f"the key's limit is {rate}; try again in {retry_after_s} s"
        super().__init__(message, retry_after_s)


class Overloaded(RetryLater):
    """The queue is full."""

    status, code, outcome = 429, "overloaded", "overloaded"

    def __init__(self, reason: str, retry_after_s: int = 1) -> None:
        message = f"the queue is full ({reason}); try again in {retry_after_s} s"
        super().__init__(message, retry_after_s)
        self.reason = reason


class UpstreamFailed(ServiceError):
    """The upstream classifier gave no answer, or an unusable one."""

    status, code = 502, "upstream_failed"


class UpstreamDown(RetryLater):
    """The upstream classifier is down, or says so."""

    status, code = 503, "upstream_down"


class ClassifyFailed(ServiceError):
    """The input was screened, but the classifier failed."""

    status, code = 503, "classify_failed"


class NotReady(ServiceError):
    """The worker is starting, dead or draining."""

    status, code = 503, "not_ready"


class ScreenFailed(ServiceError):
    """Screening failed, so the input was not classified: the gateway fails closed."""

    status, code = 503, "screen_failed"


class TimedOut(ServiceError):
    """No answer was ready in time."""

    status, code = 504, "timeout"


class UpstreamRefused(ClientError):
    """The upstream classifier blames the request; its answer is passed on unchanged."""

    code = "upstream_refused"

    def __init__(
        self, message: str, status: int, headers: Sequence[tuple[str, str]], body: bytes
    ) -> None:
        super().__init__(message)
        self.answer = status, headers, body
