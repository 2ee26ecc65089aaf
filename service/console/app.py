"""The console as an application: its pages, its errors, and which requests it accepts."""

from collections.abc import Sequence
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from service.audit.schema import AuditError
from service.console.access import Check, SameOrigin, anybody
from service.console.audit_reader import Audit
from service.console.exception_pages import GetKeys, exception_routes
from service.console.pages import GetStatuses, routes
from service.console.rendering import message
from service.http.responses import add_request_ids

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def console_app(
    audit: Audit | None,
    statuses: GetStatuses,
    hosts: Sequence[str] = LOOPBACK,
    check: Check = anybody,
    keys: GetKeys | None = None,
) -> FastAPI:
    """Return the console.

    Args:
        audit: the audit to show; None if nothing is kept.
        statuses: returns the status of each model.
        hosts: host names by which browsers reach it. Others are refused: an attacker can point a
            name here, and a browser then takes the attacker's pages and ours for one site.
        check: authenticates the user.
        keys: returns the API keys; None if the service has none.
    """
    app = FastAPI(title="PSIM console", openapi_url=None, redirect_slashes=False)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*hosts], www_redirect=False)
    app.add_middleware(SameOrigin)
    add_request_ids(app)
    app.mount("/console/static", StaticFiles(directory=Path(__file__).parent / "static"))
    app.add_api_route("/", lambda: RedirectResponse("/console"), response_model=None)
    app.include_router(routes(audit, statuses, check))
    app.include_router(exception_routes(audit, statuses, check, keys))
    app.add_exception_handler(AuditError, _on_audit_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_bad_query)
    return app


async def _on_audit_error(request: Request, error: Exception) -> Response:
    hint = "If it took too long, ask for a shorter time; else see the log of the service."
    return message(503, "The audit does not answer", f"{error}. {hint}")


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
    return message(error.status_code, "That did not work", str(error.detail), error.headers)


async def _on_bad_query(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for it
    names = sorted({str(e["loc"][-1]) for e in error.errors()})
    return message(422, "That cannot be shown", f"Not understood: {', '.join(names)}.")
