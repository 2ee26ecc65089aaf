"""The gateway on a local cluster of Ray: contract, replicas, their metrics, their death."""

import json
import os
import signal
import threading
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from soak import counted
from transformers import PreTrainedTokenizerBase

from service.app import create_app
from service.security.keys.file import Scope
from service.settings import Settings, unknown_variables
from tests.support.bundles import fit_tiny
from tests.support.contract import asking, contract
from tests.support.fakes import fake_bundle
from tests.support.families import tiny_victim
from tests.support.keys import KEY, bearer, keys_file
from tests.support.paths import ROOT
from tests.support.programs import program
from tests.support.servers import free_port, running
from tests.support.waiting import wait_for

pytest.importorskip("ray", reason="needs the extra ray")
from ray.serve.schema import ServeDeploySchema
from ray_serve import CONFIG, is_ready, on_ray

from service.ray.replica import also_serve

TEXT = "a quiet film that takes its time"
INPUTS = 32
"""Of each request of `load`."""
FAILED = "ray_serve_num_http_error_requests_total"
START_S = 240
"""Time for a replica to start beside one that is busy, on a machine that runs other tests too."""


@dataclass
class Cluster:
    url: str
    """Of Serve's proxy."""
    statistics: str
    """Where Ray's own metrics are."""


@pytest.fixture(scope="module")
def cluster(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Run the committed configuration, less what takes minutes, and the gateway of the contract."""
    bundle = fit_tiny(tiny_victim("bert"), tokenizer, tmp_path_factory.mktemp("ray") / "bundle")
    statistics = free_port()
    config = yaml.safe_load(CONFIG.read_text())
    config["http_options"]["port"] = free_port()
    (application,) = config["applications"]
    # Random weights find anything suspicious.
    application["runtime_env"]["env_vars"] |= {
        "PSIM_BUNDLE": str(bundle),
        "PSIM_MODE": "shadow",
        "PSIM_QUEUE_S": "30",  # a replica that starts slows down the one that answers
    }
    (deployment,) = application["deployments"]
    scaling = deployment["autoscaling_config"]
    scaling |= {"min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 0, "look_back_period_s": 1}
    # More in the queue than Serve's default lets in; by that only, since a core is soon busy here.
    scaling["policy"]["policy_kwargs"] = {
        "queued_characters": 8 * INPUTS * len(TEXT),
        "busy_cores": 99,
    }
    config["applications"].append(
        {
            "name": "contract",
            "route_prefix": "/contract",
            "import_path": "tests.support.ray_contract:app",
        }
    )
    variables = {
        "PYTHONPATH": str(ROOT),
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
    }
    with on_ray(config, variables, statistics) as url:
        asked = {"x-test": '["first", {}]'}
        wait_for(lambda: is_ready(f"{url}/contract/live", asked), START_S)
        yield Cluster(url, f"http://127.0.0.1:{statistics}/metrics")


def replicas(cluster: Cluster) -> list[str]:
    """Return where the replicas listen themselves; none, if one died of which this was asked."""
    answer = httpx.get(f"{cluster.url}/replicas")
    if answer.status_code != 200:
        return []
    ((targets,),) = [group.values() for group in answer.json()]
    return list(targets)


def inputs(address: str) -> int:
    """Return how many inputs a replica has decided on."""
    return _sum(f"http://{address}/metrics", "psim_inputs_total")


def failures(cluster: Cluster, code: int) -> int:
    """Return how many answers to `ask` with this status Ray's own metrics count."""
    labels = {"application": "psim", "method": "POST", "error_code": str(code)}
    return _sum(cluster.statistics, FAILED, **labels)


def _sum(url: str, name: str, **labels: str) -> int:
    return counted(httpx.get(url).text, name, **labels)


def ask(client: httpx.Client, inputs: int = 1) -> int:
    return client.post("/classify", json={"inputs": [TEXT] * inputs}).status_code


@contextmanager
def load(cluster: Cluster, callers: int = 8) -> Iterator[Counter[int]]:
    """Have several callers ask again and again; count the answers by their status.

    One that gets no answer within the time fails the test.
    """
    statuses: Counter[int] = Counter()
    enough = threading.Event()

    def caller() -> None:
        with httpx.Client(base_url=cluster.url, timeout=20) as client:
            while not enough.is_set():
                statuses[ask(client, INPUTS)] += 1

    with ThreadPoolExecutor(callers) as pool:
        running = [pool.submit(caller) for _ in range(callers)]
        try:
            yield statuses
        finally:
            enough.set()
            for one in running:
                one.result()


CONTRACT = contract()
globals().update(CONTRACT)


@pytest.fixture(autouse=True, scope="module")
def ask_the_cluster(cluster: Cluster) -> Iterator[None]:
    """Have the tests of the contract ask the cluster, of which each has a gateway of its own."""

    @asynccontextmanager
    async def client_of(**changes: Any) -> AsyncIterator[httpx.AsyncClient]:
        headers = {"x-test": json.dumps([uuid.uuid4().hex, changes])}
        url = f"{cluster.url}/contract"
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=20) as client:
            yield client

    with asking(client_of):
        yield


