"""Documentation of routes whose bodies are parsed by hand, more strictly than FastAPI does."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel

from service.errors import ServiceError
from service.http.responses import PROBLEM_JSON
from service.schemas import Problem


def documented(request: type[Any], response: type[Any], statuses: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of a FastAPI route that document its body, answer and errors."""
    content = {"application/json": {"schema": request.model_json_schema()}}
    return {
        "response_model": response,
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": problems(*statuses),
    }


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's description of errors (RFC 9457)."""
    return errors(Problem, PROBLEM_JSON, *statuses)


def errors(kind: type[BaseModel], media: str, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's description of errors of a type."""
    content = {media: {"schema": kind.model_json_schema()}}
    return {s: {"content": content, "description": HTTPStatus(s).phrase} for s in statuses}


def _statuses(kind: type[ServiceError]) -> set[int]:
    own = {kind.status} if hasattr(kind, "status") else set()
    return own.union(*map(_statuses, kind.__subclasses__()))


ERROR_STATUSES = sorted(_statuses(ServiceError))
"""HTTP status of every expected error."""
