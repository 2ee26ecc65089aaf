"""What can go wrong with a request, in the domain's terms, not in those of HTTP."""

from collections.abc import Sequence


class ServiceError(Exception):
    """Base; the message is for the caller and never holds the caller's text."""

    code = "internal"


class Malformed(ServiceError):
    """The body cannot be parsed."""

    code = "malformed"


class Invalid(ServiceError):
    """The body can be parsed, but is not a valid request."""

    code = "invalid"


class TooLarge(ServiceError):
    """The body, or one of its texts, is over the limit."""

    code = "too_large"


class UnsupportedMedia(ServiceError):
    """The body's type or encoding could hide a text from the screen."""

    code = "unsupported_media"


class Overloaded(ServiceError):
    """The queue is full; trying again later helps."""

    code = "overloaded"

    def __init__(self, reason: str, retry_after_s: int = 1) -> None:
        super().__init__(f"the queue is full ({reason}); try again in {retry_after_s} s")
        self.reason = reason
        self.retry_after_s = retry_after_s


class ScreenFailed(ServiceError):
    """Screening failed, so the input was not classified: the gateway fails closed."""

    code = "screen_failed"


class ClassifyFailed(ServiceError):
    """The input was screened, but the classifier failed."""

    code = "classify_failed"


class NotReady(ServiceError):
    """The worker is starting, dead or draining."""

    code = "not_ready"


class TimedOut(ServiceError):
    """The answer was not there in time."""

    code = "timeout"


class UnknownModel(ServiceError):
    """The request names a model that is not served."""

    code = "unknown_model"


class NotAllowed(ServiceError):
    """Who asks is not known, or may not; `challenge` says what is wanted (RFC 6750)."""

    def __init__(self, message: str, challenge: str) -> None:
        super().__init__(message)
        self.challenge = challenge


class Unauthorized(NotAllowed):
    """The request has no API key, or none that is known."""

    code = "unauthorized"


class Forbidden(NotAllowed):
    """The API key is not good for this."""

    code = "forbidden"


class RateLimited(ServiceError):
    """The API key has sent as much as it may; trying again later helps."""

    code = "rate_limited"

    def __init__(self, rate: str, retry_after_s: int) -> None:
        super().__init__(f"the key's limit is {rate}; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class NotInspected(ServiceError):
    """A proxy asks about a request that cannot be screened as its upstream would read it."""

    code = "not_inspected"


class UpstreamDown(ServiceError):
    """The classifier elsewhere is down, or says so; trying again later helps."""

    code = "upstream_down"

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UpstreamFailed(ServiceError):
    """The classifier elsewhere gave no answer, or none that can be used."""

    code = "upstream_failed"


class UpstreamRefused(ServiceError):
    """The classifier elsewhere says that the request is at fault; its answer is passed on."""

    code = "upstream_refused"

    def __init__(
        self, message: str, status: int, headers: Sequence[tuple[str, str]], body: bytes
    ) -> None:
        super().__init__(message)
        self.status, self.headers, self.body = status, headers, body
