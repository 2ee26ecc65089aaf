"""What Ray Serve costs: the gateway on it, of one and of two replicas, beside plain uvicorn.

One replica is called by Serve's proxy, and at its own port. All run one after the other on the same
CPUs, uvicorn first and last. Printed are texts a second and
the median of a call, and processor time a text, by who took it: replicas (or the service), Serve's
proxy, the rest of Ray, and this load generator.

    python benchmarks/ray_serve.py BUNDLE TEXTS.jsonl
"""

import asyncio
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import aiohttp
import httpx
import psutil
import typer
import yaml
from hop import free_port, process, round_of
from rich.console import Console
from rich.table import Table

from models.offline.io.samples import load_samples

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "deploy/ray/serve.yaml"
CONNECTIONS = (1, 8, 32)
START_S = 300
WHO = ("replicas", "proxy", "Ray", "load")


@contextmanager
def on_ray(
    config: Mapping[str, Any],
    variables: Mapping[str, str] = MappingProxyType({}),
    metrics_port: int | None = None,
) -> Iterator[str]:
    """Run a cluster of one node, and on it what is configured; yield the URL of Serve's proxy."""
    environment = os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        # On loopback addresses only, in other words.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Otherwise its processes give way to all others here, and take minutes to start.
        "RAY_worker_niceness": "0",
    }
    environment |= variables
    # A short path, since sockets are made in it.
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        file, log = Path(folder) / "serve.yaml", Path(folder) / "log"
        file.write_text(yaml.safe_dump(config))
        program = str(Path(__file__).with_name("ray_cluster.py"))
        command = [sys.executable, program, str(file), f"{folder}/ray"]
        command.append(str(metrics_port or free_port()))
        with log.open("w") as output:
            running = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        url = f"http://127.0.0.1:{config['http_options']['port']}"
        deadline = time.monotonic() + START_S
        try:
            while not is_ready(f"{url}/ready"):
                assert running.poll() is None, f"the cluster has died:\n{log.read_text()}"
                assert time.monotonic() < deadline, f"it does not serve:\n{log.read_text()}"
                time.sleep(0.2)
            yield url
        finally:
            whole = list[psutil.Process]()
            with suppress(psutil.NoSuchProcess):  # it has died, and the assertion says why
                driver = psutil.Process(running.pid)
                whole = [*driver.children(recursive=True), driver]
            # As from the keyboard, which `serve run` takes for its end.
            running.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):  # it may hang once in a while
                running.wait(30)
            for left in whole:
                with suppress(psutil.NoSuchProcess):
                    left.kill()
            running.wait()


def is_ready(url: str, headers: Mapping[str, str] | None = None) -> bool:
    try:
        return httpx.get(url, headers=headers).status_code == 200
    except httpx.TransportError:
        return False


def configuration(bundle: Path, replicas: int, port: int) -> dict[str, Any]:
    """Return the committed configuration with a fixed number of replicas."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    config["http_options"]["port"] = port
    (application,) = config["applications"]
    application["runtime_env"]["env_vars"]["PSIM_BUNDLE"] = str(bundle.absolute())
    (deployment,) = application["deployments"]
    del deployment["autoscaling_config"]
    deployment["num_replicas"] = replicas
    return config


def processor_seconds() -> dict[str, float]:
    """Return what each of `WHO` has taken so far."""
    seconds = dict.fromkeys(WHO, 0.0)
    me = psutil.Process()
    for one in [me, *me.children(recursive=True)]:
        try:
            name, times = " ".join(one.cmdline()), one.cpu_times()
        except psutil.Error:
            continue
        if one == me:
            who = "load"
        elif "ServeReplica" in name or "-m service" in name:
            who = "replicas"
        else:
            who = "proxy" if "ProxyActor" in name else "Ray"
        seconds[who] += times.user + times.system
    return seconds


async def measure(url: str, name: str, texts: Sequence[str], table: Table) -> None:
    async with aiohttp.ClientSession() as session:
        for connections in CONNECTIONS:
            await round_of(session, url, texts[: 8 * connections], connections)  # to warm up
            before, started = processor_seconds(), time.perf_counter()
            took = await round_of(session, url, texts, connections)
            seconds = time.perf_counter() - started
            after = processor_seconds()
            table.add_row(
                name,
                str(connections),
                f"{len(texts) / seconds:.0f}",
                f"{1000 * statistics.median(s for s, _ in took):.1f}",
                *(f"{1000 * (after[who] - before[who]) / len(texts):.1f}" for who in WHO),
            )


@asynccontextmanager
async def uvicorn(bundle: Path) -> AsyncIterator[str]:
    port = free_port()
    settings = {"PSIM_BUNDLE": str(bundle), "PSIM_PORT": str(port), "PSIM_THREADS": "1"}
    async with process(["-m", "service"], f"http://127.0.0.1:{port}", **settings) as url:
        yield url


async def compare(bundle: Path, texts: Sequence[str]) -> Table:
    table = Table("", "connections", "texts/s", "p50, ms", *(f"{who}, ms" for who in WHO))
    async with uvicorn(bundle) as url:
        await measure(url, "uvicorn", texts, table)
    for replicas in (1, 2):
        with on_ray(configuration(bundle, replicas, free_port())) as url:
            await measure(url, f"Ray Serve, {replicas}", texts, table)
            if replicas == 1:
                (group,) = httpx.get(f"{url}/replicas").json()
                (address,) = group["targets"]
                await measure(f"http://{address}", "Ray Serve, 1, own port", texts, table)
    async with uvicorn(bundle) as url:
        await measure(url, "uvicorn again", texts, table)
    return table


def main(
    bundle: Path,
    texts: str,
    most: Annotated[int, typer.Option(help="Texts in a round.")] = 1024,
) -> None:
    samples = [s.text for s in load_samples(texts, drop_empty=True)][:most]
    Console(width=120).print(asyncio.run(compare(bundle, samples)))


if __name__ == "__main__":
    typer.run(main)
