"""`python -m service`: one uvicorn worker, settings from `PSIM_*` variables."""

import gc
import os
import signal
import sys
from types import FrameType

import uvicorn
from pydantic import ValidationError

from models.errors import PsimError
from service import logs
from service.app import create_app
from service.settings import PREFIX, Settings, unknown_variables

KEEP_ALIVE_S = 75
"""How long an idle connection is kept: longer than proxies and pools do (nginx 60 s), or a request
meets a connection that is being closed."""


def load_settings() -> Settings:
    """Return the settings; exit with code 2 and one line for each thing that is wrong."""
    complaints = unknown_variables(os.environ)
    try:
        settings = Settings()
    except ValidationError as error:
        complaints += [
            f"{PREFIX}{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" if e["loc"] else e["msg"]
            for e in error.errors()
        ]
    if complaints:
        sys.stderr.write("".join(f"error: {complaint}\n" for complaint in complaints))
        raise SystemExit(2)
    return settings


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def main() -> None:
    """Serve until SIGTERM or SIGINT, then let running requests end."""
    # As the first process of a container, it would not end at all while it starts; and once all is
    # answered, uvicorn sends itself the signal again, which is no failure.
    signal.signal(signal.SIGTERM, _end)
    settings = load_settings()
    # What was imported stays: a full collection, as after a reload, need not look at it. That is
    # 4 ms in which nothing else runs, instead of 270.
    gc.freeze()
    logs.configure(settings.log_level)
    try:
        app = create_app(settings)
    except PsimError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=settings.drain_s,
        timeout_keep_alive=KEEP_ALIVE_S,
        server_header=False,
    )


if __name__ == "__main__":
    main()
