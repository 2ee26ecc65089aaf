"""Metrics of the process: version, budget of the bundle, lag of the event loop."""

import asyncio
import time
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Histogram

from service.observability.event_loop import measured_event_loop
from tests.support.requests import client_of
from tests.support.waiting import until


async def test_the_version_and_the_budget_of_the_bundle_are_there() -> None:
    async with client_of() as client:
        lines = (await client.get("/metrics")).text.splitlines()
    assert f'psim_build_info{{version="{version("psim-gateway")}"}} 1.0' in lines
    assert 'psim_frr_budget{model="fake"} 0.01' in lines


async def test_no_series_says_when_a_counter_began() -> None:
    async with client_of() as client:
        for accepted in ("text/plain", "application/openmetrics-text"):
            text = (await client.get("/metrics", headers={"accept": accepted})).text
            assert "psim_requests_total" in text
            assert "_created" not in text


async def test_the_running_service_measures_its_event_loop() -> None:
    async def counted() -> bool:
        lines = (await client.get("/metrics")).text.splitlines()
        (count,) = [line for line in lines if line.startswith("psim_event_loop_lag_seconds_count")]
        return float(count.split()[1]) > 0

    before = asyncio.all_tasks()
    async with client_of() as client:
        await until(counted)
    assert asyncio.all_tasks() == before


async def test_what_blocks_the_event_loop_is_its_lag() -> None:
    registry = CollectorRegistry()
    async with measured_event_loop(Histogram("lag", "Lag", registry=registry)):
        await asyncio.sleep(0)  # the task begins to wait
        time.sleep(0.6)
        await until(lambda: registry.get_sample_value("lag_count"))
    assert (registry.get_sample_value("lag_sum") or 0) > 0.3