def test_the_contract_is_asked_by_most_of_its_tests() -> None:
    assert len(CONTRACT) > 25


def test_the_proxy_sends_the_request_id_once_and_as_it_came(cluster: Cluster) -> None:
    for given in ("abc-1.2_3", None):
        answer = httpx.get(f"{cluster.url}/live", headers={"x-request-id": given} if given else {})
        (found,) = answer.headers.get_list("x-request-id")
        assert found == (given or found)


async def test_where_replicas_are_is_told_to_keys_that_read_metrics(tmp_path: Path) -> None:
    settings = Settings(bundle=tmp_path, keys=keys_file(tmp_path))

    async def asked(headers: Mapping[str, str]) -> int:
        app = create_app(settings, fake_bundle())
        also_serve(app, settings)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return (await client.get("/replicas", headers=headers)).status_code

    assert await asked({}) == 401
    assert await asked(bearer(KEY[Scope.CLASSIFY])) == 403
    # Let in; but this is no replica that could know.
    assert await asked(bearer(KEY[Scope.METRICS])) == 500


def test_a_long_queue_brings_a_second_replica_and_both_serve(cluster: Cluster) -> None:
    assert len(replicas(cluster)) == 1
    with load(cluster, callers=16) as statuses:
        wait_for(lambda: len(replicas(cluster)) == 2, START_S)
        wait_for(lambda: all(inputs(one) > 20 * INPUTS for one in replicas(cluster)), 60)
    assert set(statuses) == {200}


def test_prometheus_finds_each_replica_and_their_sum_is_what_was_asked(
    cluster: Cluster, tmp_path: Path
) -> None:
    wait_for(lambda: len(replicas(cluster)) == 2, START_S)
    before = sum(inputs(one) for one in replicas(cluster))
    with httpx.Client(base_url=cluster.url) as client, ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, [client] * 40)) == {200}
    scrape = yaml.safe_load((ROOT / "deploy/ray/prometheus.yml").read_text())
    (job,) = scrape["scrape_configs"]
    (discovery,) = job["http_sd_configs"]
    discovery |= {"url": f"{cluster.url}/replicas", "refresh_interval": "1s"}
    scrape["global"]["scrape_interval"] = "1s"
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(scrape))
    port = free_port()
    arguments = [
        f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]

    def found(query: str) -> float:
        asked = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query})
        values = [float(one["value"][1]) for one in asked.json()["data"]["result"]]
        return values[0] if values else 0.0

    with running(program("prometheus"), *arguments, log=tmp_path / "prometheus.log"):
        wait_for(lambda: is_ready(f"http://127.0.0.1:{port}/-/ready"))
        wait_for(lambda: found('count(up{job="psim-gateway"} == 1)') == 2)
        wait_for(lambda: found("sum(psim_inputs_total)") == before + 40)


def test_a_replica_that_is_killed_under_load_loses_no_request_and_comes_back(
    cluster: Cluster,
) -> None:
    wait_for(lambda: len(replicas(cluster)) == 2, START_S)
    first = replicas(cluster)
    failed = failures(cluster, 500)
    with load(cluster) as statuses:
        wait_for(lambda: statuses[200] > 50)
        os.kill(_owner(first[0]), signal.SIGKILL)
        wait_for(
            lambda: [one for one in {*replicas(cluster)} - {*first} if inputs(one) > 5], START_S
        )
    assert statuses.keys() <= {200, 500, 503}
    errors = statuses.total() - statuses[200]
    assert errors <= 8, "more than what the replica held"
    # Not all of them, at times: Ray drops counts that its agent does not take within seconds.
    assert failures(cluster, 500) - failed <= statuses[500]


def test_an_error_that_the_proxy_answers_with_is_in_rays_own_metrics(cluster: Cluster) -> None:
    at_once = {"x-request-timeout-seconds": "0.0001"}
    with httpx.Client(base_url=cluster.url, headers=at_once, timeout=20) as client:
        assert ask(client) == 408
        # Asked again and again, since a count may be dropped.
        wait_for(lambda: ask(client) == 408 and failures(cluster, 408), 60)


def _owner(address: str) -> int:
    """Return the process that listens on an address of this machine."""
    port = int(address.rsplit(":", 1)[1])
    (owner,) = {
        one.pid
        for one in psutil.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port
    }
    assert owner
    return owner


def test_serve_takes_the_configuration_and_knows_every_field_of_it() -> None:
    config = yaml.safe_load(CONFIG.read_text())
    assert taken(config) == config
    (application,) = config["applications"]
    assert not unknown_variables(application["runtime_env"]["env_vars"])
    (deployment,) = application["deployments"]
    deployment["max_ongoing_request"] = 2048
    assert taken(config) != config


def taken(config: dict[str, Any]) -> dict[str, Any]:
    """Return what Serve's own schema reads of a configuration; what it does not know is gone."""
    read: dict[str, Any] = ServeDeploySchema.model_validate(config).model_dump(
        exclude_unset=True, mode="json"
    )
    return read
