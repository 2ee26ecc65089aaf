"""The gateway and its peers as processes: installed, started, watched, stopped."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from harness import Setup

HERE = Path(__file__).parent
ANSWERED = {200, 403}
"""403 is how the gateway answers a text that it rejects. Others are refusals and failures."""
START_S, STOP_S = 180, 3
Body = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """A server that classifies texts.

    Its command gets the Python of its environment, the setup, a dtype and a port.
    """

    name: str
    command: Callable[[str, Setup, str, int], list[str]]
    package: str
    """Whose version is told."""
    environment: str | None = None
    """Name of a requirements file beside `peers`, for what does not go together with ours."""
    constrained: bool = False
    """Install what our own constraints say, where the file does not."""
    guards: bool = False
    ready: str = "/ready"
    body: Callable[[Setup, str], Body] = lambda setup, text: {"inputs": text}
    variables: Callable[[Setup, str, int], dict[str, str]] = lambda setup, dtype, port: {}


class CannotRunError(Exception):
    """A peer cannot be installed or started here; says why."""


def python_of(setup: Setup, environment: str | None, *, constrained: bool = False) -> Path:
    """Return the Python of an environment, set up from its requirements file at the first use.

    Raises:
        CannotRunError: pip failed.
    """
    if environment is None:
        return Path(sys.executable)
    folder = setup.build / "venvs" / environment
    python = folder.absolute() / "bin" / "python"
    requirements = HERE / "peers" / f"{environment}.txt"
    done = folder / ".installed"
    if not done.exists() or done.read_text() != requirements.read_text():
        also = ["-c", str(HERE.parent / "constraints.txt")] if constrained else []
        print(f"installing {environment}, at its first use only")
        try:
            _run([sys.executable, "-m", "venv", str(folder)])
            _run([str(python), "-m", "pip", "install", "-q", *also, "-r", str(requirements)])
        except subprocess.CalledProcessError as error:
            said = [line for line in error.stderr.splitlines() if line.startswith("ERROR")]
            raise CannotRunError(f"pip: {said[-1] if said else error}") from error
        done.write_text(requirements.read_text())
    return python


def version_of(python: Path, package: str) -> str:
    """Return the version of a package in an environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return _run([str(python), "-c", code]).strip()


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def plain_victim(setup: Setup) -> Path:
    """Return a folder with the bundle's victim and tokenizer, as transformers saves a model."""
    folder = setup.build.absolute() / "victim"
    for part in ("victim", "tokenizer"):
        shutil.copytree(setup.bundle / part, folder, dirs_exist_ok=True)
    return folder


def _texts_file(setup: Setup) -> Path:
    file = setup.build / "texts.json"
    file.write_text(json.dumps(setup.texts))
    return file


def _gateway(python: str, setup: Setup, dtype: str, port: int) -> list[str]:
    return [python, "-m", "service"]


def _gateway_variables(setup: Setup, dtype: str, port: int) -> dict[str, str]:
    chosen = {"PSIM_ENGINE": setup.engine} if setup.engine else {}
    return chosen | {
        "PSIM_BUNDLE": str(setup.bundle),
        "PSIM_DTYPE": dtype,
        "PSIM_PORT": str(port),
        "PSIM_THREADS": str(setup.threads),
    }


def _fastapi(guard: str) -> Callable[[str, Setup, str, int], list[str]]:
    def command(python: str, setup: Setup, dtype: str, port: int) -> list[str]:
        return [
            python, str(HERE / "peers" / "fastapi_server.py"),
            str(plain_victim(setup)), "--texts", str(_texts_file(setup)),
            "--guard", guard, "--dtype", dtype, "--port", str(port),
            "--threads", str(setup.threads),
        ]  # fmt: skip

    return command


def _litserve(python: str, setup: Setup, dtype: str, port: int) -> list[str]:
    script = HERE / "peers" / "litserve_server.py"
    return [python, str(script), str(plain_victim(setup)), dtype, str(port), str(setup.threads)]


def _infinity(python: str, setup: Setup, dtype: str, port: int) -> list[str]:
    return [
        str(Path(python).with_name("infinity_emb")), "v2", "--model-id", str(plain_victim(setup)),
        "--served-model-name", "victim", "--engine", "torch", "--device", "cpu", "--dtype", dtype,
        "--port", str(port), "--log-level", "warning",
    ]  # fmt: skip


