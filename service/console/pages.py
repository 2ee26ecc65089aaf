"""The console's pages: query the audit, fill in a template."""

import asyncio
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

import sqlalchemy as sa
from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse

from service.audit import review
from service.audit.exceptions import Known, in_force
from service.audit.rows import as_json
from service.console.access import Check
from service.console.audit_reader import Audit
from service.console.overview import overview
from service.console.query import ConsoleQuery, MarkRequest, ReviewPageQuery
from service.console.rendering import read_form, render, review_address
from service.console.status import ServiceStatus

GetStatuses = Callable[[], Sequence[ServiceStatus]]
"""Returns the status of each model that is served; takes milliseconds for each."""
NO_AUDIT = (
    "There is no audit to show: set PSIM_AUDIT_URL, for example to sqlite:////folder/audit.db, "
    "and restart the service."
)


def routes(audit: Audit | None, statuses: GetStatuses, check: Check) -> APIRouter:
    """Return the pages over an audit; `check` authenticates the user."""
    router = APIRouter(dependencies=[Depends(check)])

    def existing() -> Audit:
        if audit is None:
            raise HTTPException(404, NO_AUDIT)
        return audit

    @router.get("/console")
    async def show_overview(query: Annotated[ConsoleQuery, Query()]) -> Response:
        return await _overview_page(audit, await asyncio.to_thread(statuses), query)

    @router.get("/console/queue")
    async def show_review_queue(query: Annotated[ReviewPageQuery, Query()]) -> Response:
        found = await asyncio.to_thread(statuses)
        return await _review_page(existing(), found, query)

    @router.post("/console/inputs/{id}/mark")
    async def mark(request: Request, id: UUID, user: Annotated[str, Depends(check)]) -> Response:
        return await _mark(existing(), id, await read_form(request, MarkRequest), user)

    @router.get("/console/marks.jsonl")
    async def export() -> Response:
        rows = await existing().marked()
        lines = (json.dumps(as_json(row), ensure_ascii=False) + "\n" for row in rows)
        headers = {"content-disposition": 'attachment; filename="marks.jsonl"'}
        return StreamingResponse(lines, 200, headers, "application/jsonl")

    return router


async def _overview_page(
    audit: Audit | None, statuses: Sequence[ServiceStatus], query: ConsoleQuery
) -> Response:
    now, shown = datetime.now(UTC), None
    if audit is not None:
        # With several views, p-values are multiplied by their number.
        texts = {
            s.digest: (min(group.texts for group in s.thresholds) + 1) // s.views - 1
            for s in statuses
        }
        shown = await audit.read(lambda connection: overview(connection, query, now, texts))
    return render(
        "overview.html", now, query=query, statuses=statuses, overview=shown, no_audit=NO_AUDIT
    )


async def _review_page(
    audit: Audit, statuses: Sequence[ServiceStatus], query: ReviewPageQuery
) -> Response:
    now = datetime.now(UTC)

    def read(
        connection: sa.Connection,
    ) -> tuple[review.Page, review.FlaggedInput | None, Known]:
        done = review.flagged_input(connection, query.done) if query.done else None
        page = review.page(connection, query.filter(now), query.after)
        return page, done, in_force(connection, now)

    page, done, excepted = await audit.read(read)
    shown = {"page": page, "done": done, "excepted": excepted}
    return render("review.html", now, query=query, statuses=statuses, **shown)


async def _mark(audit: Audit, id: UUID, form: MarkRequest, user: str) -> Response:
    new = form.mark_event(user, datetime.now(UTC))
    try:
        was = await audit.write(lambda connection: review.mark(connection, id, new))
    except KeyError:
        raise HTTPException(404, "The audit has no such input, or no longer.") from None
    page = review_address(
        form, done=id, was=was or "", before=form.before, before_id=form.before_id
    )
    return RedirectResponse(f"{page}#done", 303)
