"""`python -m service`: one uvicorn worker, settings from `PSIM_*` variables."""

import gc
import sys
from typing import NoReturn

import uvicorn

from models.errors import PsimError
from service import logs
from service.app import create_app
from service.settings import load_settings


def main() -> None:
    """Serve until SIGTERM or SIGINT, then let running requests end; exit with 2 if it cannot be."""
    try:
        settings = load_settings()
    except PsimError as error:
        _refuse(error)
    # What was imported stays: a full collection, as after a reload, need not look at it. That is
    # 4 ms in which nothing else runs, instead of 270.
    gc.freeze()
    logs.configure(settings.log_level)
    try:
        app = create_app(settings)
    except PsimError as error:
        _refuse(error)
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=settings.drain_s,
        server_header=False,
    )


def _refuse(error: PsimError) -> NoReturn:
    sys.stderr.write("".join(f"error: {line}\n" for line in str(error).splitlines()))
    raise SystemExit(2) from error


if __name__ == "__main__":
    main()
