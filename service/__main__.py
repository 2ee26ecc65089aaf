"""`python -m service`: one uvicorn worker, settings from `PSIM_*` variables."""

import signal
import sys
from types import FrameType

import uvicorn

from models.errors import PsimError
from service.app import create_process_app
from service.settings import load_settings

KEEP_ALIVE_S = 75
"""How long an idle connection is kept: longer than proxies and pools do (nginx 60 s), or a request
meets a connection that is being closed."""


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def main() -> None:
    """Serve until SIGTERM or SIGINT, then let running requests end; exit with 2 if it cannot be."""
    # As the first process of a container, it would not end at all while it starts; and once all is
    # answered, uvicorn sends itself the signal again, which is no failure.
    signal.signal(signal.SIGTERM, _end)
    try:
        settings = load_settings()
        app = create_process_app(settings)
    except PsimError as error:
        sys.stderr.write("".join(f"error: {line}\n" for line in str(error).splitlines()))
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
