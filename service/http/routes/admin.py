"""Routes for operators, served only if `PSIM_ADMIN` is on."""

from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from service.errors import CrossSite
from service.http.openapi import problems
from service.http.responses import json_response, problem
from service.http.routing import add_route
from service.lifecycle.registry import Registry
from service.lifecycle.reload import Reloader, ReloadFailed, ReloadRunning
from service.security.origin import same_origin


class AdminRoutes:
    """Reloading."""

    def __init__(self, models: Registry, reloader: Reloader) -> None:
        self._models, self._reloader = models, reloader

    async def reload(self) -> Response:
        """Read models and bundles again, and serve them if all of them work."""
        try:
            await self._reloader.reload()
        except ReloadRunning as error:
            return problem(409, "reload_running", str(error))
        except ReloadFailed as error:
            return problem(422, "reload_failed", str(error))
        served: dict[str, Any] = {name: b.digest for name, b in self._models.bundles.items()}
        return json_response(200, {"bundles": served})

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter(dependencies=[Depends(_not_cross_site)])
        errors = problems(401, 403, 409, 422)
        add_route(router, "/admin/reload", self.reload, response_model=None, responses=errors)
        return router


async def _not_cross_site(request: Request) -> None:
    """Raise `CrossSite` if another site's page has a browser send the request."""
    if same_origin(request.headers) is False:
        raise CrossSite("the request comes from a page of another site; send it from a program")
