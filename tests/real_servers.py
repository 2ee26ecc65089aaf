"""Real servers for tests: the application over a socket, and those that Debian packages."""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
import uvicorn
from fastapi import FastAPI

WITHOUT = "TESTS_WITHOUT_SERVERS"
"""Set to 1 where servers cannot be installed; the gate never does, so that nothing is missed."""


def program(name: str, package: str) -> str:
    """Return the path of a program; a test that needs it fails where it is missing."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = str(debian[-1]) if debian else shutil.which(name)
    if found is None:
        if os.environ.get(WITHOUT) == "1":
            pytest.skip(f"{name} is missing and {WITHOUT} is set")
        pytest.fail(f"{name} is missing: apt-get install {package}, or set {WITHOUT}=1 to skip")
    return found


def peer(variable: str, package: str) -> str:
    """Return a program of a peer that wants an environment of its own; skip where there is none."""
    found = os.environ.get(variable)
    if not found:
        pytest.skip(f"{package} wants an environment of its own: {variable}, docs/compatibility.md")
    return found


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
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait until the condition holds; a refused connection is none that holds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def answers(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), 1):
        return True


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve an application in a thread; yield its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def new_database(url: str) -> str:
    """Make an empty database beside that of `postgres`; return its URL."""
    name = f"test_{time.monotonic_ns()}"
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return url.replace("/postgres", f"/{name}")


@contextmanager
def postgres(folder: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Run PostgreSQL on an empty folder; yield the URL of a database, and the server.

    It refuses to run as root: then it is the user that Debian's package makes.
    """
    user = "postgres" if os.geteuid() == 0 else None
    initdb, server = program("initdb", "postgresql"), program("postgres", "postgresql")
    if user:
        shutil.chown(folder, user)
    data = folder / "data"
    command: list[str | Path] = [
        initdb,
        "-D",
        data,
        "-U",
        "psim",
        "-A",
        "trust",
        "-E",
        "UTF8",
        "--no-locale",
    ]
    subprocess.run([*command, "--no-sync"], user=user, cwd=folder, check=True, capture_output=True)
    port = free_port()
    command = [server, "-D", data, "-p", str(port), "-k", folder, "-F", "-h", "127.0.0.1"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, user=user, cwd=folder, stdout=log, stderr=log)
    url = f"postgresql://psim@127.0.0.1:{port}/postgres"
    try:
        wait_for(lambda: (data / "postmaster.pid").read_text().rstrip().endswith("ready"))
        yield url, process
    finally:
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGINT)  # a fast shutdown
        process.wait(20)


@contextmanager
def redis(port: int, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run an empty Redis that keeps nothing; yield it once it answers."""
    command = [program("redis-server", "redis-server"), "--port", str(port), "--save", ""]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--bind", "127.0.0.1"], cwd=log.parent, stdout=file, stderr=file
        )
    try:
        wait_for(lambda: answers(port))
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(20)


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
