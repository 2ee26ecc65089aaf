"""Which site a browser sends a request for."""

from starlette.datastructures import Headers


def same_origin(headers: Headers) -> bool | None:
    """Return whether a request comes from a page of this server; None if no browser says so.

    Browsers send `sec-fetch-site` over TLS and to loopback only, and `origin` with every POST.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site == "same-origin"
    if origin is None:
        return None
    host = headers.get("host", "")
    return origin in (f"http://{host}", f"https://{host}")
