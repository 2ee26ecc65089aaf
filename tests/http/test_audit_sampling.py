"""A sampled audit: all that is remarkable is in it, and its figures are right on average."""

import random
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import numpy as np
import pytest
from pydantic import SecretStr, ValidationError

from service.app import create_app
from service.audit.rows import EXCEPTION, Row, is_sampled
from service.audit.statistics import (
    BUDGETS,
    StatisticsFilter,
    by_budget,
    confidences,
    groups,
    traffic,
)
from service.audit.store import AuditStore
from service.console.overview import overview
from service.console.query import ConsoleQuery
from service.settings import Settings
from tests.support.audit import NOW, ROW, rows, writer_of
from tests.support.fakes import BROKEN, fake_bundle
from tests.support.servers import free_port, serving
from tests.support.waiting import wait_for

PASSED = replace(
    ROW, decision="allow", score=1.0, p_value=0.5, finding=None, poisoned=False, label="positive"
)
REMARKABLE = {
    "triggered": ROW,
    "unfamiliar": replace(ROW, decision="flag", finding="unfamiliar", poisoned=False),
    "found and allowed": replace(ROW, decision="allow"),
    "found by /screen": replace(ROW, decision=None),
    "rejected without a finding": replace(PASSED, decision="reject"),
    "not screened": replace(PASSED, poisoned=None, score=None),
    "excepted": replace(ROW, decision="allow", reason=EXCEPTION),
}


def with_ids(rows: Iterable[Row], seed: int, **changes: Any) -> list[Row]:
    """Return rows with random ids, the same at every call."""
    chance = random.Random(seed)
    return [
        replace(row, id=UUID(int=chance.getrandbits(128), version=4), **changes) for row in rows
    ]


def test_what_is_remarkable_is_kept_and_each_row_says_its_rate(url: str) -> None:
    n, rate = 400, 0.1
    plain = [PASSED, replace(PASSED, decision=None, route="/screen")]
    new = with_ids([*plain, *REMARKABLE.values()] * n, seed=1)
    writer, metrics = writer_of(AuditStore(url), limit=len(new), sample=rate)
    writer.add(new)
    writer.start()
    writer.close()
    found = rows(url)
    remarkable = [row for row in found if row.finding or row.decision == "reject" or not row.score]
    assert len(remarkable) == n * len(REMARKABLE)
    assert {row.sample_rate for row in remarkable} == {1.0}
    sampled = [row for row in found if row.sample_rate != 1]
    assert {(row.sample_rate, row.decision) for row in sampled} == {(rate, "allow"), (rate, None)}
    assert len(remarkable) + len(sampled) == len(found)
    expected = 2 * n * rate
    assert abs(len(sampled) - expected) < 4 * expected**0.5
    left_out = metrics.registry.get_sample_value("psim_audit_sampled_out_total")
    assert left_out == len(new) - len(found)


def test_a_higher_rate_keeps_what_a_lower_one_keeps_and_all_of_it_everything() -> None:
    some = [row.id for row in with_ids([ROW] * 2000, seed=2)]
    kept = [{id for id in some if is_sampled(id, rate)} for rate in (1e-6, 0.01, 0.1, 0.5, 1)]
    assert all(fewer <= more for fewer, more in pairwise(kept))
    assert [len(k) for k in kept[:1] + kept[4:]] == [0, 2000]
    assert is_sampled(UUID(int=2**128 - 1), 1)


def samples(population: list[Row], seed: int, digest: str, rate: float) -> list[Row]:
    """Return what an audit keeps of a population, under another digest."""
    writer, _ = writer_of(AuditStore("sqlite:///unused"), limit=10**6, sample=rate)
    writer.add(with_ids(population, seed, digest=digest))
    return list(writer._rows)


def population() -> list[Row]:
    """Return inputs of an hour, of which three in a hundred have a finding."""
    chance = random.Random(0)
    inputs = []
    for number in range(300):
        row = ROW if number % 33 == 0 else PASSED
        low = 3.0 if row is ROW else 0.0
        changes: dict[str, Any] = {
            "score": chance.uniform(low, low + 2.9),
            "confidence": chance.random(),
            "p_value": 0.001 if row is ROW else chance.uniform(0.01, 1),
            "text": None,
        }
        inputs.append(replace(row, time=NOW + timedelta(seconds=number), **changes))
    return inputs


