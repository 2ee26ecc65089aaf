"""The console's pages: query the audit, fill in a template."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode
from uuid import UUID

import sqlalchemy as sa
from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from models.detection.screen import Finding
from service.audit import review
from service.audit.rows import Mark, as_json
from service.console import formatting
from service.console.access import Check
from service.console.audit_reader import Audit
from service.console.overview import overview
from service.console.query import PERIODS, ConsoleQuery, MarkRequest, ReviewPageQuery, ReviewQuery
from service.console.status import ServiceStatus, predicted_class
from service.schemas import Decision

GetStatuses = Callable[[], Sequence[ServiceStatus]]
"""Returns the status of each model that is served; takes milliseconds for each."""
MAX_FORM_BYTES = 4096
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
        return await _mark(existing(), id, await _form(request), user)

    @router.get("/console/marks.jsonl")
    async def export() -> Response:
        rows = await existing().marked()
        lines = (json.dumps(as_json(row), ensure_ascii=False) + "\n" for row in rows)
        headers = {"content-disposition": 'attachment; filename="marks.jsonl"'}
        return StreamingResponse(lines, 200, headers, "application/jsonl")

    return router


def message(
    status: int, title: str, detail: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a page with nothing but a message."""
    response = _page("message.html", datetime.now(UTC), title=title, detail=detail)
    response.status_code = status
    response.headers.update(headers or {})
    return response


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
    return _page(
        "overview.html", now, query=query, statuses=statuses, overview=shown, no_audit=NO_AUDIT
    )


async def _review_page(
    audit: Audit, statuses: Sequence[ServiceStatus], query: ReviewPageQuery
) -> Response:
    now = datetime.now(UTC)

    def read(connection: sa.Connection) -> tuple[review.Page, review.FlaggedInput | None]:
        done = review.flagged_input(connection, query.done) if query.done else None
        return review.page(connection, query.filter(now), query.after), done

    page, done = await audit.read(read)
    return _page("review.html", now, query=query, statuses=statuses, page=page, done=done)


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


async def _form(request: Request) -> MarkRequest:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            raise HTTPException(413, "The form is too large.")
    try:
        fields = dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=20))
        return MarkRequest.model_validate(fields)
    except ValueError:
        raise HTTPException(422, "The form was not understood.") from None


def review_address(query: ReviewQuery, **parameters: object) -> str:
    """Return the address of the review queue for a query, with more parameters."""
    values = {name: getattr(query, name) for name in ReviewQuery.model_fields} | parameters
    return "/console/queue?" + urlencode({k: v for k, v in values.items() if v is not None})


def _page(template: str, now: datetime, **variables: Any) -> Response:
    return HTMLResponse(TEMPLATES.get_template(template).render(now=now, **variables))


def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("service.console"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (formatting.visible, formatting.percent, formatting.number, formatting.moment):
        templates.filters[function.__name__] = function
    templates.globals |= {"PERIODS": PERIODS, "MARKS": [*Mark], "DECISIONS": [*Decision]}
    templates.globals |= {"FINDINGS": [*Finding]}
    templates.globals |= {"MAX_COUNT": review.MAX_COUNT, "UNMARKED": review.UNMARKED}
    templates.globals |= {"review_address": review_address, "predicted_class": predicted_class}
    return templates


TEMPLATES = _templates()
