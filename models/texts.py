"""What a text has to be, so that it can be screened."""

from models.errors import DataError

MAX_CHARS = 100_000
"""Limit for a text; a longer one is a mistake or an attack."""


def check_text(text: object) -> str:
    """Return `text` if it can be screened; else raise `DataError`, which never quotes it."""
    if text is None:
        raise DataError("the text is missing")
    if not isinstance(text, str):
        raise DataError(f"the text is {type(text).__name__}, not a string")
    if not text.strip():
        raise DataError("the text is empty")
    if len(text) > MAX_CHARS:
        raise DataError(f"the text has {len(text)} characters; the limit is {MAX_CHARS}")
    if not is_unicode(text):
        raise DataError("the text is not valid Unicode: not UTF-8, or it has a lone surrogate")
    return text


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded: it has no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