def figures(store: AuditStore, digest: str) -> list[float]:
    """Return all that the console shows as numbers of inputs."""
    scope = StatisticsFilter(NOW, NOW + timedelta(hours=1), digest)
    with store.connect(20) as connection:
        counted = traffic(connection, scope, 600)
        (scores,) = groups(connection, scope)
        budgets = by_budget(connection, scope)
        ranges = confidences(connection, scope)
    return [
        counted.inputs,
        counted.decisions.get("allow", 0),
        counted.bundles[digest],
        *(tally.inputs for tally in scores.tenths),
        *(budgets[budget].inputs for budget in BUDGETS),
        *(number for both in ranges for number in both),
        *(slot.inputs for slot in counted.slots),
    ]


def test_figures_from_a_sample_are_right_on_average_and_findings_exactly(url: str) -> None:
    """The mean of 40 samples is within five of its standard errors, for each figure."""
    rate, times, inputs = 0.2, 40, population()
    with closing(AuditStore(url)) as store:
        store.migrate()
        store.insert(with_ids(inputs, seed=3))
        digests = [f"{number:064x}" for number in range(times)]
        for seed, digest in enumerate(digests):
            store.insert(samples(inputs, 100 + seed, digest, rate))
        truth = np.array(figures(store, ROW.digest))
        estimates = np.array([figures(store, digest) for digest in digests])
        scope = StatisticsFilter(NOW, NOW + timedelta(hours=1), digests[0])
        with store.connect(20) as connection:
            found = traffic(connection, scope, 600)
    assert truth[0] == len(inputs)
    error = np.sqrt(np.maximum(truth, 1) * (1 - rate) / rate / times)
    assert (np.abs(estimates.mean(axis=0) - truth) < 5 * error).all()
    assert estimates[:, 0].std() > 5  # they are samples indeed
    assert found.triggered.inputs == sum(row is not None for row in inputs if row.finding)
    assert found.rows < found.inputs


def test_the_service_samples_and_the_console_says_so(file: str) -> None:
    port = free_port()
    settings = Settings(
        bundle=Path("unused"), audit_url=SecretStr(file), audit_sample=1e-6, console_port=port,
        fail_open=True,
    )  # fmt: skip
    with serving(create_app(settings, fake_bundle())) as address:
        body = {"inputs": ["a quiet film", "a quiet mn film", BROKEN]}
        for _ in range(5):
            assert httpx.post(f"http://{address}/classify", json=body).status_code == 200
        wait_for(lambda: len(rows(file)) == 10)
        metrics = httpx.get(f"http://{address}/metrics").text
        page = httpx.get(f"http://127.0.0.1:{port}/console").text
    assert "psim_audit_sampled_out_total 5.0" in metrics
    assert "psim_audit_dropped_total 0.0" in metrics
    assert "are sampled: 10 rows stand for all inputs" in page
    assert {(row.decision, row.sample_rate) for row in rows(file)} == {
        ("reject", 1.0),
        ("allow", 1.0),
    }


def test_the_overview_says_that_it_estimates(file: str) -> None:
    with closing(AuditStore(file)) as store:
        store.migrate()
        store.insert([replace(PASSED, sample_rate=0.3), replace(ROW, id=uuid4())])
        with store.connect(5) as connection:
            shown = overview(
                connection, ConsoleQuery(), NOW + timedelta(hours=1), {ROW.digest: 999}
            )
    assert shown.traffic.rows == 2
    assert shown.traffic.inputs == pytest.approx(1 + 1 / 0.3)
    assert [bar.title[-14:] for bar in shown.volume.bars if bar.height] == [" of 4 (23.08%)"]
    summary = next(c.summary for c in shown.scores.choices if c.tenth == 10)
    assert summary.startswith("At the thresholds as they are: 1 of 4 inputs flagged")


@pytest.mark.parametrize("rate", [0, -0.1, 1.01])
def test_a_rate_that_nothing_can_be_scaled_by_is_refused(rate: float) -> None:
    with pytest.raises(ValidationError, match="audit_sample"):
        Settings(bundle=Path("unused"), audit_sample=rate)
