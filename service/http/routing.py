"""FastAPI routers that follow the route table."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request

from service.route_table import ROUTES


def add_route(
    router: APIRouter, path: str, endpoint: Callable[..., Any], **documentation: Any
) -> None:
    """Serve a path as the route table declares it.

    Raises:
        KeyError: the table lacks the path.
    """
    route = ROUTES[path]
    hidden = [method for method in route.methods if method == "HEAD" or not route.documented]
    shown = [method for method in route.methods if method not in hidden]
    for methods in filter(None, (shown, hidden)):
        router.add_api_route(
            path, endpoint, methods=methods, include_in_schema=methods is shown, **documentation
        )


def prefixed_model(request: Request) -> str | None:
    """Return the name of the model in the prefix of the path, if it has one."""
    name: str | None = request.path_params.get("name")
    return name