PEERS = (
    Peer("PSIM Gateway", _gateway, "psim-gateway", guards=True, variables=_gateway_variables),
    Peer("transformers + FastAPI", _fastapi("none"), "transformers"),
    Peer("two passes + FastAPI", _fastapi("second-pass"), "transformers", guards=True),
    Peer("STRIP + FastAPI", _fastapi("strip"), "transformers", guards=True),
    Peer("LitServe", _litserve, "litserve", "litserve", constrained=True, ready="/health"),
    Peer(
        "infinity", _infinity, "infinity-emb", "infinity", ready="/health",
        body=lambda setup, text: {"model": "victim", "input": [text]},
    ),
)  # fmt: skip


@dataclass
class Running:
    """A server that is ready, and what it has taken so far."""

    process: psutil.Process
    port: int
    start_s: float
    """From the spawn to the first 200 of its ready route."""
    peak_mb: float = 0
    """Of the resident memory of all its processes; pages that they share count in each."""


@contextlib.contextmanager
def running(peer: Peer, python: Path, setup: Setup, dtype: str) -> Iterator[Running]:
    """Run a peer on the server CPUs; its output goes into a log beside the results.

    Raises:
        CannotRunError: it stopped, or was not ready in time; says where its log is.
    """
    port = free_port()
    log = setup.build / "logs" / f"{peer.name}, {dtype}.log"
    log.parent.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(setup.threads),
        "PYTHONPATH": str(HERE.parent),
        "DO_NOT_TRACK": "1",
        **peer.variables(setup, dtype, port),
    }
    command = peer.command(str(python), setup, dtype, port)
    with log.open("w") as output:
        started = time.perf_counter()
        process = psutil.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        os.sched_setaffinity(process.pid, setup.server_cpus)
        done = threading.Event()
        try:
            _await_ready(process, f"http://127.0.0.1:{port}{peer.ready}", log)
            server = Running(process, port, time.perf_counter() - started)
            watch = threading.Thread(target=_watch, args=(process, server, done))
            watch.start()
            yield server
        finally:
            done.set()
            _stop(process)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _await_ready(process: psutil.Popen, url: str, log: Path) -> None:
    deadline = time.perf_counter() + START_S
    while time.perf_counter() < deadline:
        if process.poll() is not None:
            raise CannotRunError(f"stopped with code {process.returncode}; see logs/{log.name}")
        with contextlib.suppress(OSError):
            if urllib.request.urlopen(url, timeout=5).status == 200:
                return
        time.sleep(0.02)
    raise CannotRunError(f"not ready after {START_S} s; see logs/{log.name}")


def _family(process: psutil.Popen) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


def _watch(process: psutil.Popen, server: Running, done: threading.Event) -> None:
    while not done.wait(0.1):
        total = 0
        for member in _family(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += member.memory_info().rss
        server.peak_mb = max(server.peak_mb, total / 2**20)


def _stop(process: psutil.Popen) -> None:
    family = _family(process)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.terminate()
    _, alive = psutil.wait_procs(family, STOP_S)
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def load(
    peer: Peer, server: Running, setup: Setup, levels: list[dict[str, Any]], locust: Path
) -> list[dict[str, Any]]:
    """Put load on a server, level by level; see `locust_load.py`.

    Every text is a request of its own, and they are taken in turn.

    Raises:
        CannotRunError: the load generator failed.
    """
    spec = {
        "host": f"http://127.0.0.1:{server.port}",
        "path": "/classify",
        "bodies": [peer.body(setup, text) for text in setup.texts],
        "levels": levels,
        "answered": sorted(ANSWERED),
    }
    with subprocess.Popen(
        [str(locust), str(HERE / "locust_load.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as generator:  # fmt: skip
        os.sched_setaffinity(generator.pid, setup.load_cpus)
        output, errors = generator.communicate(json.dumps(spec))
    if generator.returncode:
        raise CannotRunError(f"the load generator failed: {errors[-500:]}")
    found: list[dict[str, Any]] = json.loads(output)["levels"]
    return found
