"""The console's pages: ask the audit, fill in a template."""

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

from service.audit import review as queue
from service.audit.rows import Mark, as_json
from service.console import formatting as words
from service.console.access import Check
from service.console.audit_reader import Audit
from service.console.overview import overview
from service.console.query import PERIODS, ConsoleQuery, MarkRequest, ReviewPageQuery, ReviewQuery
from service.console.status import ServiceStatus
from service.schemas import Decision

StatesOf = Callable[[], Sequence[ServiceStatus]]
"""Says how each model is that is served."""
BODY_BYTES = 4096
NO_AUDIT = (
    "Nothing is kept, so there is nothing to show: set PSIM_AUDIT_URL, for example to "
    "sqlite:////folder/audit.db, and start the service again."
)


def address(asked: ReviewQuery, **more: object) -> str:
    """Return the address of the queue that shows what is asked."""
    shown = {name: getattr(asked, name) for name in ReviewQuery.model_fields} | more
    return "/console/queue?" + urlencode({k: v for k, v in shown.items() if v is not None})


def message(
    status: int, title: str, detail: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a page that only says something."""
    response = _page("message.html", datetime.now(UTC), title=title, detail=detail)
    response.status_code = status
    response.headers.update(headers or {})
    return response


def _page(template: str, now: datetime, **shown: Any) -> Response:
    return HTMLResponse(PAGES.get_template(template).render(now=now, **shown))


async def _form(request: Request) -> MarkRequest:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES:
            raise HTTPException(413, "The form is too large.")
    try:
        fields = dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=20))
        return MarkRequest.model_validate(fields)
    except ValueError:
        raise HTTPException(422, "The form was not understood.") from None


def _environment() -> Environment:
    pages = Environment(
        loader=PackageLoader("service.console"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for written in (words.visible, words.percent, words.number, words.moment):
        pages.filters[written.__name__] = written
    pages.globals |= {"PERIODS": PERIODS, "MARKS": [*Mark], "DECISIONS": [*Decision]}
    pages.globals |= {"MOST": queue.MOST, "UNMARKED": queue.UNMARKED, "address": address}
    return pages


PAGES = _environment()


def routes(audit: Audit | None, states: StatesOf, check: Check) -> APIRouter:
    """Return the pages over an audit; `check` says who asks."""
    router = APIRouter()
    who = Annotated[str, Depends(check)]

    def kept() -> Audit:
        if audit is None:
            raise HTTPException(404, NO_AUDIT)
        return audit

    @router.get("/console")
    async def show_overview(asked: Annotated[ConsoleQuery, Query()], name: who) -> Response:
        now, running = datetime.now(UTC), states()
        found = None
        if audit is not None:
            texts = min(one.texts for state in running for one in state.thresholds)
            found = await audit.ask(lambda c: overview(c, asked, now, texts))
        return _page(
            "overview.html", now, asked=asked, states=running, found=found, missing=NO_AUDIT
        )

    @router.get("/console/queue")
    async def show_queue(asked: Annotated[ReviewPageQuery, Query()], name: who) -> Response:
        now = datetime.now(UTC)

        def ask(connection: sa.Connection) -> tuple[queue.Page, queue.Found | None]:
            done = queue.one(connection, asked.done) if asked.done else None
            return queue.page(connection, asked.filter(now), asked.behind), done

        page, done = await kept().ask(ask)
        texts = states()[0].keeps_texts
        return _page("queue.html", now, asked=asked, page=page, done=done, keeps_texts=texts)

    @router.post("/console/inputs/{id}/mark")
    async def mark(request: Request, id: UUID, name: who) -> Response:
        sent = await _form(request)
        new = sent.marked(name, datetime.now(UTC))
        try:
            was = await kept().change(lambda c: queue.mark(c, id, new))
        except KeyError:
            raise HTTPException(404, "The audit has no such input, or no longer.") from None
        here = address(sent, done=id, was=was or "", before=sent.before, before_id=sent.before_id)
        return RedirectResponse(f"{here}#done", 303)

    @router.get("/console/marks.jsonl")
    async def export(name: who) -> Response:
        rows = await kept().marked()
        lines = (json.dumps(as_json(row), ensure_ascii=False) + "\n" for row in rows)
        headers = {"content-disposition": 'attachment; filename="marks.jsonl"'}
        return StreamingResponse(lines, 200, headers, "application/jsonl")

    return router
