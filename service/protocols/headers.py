"""Names of headers by which a server may read another request than the one that was screened."""

import re

REWRITING = frozenset(
    "x-http-method x-http-method-override x-method-override "
    "x-original-url x-original-uri x-rewrite-url".split()
)
"""Some servers let callers replace the method or the URL with them."""
PLAIN = re.compile(r"[A-Za-z0-9-]+")
"""Servers that hand headers on as variables take other characters, such as `_`, for `-`."""


def is_ambiguous(name: str) -> bool:
    """Return whether a server may take a header for another one, or for another request."""
    return name.lower() in REWRITING or not PLAIN.fullmatch(name)
