"""The console's pages of reviewed exceptions, and of API keys and their policies."""

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

import sqlalchemy as sa
from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import RedirectResponse

from service.audit import exceptions, review
from service.audit.schema import AuditError
from service.console.access import Check
from service.console.audit_reader import Audit
from service.console.pages import NO_AUDIT, GetStatuses
from service.console.query import ExceptionRequest
from service.console.rendering import read_form, render, review_address
from service.security.keys.file import Key

GetKeys = Callable[[], Mapping[str, Key]]
"""Returns the API keys by name."""
NO_HMAC = (
    "The audit has no HMAC of this text: set PSIM_AUDIT_KEY, by which exceptions know their texts."
)


def exception_routes(
    audit: Audit | None, statuses: GetStatuses, check: Check, keys: GetKeys | None
) -> APIRouter:
    """Return the pages; `check` authenticates the user, who is the reviewer."""
    router = APIRouter(dependencies=[Depends(check)])

    def existing() -> Audit:
        if audit is None:
            raise HTTPException(404, NO_AUDIT)
        return audit

    @router.get("/console/exceptions")
    async def show_exceptions() -> Response:
        found = await existing().read(exceptions.recorded)
        shown = await asyncio.to_thread(statuses)
        return render("exceptions.html", datetime.now(UTC), exceptions=found, statuses=shown)

    @router.post("/console/inputs/{id}/exception")
    async def add(request: Request, id: UUID, user: Annotated[str, Depends(check)]) -> Response:
        form = await read_form(request, ExceptionRequest)
        await existing().write(lambda connection: _add(connection, id, form, user))
        return RedirectResponse(
            review_address(form, before=form.before, before_id=form.before_id), 303
        )

    @router.post("/console/exceptions/{id}/remove")
    async def remove(id: UUID, user: Annotated[str, Depends(check)]) -> Response:
        await existing().write(lambda connection: _remove(connection, id, user))
        return RedirectResponse("/console/exceptions", 303)

    @router.get("/console/keys")
    async def show_keys() -> Response:
        shown = await asyncio.to_thread(statuses)
        found = keys() if keys else None
        return render("keys.html", datetime.now(UTC), keys=found, statuses=shown)

    return router


def _add(connection: sa.Connection, id: UUID, form: ExceptionRequest, user: str) -> None:
    """Add an exception for the text of an input.

    Raises:
        HTTPException: the input does not exist, has no HMAC, or has an exception already.
    """
    found = review.flagged_input(connection, id)
    if found is None:
        raise HTTPException(404, "The audit has no such input, or no longer.")
    if found.row.text_hmac is None:
        raise HTTPException(409, NO_HMAC)
    now = datetime.now(UTC)
    new = form.exception(found.row.digest, found.row.text_hmac, user, now)
    try:
        exceptions.add(connection, new)
    except AuditError as error:
        raise HTTPException(409, f"{error}.") from None


def _remove(connection: sa.Connection, id: UUID, user: str) -> None:
    try:
        exceptions.remove(connection, id, user, datetime.now(UTC))
    except AuditError as error:
        raise HTTPException(404, f"{error}.") from None
