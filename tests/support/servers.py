"""Real servers: the application over a socket or as a process, and others."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.types import ASGIApp

from tests.support.waiting import wait_for


@contextmanager
def answering(command: Sequence[str | Path], url: str, log: Path) -> Iterator[None]:
    """Run a peer until the block ends, once it answers a URL with 200."""
    # What Python would import of ours is not for its environment.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with log.open("w") as file:
        process = subprocess.Popen([*command], env=environment, stdout=file, stderr=file)

    def answers() -> bool:
        assert process.poll() is None, f"it has died:\n{log.read_text()}"
        try:
            return httpx.get(url).status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_for(answers, 120)
        yield
    finally:
        process.terminate()
        process.wait(20)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def answers(port: int) -> bool:
    """Whether somebody listens on a port; otherwise the connection is refused."""
    with socket.create_connection(("127.0.0.1", port), 1):
        return True


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Serve an application in a thread; yield its host and port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


@contextmanager
def running(*command: str | Path, log: Path) -> Iterator[None]:
    """Run a server until the block ends."""
    with log.open("w") as file:
        process = subprocess.Popen([*command], stdout=file, stderr=subprocess.STDOUT)
    try:
        yield
        assert process.poll() is None, f"the server has died:\n{log.read_text()}"
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def served(bundle: Path, **settings: str) -> Iterator[httpx.Client]:
    """Run `python -m service` on a free port until the block ends; SIGTERM must end it cleanly."""
    environment = os.environ | {"PSIM_BUNDLE": str(bundle), "PSIM_PORT": "0"}
    environment |= {f"PSIM_{name}": value for name, value in settings.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "service"], env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        port = None
        for line in process.stderr:
            if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                port = int(found[1])
                break
        assert port, "the service did not start"
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            client.headers["x-server-pid"] = str(process.pid)
            yield client
        process.send_signal(signal.SIGTERM)
        logs = process.stderr.read()
        assert process.wait(30) == 0
        assert "hotel" not in logs, "a text reached the logs"
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
