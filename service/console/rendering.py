"""Pages out of templates, and forms out of requests."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode

from fastapi import HTTPException, Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel

from models.detection.screen import Finding
from service.audit import review
from service.audit.exceptions import NOTE_CHARS
from service.audit.rows import Mark
from service.console import formatting
from service.console.query import EXCEPTION_DAYS, PERIODS, ReviewQuery
from service.console.status import predicted_class
from service.schemas import Decision

MAX_FORM_BYTES = 4096
Form = TypeVar("Form", bound=BaseModel)


def render(template: str, now: datetime, **variables: Any) -> Response:
    """Return a page."""
    return HTMLResponse(TEMPLATES.get_template(template).render(now=now, **variables))


def message(
    status: int, title: str, detail: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a page with nothing but a message."""
    response = render("message.html", datetime.now(UTC), title=title, detail=detail)
    response.status_code = status
    response.headers.update(headers or {})
    return response


async def read_form(request: Request, form: type[Form]) -> Form:
    """Return the submitted form.

    Raises:
        HTTPException: it is too large, or not understood.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            raise HTTPException(413, "The form is too large.")
    try:
        fields = dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=20))
        return form.model_validate(fields)
    except ValueError:
        raise HTTPException(422, "The form was not understood.") from None


def review_address(query: ReviewQuery, **parameters: object) -> str:
    """Return the address of the review queue for a query, with more parameters."""
    values = {name: getattr(query, name) for name in ReviewQuery.model_fields} | parameters
    return "/console/queue?" + urlencode({k: v for k, v in values.items() if v is not None})


def _templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("service.console"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (
        formatting.visible,
        formatting.percent,
        formatting.number,
        formatting.count,
        formatting.moment,
    ):
        templates.filters[function.__name__] = function
    templates.globals |= {"PERIODS": PERIODS, "MARKS": [*Mark], "DECISIONS": [*Decision]}
    templates.globals |= {"FINDINGS": [*Finding]}
    templates.globals |= {"EXCEPTION_DAYS": EXCEPTION_DAYS, "NOTE_CHARS": NOTE_CHARS}
    templates.globals |= {"MAX_COUNT": review.MAX_COUNT, "UNMARKED": review.UNMARKED}
    templates.globals |= {"review_address": review_address, "predicted_class": predicted_class}
    return templates


TEMPLATES = _templates()
