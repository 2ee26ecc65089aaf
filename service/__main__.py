"""`python -m service`: one uvicorn worker, settings from `PSIM_*` variables."""

import signal
import sys
from types import FrameType

import uvicorn

from models.errors import PsimError
from service.app import create_process_app
from service.http.server import KEEP_ALIVE_S
from service.settings import load_settings


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def main() -> None:
    """Serve until SIGTERM or SIGINT, then let running requests end; exit with 2 on bad settings."""
    # PID 1 of a container ignores SIGTERM by default, also while it starts. And uvicorn repeats the
    # signal after a clean shutdown, which is no failure.
    signal.signal(signal.SIGTERM, _exit)
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
