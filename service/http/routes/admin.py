"""What only an operator may ask for; there is nothing of it unless `PSIM_ADMIN` is on."""

from typing import Any

from fastapi import APIRouter, Response

from service.http.openapi import problems
from service.http.responses import json_response, problem
from service.lifecycle.registry import Registry
from service.lifecycle.reload import Reloader, ReloadFailed, ReloadRunning


def routes(models: Registry, reloader: Reloader) -> APIRouter:
    """Return the operator's routes."""
    router = APIRouter()

    @router.post("/admin/reload", response_model=None, responses=problems(401, 403, 409, 422))
    async def reload() -> Response:
        """Read models and bundles anew, and serve them if all is well."""
        try:
            await reloader.reload()
        except ReloadRunning as error:
            return problem(409, "reload_running", str(error))
        except ReloadFailed as error:
            return problem(422, "reload_failed", str(error))
        served: dict[str, Any] = {name: b.digest for name, b in models.bundles.items()}
        return json_response(200, {"bundles": served})

    return router
