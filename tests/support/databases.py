"""A real PostgreSQL and a real Redis."""

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from tests.support.programs import program
from tests.support.servers import answers, free_port
from tests.support.waiting import wait_for


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

    It refuses to run as root: then it is the user that Debian's package makes, or nobody.
    """
    user = None
    if os.geteuid() == 0:
        known = {entry.pw_name for entry in pwd.getpwall()}
        user = "postgres" if "postgres" in known else "nobody"
    initdb, server = program("initdb"), program("postgres")
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
    command = [program("redis-server"), "--port", str(port), "--save", ""]
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
